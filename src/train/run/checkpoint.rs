//! Everything that a run needs to go on, in one file that is whole or not there.
//!
//! ```text
//! "RUSHTRN1"                      8 bytes
//! length of the description      u64, little-endian
//! description                    JSON: the state, and of each array its name, kind and length
//! arrays                         little-endian, one behind the other
//! SHA-256 of all that            32 bytes
//! ```

use super::optimizer::{Optimizer, State};
use crate::train::params::Params;
use anyhow::{Context, Result, bail, ensure};
use rushlight_models::checkpoint::AtomicFile;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"RUSHTRN1";
const HASH: usize = 32;
/// Checkpoints that are kept.
const KEPT: usize = 2;
/// Longest description.
const MAX_DESCRIPTION: u64 = 256 << 20;
/// Bytes read or written at a time.
const PIECE: usize = 1 << 18;

/// Where a run stands, besides its numbers. Data order, dropout and initial values are functions of the seed and the
/// step, so that the step is the random state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done, skipped ones too.
    pub step: u64,
    /// Updates that the optimizer made.
    pub updates: u64,
    /// Those of each parameter, where some were idle.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uneven: Vec<u64>,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Seconds at work.
    pub seconds: f64,
    /// Steps skipped because of numbers that are none.
    pub skipped: u64,
    /// The step of the last evaluation.
    pub evaluated: u64,
    /// The lowest loss on the validation set, and the step it was found at.
    #[serde(with = "bits")]
    pub best: Option<(f64, u64)>,
    /// Evaluations since then.
    pub waited: u64,
    /// Whether it ended because the validation set was learnt no better.
    pub stopped: bool,
}

/// A number as its bits: what JSON says of one is not always read as the same.
mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(best: &Option<(f64, u64)>, to: S) -> Result<S::Ok, S::Error> {
        best.map(|(loss, step)| (loss.to_bits(), step)).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<(f64, u64)>, D::Error> {
        let best: Option<(u64, u64)> = Deserialize::deserialize(from)?;
        Ok(best.map(|(loss, step)| (f64::from_bits(loss), step)))
    }
}

#[derive(Serialize, Deserialize)]
struct Description {
    progress: Progress,
    arrays: Vec<Array>,
}

#[derive(Serialize, Deserialize)]
struct Array {
    name: String,
    kind: String,
    len: usize,
}

/// The arrays of a run with their names, borrowed one way or the other; without the optimizer those of the parameters.
macro_rules! arrays {
    ($name:ident, $numbers:ident, $iter:ident $(, $mut:tt)?) => {
        /// An array in memory.
        enum $numbers<'a> {
            Floats(&'a $($mut)? [f32]),
            Bytes(&'a $($mut)? [u8]),
        }

        impl $numbers<'_> {
            /// Kind, length and size.
            fn about(&self) -> (&'static str, usize, usize) {
                match self {
                    $numbers::Floats(x) => ("f32", x.len(), 4 * x.len()),
                    $numbers::Bytes(x) => ("u8", x.len(), x.len()),
                }
            }
        }

        fn $name<'a>(params: &'a $($mut)? Params, optimizer: Option<&'a $($mut)? Optimizer>) -> Vec<(String, $numbers<'a>)> {
            use $numbers::{Bytes, Floats};
            let names: Vec<String> = params.list.iter().map(|p| p.name.clone()).collect();
            let values = params.list.$iter().map(|p| (format!("param {}", p.name), Floats(& $($mut)? p.values)));
            let mut all: Vec<_> = values.collect();
            for (name, state) in names.iter().zip(optimizer.into_iter().flat_map(|o| o.states.$iter())) {
                let mut put = |what: &str, numbers| all.push((format!("{what} {name}"), numbers));
                match state {
                    State::Adam { first, second } => {
                        put("first", Floats(first));
                        put("second", Floats(second));
                    }
                    State::Adam8 { first, second, first_scales, second_scales } => {
                        put("first", Bytes(first));
                        put("second", Bytes(second));
                        put("first scales", Floats(first_scales));
                        put("second scales", Floats(second_scales));
                    }
                    State::Sgd { momentum } => put("momentum", Floats(momentum)),
                }
            }
            all
        }
    };
}

