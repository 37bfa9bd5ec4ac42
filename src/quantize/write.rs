//! Writes a planned file as a stream: threads take the next rows of the source, encode them and pass them on in order,
//! so that nothing larger than a few pieces is ever in memory. What a row becomes depends on that row alone: the file
//! is the same with any number of threads.

use super::plan::{Plan, Planned};
use super::scratch::Scratch;
use anyhow::{Context, Result, anyhow, bail};
use rushlight_models::checkpoint::{Bytes, Checkpoint, TensorInfo, gguf};
use rushlight_models::convert::Source;
use rushlight_models::{Error, is_full};
use rushlight_quant::formats::{Format, exact};
use rushlight_quant::quantize::encode;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc};

/// Weights in a piece, where rows are not longer: 1 MB as f32.
const PIECE: usize = 1 << 18;
/// The largest number of an f16, in which most formats keep their scales.
const MAX_F16: f32 = 65504.0;

/// How to write.
pub struct Options<'a> {
    /// Threads that encode.
    pub threads: usize,
    /// Bytes of memory that may be used.
    pub memory: u64,
    /// Set from outside to stop at the next piece.
    pub stop: &'a AtomicBool,
    /// Where tensors may lie that a longer method has finished; they are copied from there.
    pub scratch: Option<&'a Scratch>,
}

/// [`Options::stop`] was set: the file was not written.
#[derive(Debug)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped before the end: nothing was written")
    }
}

impl std::error::Error for Stopped {}

/// What adapters change in the weights, and what of that is written: steps that are coarser than the change round it away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    /// The squares of the changes, summed.
    asked: f64,
    /// Their products with what the written weights differ by.
    made: f64,
}

impl Change {
    /// The part of the change that is written, some 1 where nothing is lost; `None` where nothing was to be changed.
    pub fn kept(&self) -> Option<f64> {
        (self.asked > 0.0).then(|| self.made / self.asked)
    }

    /// Of weights that were `before` and should be `after`.
    fn new(before: &[f32], after: &[f32], written: &[f32]) -> Change {
        let mut change = Change::default();
        for ((before, after), written) in before.iter().zip(after).zip(written) {
            let asked = f64::from(*after) - f64::from(*before);
            change.asked += asked * asked;
            change.made += asked * (f64::from(*written) - f64::from(*before));
        }
        change
    }
}

