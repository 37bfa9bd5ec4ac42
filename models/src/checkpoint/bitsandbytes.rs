//! bitsandbytes checkpoints: NF4 and FP4, with and without double quantization, and LLM.int8.
//!
//! A 4-bit layer's `weight` holds two codes a byte, the first in the high half, of all weights one after another;
//! `weight.absmax` the largest magnitude of each block of them, and `weight.quant_state.bitsandbytes__nf4` a JSON text
//! that says the rest. With double quantization `absmax` is itself 8-bit codes into `nested_quant_map`, times the
//! `nested_absmax` of their block, plus an offset. An 8-bit layer's `weight` is signed bytes, times `SCB / 127` of the row.

use super::prequantized::{Layer, LayerParts, Layers, Part};
use crate::Result;
use rushlight_quant::formats::{Format, table};
use serde_json::Value;

/// Longest description of a layer, in bytes. Real ones have under 200.
const MAX_STATE: usize = 65_536;

/// A layer of 4-bit codes into a table.
#[derive(Debug)]
pub(super) struct Table {
    /// NF4 or FP4.
    format: Format,
    codes: Part,
    /// Weights in a block.
    block: usize,
    absmax: Part,
    nested: Option<Nested>,
}

/// What turns 8-bit magnitudes into numbers.
#[derive(Debug)]
struct Nested {
    map: Vec<f32>,
    absmax: Part,
    block: usize,
    offset: f32,
}

impl Table {
    /// The magnitude of weight `i`'s block.
    #[inline]
    fn scale(&self, i: usize) -> f32 {
        let b = i / self.block;
        match &self.nested {
            None => self.absmax.float(b),
            Some(nested) => {
                nested.map[usize::from(self.absmax.data[b])] * nested.absmax.float(b / nested.block) + nested.offset
            }
        }
    }

    #[inline]
    fn code(&self, i: usize) -> u8 {
        self.codes.data[i / 2] >> (4 * (1 - i % 2)) & 15
    }

    /// Packs the rows from `first` on, as many as `out` has room for.
    pub fn pack(&self, layer: &Layer, first: usize, out: &mut [u8]) {
        let start = first * layer.cols;
        if layer.format == Format::F32 {
            let table = table::table(self.format).unwrap_or(&[0.0; 16]);
            for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let w = table[usize::from(self.code(start + i))] * self.scale(start + i);
                *out = w.to_le_bytes();
            }
            return;
        }
        for (b, block) in out.as_chunks_mut::<{ table::BYTES }>().0.iter_mut().enumerate() {
            let at = start + 32 * b;
            let codes = std::array::from_fn(|i| self.code(at + i));
            table::put(&codes, self.scale(at), block);
        }
    }
}

/// A layer of signed bytes with a scale for each row.
#[derive(Debug)]
pub(super) struct SignedBytes {
    codes: Part,
    scales: Part,
}

impl SignedBytes {
    /// Packs the rows from `first` on, as many as `out` has room for.
    pub fn pack(&self, layer: &Layer, first: usize, out: &mut [u8]) {
        let row_bytes = layer.format.row_bytes(layer.cols).unwrap_or(0);
        let rows = self.codes.data[first * layer.cols..].chunks_exact(layer.cols);
        for (o, (codes, row)) in rows.zip(out.chunks_exact_mut(row_bytes)).enumerate() {
            let scale = self.scales.float(first + o) / 127.0;
            if layer.format == Format::F32 {
                for (&q, out) in codes.iter().zip(row.as_chunks_mut::<4>().0) {
                    *out = (f32::from(q as i8) * scale).to_le_bytes();
                }
                continue;
            }
            for (codes, block) in codes.as_chunks::<32>().0.iter().zip(row.as_chunks_mut::<36>().0) {
                block[..4].copy_from_slice(&scale.to_le_bytes());
                block[4..].copy_from_slice(codes);
            }
        }
    }
}

const STATE: &str = ".weight.quant_state.bitsandbytes__";

/// Finds every layer.
pub(super) fn find(layers: &mut Layers) -> Result<()> {
    for kind in ["nf4", "fp4"] {
        for base in layers.parts.with_end(&format!("{STATE}{kind}")) {
            let layer = four_bits(layers, kind, &base).map_err(|what| layers.error(what))?;
            layers.add(format!("{base}.weight"), layer);
        }
    }
    for base in layers.parts.with_end(".SCB") {
        let layer = eight_bits(layers, &base).map_err(|what| layers.error(what))?;
        layers.add(format!("{base}.weight"), layer);
    }
    Ok(())
}

