//! GPTQ checkpoints (AutoGPTQ, GPTQModel): `qweight`, `qzeros`, `scales` and `g_idx` of each layer.
//!
//! `qweight` `[inputs * bits / 32, outputs]` packs the codes of each output's inputs, 32 bits after 32 bits; `qzeros`
//! `[groups, outputs * bits / 32]` the zero points of each group's outputs; `scales` is `[groups, outputs]` and `g_idx`
//! gives each input's group. A weight is `scale * (code - zero)`. Version 1 stores zero points less one.

use super::prequantized::{Fields, Layer, LayerParts, Layers, Part, word};
use crate::Result;
use rushlight_quant::formats::{Format, grid};
use std::sync::Arc;

/// What a configuration says of such weights.
#[derive(Debug)]
pub(super) struct Config {
    bits: u32,
    group: Option<usize>,
    /// What zero points are stored less.
    zero_offset: u16,
    /// Whether layers may differ from `bits` and `group`.
    dynamic: bool,
}

impl Config {
    pub fn read(config: &Fields<'_>) -> Result<Config> {
        let (bits, group) = config.grid()?;
        let format = match config.str("checkpoint_format")? {
            Some(format) => format,
            None => config.str("format")?.unwrap_or("gptq"),
        };
        let zero_offset = match format {
            "gptq" => 1,
            "gptq_v2" => 0,
            other => {
                return Err(config.error(format!(
                    "its GPTQ weights are laid out for '{other}', which cannot be read; gptq and gptq_v2 can"
                )));
            }
        };
        if config.bool_or("is_marlin_format", false)? {
            return Err(config.error("its GPTQ weights are laid out for Marlin, which cannot be read; gptq can"));
        }
        if let Some(other) = config.str("pack_dtype")?.filter(|name| *name != "int32") {
            return Err(
                config.error(format!("its GPTQ weights are packed in {other}, which cannot be read; int32 can"))
            );
        }
        let dynamic = match config.get(&["dynamic"]) {
            None => false,
            Some((_, rules)) => match rules.as_object() {
                Some(rules) => !rules.is_empty(),
                None => return Err(config.error(format!("the field dynamic is {rules}, not an object"))),
            },
        };
        Ok(Config { bits, group, zero_offset, dynamic })
    }
}

/// How codes and zero points lie in their words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// Codes one input after another; zero points one output after another.
    Gptq,
    /// Both eight outputs in a word, in AWQ's order.
    Awq,
}

/// A layer of codes with scales and zero points over groups of inputs.
#[derive(Debug)]
pub(super) struct Grid {
    pub packing: Packing,
    pub bits: u32,
    pub zero_offset: u16,
    /// The group of each input, in the order in which inputs are packed.
    pub groups: Vec<u32>,
    pub qweight: Part,
    pub qzeros: Part,
    pub scales: Part,
}