/// Writes `plan`, made for `checkpoint`, as the GGUF file `output`, which appears when it is whole. `progress` is told
/// how many bytes of the source are done.
pub fn write(
    plan: &Plan,
    checkpoint: &Checkpoint,
    output: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Change> {
    let infos: Vec<TensorInfo> = plan
        .tensors
        .iter()
        .map(|t| TensorInfo { name: t.source.name.clone(), format: t.format, shape: t.source.shape.clone() })
        .collect();
    let mut writer = gguf::Writer::create(output, &plan.metadata, &infos)?;
    let change = stream(plan, checkpoint, output, options, progress, &mut |name, bytes| writer.write(name, bytes))?;
    writer.finish().map_err(|e| explain(e, output, plan))?;
    Ok(change)
}

/// Encodes the tensors of `plan` and gives their bytes to `write`, in order, each with its tensor's name. `output`, what is
/// written in the end, is for messages.
pub fn stream(
    plan: &Plan,
    checkpoint: &Checkpoint,
    output: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64),
    write: &mut dyn FnMut(&str, &[u8]) -> rushlight_models::Result<()>,
) -> Result<Change> {
    let threads = options.threads.max(1);
    let window = threads * 4;
    let piece = piece_weights(plan, threads, window, options.memory)?;
    let line = Line {
        plan,
        checkpoint,
        scratch: options.scratch,
        piece,
        window,
        place: Mutex::new(Place::default()),
        moved: Condvar::new(),
    };
    std::thread::scope(|scope| -> Result<Change> {
        // However this ends, the threads end too.
        let _ending = Ending(&line);
        let (sender, results) = mpsc::channel();
        for i in 0..threads {
            let (line, sender) = (&line, sender.clone());
            let work = move || {
                let _ending = Ending(line);
                line.work(&sender);
            };
            std::thread::Builder::new().name(format!("quantize-{i}")).spawn_scoped(scope, work)?;
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let (mut due, mut done) = (0, 0);
        let mut total = Change::default();
        for result in results {
            if options.stop.load(Ordering::Relaxed) {
                return Err(Stopped.into());
            }
            let Encoded { number, piece, bytes, change } = result?;
            early.insert(number, (piece, bytes, change));
            while let Some((piece, bytes, change)) = early.remove(&due) {
                // In the order of the file, so that the last digit does not depend on threads.
                total.asked += change.asked;
                total.made += change.made;
                let tensor = &plan.tensors[piece.tensor];
                write(&tensor.source.name, &bytes).map_err(|e| explain(e, output, plan))?;
                done += piece.source_bytes;
                if piece.rows.end == tensor.rows() {
                    line.let_go(tensor);
                }
                due += 1;
                line.written(bytes);
            }
            progress(done);
        }
        Ok(total)
    })
}

/// How many weights a piece may have.
fn piece_weights(plan: &Plan, threads: usize, window: usize, memory: u64) -> Result<usize> {
    // Each thread holds a piece as f32, and at most `window` pieces are encoded and wait to be written, as 4 bytes each.
    let each = 4 * (threads + window) as u64;
    let allowed = usize::try_from(memory / each).unwrap_or(usize::MAX).min(PIECE);
    let longest = plan.tensors.iter().max_by_key(|t| t.cols());
    if let Some(tensor) = longest.filter(|t| t.cols() > allowed && t.cols() as u64 * each > memory) {
        let needed = megabytes(tensor.cols() as u64 * each);
        bail!(
            "the rows of {} need {needed} of memory: allow more with --memory, or fewer --threads",
            tensor.source.name
        );
    }
    Ok(allowed)
}

/// What an error in writing means to a person.
fn explain(error: Error, output: &Path, plan: &Plan) -> anyhow::Error {
    match &error {
        Error::Io { source, .. } if is_full(source) => anyhow!(
            "{}: no space left for the file, which takes {}: free some space and give the same command again, or write elsewhere",
            output.display(),
            megabytes(plan.bytes().0)
        ),
        _ => error.into(),
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{} MB", bytes.div_ceil(1_000_000))
}

/// Rows of a tensor, to be encoded together.
struct Piece {
    tensor: usize,
    rows: Range<usize>,
    /// The bytes of the source that this piece stands for.
    source_bytes: u64,
}

/// A piece as it goes into the file.
struct Encoded {
    /// Pieces are written in the order of their numbers, from 0.
    number: usize,
    piece: Piece,
    bytes: Vec<u8>,
    change: Change,
}

/// Where the threads are in the plan.
#[derive(Default)]
struct Place {
    tensor: usize,
    row: usize,
    /// The packed rows of the tensor, and whether a longer method has finished them.
    data: Option<(Bytes, bool)>,
    /// Pieces handed out, and written.
    handed: usize,
    written: usize,
    stopped: bool,
    /// Buffers that were written and can be filled again.
    spare: Vec<Vec<u8>>,
}

/// The assembly line that threads work at.
struct Line<'a> {
    plan: &'a Plan,
    checkpoint: &'a Checkpoint,
    scratch: Option<&'a Scratch>,
    piece: usize,
    window: usize,
    place: Mutex<Place>,
    moved: Condvar,
}

/// Stops the line when dropped.
struct Ending<'a, 'b>(&'a Line<'b>);

impl Drop for Ending<'_, '_> {
    fn drop(&mut self) {
        // A thread that has merely run out of work stops nothing: the line is at its end anyway.
        self.0.place().stopped = true;
        self.0.moved.notify_all();
    }
}

/// What a thread is to do.
struct Task {
    number: usize,
    piece: Piece,
    source: Bytes,
    finished: bool,
    buffer: Vec<u8>,
}

impl Line<'_> {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, results: &mpsc::Sender<Result<Encoded>>) {
        let mut weights = Vec::new();
        loop {
            let encoded = match self.next() {
                Ok(Some(task)) => self.encode(task, &mut weights),
                Ok(None) => return,
                Err(e) => Err(e),
            };
            let failed = encoded.is_err();
            if results.send(encoded).is_err() || failed {
                return;
            }
        }
    }

    /// The next piece, once there is room for it; `None` at the end.
    fn next(&self) -> Result<Option<Task>> {
        let mut place = self.place();
        while !place.stopped && place.handed >= place.written + self.window {
            place = self.moved.wait(place).unwrap_or_else(PoisonError::into_inner);
        }
        let Some(tensor) = self.plan.tensors.get(place.tensor).filter(|_| !place.stopped) else { return Ok(None) };
        let (data, finished) = match &place.data {
            Some((data, finished)) => (data.clone(), *finished),
            None => {
                let (data, finished) = self.open(tensor)?;
                place.data = Some((data.clone(), finished));
                (data, finished)
            }
        };
        let (rows, of_matrix) = (tensor.rows(), tensor.rows_of_matrix());
        let start = place.row;
        // A piece stays within a matrix of a stack, since each has its own importance.
        let end = (start + (self.piece / tensor.cols().max(1)).max(1)).min((start / of_matrix + 1) * of_matrix);
        let row_bytes = data.len() / rows.max(1);
        let Some(source) = data.slice(start * row_bytes..end * row_bytes) else {
            bail!("tensor '{}' has fewer rows than its shape says", tensor.source.name);
        };
        let source_row = tensor.bytes().1 / rows.max(1) as u64;
        let piece = Piece { tensor: place.tensor, rows: start..end, source_bytes: source_row * (end - start) as u64 };
        let number = place.handed;
        place.handed += 1;
        place.row = end;
        if end == rows {
            (place.tensor, place.row, place.data) = (place.tensor + 1, 0, None);
        }
        let buffer = place.spare.pop().unwrap_or_default();
        Ok(Some(Task { number, piece, source, finished, buffer }))
    }

    /// The packed rows of `tensor`: as a longer method has finished them, or of the source.
    fn open(&self, tensor: &Planned) -> Result<(Bytes, bool)> {
        let name = &tensor.source.name;
        if let Some(scratch) = self.scratch
            && let Some(data) = scratch.get(name)?
        {
            if data.len() as u64 != tensor.bytes().0 {
                bail!("{}: '{name}' has another size than it should: delete the folder", scratch.dir().display());
            }
            return Ok((data, true));
        }
        Ok((tensor.source.data(self.checkpoint)?, false))
    }

    fn encode(&self, task: Task, weights: &mut Vec<f32>) -> Result<Encoded> {
        let Task { number, piece, source, finished, buffer: mut bytes } = task;
        let tensor = &self.plan.tensors[piece.tensor];
        let mut change = Change::default();
        bytes.clear();
        if finished {
            bytes.extend_from_slice(&source);
        } else {
            let (name, cols) = (&tensor.source.name, tensor.cols());
            weights.resize(piece.rows.len() * cols, 0.0);
            tensor.source.format.decode(&source, weights);
            if let Some(order) = &tensor.order {
                restore(order, weights);
            }
            let before = tensor.fold.as_ref().map(|fold| {
                let before = weights.clone();
                fold.apply(piece.rows.clone(), weights);
                before
            });
            // Without branches, so that it takes no time.
            if !weights.iter().fold(true, |all, w| all & w.is_finite()) {
                return Err(not_finite(tensor, &piece, weights).context(self.checkpoint.path().display().to_string()));
            }
            let row_bytes = tensor.format.row_bytes(cols).with_context(|| format!("'{name}' has no whole blocks"))?;
            bytes.resize(row_bytes * piece.rows.len(), 0);
            let kept = if tensor.format == tensor.source.format && tensor.format.is_float() && tensor.fold.is_none() {
                bytes.copy_from_slice(&source);
                true
            } else {
                tensor.is_exact() && exact::convert(tensor.source.format, tensor.format, &source, &mut bytes)
            };
            if !kept {
                let matrix = piece.rows.start / tensor.rows_of_matrix();
                let importance = tensor.importance.as_ref().map(|all| &all[matrix * cols..(matrix + 1) * cols]);
                encode(tensor.format, weights, cols, importance, &mut bytes);
                check_range(tensor, &piece, weights, &bytes)?;
            }
            if let Some(before) = before {
                let mut written = vec![0.0; weights.len()];
                tensor.format.decode(&bytes, &mut written);
                change = Change::new(&before, weights, &written);
            }
        }
        source.release();
        Ok(Encoded { number, piece, bytes, change })
    }

    /// A tensor is written: the memory that its source takes goes back.
    fn let_go(&self, tensor: &Planned) {
        if let Source::Tensor { name, .. } = &tensor.source.source {
            self.checkpoint.release(name);
        }
    }

    /// A piece was written, from `buffer`.
    fn written(&self, buffer: Vec<u8>) {
        let mut place = self.place();
        place.written += 1;
        place.spare.push(buffer);
        drop(place);
        self.moved.notify_all();
    }
}

