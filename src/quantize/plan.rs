//! What will be written: for each tensor its format and the importance of its columns.

use super::mix::{Chosen, Traits, choose};
use super::types::{FORMATS, Target, Wishes};
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::imatrix::Imatrix;
use rushlight_models::checkpoint::{Checkpoint, Kind, Metadata, TensorInfo, Value, gguf};
use rushlight_models::convert::{Converted, Source, to_gguf};
use rushlight_models::fold::Fold;
use rushlight_quant::formats::Format;
use std::path::Path;
use std::sync::Arc;

/// GGUF's `general.quantization_version`: of the block formats' layouts, 2 since 2023.
const QUANTIZATION_VERSION: u64 = 2;
/// What tensors begin at multiples of.
const ALIGNMENT: u64 = 32;

/// A GGUF file to be written.
pub struct Plan {
    /// What was asked for.
    pub target: Target,
    /// All of the file's metadata.
    pub metadata: Metadata,
    /// Its tensors, in order.
    pub tensors: Vec<Planned>,
    /// What a person should know, a sentence each.
    pub notes: Vec<String>,
}

/// A tensor of a [`Plan`].
pub struct Planned {
    /// Where it comes from, in which format and shape.
    pub source: Converted,
    /// What it is written as.
    pub format: Format,
    /// What it would have been written as, if its rows were whole blocks of that.
    pub instead_of: Option<Format>,
    /// The importance of each column; for a stack of matrices one after another.
    pub importance: Option<Vec<f32>>,
    /// Column `i` of the source's rows is column `order[i]`, where they are not in their own order.
    pub order: Option<Arc<[u32]>>,
    /// What adapters make of its rows before they are encoded.
    pub fold: Option<Fold>,
}

impl Planned {
    /// `source`, a tensor of `checkpoint`, to be written as `format`.
    pub fn new(checkpoint: &Checkpoint, source: Converted, format: Format) -> Planned {
        let order = match &source.source {
            Source::Tensor { name, .. } => checkpoint.column_order(name),
            Source::Parts { .. } | Source::Data(_) => None,
        };
        Planned { source, format, instead_of: None, importance: None, order, fold: None }
    }

    /// Weights in a row.
    pub fn cols(&self) -> usize {
        self.source.shape.last().copied().unwrap_or(1)
    }

    /// Rows of all matrices together.
    pub fn rows(&self) -> usize {
        self.source.shape.iter().rev().skip(1).product()
    }

    /// Rows of one matrix of a stack.
    pub fn rows_of_matrix(&self) -> usize {
        self.source.shape.iter().rev().nth(1).copied().unwrap_or(1)
    }

    /// Whether the codes of the source can be kept as they are.
    pub fn is_exact(&self) -> bool {
        let kept = match self.source.format {
            Format::Q4_Z => matches!(self.format, Format::Q4_1 | Format::Q4_0),
            Format::Q8_F => self.format == Format::Q8_0,
            from => from == self.format,
        };
        kept && self.order.is_none() && self.fold.is_none()
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.source.shape.iter().product()
    }

    /// Bytes as written, and as in the source.
    pub fn bytes(&self) -> (u64, u64) {
        let bytes = |format: Format| format.row_bytes(self.cols()).unwrap_or(0) as u64 * self.rows() as u64;
        (bytes(self.format), bytes(self.source.format))
    }
}

/// An imatrix and the file that it is from.
pub struct GivenImatrix<'a> {
    /// For messages and metadata.
    pub path: &'a Path,
    /// What it says.
    pub imatrix: &'a Imatrix,
}

impl Plan {
    /// Plans a file of `target` for `checkpoint`.
    pub fn new(
        checkpoint: &Checkpoint,
        target: Target,
        wishes: &Wishes,
        imatrix: Option<&GivenImatrix>,
    ) -> Result<Plan> {
        let conversion = to_gguf(checkpoint)?;
        let mut metadata = conversion.metadata;
        let mut notes = [checkpoint.notes(), &conversion.notes].concat();
        let traits = Traits::of(&metadata).with_context(|| checkpoint.path().display().to_string())?;
        let names: Vec<_> = conversion.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
        let chosen = choose(target, wishes, &traits, imatrix.is_some(), &names)?;
        let from_gguf = matches!(checkpoint.kind(), Kind::Gguf(_));
        let mut tensors = Vec::with_capacity(chosen.len());
        for (source, Chosen { format, instead_of }) in conversion.tensors.into_iter().zip(chosen) {
            // What is not for quantizing is small, and programs want it in f32 where a GGUF file does not say otherwise.
            let left = if from_gguf { source.format } else { Format::F32 };
            let format = format.unwrap_or(left);
            let mut planned = Planned { instead_of, ..Planned::new(checkpoint, source, format) };
            // Codes that are there already do not make way for larger ones that were not asked for.
            let (written, stored) = planned.bytes();
            let kept = FORMATS.contains(&planned.source.format) && planned.order.is_none();
            if instead_of.is_some() && kept && stored <= written {
                planned.format = planned.source.format;
            }
            tensors.push(planned);
        }
        set(&mut metadata, "general.quantization_version", Value::Unsigned(QUANTIZATION_VERSION));
        set(&mut metadata, "general.file_type", Value::Unsigned(target.file_type.into()));
        if let Some(given) = imatrix {
            weigh(&mut tensors, given, &mut notes)?;
            describe(&mut metadata, given);
        } else if target.name == "Q2_K_S" {
            notes.push("Q2_K_S without an imatrix loses much: give one with --imatrix, or take Q2_K".into());
        }
        notes.extend(fallbacks(&tensors));
        notes.extend(kept(checkpoint, &tensors));
        notes.extend(requantized(&tensors));
        Ok(Plan { target, metadata, tensors, notes })
    }

