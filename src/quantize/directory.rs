//! Hugging Face directories of quantized weights: GPTQ's integer codes and bitsandbytes' NF4.

use super::scratch::Scratch;
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::export::{GptqGrid, GptqLayer, GptqVersion, GptqWriter};
use rushlight_models::checkpoint::{Checkpoint, Kind};
use rushlight_quant::formats::Format;
use std::path::Path;

/// What a directory's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Symmetric integers of so many bits, in GPTQ's layout.
    Integers(u32),
    /// 4-bit normal floats with double quantization, in bitsandbytes' layout.
    Nf4,
}

impl Weights {
    /// The type called `name`.
    pub fn parse(name: &str) -> Option<Weights> {
        match name.to_ascii_lowercase().as_str() {
            "int4" => Some(Weights::Integers(4)),
            "int8" => Some(Weights::Integers(8)),
            "nf4" => Some(Weights::Nf4),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Weights::Integers(4) => "int4",
            Weights::Integers(_) => "int8",
            Weights::Nf4 => "nf4",
        }
    }
}

/// Fails where `checkpoint` cannot become a directory, or not that of `output`.
pub fn check(checkpoint: &Checkpoint, weights: Weights, output: &Path) -> Result<()> {
    let source = checkpoint.path().display();
    if !matches!(checkpoint.kind(), Kind::HuggingFace { .. }) {
        bail!(
            "{source}: {} is a type of Hugging Face directories, which are made from Hugging Face directories: give one, or \
             choose a GGUF type",
            weights.name()
        );
    }
    if output.extension().is_some_and(|ext| ext == "gguf") {
        bail!("{}: {} makes a directory, not a GGUF file: name one", output.display(), weights.name());
    }
    Ok(())
}

/// What the grid of `layers` is in GPTQ's terms.
pub fn gptq_grid(bits: u32, group: Option<usize>) -> GptqGrid {
    GptqGrid { bits, group, symmetric: true, act_order: false, version: GptqVersion::V1 }
}

/// Writes what `scratch` has of `layers`, as rows of `format`, into a directory that was begun by `writer`.
pub fn write_gptq(
    mut writer: GptqWriter<'_>,
    checkpoint: &Checkpoint,
    layers: &[String],
    grid: GptqGrid,
    format: Format,
    scratch: &Scratch,
) -> Result<()> {
    let zero = 1u16 << (grid.bits - 1);
    for name in layers {
        let shape = checkpoint.find(&format!("{name}.weight")).map(|info| info.shape.clone()).unwrap_or_default();
        let &[rows, cols] = &shape[..] else { bail!("{name} is not a matrix") };
        let data = scratch.get(name)?.with_context(|| format!("{name} is not finished"))?;
        let group = grid.group.unwrap_or(cols).min(cols);
        let (mut codes, mut scales) = (Vec::with_capacity(rows * cols), Vec::with_capacity(rows * cols / group));
        for row in data.chunks_exact(format.row_bytes(cols).context("rows are not whole blocks")?) {
            for i in 0..cols / 32 {
                let block = format.group(row, i).context("a row is too short")?;
                codes.extend(block.codes.iter().map(|&code| (i16::from(code) + zero as i16) as u8));
                if (i * 32).is_multiple_of(group) {
                    scales.push(block.scale[0]);
                }
            }
        }
        let zeros = vec![zero; scales.len()];
        let g_idx: Vec<u32> = (0..cols).map(|i| (i / group) as u32).collect();
        writer.layer(name, &GptqLayer { codes: &codes, scales: &scales, zeros: &zeros, g_idx: &g_idx })?;
    }
    Ok(writer.finish()?)
}