arrays!(arrays, Numbers, iter);
arrays!(arrays_mut, NumbersMut, iter_mut, mut);

/// Writes everything to `path`; what was there stays until the new file is whole.
pub fn write(path: &Path, progress: &Progress, params: &Params, optimizer: Option<&Optimizer>) -> Result<()> {
    let said = || path.display().to_string();
    let all = arrays(params, optimizer);
    let described = all.iter().map(|(name, numbers)| {
        let (kind, len, _) = numbers.about();
        Array { name: name.clone(), kind: kind.into(), len }
    });
    let description = serde_json::to_vec(&Description { progress: progress.clone(), arrays: described.collect() })?;
    let mut file = AtomicFile::create(path)?;
    let mut hash = Sha256::new();
    let mut put = |bytes: &[u8]| -> Result<()> {
        hash.update(bytes);
        file.write_all(bytes).with_context(said)
    };
    put(MAGIC)?;
    put(&(description.len() as u64).to_le_bytes())?;
    put(&description)?;
    let mut buffer = Vec::new();
    for (_, numbers) in &all {
        match numbers {
            Numbers::Bytes(bytes) => put(bytes)?,
            Numbers::Floats(values) => {
                for part in values.chunks(PIECE / 4) {
                    buffer.clear();
                    part.iter().for_each(|x| buffer.extend_from_slice(&x.to_le_bytes()));
                    put(&buffer)?;
                }
            }
        }
    }
    let hash = hash.finalize();
    file.write_all(&hash).with_context(said)?;
    Ok(file.commit()?)
}

/// What the file says of the run, if it is whole.
pub fn peek(path: &Path) -> Result<Progress> {
    Ok(open(path)?.0.progress)
}

/// Why a checkpoint does not fit.
const OTHERS: &str = "what is trained (method, rank, targets, optimizer) cannot change in a run that has begun: give what it \
                      had, or another folder with -o";

/// Takes everything from the file `path`.
pub fn read(path: &Path, params: &mut Params, mut optimizer: Option<&mut Optimizer>) -> Result<Progress> {
    let said = || path.display().to_string();
    let (description, mut file, mut left) = open(path)?;
    let mut all = arrays_mut(params, optimizer.as_deref_mut());
    ensure!(
        description.arrays.len() >= all.len(),
        "{}: it holds {} arrays where this run has {}; {OTHERS}",
        path.display(),
        description.arrays.len(),
        all.len()
    );
    let mut buffer = Vec::new();
    for ((name, numbers), there) in all.iter_mut().zip(&description.arrays) {
        let (kind, len, size) = numbers.about();
        if (&*name, kind, len) != (&there.name, &there.kind, there.len) {
            bail!(
                "{}: it holds '{}' ({} of {}) where this run has '{name}' ({len} of {kind}); {OTHERS}",
                path.display(),
                there.name,
                there.len,
                there.kind
            );
        }
        left = left.checked_sub(size as u64).with_context(|| format!("{}: it ends too early", path.display()))?;
        match numbers {
            NumbersMut::Bytes(out) => file.read_exact(out).with_context(said)?,
            NumbersMut::Floats(out) => {
                for out in out.chunks_mut(PIECE / 4) {
                    buffer.resize(4 * out.len(), 0);
                    file.read_exact(&mut buffer).with_context(said)?;
                    let values = buffer.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                    out.iter_mut().zip(values).for_each(|(x, y)| *x = y);
                }
            }
        }
    }
    drop(all);
    if let Some(optimizer) = optimizer {
        let Progress { updates, uneven, .. } = &description.progress;
        ensure!(
            optimizer.resume(*updates, uneven),
            "{}: it counts the steps of other parameters; {OTHERS}",
            path.display()
        );
    }
    Ok(description.progress)
}

