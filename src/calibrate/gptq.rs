//! GPTQ on a whole model: from a plan to finished tensors in the scratch folder.

use super::groups::Groups;
use super::imatrix::gguf_name;
use super::layers::{Job, Run, State, Target};
use super::text::{self, Own};
use crate::quantize::plan::Plan;
use crate::quantize::scratch::{Fingerprint, Scratch};
use anyhow::{Result, bail};
use rushlight_models::checkpoint::export::Original;
use rushlight_models::checkpoint::{Bytes, Checkpoint};
use rushlight_models::convert::Source;
use rushlight_models::families::{Naming, Role};
use rushlight_models::model::{Linear, Model};
use rushlight_models::tokenizer::Tokenizer;
use rushlight_quant::Cpu;
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::{Codes, GptqOptions, Grid, gptq};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

/// Columns of a matrix beyond which GPTQ is run once.
const WIDE: usize = 4096;

/// What to calibrate on, and how to go about it.
pub struct Options<'a> {
    /// A text and its name, instead of the built-in one with texts that the model writes.
    pub text: Option<(&'a str, &'a str)>,
    /// Threads; the physical cores where `None`.
    pub threads: Option<usize>,
    /// Bytes of memory that may be used beside what is mapped from files.
    pub memory: u64,
    /// Set from outside to stop before the next chunk.
    pub stop: &'a AtomicBool,
    /// GPTQ's own settings.
    pub gptq: GptqOptions,
}

/// How far it has come.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// The model writes texts: steps done, and in all.
    Writing(usize, usize),
    /// Layers are being quantized.
    Layers(State),
}

impl Options<'_> {
    /// Fails if the text is too short, before anything is begun.
    pub fn check(&self, tokenizer: &Tokenizer) -> Result<()> {
        self.text.map_or(Ok(()), |(text, name)| text::sequences(tokenizer, text, name, text::LENGTH).map(drop))
    }

    /// `fingerprint` with what decides the result here.
    pub fn fingerprint(&self, fingerprint: Fingerprint) -> Fingerprint {
        let text = self.text.map_or(text::BUILT_IN, |(text, _)| text);
        let hash: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        let own = if self.text.is_none() { " and the model's own" } else { "" };
        let isa = rushlight_quant::Isa::from_env().map_or(String::new(), |isa| isa.name().into());
        // Activations are rounded differently with each instruction set.
        fingerprint
            .with("calibration", format!("{hash}{own}"))
            .with("gptq", format!("beside the original, {:?}", self.gptq))
            .with("instructions", isa)
    }
}

/// Quantizes the linear layers of `checkpoint` to what `plan` has for them, and leaves them in `scratch`, from where
/// [`crate::quantize::write::write`] takes them; what is there already is kept. Tensors that are not for GPTQ (the
/// embedding, a head that shares its weights, floating point, codes that are kept) are left to the writer.
pub fn quantize(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    plan: &Plan,
    scratch: &Scratch,
    options: &Options<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let model = Model::load(checkpoint)?;
    let targets = targets(&model, plan);
    if targets.is_empty() {
        bail!("{}: nothing here is for GPTQ: use --method rtn", checkpoint.path().display());
    }
    run(model, tokenizer, &targets, &|format| Grid::Blocks(format), scratch, options, progress)
}

/// A linear layer that is to be one of a Hugging Face directory.
#[derive(Clone, Debug)]
pub struct Named {
    /// Its id in the model.
    pub id: usize,
    /// The name of its tensor in the directory, without `.weight`.
    pub name: String,
    /// Row `i` of the tensor is row `rows[i]` of the model's; as they stand where `None`.
    pub rows: Option<Vec<u32>>,
}

/// Quantizes `layers` to integer codes in `groups`, and leaves them in `scratch`, from where [`Groups::layer`] takes them.
pub fn quantize_groups(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    layers: &[Named],
    groups: Groups,
    scratch: &Scratch,
    options: &Options<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let model = Model::load(checkpoint)?;
    let target = |l: &Named| {
        let format = model.linears().find(|linear| linear.id == l.id)?.weight.format();
        Some((l.id, Target { name: l.name.clone(), format, groups: Some(groups), rows: l.rows.clone() }))
    };
    let targets = layers.iter().filter_map(target).collect();
    let Groups { bits, group, symmetric } = groups;
    let grid = Grid::Group { bits, group, symmetric };
    run(model, tokenizer, &targets, &|_| grid, scratch, options, progress)
}

/// The linear layers that are tensors of their own in `original`; the head, which is usually left as it is, is not among
/// them.
pub fn named_layers(original: &Original<'_>, model: &Model) -> Vec<Named> {
    let name = |l: &Linear| {
        let name = model.family.name(Naming::HuggingFace, l.role, l.layer)?;
        let tensor = format!("{name}.weight");
        let fits = original.find(&tensor)?.shape == [l.weight.rows(), l.weight.cols()];
        fits.then(|| Named { id: l.id, rows: original.rows(&tensor).map(<[u32]>::to_vec), name })
    };
    model.linears().filter(|l| l.role != Role::Head).filter_map(name).collect()
}

