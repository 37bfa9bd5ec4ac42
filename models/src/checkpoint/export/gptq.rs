//! GPTQ directories as GPTQModel and transformers load them.

use super::directory::{Directory, Kept, copy, shape};
use super::original::Original;
use crate::checkpoint::safetensors::{Entry, Writer};
use crate::{Error, Result};
use rushlight_quant::formats::f32_to_f16;
use serde_json::{Value, json};
use std::path::Path;

/// How zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqVersion {
    /// Less one, which every reader understands: zero points from 1 up.
    V1,
    /// As they are, from 0 up.
    V2,
}

/// The grid that all layers of a directory share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptqGrid {
    /// 2, 3, 4 or 8.
    pub bits: u32,
    /// Inputs in a group; `None` for whole rows.
    pub group: Option<usize>,
    /// Whether every zero point is in the middle.
    pub symmetric: bool,
    /// Whether inputs were taken in another order than their own, so that a group's inputs are not neighbours.
    pub act_order: bool,
    /// How zero points are stored.
    pub version: GptqVersion,
}

impl GptqGrid {
    /// Groups of a row of `cols` inputs; the last may be shorter.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group.unwrap_or(cols).max(1))
    }

    /// Whether a layer of this size can be packed: inputs and outputs must fill whole 32-bit words, which three bits do
    /// only 32 at a time.
    pub fn holds(&self, rows: usize, cols: usize) -> bool {
        let run = if self.bits == 3 { 32 } else { 32 / self.bits.max(1) as usize };
        rows.is_multiple_of(run) && cols.is_multiple_of(run)
    }
}

/// A quantized linear layer: weight `[o, i]` is `scales[o, g] * (codes[o, i] - zeros[o, g])` with `g = g_idx[i]`.
#[derive(Clone, Copy, Debug)]
pub struct GptqLayer<'a> {
    /// `[outputs, inputs]`, inputs in their own order.
    pub codes: &'a [u8],
    /// `[outputs, groups]`; stored as f16, to nearest.
    pub scales: &'a [f32],
    /// `[outputs, groups]`.
    pub zeros: &'a [u16],
    /// The group of each input.
    pub g_idx: &'a [u32],
}

/// Writes a directory layer by layer. It appears under its name only when it is whole; a writer dropped before that
/// leaves nothing.
pub struct GptqWriter<'a> {
    source: &'a Original<'a>,
    grid: GptqGrid,
    directory: Directory,
    kept: Kept,
    weights: Writer,
    head: bool,
}

impl<'a> GptqWriter<'a> {
    /// Begins the directory `target`: that of `source`, in which the weights of `layers` (names without `.weight`) will be
    /// quantized. They follow in this order, each by [`GptqWriter::layer`].
    ///
    /// # Errors
    /// When the packing cannot hold a layer (see [`GptqGrid::holds`]), or a file cannot be written.
    pub fn create(
        source: &'a Original<'a>,
        target: &Path,
        layers: &[String],
        grid: GptqGrid,
    ) -> Result<GptqWriter<'a>> {
        let GptqGrid { bits, group, .. } = grid;
        let error = |what: String| Error::file(target, format!("cannot be written: {what}"));
        if !matches!(bits, 2 | 3 | 4 | 8) || group == Some(0) {
            return Err(error(format!("GPTQ has no codes of {bits} bits in groups of {group:?}")));
        }
        let kept = Kept::of(source, layers)?;
        let mut entries = kept.widest.clone();
        for name in layers {
            let (rows, cols) = shape(source, name)?;
            if !grid.holds(rows, cols) {
                return Err(error(format!(
                    "layer '{name}' is [{rows}, {cols}], which GPTQ's packing of {bits} bits cannot hold"
                )));
            }
            let groups = grid.groups(cols);
            let words = |n: usize| n / 32 * bits as usize + n % 32 * bits as usize / 32;
            let mut entry = |part: &str, dtype: &str, shape: &[usize]| {
                let (name, dtype, shape) = (format!("{name}.{part}"), dtype.to_owned(), shape.to_vec());
                entries.push(Entry { name, dtype, shape });
            };
            entry("qweight", "I32", &[words(cols), rows]);
            entry("qzeros", "I32", &[groups, words(rows)]);
            entry("g_idx", "I32", &[cols]);
            entry("scales", "F16", &[groups, rows]);
        }
        entries.extend(kept.tensors.iter().cloned());
        let directory = Directory::create(target)?;
        let mut weights = Writer::create(&directory.file("model.safetensors"), &entries)?;
        copy(source, &kept.widest, &mut weights)?;
        let head = layers.iter().any(|name| name == "lm_head");
        Ok(GptqWriter { source, grid, directory, kept, weights, head })
    }

    /// Writes the next layer.
    ///
    /// # Errors
    /// When the layer is not of its tensor's size, a code, zero point or group is out of range, or a scale is beyond f16.
    pub fn layer(&mut self, name: &str, layer: &GptqLayer<'_>) -> Result<()> {
        let (rows, cols) = shape(self.source, name)?;
        let [qweight, qzeros, g_idx, scales] = pack(&self.grid, rows, cols, layer)
            .map_err(|what| Error::model(format!("layer '{name}' cannot be written for GPTQ: {what}")))?;
        self.weights.write(&format!("{name}.qweight"), &qweight)?;
        self.weights.write(&format!("{name}.qzeros"), &qzeros)?;
        self.weights.write(&format!("{name}.g_idx"), &g_idx)?;
        self.weights.write(&format!("{name}.scales"), &scales)
    }

    /// Copies what is not quantized, writes the configuration and gives the directory its name.
    pub fn finish(self) -> Result<()> {
        let GptqWriter { source, grid, directory, mut kept, mut weights, head } = self;
        copy(source, &kept.tensors, &mut weights)?;
        weights.finish()?;
        source.companions(&directory)?;
        let description = describe(&grid, &kept.linears, head);
        directory.json("quantize_config.json", &description)?;
        kept.config["quantization_config"] = description;
        directory.json("config.json", &kept.config)?;
        directory.commit()
    }
}

