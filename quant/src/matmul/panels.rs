//! Weight rows unpacked into cache, sixteen to a panel, for the products with many rows.

use super::Matrix;
use super::low_rank::Tail;
use crate::buffer::{Aligned, Number};
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::{CodePanel, HalfKernels, PANEL, WordKernels, WordPanel, fetch};
use std::ops::Range;

/// What a thread unpacks weights into.
#[derive(Default)]
pub(super) struct Panels {
    codes: Aligned<i8>,
    words: Aligned<i16>,
    scale: Aligned<f32>,
    min: Aligned<f32>,
    pub(super) floats: Aligned<f32>,
    pub(super) half: Aligned<u16>,
}

/// Columns that share a scale once unpacked.
fn sub(format: Format) -> usize {
    if matches!(format, Format::Q2_K | Format::Q3_K | Format::Q6_K) { 16 } else { 32 }
}

fn has_min(format: Format) -> bool {
    matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q2_K | Format::Q4_K | Format::Q5_K | Format::Q8_Z)
}

/// The rows `rows` as panels of sixteen: which panel, how many of its rows there are, and their packed weights. Those of
/// the next panel, of these rows or behind them, are fetched meanwhile.
fn parts<'a>(w: &Matrix<'a>, rows: &Range<usize>) -> impl Iterator<Item = (usize, usize, &'a [u8])> + use<'a> {
    let (all, row_bytes, total, end) = (w.data, w.row_bytes(), w.rows, rows.end);
    let data = move |first: usize| &all[total.min(first) * row_bytes..total.min(first + PANEL) * row_bytes];
    fetch(data(rows.start));
    rows.clone().step_by(PANEL).enumerate().map(move |(p, first)| {
        fetch(data(first + PANEL));
        (p, PANEL.min(end - first), &data(first)[..PANEL.min(end - first) * row_bytes])
    })
}

/// Where panel `p` has its codes, and where its scales and minimums.
fn places(w: &Matrix<'_>, p: usize) -> (Range<usize>, Range<usize>) {
    let (codes, scales) = (w.cols * PANEL, w.cols / sub(w.format) * PANEL);
    (p * codes..(p + 1) * codes, p * scales..(p + 1) * scales)
}

/// Panels that there is room for: pairs of them, as products take them.
fn whole(rows: &Range<usize>) -> usize {
    rows.len().div_ceil(2 * PANEL).max(1) * 2
}

/// Unpacks rows of codes by `pack`.
fn unpack<T: Number>(
    w: &Matrix<'_>,
    rows: &Range<usize>,
    pack: impl Fn(&[u8], usize, usize, &mut [T], &mut [f32], &mut [f32]),
    codes: &mut Aligned<T>,
    [scale, min]: [&mut Aligned<f32>; 2],
) {
    let (last_codes, last_scales) = places(w, whole(rows) - 1);
    codes.reserve(last_codes.end);
    scale.reserve(last_scales.end);
    min.reserve(last_scales.end);
    for (p, used, data) in parts(w, rows) {
        let (c, s) = places(w, p);
        pack(data, used, w.cols, &mut codes[c], &mut scale[s.clone()], &mut min[s]);
    }
}

impl Panels {
    pub(super) fn unpack_codes(&mut self, cpu: &Cpu, w: &Matrix<'_>, rows: &Range<usize>) {
        let pack = (cpu.kernels.pack_codes)(w.format);
        unpack(w, rows, pack, &mut self.codes, [&mut self.scale, &mut self.min]);
    }

    pub(super) fn unpack_words(&mut self, kernels: &WordKernels, w: &Matrix<'_>, rows: &Range<usize>) {
        let pack = (kernels.pack)(w.format);
        unpack(w, rows, pack, &mut self.words, [&mut self.scale, &mut self.min]);
    }

    /// The panels of pair `pair`.
    pub(super) fn code_panels(&self, w: &Matrix<'_>, pair: usize) -> [CodePanel<'_>; 2] {
        [2 * pair, 2 * pair + 1].map(|p| {
            let (c, s) = places(w, p);
            let min = if has_min(w.format) { &self.min[s.clone()] } else { &[] };
            CodePanel { codes: &self.codes[c], scale: &self.scale[s], min, sub: sub(w.format) }
        })
    }

    /// The panels of pair `pair`.
    pub(super) fn word_panels(&self, w: &Matrix<'_>, pair: usize) -> [WordPanel<'_>; 2] {
        [2 * pair, 2 * pair + 1].map(|p| {
            let (c, s) = places(w, p);
            let min = if has_min(w.format) { &self.min[s.clone()] } else { &[] };
            WordPanel { codes: &self.words[c], scale: &self.scale[s], min, sub: sub(w.format) }
        })
    }

    pub(super) fn unpack_half(&mut self, kernels: &HalfKernels, w: &Matrix<'_>, rows: &Range<usize>, tail: Tail<'_>) {
        let own = w.cols * PANEL * kernels.weight_parts(w.format);
        let len = own + tail.width * PANEL;
        self.half.reserve(whole(rows) * len);
        for (p, used, data) in parts(w, rows) {
            let (panel, behind) = self.half[p * len..(p + 1) * len].split_at_mut(own);
            (kernels.pack)(w.format)(data, used, w.cols, panel);
            tail.pack(kernels, rows.start + p * PANEL, used, behind);
        }
    }

    pub(super) fn unpack_floats(&mut self, cpu: &Cpu, w: &Matrix<'_>, rows: &Range<usize>) {
        let len = w.cols * PANEL;
        self.floats.reserve(whole(rows) * len);
        for (p, used, data) in parts(w, rows) {
            (cpu.kernels.pack_floats)(w.format)(data, used, w.cols, &mut self.floats[p * len..(p + 1) * len]);
        }
    }
}