/// The description, and the file where its arrays begin, with how many bytes of them it has.
fn open(path: &Path) -> Result<(Description, File, u64)> {
    let damaged = || format!("{} is damaged", path.display());
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let body = file.metadata().ok().and_then(|about| about.len().checked_sub(HASH as u64)).with_context(damaged)?;
    let mut hash = Sha256::new();
    let mut start = [0; 16];
    file.read_exact(&mut start).with_context(damaged)?;
    hash.update(start);
    let [magic, length] = [&start[..8], &start[8..]];
    let length = length.try_into().map(u64::from_le_bytes).ok().filter(|_| magic == MAGIC);
    let length = length.filter(|&n| n <= MAX_DESCRIPTION && n + 16 <= body).with_context(damaged)?;
    let mut description = vec![0; length as usize];
    file.read_exact(&mut description).with_context(damaged)?;
    hash.update(&description);
    // Read, not mapped: the pages of a map would count as memory of the run.
    let (mut buffer, arrays) = (vec![0; PIECE], body - 16 - length);
    let mut left = arrays;
    while left > 0 {
        let piece = &mut buffer[..left.min(PIECE as u64) as usize];
        file.read_exact(piece).with_context(damaged)?;
        hash.update(&*piece);
        left -= piece.len() as u64;
    }
    let mut there = [0; HASH];
    file.read_exact(&mut there).with_context(damaged)?;
    ensure!(hash.finalize()[..] == there, damaged());
    let description = serde_json::from_slice(&description).with_context(damaged)?;
    file.seek(SeekFrom::Start(16 + length)).with_context(damaged)?;
    Ok((description, file, arrays))
}