/// What config.json and quantize_config.json say. `floats` are layers that stay as they are.
fn describe(grid: &GptqGrid, floats: &[String], head: bool) -> Value {
    let format = if grid.version == GptqVersion::V1 { "gptq" } else { "gptq_v2" };
    let mut description = json!({
        "bits": grid.bits,
        "group_size": grid.group.map_or(-1, |group| group as i64),
        "desc_act": grid.act_order,
        "sym": grid.symmetric,
        "lm_head": head,
        "quant_method": "gptq",
        "checkpoint_format": format,
        "format": format,
        "pack_dtype": "int32",
        "true_sequential": true,
        "meta": {"quantizer": [format!("rushlight:{}", env!("CARGO_PKG_VERSION"))]},
    });
    if !floats.is_empty() {
        let skip = floats.iter().map(|name| (format!("-:^{}$", regex::escape(name)), json!({})));
        description["dynamic"] = Value::Object(skip.collect());
    }
    description
}

/// `qweight`, `qzeros`, `g_idx` and `scales`.
fn pack(grid: &GptqGrid, rows: usize, cols: usize, layer: &GptqLayer<'_>) -> Result<[Vec<u8>; 4], String> {
    let GptqLayer { codes, scales, zeros, g_idx } = *layer;
    let bits = grid.bits as usize;
    let groups = grid.groups(cols);
    if codes.len() != rows * cols || g_idx.len() != cols || [scales.len(), zeros.len()] != [rows * groups; 2] {
        return Err(format!(
            "{} codes, {} scales, {} zero points and {} inputs are not those of [{rows}, {cols}] in {groups} groups",
            codes.len(),
            scales.len(),
            zeros.len(),
            g_idx.len()
        ));
    }
    let lowest = u16::from(grid.version == GptqVersion::V1);
    let wrong = [
        codes.iter().find(|&&q| usize::from(q) >> bits != 0).map(|q| format!("code {q} of {bits} bits")),
        (zeros.iter().find(|&&z| z < lowest || usize::from(z - lowest) >> bits != 0))
            .map(|z| format!("zero point {z} of {bits} bits: {:?} cannot store it", grid.version)),
        g_idx.iter().find(|&&g| g as usize >= groups).map(|g| format!("group {g} of {groups}")),
        (scales.iter().find(|s| f32_to_f16(**s) & 0x7c00 == 0x7c00)).map(|s| format!("scale {s}, beyond f16")),
    ];
    if let Some(what) = wrong.into_iter().flatten().next() {
        return Err(what);
    }
    let mut qweight = vec![0u32; cols * bits / 32 * rows];
    for (o, codes) in codes.chunks_exact(cols).enumerate() {
        for (i, &q) in codes.iter().enumerate() {
            let (word, bit) = (i * bits / 32, i * bits % 32);
            qweight[word * rows + o] |= u32::from(q) << bit;
            // Three bits may lie in two words.
            if bit + bits > 32 {
                qweight[(word + 1) * rows + o] |= u32::from(q) >> (32 - bit);
            }
        }
    }
    let words = rows * bits / 32;
    let (mut qzeros, mut halves) = (vec![0u32; groups * words], Vec::with_capacity(2 * groups * rows));
    for g in 0..groups {
        for o in 0..rows {
            let (word, bit) = (g * words + o * bits / 32, o * bits % 32);
            let zero = u32::from(zeros[o * groups + g] - lowest);
            qzeros[word] |= zero << bit;
            if bit + bits > 32 {
                qzeros[word + 1] |= zero >> (32 - bit);
            }
            halves.extend(f32_to_f16(scales[o * groups + g]).to_le_bytes());
        }
    }
    let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok([bytes(&qweight), bytes(&qzeros), bytes(g_idx), halves])
}