    /// Bytes of the file beside those of its tensors: metadata, and what aligns them.
    pub fn overhead(&self) -> u64 {
        let infos: Vec<TensorInfo> = self
            .tensors
            .iter()
            .map(|t| TensorInfo { name: t.source.name.clone(), format: t.format, shape: t.source.shape.clone() })
            .collect();
        gguf::header_bytes(&self.metadata, &infos) + ALIGNMENT * infos.len() as u64
    }

    /// Bytes of all tensors as written, and as in the source.
    pub fn bytes(&self) -> (u64, u64) {
        self.tensors.iter().map(Planned::bytes).fold((0, 0), |(a, b), (c, d)| (a + c, b + d))
    }
}

fn set(metadata: &mut Metadata, key: &str, value: Value) {
    metadata.0.insert(key.into(), value);
}

/// Gives each tensor that is quantized its importance.
fn weigh(tensors: &mut [Planned], given: &GivenImatrix, notes: &mut Vec<String>) -> Result<()> {
    let GivenImatrix { path, imatrix } = given;
    let mut without = Vec::new();
    let mut used = 0;
    for tensor in tensors.iter_mut().filter(|t| !t.format.is_float() && !t.is_exact()) {
        let name = &tensor.source.name;
        let Some(importance) = imatrix.importance(name) else {
            // llama.cpp's tool leaves these two out unless told otherwise: nothing is wrong.
            if !matches!(name.as_str(), "token_embd.weight" | "output.weight") {
                without.push(name.as_str());
            }
            continue;
        };
        let expected = tensor.elements() / tensor.rows_of_matrix().max(1);
        if importance.len() != expected {
            bail!(
                "{}: '{name}' has {} values, but the model's has {expected} columns: the imatrix is of another model",
                path.display(),
                importance.len()
            );
        }
        tensor.importance = Some(importance);
        used += 1;
    }
    if used == 0 && !without.is_empty() {
        bail!(
            "{}: none of its {} entries is for a tensor of this model, such as '{}': the imatrix is of another model",
            path.display(),
            imatrix.entries.len(),
            without[0]
        );
    }
    if !without.is_empty() {
        let named = without.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        let more = if without.len() > 3 { ", ..." } else { "" };
        notes.push(format!(
            "the imatrix has nothing for {} of {} tensors, which are quantized without: {named}{more}",
            without.len(),
            used + without.len()
        ));
    }
    Ok(())
}

/// The metadata by which llama.cpp tells that an imatrix was used.
fn describe(metadata: &mut Metadata, given: &GivenImatrix) {
    let GivenImatrix { path, imatrix } = given;
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    set(metadata, "quantize.imatrix.file", Value::String(file));
    if let Some(dataset) = imatrix.datasets.first() {
        set(metadata, "quantize.imatrix.dataset", Value::String(dataset.clone()));
    }
    set(metadata, "quantize.imatrix.entries_count", Value::Unsigned(imatrix.entries.len() as u64));
    set(metadata, "quantize.imatrix.chunks_count", Value::Unsigned(imatrix.chunks.into()));
}

/// One note for each pair of formats.
fn fallbacks(tensors: &[Planned]) -> Vec<String> {
    let mut groups: Vec<(Format, Format, usize, &Planned)> = Vec::new();
    for tensor in tensors {
        let Some(wanted) = tensor.instead_of else { continue };
        match groups.iter_mut().find(|(a, b, ..)| (*a, *b) == (wanted, tensor.format)) {
            Some((_, _, count, _)) => *count += 1,
            None => groups.push((wanted, tensor.format, 1, tensor)),
        }
    }
    let note = |(wanted, format, count, first): &(Format, Format, usize, &Planned)| {
        let (name, cols, block) = (&first.source.name, first.cols(), wanted.block_len());
        let plural = if *count == 1 { "tensor is" } else { "tensors are" };
        format!(
            "{count} {plural} {format} instead of {wanted}, whose blocks of {block} do not divide a row of {cols} \
             ({name})"
        )
    };
    groups.iter().map(note).collect()
}

/// Which integer grids of other tools go over into GGUF blocks.
fn kept(checkpoint: &Checkpoint, tensors: &[Planned]) -> Option<String> {
    if !matches!(checkpoint.kind(), Kind::HuggingFace { .. }) {
        return None;
    }
    let count = tensors.iter().filter(|t| !t.source.format.is_float() && t.is_exact()).count();
    (count > 0).then(|| format!("{count} tensors are quantized already and keep their codes as they are"))
}

/// What quantizing a second time costs.
fn requantized(tensors: &[Planned]) -> Option<String> {
    let again = |t: &&Planned| !t.source.format.is_float() && !t.format.is_float() && !t.is_exact();
    let count = tensors.iter().filter(again).count();
    let first = tensors.iter().find(again)?;
    let plural = if count == 1 { "tensor is" } else { "tensors are" };
    Some(format!(
        "{count} {plural} quantized already ({} is {}): the errors of both times add up; start from the F16 or BF16 \
         model where there is one",
        first.source.name, first.source.format
    ))
}
