//! NF4 directories as transformers loads them with bitsandbytes.

use super::directory::{Directory, Kept, copy, element, shape};
use super::original::Original;
use crate::checkpoint::Tensor;
use crate::checkpoint::prequantized::in_parallel;
use crate::checkpoint::safetensors::{Entry, Writer};
use crate::{Error, Result};
use rushlight_quant::formats::nf4::{self, BLOCK, NESTED_BLOCK};
use rushlight_quant::formats::{Format, NF4, TableFormat, table};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// How [`write_nf4`] stores weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nf4Options {
    /// Whether the blocks' largest magnitudes are quantized to 8 bits too: 4.13 bits a weight rather than 4.5.
    pub double: bool,
}

/// Rows that one task encodes: whole blocks of [`BLOCK`], whatever their length.
const ROWS: usize = BLOCK;

/// Writes the directory `target`: that of `source` with the weights of `layers` (names without `.weight`) in NF4. Tensors
/// go through memory one at a time; `progress` is told the name of each layer once it is written. The directory appears
/// under its name only when it is whole.
///
/// # Errors
/// When one of `layers` holds numbers that are not finite, or a file cannot be
/// written.
pub fn write_nf4(
    source: &Original<'_>,
    target: &Path,
    layers: &[String],
    options: Nf4Options,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut kept = Kept::of(source, layers)?;
    let mut entries = Vec::new();
    for name in layers {
        entries.extend(layer_entries(name, shape(source, name)?, options));
    }
    // A part whose size is no multiple of 8 would put those behind it at odd places: such parts come last, by the size of
    // their elements like the tensors that stay.
    let (even_parts, odd_parts): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(even);
    let mut last = [&kept.tensors[..], &odd_parts].concat();
    last.sort_by_key(|entry| std::cmp::Reverse(element(entry)));
    let entries = [&kept.widest[..], &even_parts, &last].concat();
    let directory = Directory::create(target)?;
    let mut weights = Writer::create(&directory.file("model.safetensors"), &entries)?;
    copy(source, &kept.widest, &mut weights)?;
    let mut late = HashMap::new();
    for name in layers {
        let (rows, cols) = shape(source, name)?;
        let tensor = source.tensor(&format!("{name}.weight"))?;
        let (codes, absmax) =
            encode(&tensor, rows, cols).map_err(|what| Error::file(source.checkpoint().path(), what))?;
        let entries = layer_entries(name, (rows, cols), options);
        for (entry, data) in entries.into_iter().zip(layer_data(&tensor, (rows, cols), codes, &absmax, options)) {
            match even(&entry) {
                true => weights.write(&entry.name, &data)?,
                false => drop(late.insert(entry.name, data)),
            }
        }
        progress(name);
    }
    for entry in last {
        match late.remove(&entry.name) {
            Some(data) => weights.write(&entry.name, &data)?,
            None => copy(source, &[entry], &mut weights)?,
        }
    }
    weights.finish()?;
    source.companions(&directory)?;
    kept.config["quantization_config"] = describe(&kept, options);
    directory.json("config.json", &kept.config)?;
    directory.commit()
}

fn even(entry: &Entry) -> bool {
    entry.bytes().is_some_and(|bytes| bytes.is_multiple_of(8))
}

/// The codes and magnitudes of a whole tensor.
fn encode(tensor: &Tensor, rows: usize, cols: usize) -> Result<(Vec<u8>, Vec<f32>), String> {
    let (name, format) = (&tensor.info.name, tensor.info.format);
    let row_bytes = format.row_bytes(cols).filter(|_| format.is_float());
    let row_bytes = row_bytes.ok_or_else(|| format!("tensor '{name}' is {format} already, not floats"))?;
    let decode = |first: usize, weights: &mut [f32]| {
        format.decode(&tensor.data[first * row_bytes..][..weights.len() / cols * row_bytes], weights);
    };
    encode_rows(rows, cols, &decode).ok_or_else(|| {
        format!(
            "tensor '{name}' holds weights that are not numbers (NaN or infinite): the file is damaged; download it again"
        )
    })
}