fn four_bits(layers: &mut Layers, kind: &str, base: &str) -> Result<Layer, String> {
    let parts = &mut layers.parts;
    let state = parts.need(&format!("{base}{STATE}{kind}"), &["U8"], None)?;
    let text = state.data.get(..state.data.len().min(MAX_STATE)).unwrap_or_default();
    let state: Value = serde_json::from_slice(text)
        .map_err(|e| format!("tensor '{}' is not the JSON text that it should be ({e})", state.name))?;
    let bad = |field: &str| format!("layer '{base}': the field {field} of its quant_state is missing or wrong");
    let count = |field: &str| {
        let value = state.get(field).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        value.filter(|&n| n > 0).ok_or_else(|| bad(field))
    };
    let (format, shape) = match (state.get("quant_type").and_then(Value::as_str), state.get("shape")) {
        (Some(name), Some(Value::Array(shape))) if name == kind && shape.len() == 2 => {
            let side = |i: usize| shape[i].as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
            let shape = side(0).zip(side(1)).ok_or_else(|| bad("shape"))?;
            (if kind == "nf4" { Format::NF4 } else { Format::FP4 }, shape)
        }
        (Some(name), _) if name != kind => return Err(bad("quant_type")),
        _ => return Err(bad("shape")),
    };
    let (rows, cols) = shape;
    let total = rows.checked_mul(cols).filter(|&n| n <= isize::MAX as usize / 8).ok_or_else(|| bad("shape"))?;
    let block = count("blocksize")?;
    let Some(codes) = parts.take(&format!("{base}.weight")) else {
        return Err(format!("tensor '{base}.weight' is missing: the directory is incomplete, download it again"));
    };
    // The codes may be stored under any type: that is what bnb_4bit_quant_storage is for.
    if codes.data.len() != total.div_ceil(2) {
        return Err(format!(
            "tensor '{base}.weight' has {} bytes, which does not fit the shape [{rows}, {cols}] of its quant_state",
            codes.data.len()
        ));
    }
    let map = parts.need(&format!("{base}.weight.quant_map"), &["F32"], Some(&[16]))?;
    let known = table::table(format).ok_or_else(|| bad("quant_type"))?;
    if (0..16).any(|i| (map.float(i) - known[i]).abs() > 1e-6 || map.float(i).is_nan()) {
        return Err(format!("tensor '{}' is not the table of {format}", map.name));
    }
    let blocks = total.div_ceil(block);
    let absmax_name = format!("{base}.weight.absmax");
    let floats = |part: &Part, len: usize| part.shape.iter().product::<usize>() == len;
    let wrong = |part: &Part, len: usize| format!("tensor '{}' is {:?}, not [{len}]", part.name, part.shape);
    let (absmax, nested) = if state.get("nested_blocksize").is_none() {
        (parts.need(&absmax_name, &["F32", "F16", "BF16"], None)?, None)
    } else {
        let absmax = parts.need(&absmax_name, &["U8"], None)?;
        let nested_block = count("nested_blocksize")?;
        let offset = state.get("nested_offset").and_then(Value::as_f64).ok_or_else(|| bad("nested_offset"))? as f32;
        let map = parts.need(&format!("{base}.weight.nested_quant_map"), &["F32"], Some(&[256]))?;
        let nested = parts.need(&format!("{base}.weight.nested_absmax"), &["F32"], None)?;
        let len = blocks.div_ceil(nested_block);
        if !floats(&nested, len) {
            return Err(wrong(&nested, len));
        }
        let map: Vec<f32> = (0..256).map(|i| map.float(i)).collect();
        (absmax, Some(Nested { map, absmax: nested, block: nested_block, offset }))
    };
    if !floats(&absmax, blocks) {
        return Err(wrong(&absmax, blocks));
    }
    let whole = cols.is_multiple_of(32) && block.is_multiple_of(32);
    let packed = if whole { format } else { Format::F32 };
    let table = Table { format, codes, block, absmax, nested };
    Ok(Layer { rows, cols, format: packed, order: None, parts: LayerParts::Table(table) })
}

fn eight_bits(layers: &mut Layers, base: &str) -> Result<Layer, String> {
    let parts = &mut layers.parts;
    let codes = parts.need(&format!("{base}.weight"), &["I8"], None)?;
    let &[rows, cols] = &codes.shape[..] else {
        return Err(format!("tensor '{}' is {:?}, not a matrix", codes.name, codes.shape));
    };
    let scales = parts.need(&format!("{base}.SCB"), &["F32", "F16", "BF16"], None)?;
    if scales.shape.iter().product::<usize>() != rows || rows == 0 || cols == 0 {
        return Err(format!("tensor '{}' is {:?}, not [{rows}]", scales.name, scales.shape));
    }
    if let Some(part) = parts.take(&format!("{base}.weight_format"))
        && part.data.iter().any(|&byte| byte != 0)
    {
        return Err(format!("tensor '{}' says that the layer is not stored row by row: save it again", part.name));
    }
    let format = if cols.is_multiple_of(32) { Format::Q8_F } else { Format::F32 };
    let parts = LayerParts::Bytes(SignedBytes { codes, scales });
    Ok(Layer { rows, cols, format, order: None, parts })
}