/// Has GPTQ make `targets` on the grid that `grid` has for a target's format.
fn run(
    model: Model,
    tokenizer: &Tokenizer,
    targets: &HashMap<usize, Target>,
    grid: &dyn Fn(Format) -> Grid,
    scratch: &Scratch,
    options: &Options<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let sequences = sequences(&model, tokenizer, scratch, options, progress)?;
    let run = Run {
        model,
        threads: options.threads,
        sequences: &sequences,
        targets,
        scratch,
        memory: options.memory,
        stop: options.stop,
    };
    // A factor takes time by the third power of the columns: one order of visits has to do.
    let variants = options.gptq.variants.iter().take(1).copied().collect();
    let short = GptqOptions { variants, ..options.gptq.clone() };
    let mut one = |cpu: &Cpu, job: &Job<'_>| {
        let (name, format) = (&job.target.name, job.target.format);
        let options = if job.linear.weight.cols() > WIDE { &short } else { &options.gptq };
        let done = gptq(cpu, job.weights, job.rows.len(), job.seen, job.held_out, grid(format), options)
            .map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
        let share = 100.0 * done.objective / done.rounded.max(f64::MIN_POSITIVE);
        tracing::info!("{name}: {share:.1} % of the error of rounding; {:?}, {} refined", done.methods, done.refined);
        match done.codes {
            Codes::Blocks(packed) => Ok(packed),
            codes @ Codes::Groups { .. } => match &job.target.groups {
                Some(groups) => groups.records(name, &codes, scratch),
                None => Err(anyhow::anyhow!("{name}: it has no place for groups")),
            },
        }
    };
    run.run(&mut one, &mut |state| progress(Progress::Layers(state)))
}

/// What `plan` has for each linear layer of `model` that is for GPTQ.
pub fn targets(model: &Model, plan: &Plan) -> HashMap<usize, Target> {
    let planned: HashMap<&str, _> = plan.tensors.iter().map(|t| (t.source.name.as_str(), t)).collect();
    let linears = model.linears().filter(|l| !(model.spec.tied_head && l.id == model.head.id));
    let target = |linear| {
        let name = gguf_name(model, linear)?;
        let planned = planned.get(name.as_str())?;
        let fits = planned.source.shape == [linear.weight.rows(), linear.weight.cols()];
        if !fits || planned.is_exact() || planned.format.levels().is_none() {
            return None;
        }
        let rows = match &planned.source.source {
            Source::Tensor { rows, .. } => rows.clone(),
            Source::Parts { .. } | Source::Data(_) => return None,
        };
        Some((linear.id, Target { name, format: planned.format, groups: None, rows }))
    };
    linears.filter_map(target).collect()
}

/// The sequences to calibrate on: as an earlier run left them, or new.
fn sequences(
    model: &Model,
    tokenizer: &Tokenizer,
    scratch: &Scratch,
    options: &Options<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Vec<u32>>> {
    const STATE: &str = "sequences";
    if let Some(kept) = scratch.get_state(STATE)? {
        return Ok(unpack(&kept));
    }
    let length = text::length(model);
    let sequences = match options.text {
        Some((text, name)) => text::sequences(tokenizer, text, name, length)?,
        None => {
            let theirs = text::sequences(tokenizer, text::BUILT_IN, "the built-in text", length)?;
            let own = Own::for_model(model);
            let mut write = |own: Own| {
                text::own(model, tokenizer, options.threads, options.memory / 2, own, &mut |step| {
                    progress(Progress::Writing(step, own.steps));
                })
            };
            let mut ours = write(own)?;
            let count = theirs.len();
            let theirs = text::familiar(model, options.threads, theirs, &ours)?;
            if 2 * theirs.len() < count {
                // What is left out of it makes room for more of the model's own.
                ours.extend(write(Own { seed: own.seed + 1, ..own })?);
            }
            text::interleave(theirs, ours)
        }
    };
    scratch.put_state(STATE, &pack(&sequences))?;
    Ok(sequences)
}

/// Sequences as bytes: for each its length and its tokens.
fn pack(sequences: &[Vec<u32>]) -> Vec<u8> {
    let words = sequences.iter().flat_map(|s| std::iter::once(s.len() as u32).chain(s.iter().copied()));
    words.flat_map(u32::to_le_bytes).collect()
}

fn unpack(bytes: &Bytes) -> Vec<Vec<u32>> {
    let mut words = bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
    let mut sequences = Vec::new();
    while let Some(len) = words.next() {
        sequences.push(words.by_ref().take(len as usize).collect());
    }
    sequences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_as_bytes_and_back() {
        let sequences = vec![vec![1, 2, 3], vec![], vec![u32::MAX]];
        assert_eq!(unpack(&Bytes::new(pack(&sequences))), sequences);
    }
}