/// The same of any matrix: `decode(first, weights)` gives the rows from `first` on that fill `weights`. `None` where a weight
/// is not finite.
fn encode_rows(rows: usize, cols: usize, decode: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Option<(Vec<u8>, Vec<f32>)> {
    let total = rows * cols;
    let (mut codes, mut absmax) = (vec![0; total.div_ceil(2)], vec![0.0; total.div_ceil(BLOCK)]);
    let finite = std::sync::atomic::AtomicBool::new(true);
    let parts = codes.chunks_mut(ROWS * cols / 2).zip(absmax.chunks_mut(ROWS * cols / BLOCK));
    in_parallel(parts.enumerate(), total >> 16, &|(i, (codes, absmax))| {
        let first = i * ROWS;
        let mut weights = vec![0.0; ROWS.min(rows - first) * cols];
        decode(first, &mut weights);
        if weights.iter().any(|w| !w.is_finite()) {
            finite.store(false, std::sync::atomic::Ordering::Relaxed);
        }
        nf4::encode(&weights, BLOCK, codes, absmax);
    });
    finite.into_inner().then_some((codes, absmax))
}

/// A matrix put into NF4, its magnitudes quantized doubly, as it lies in memory: what reading the layer that [`write_nf4`]
/// writes gives, floats where `cols` is no multiple of 32. See [`encode_rows`] for the rest.
pub(crate) fn blocks(
    rows: usize,
    cols: usize,
    decode: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> Option<(Format, Vec<u8>)> {
    let (codes, absmax) = encode_rows(rows, cols, decode)?;
    let (nf4::Nested { codes: magnitudes, absmax, offset }, map) = (nf4::nest(&absmax), nf4::dynamic_map());
    let scale = |b: usize| map[usize::from(magnitudes[b])] * absmax[b / NESTED_BLOCK] + offset;
    let code = |i: usize| codes[i / 2] >> (4 * (1 - i % 2)) & 15;
    if !cols.is_multiple_of(32) {
        let weight = |i: usize| NF4::TABLE[usize::from(code(i))] * scale(i / BLOCK);
        return Some((Format::F32, (0..rows * cols).flat_map(|i| weight(i).to_le_bytes()).collect()));
    }
    let mut packed = vec![0; rows * cols / 32 * table::BYTES];
    for (b, block) in packed.as_chunks_mut::<{ table::BYTES }>().0.iter_mut().enumerate() {
        table::put(&std::array::from_fn(|i| code(32 * b + i)), scale(b * 32 / BLOCK), block);
    }
    Some((Format::NF4, packed))
}

/// What a layer consists of.
fn layer_entries(layer: &str, (rows, cols): (usize, usize), options: Nf4Options) -> Vec<Entry> {
    let total = rows * cols;
    let blocks = total.div_ceil(BLOCK);
    let entry = |part: &str, dtype: &str, shape: &[usize]| Entry {
        name: format!("{layer}.weight{part}"),
        dtype: dtype.into(),
        shape: shape.to_vec(),
    };
    let mut entries = vec![
        entry("", "U8", &[total.div_ceil(2), 1]),
        entry(".absmax", if options.double { "U8" } else { "F32" }, &[blocks]),
        entry(".quant_map", "F32", &[16]),
        entry(".quant_state.bitsandbytes__nf4", "U8", &[STATE]),
    ];
    if options.double {
        entries.push(entry(".nested_absmax", "F32", &[blocks.div_ceil(NESTED_BLOCK)]));
        entries.push(entry(".nested_quant_map", "F32", &[256]));
    }
    entries
}

/// The bytes of each of [`layer_entries`].
fn layer_data(
    tensor: &Tensor,
    (rows, cols): (usize, usize),
    codes: Vec<u8>,
    absmax: &[f32],
    options: Nf4Options,
) -> Vec<Vec<u8>> {
    let bytes = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let dtype = match tensor.info.format {
        Format::F16 => "float16",
        Format::BF16 => "bfloat16",
        _ => "float32",
    };
    let mut state = json!({"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": [rows, cols]});
    let mut nested = Vec::new();
    let absmax = if options.double {
        let nf4::Nested { codes, absmax, offset } = nf4::nest(absmax);
        state["nested_blocksize"] = json!(NESTED_BLOCK);
        state["nested_dtype"] = json!("float32");
        state["nested_offset"] = json!(f64::from(offset));
        nested = vec![bytes(&absmax), bytes(&nf4::dynamic_map())];
        codes
    } else {
        bytes(absmax)
    };
    let mut state = state.to_string().into_bytes();
    state.resize(STATE, b' ');
    [codes, absmax, bytes(&NF4::TABLE), state].into_iter().chain(nested).collect()
}

/// Bytes of a layer's description: known before the layer is, so filled up with spaces, which JSON allows at its end. The
/// longest one has some 190.
const STATE: usize = 256;

/// What config.json says.
fn describe(kept: &Kept, options: Nf4Options) -> Value {
    let dtype = kept.config.get("dtype").or_else(|| kept.config.get("torch_dtype")).and_then(Value::as_str);
    // Once layers are listed, the head is no longer left out by itself.
    let skip = (!kept.linears.is_empty()).then(|| [&kept.linears[..], &["lm_head".to_owned()]].concat());
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype.unwrap_or("float32"),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": options.double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}