/// Where each of eight outputs lies in a word, in AWQ's packing.
const AWQ_PLACES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Grid {
    /// The zero point of output `o` in group `g`.
    #[inline]
    fn zero(&self, g: usize, o: usize) -> u16 {
        let words = self.qzeros.shape[1];
        let stored = match self.packing {
            Packing::Awq => word(&self.qzeros.data, g * words + o / 8) >> (4 * AWQ_PLACES[o % 8]),
            Packing::Gptq => {
                let bit = o * self.bits as usize;
                let at = g * words + bit / 32;
                let low = u64::from(word(&self.qzeros.data, at));
                // Three bits may lie in two words.
                let high = if bit % 32 + self.bits as usize > 32 { word(&self.qzeros.data, at + 1) } else { 0 };
                ((low | u64::from(high) << 32) >> (bit % 32)) as u32
            }
        };
        (stored & self.mask()) as u16 + self.zero_offset
    }

    #[inline]
    fn scale(&self, g: usize, o: usize) -> f32 {
        self.scales.float(g * self.scales.shape[1] + o)
    }

    fn mask(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// The codes of the outputs from `first` on, `[outputs][cols]` and inputs in their own order. `first` is a multiple
    /// of 8.
    fn codes(&self, first: usize, cols: usize, codes: &mut [u8]) {
        let (bits, mask, data) = (self.bits as usize, self.mask(), &self.qweight.data[..]);
        let outs = codes.len() / cols;
        let width = self.qweight.shape[1];
        match self.packing {
            Packing::Awq => {
                for i in 0..cols {
                    for o in 0..outs {
                        let word = word(data, i * width + (first + o) / 8);
                        codes[o * cols + i] = (word >> (4 * AWQ_PLACES[o % 8]) & mask) as u8;
                    }
                }
            }
            Packing::Gptq if bits == 3 => {
                for run in 0..cols / 32 {
                    for o in 0..outs {
                        let at = |k: usize| u128::from(word(data, (3 * run + k) * width + first + o)) << (32 * k);
                        let all = at(0) | at(1) | at(2);
                        for (i, code) in codes[o * cols + 32 * run..][..32].iter_mut().enumerate() {
                            *code = (all >> (3 * i)) as u8 & 7;
                        }
                    }
                }
            }
            Packing::Gptq => {
                let each = 32 / bits;
                for run in 0..cols / each {
                    for o in 0..outs {
                        let word = word(data, run * width + first + o);
                        for (i, code) in codes[o * cols + each * run..][..each].iter_mut().enumerate() {
                            *code = (word >> (bits * i) & mask) as u8;
                        }
                    }
                }
            }
        }
    }

    /// Packs the outputs from `first` on, as many as `out` has room for.
    pub fn pack(&self, layer: &Layer, first: usize, out: &mut [u8]) {
        let (cols, format) = (layer.cols, layer.format);
        let row_bytes = format.row_bytes(cols).unwrap_or(0);
        let mut codes = vec![0; out.len() / row_bytes * cols];
        self.codes(first, cols, &mut codes);
        for (o, (codes, row)) in codes.chunks_exact(cols).zip(out.chunks_exact_mut(row_bytes)).enumerate() {
            let o = first + o;
            if format == Format::F32 {
                for (i, (&q, out)) in codes.iter().zip(row.as_chunks_mut::<4>().0).enumerate() {
                    let g = self.groups[i] as usize;
                    let w = self.scale(g, o) * (f32::from(q) - f32::from(self.zero(g, o)));
                    *out = w.to_le_bytes();
                }
                continue;
            }
            for (b, block) in row.chunks_exact_mut(format.block_bytes()).enumerate() {
                let g = self.groups[32 * b] as usize;
                let mut run = [0; 32];
                match &layer.order {
                    None => run.copy_from_slice(&codes[32 * b..][..32]),
                    Some(order) => {
                        for (to, &i) in run.iter_mut().zip(&order[32 * b..]) {
                            *to = codes[i as usize];
                        }
                    }
                }
                grid::put(format, &run, self.zero(g, o), self.scale(g, o), block);
            }
        }
    }

    /// The layer of this grid: `groups` holds the group of each input in its own order.
    pub fn into_layer(mut self, rows: usize) -> Result<Layer, String> {
        let cols = self.groups.len();
        let (mut least, mut most, mut halves) = (u16::MAX, 0, true);
        for g in 0..self.scales.shape[0] {
            for o in 0..rows {
                let (zero, scale) = (self.zero(g, o), self.scale(g, o));
                (least, most) = (least.min(zero), most.max(zero));
                halves &= self.scales.dtype == "F16" || grid::is_f16(scale);
                if !scale.is_finite() {
                    let name = &self.scales.name;
                    return Err(format!(
                        "tensor '{name}' holds a scale that is not a number (group {g}, output {o}): the file is \
                         damaged; download it again"
                    ));
                }
            }
        }
        // Inputs by group, and within a group as they come.
        let mut order: Vec<u32> = (0..cols as u32).collect();
        order.sort_by_key(|&i| self.groups[i as usize]);
        let whole = cols.is_multiple_of(32)
            && order.chunks(32).all(|run| {
                let group = |i: u32| self.groups[i as usize];
                run.iter().all(|&i| group(i) == group(run[0]))
            });
        let format = grid::block_format(self.bits, (least, most), halves).filter(|_| whole).unwrap_or(Format::F32);
        let mut kept: Option<Arc<[u32]>> = None;
        if format != Format::F32 && order.iter().enumerate().any(|(place, &i)| i as usize != place) {
            self.groups = order.iter().map(|&i| self.groups[i as usize]).collect();
            kept = Some(order.into());
        }
        Ok(Layer { rows, cols, format, order: kept, parts: LayerParts::Grid(self) })
    }
}

/// The group of each of `cols` inputs without `g_idx`: one after another.
pub(super) fn plain_groups(cols: usize, groups: usize, group: Option<usize>) -> Option<Vec<u32>> {
    let group = group.unwrap_or(cols).min(cols);
    (cols.div_ceil(group) == groups).then(|| (0..cols).map(|i| (i / group) as u32).collect())
}

/// Finds every layer.
pub(super) fn find(layers: &mut Layers, config: &Config) -> Result<()> {
    for base in layers.parts.with_end(".qweight") {
        let layer = layer(layers, config, &base).map_err(|what| layers.error(what))?;
        layers.add(format!("{base}.weight"), layer);
    }
    Ok(())
}

fn layer(layers: &mut Layers, config: &Config, base: &str) -> Result<Layer, String> {
    let parts = &mut layers.parts;
    let qweight = parts.need(&format!("{base}.qweight"), &["I32"], None)?;
    let &[words, rows] = &qweight.shape[..] else {
        return Err(format!("tensor '{}' is {:?}, not a matrix", qweight.name, qweight.shape));
    };
    let qzeros = parts.need(&format!("{base}.qzeros"), &["I32"], None)?;
    let &[groups, zero_words] = &qzeros.shape[..] else {
        return Err(format!("tensor '{}' is {:?}, not a matrix", qzeros.name, qzeros.shape));
    };
    if [words, rows, groups, zero_words].contains(&0) {
        return Err(format!("layer '{base}' is empty: {:?} and {:?}", qweight.shape, qzeros.shape));
    }
    // Layers of other sizes than the rest show it by their zero points.
    let bits = match config.dynamic {
        true => u32::try_from(zero_words * 32 / rows).unwrap_or(0),
        false => config.bits,
    };
    let fits = matches!(bits, 2 | 3 | 4 | 8)
        && rows.checked_mul(bits as usize) == zero_words.checked_mul(32)
        && words.checked_mul(32).is_some_and(|n| n % bits as usize == 0)
        && (bits != 3 || words % 3 == 0);
    if !fits {
        return Err(format!(
            "the zero points of '{base}' ({:?}) do not fit its weights ({:?}) at {bits} bits: the file is damaged or \
             the bits of its configuration are wrong",
            qzeros.shape, qweight.shape
        ));
    }
    let cols = words * 32 / bits as usize;
    let scales = parts.need(&format!("{base}.scales"), &["F16", "BF16", "F32"], Some(&[groups, rows]))?;
    let group = config.group.filter(|_| !config.dynamic);
    let plain = match config.dynamic {
        true => plain_groups(cols, groups, Some(cols.div_ceil(groups))),
        false => plain_groups(cols, groups, group),
    };
    let missing = || {
        format!(
            "layer '{base}' has {groups} groups, which does not fit {cols} inputs and the group_size of its \
             configuration"
        )
    };
    let groups_of = match parts.take(&format!("{base}.g_idx")) {
        None => plain.ok_or_else(missing)?,
        Some(part) => {
            if part.dtype != "I32" || part.shape != [cols] {
                let Part { name, dtype, shape, .. } = part;
                return Err(format!("tensor '{name}' should be I32 [{cols}] but is {dtype} {shape:?}"));
            }
            let indices: Vec<u32> = (0..cols).map(|i| word(&part.data, i)).collect();
            if let Some(i) = indices.iter().position(|&g| g as usize >= groups) {
                let g = indices[i] as i32;
                return Err(format!("tensor '{}' puts input {i} into group {g} of {groups}", part.name));
            }
            // Some tools left it at zero where groups simply follow one another.
            match plain {
                Some(plain) if groups > 1 && indices.iter().all(|&g| g == 0) => plain,
                _ => indices,
            }
        }
    };
    let zero_offset = config.zero_offset;
    Grid { packing: Packing::Gptq, bits, zero_offset, groups: groups_of, qweight, qzeros, scales }.into_layer(rows)
}