/// The checkpoints of a run, in a folder of their own.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// Those in `dir`, which is made if it is not there.
    pub fn open(dir: &Path) -> Result<Checkpoints> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        Ok(Checkpoints { dir: dir.to_owned() })
    }

    /// Where the checkpoint after `step` steps is.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:09}.ckpt"))
    }

    /// Where the parameters that were best after `step` steps are.
    pub fn best(&self, step: u64) -> PathBuf {
        self.dir.join(format!("best-{step:09}.ckpt"))
    }

    /// The steps of the files called `kind-STEP.ckpt`, in ascending order.
    fn steps(&self, kind: &str) -> Result<Vec<u64>> {
        let mut steps = Vec::new();
        for entry in std::fs::read_dir(&self.dir).with_context(|| self.dir.display().to_string())? {
            let name = entry.with_context(|| self.dir.display().to_string())?.file_name();
            let name = name.to_string_lossy();
            let step: Option<u64> =
                name.strip_prefix(kind).and_then(|n| n.strip_prefix('-')?.strip_suffix(".ckpt")?.parse().ok());
            steps.extend(step);
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.steps("step")?.is_empty())
    }

    /// The step of the newest, if there is any.
    pub fn newest(&self) -> Option<u64> {
        self.steps("step").ok()?.pop()
    }

    /// Removes all of them: another run begins.
    pub fn clear(&self) -> Result<()> {
        for (kind, step) in ["step", "best"].map(|k| (k, self.steps(k))) {
            for step in step? {
                std::fs::remove_file(self.dir.join(format!("{kind}-{step:09}.ckpt")))?;
            }
        }
        Ok(())
    }

    /// Saves the state after `progress.step` steps, and removes those older than the last two.
    pub fn save(&self, progress: &Progress, params: &Params, optimizer: &Optimizer) -> Result<()> {
        write(&self.path(progress.step), progress, params, Some(optimizer))?;
        let steps = self.steps("step")?;
        let (old, kept) = steps.split_at(steps.len().saturating_sub(KEPT));
        for step in old {
            let path = self.path(*step);
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        // What no checkpoint calls its best goes too.
        let best = self.steps("best")?;
        if best.is_empty() {
            return Ok(());
        }
        let named: Vec<u64> = kept.iter().filter_map(|s| Some(peek(&self.path(*s)).ok()?.best?.1)).collect();
        for step in best.into_iter().filter(|step| !named.contains(step)) {
            let path = self.best(step);
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// The newest checkpoint that is whole; what is wrong with newer ones goes to `note`, and they are removed.
    pub fn load(
        &self,
        params: &mut Params,
        optimizer: &mut Optimizer,
        note: &mut dyn FnMut(String),
    ) -> Result<Option<Progress>> {
        let steps = self.steps("step")?;
        for (i, step) in steps.iter().enumerate().rev() {
            let path = self.path(*step);
            match peek(&path) {
                Ok(_) => return read(&path, params, Some(optimizer)).map(Some),
                Err(e) if i > 0 => {
                    note(format!("{e:#}: going on from the one before it"));
                    std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
                }
                Err(e) => {
                    let again = "there is no whole checkpoint left; delete the folder to start anew";
                    return Err(e.context(again));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::params::Gradients;
    use crate::train::params::Param;
    use crate::train::run::optimizer::Rule;
    use rushlight_quant::buffer::Aligned;

    fn params(fill: f32) -> Params {
        let param = |name: &str, len: usize| {
            let mut values = Aligned::zeroed(len);
            values.iter_mut().enumerate().for_each(|(i, v)| *v = fill + i as f32);
            Param { name: name.into(), shape: vec![len], values, rate: 1.0, decay: true, idles: false }
        };
        Params { list: vec![param("a", 300), param("b", 5)] }
    }

    fn run(rule: Rule) -> (Params, Optimizer) {
        let mut p = params(0.5);
        let mut optimizer = Optimizer::new(rule, &p, 0.0, 1);
        let g = params(0.1).list.into_iter().map(|p| p.values).collect();
        optimizer.step(&mut p, &g, 1.0, 0.1);
        (p, optimizer)
    }

    #[test]
    fn all_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(&dir.path().join("c")).unwrap();
        for rule in [Rule::Adamw, Rule::Adamw8bit, Rule::Sgd] {
            checkpoints.clear().unwrap();
            let (mut p, mut o) = run(rule);
            // One of the parameters idles for a step.
            let mut g: Gradients = params(0.3).list.into_iter().map(|p| p.values).collect();
            p.list[0].idles = true;
            o.step(&mut p, &g, 1.0, 0.1);
            let uneven = o.uneven();
            assert_eq!((uneven[0], uneven[1]), (1, 2));
            let progress = Progress { step: 7, updates: 2, uneven, best: Some((0.1 + 0.2, 3)), ..Progress::default() };
            checkpoints.save(&progress, &p, &o).unwrap();
            let mut back = params(0.0);
            back.list[0].idles = true;
            let mut optimizer = Optimizer::new(rule, &back, 0.0, 1);
            let read = checkpoints.load(&mut back, &mut optimizer, &mut |n| panic!("{n}")).unwrap().unwrap();
            assert_eq!(read, progress);
            // Going on from either gives the same.
            g.meet(0);
            o.step(&mut p, &g, 1.0, 0.1);
            optimizer.step(&mut back, &g, 1.0, 0.1);
            let bits =
                |p: &Params| p.list.iter().flat_map(|p| p.values.iter().map(|v| v.to_bits())).collect::<Vec<_>>();
            assert_eq!(bits(&p), bits(&back));
        }
        // Another optimizer's state does not fit.
        let mut p = params(0.0);
        let mut other = Optimizer::new(Rule::Adamw, &p, 0.0, 1);
        let error = checkpoints.load(&mut p, &mut other, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("4 arrays where this run has 6"), "{error}");
    }

    #[test]
    fn the_last_two_are_kept_and_damage_falls_back() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        let (mut p, mut o) = run(Rule::Adamw);
        for step in [10, 20, 30] {
            let best = Some((1.0, step - 5));
            write(&checkpoints.best(step - 5), &Progress::default(), &p, None).unwrap();
            checkpoints.save(&Progress { step, best, ..Progress::default() }, &p, &o).unwrap();
        }
        assert_eq!(checkpoints.steps("step").unwrap(), [20, 30]);
        assert_eq!(checkpoints.steps("best").unwrap(), [15, 25]);
        let whole = std::fs::read(checkpoints.path(30)).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        for damaged in [&whole[..whole.len() - 1], &whole[..10], &[], &flipped[..]] {
            std::fs::write(checkpoints.path(30), damaged).unwrap();
            let mut notes = Vec::new();
            let progress = checkpoints.load(&mut p, &mut o, &mut |n| notes.push(n)).unwrap().unwrap();
            assert_eq!(progress.step, 20);
            assert!(notes[0].contains("step-000000030.ckpt is damaged"), "{notes:?}");
        }
        std::fs::write(checkpoints.path(20), &whole[..99]).unwrap();
        let error = checkpoints.load(&mut p, &mut o, &mut |_| {}).unwrap_err();
        assert!(format!("{error:#}").contains("no whole checkpoint left"), "{error:#}");
        checkpoints.clear().unwrap();
        assert!(checkpoints.is_empty().unwrap());
    }
}