/// Brings the columns of each row into their own order.
fn restore(order: &[u32], weights: &mut [f32]) {
    let mut stored = vec![0.0; order.len()];
    for row in weights.chunks_exact_mut(order.len()) {
        stored.copy_from_slice(row);
        for (&to, &value) in order.iter().zip(&stored) {
            row[to as usize] = value;
        }
    }
}

/// The first weight that is not a number.
fn not_finite(tensor: &Planned, piece: &Piece, weights: &[f32]) -> anyhow::Error {
    let at = weights.iter().position(|w| !w.is_finite()).unwrap_or(0);
    let (row, col) = (piece.rows.start + at / tensor.cols(), at % tensor.cols());
    let (name, value, index) = (&tensor.source.name, weights[at], row * tensor.cols() + col);
    anyhow!(
        "tensor '{name}' has {value} at row {row}, column {col} (weight {index}): the model is damaged, download it again"
    )
}

/// Fails where a weight is far beyond what its format can say, which the encoder then makes the greatest that it can.
fn check_range(tensor: &Planned, piece: &Piece, weights: &[f32], bytes: &[u8]) -> Result<()> {
    let size = |w: f32| w.abs();
    let greatest = weights.iter().fold(0f32, |max, &w| max.max(size(w)));
    if greatest <= MAX_F16 || tensor.format == Format::F32 {
        return Ok(());
    }
    let mut decoded = vec![0.0; weights.len()];
    tensor.format.decode(bytes, &mut decoded);
    // Coarse formats round by much, but never the greatest weight of a block by half.
    let far = |(w, d): (&f32, &f32)| size(*w) == greatest && (d.is_nan() || size(*d) <= greatest / 2.0);
    if let Some(at) = weights.iter().zip(&decoded).position(far) {
        let (name, format, row) = (&tensor.source.name, tensor.format, piece.rows.start + at / tensor.cols());
        bail!(
            "tensor '{name}' has the weight {:e} in row {row}, which {format} cannot hold: give it another format with \
             --keep '{name}=BF16'",
            weights[at]
        );
    }
    Ok(())
}
