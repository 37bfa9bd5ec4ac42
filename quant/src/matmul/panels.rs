//! Weight rows unpacked into cache, sixteen to a panel, for the products with many rows.

use super::Matrix;
use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::{CodePanel, HalfKernels, PANEL, WordKernels, WordPanel};

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

impl Panels {
    pub(super) fn unpack_codes(&mut self, cpu: &Cpu, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
        let (code_len, scale_len) = (w.cols * PANEL, w.cols / sub(w.format) * PANEL);
        self.codes.reserve(2 * code_len);
        self.scale.reserve(2 * scale_len);
        self.min.reserve(2 * scale_len);
        for (p, first) in rows.clone().step_by(PANEL).enumerate() {
            let used = PANEL.min(rows.end - first);
            (cpu.kernels.pack_codes)(w.format)(
                &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()],
                used,
                w.cols,
                &mut self.codes[p * code_len..(p + 1) * code_len],
                &mut self.scale[p * scale_len..(p + 1) * scale_len],
                &mut self.min[p * scale_len..(p + 1) * scale_len],
            );
        }
    }

    pub(super) fn code_panels(&self, w: &Matrix<'_>, width: usize) -> ([CodePanel<'_>; 2], usize) {
        let (code_len, scale_len) = (w.cols * PANEL, w.cols / sub(w.format) * PANEL);
        let panel = |p: usize| CodePanel {
            codes: &self.codes[p * code_len..(p + 1) * code_len],
            scale: &self.scale[p * scale_len..(p + 1) * scale_len],
            min: if has_min(w.format) { &self.min[p * scale_len..(p + 1) * scale_len] } else { &[] },
            sub: sub(w.format),
        };
        ([panel(0), panel(1)], width.div_ceil(PANEL))
    }

    pub(super) fn unpack_words(&mut self, kernels: &WordKernels, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
        let (code_len, scale_len) = (w.cols * PANEL, w.cols / sub(w.format) * PANEL);
        self.words.reserve(2 * code_len);
        self.scale.reserve(2 * scale_len);
        self.min.reserve(2 * scale_len);
        for (p, first) in rows.clone().step_by(PANEL).enumerate() {
            let used = PANEL.min(rows.end - first);
            (kernels.pack)(w.format)(
                &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()],
                used,
                w.cols,
                &mut self.words[p * code_len..(p + 1) * code_len],
                &mut self.scale[p * scale_len..(p + 1) * scale_len],
                &mut self.min[p * scale_len..(p + 1) * scale_len],
            );
        }
    }

    pub(super) fn word_panels(&self, w: &Matrix<'_>) -> [WordPanel<'_>; 2] {
        let (code_len, scale_len) = (w.cols * PANEL, w.cols / sub(w.format) * PANEL);
        [0, 1].map(|p| WordPanel {
            codes: &self.words[p * code_len..(p + 1) * code_len],
            scale: &self.scale[p * scale_len..(p + 1) * scale_len],
            min: if has_min(w.format) { &self.min[p * scale_len..(p + 1) * scale_len] } else { &[] },
            sub: sub(w.format),
        })
    }

    pub(super) fn unpack_half(&mut self, kernels: &HalfKernels, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
        let len = w.cols * PANEL;
        self.half.reserve(2 * len);
        for (p, first) in rows.clone().step_by(PANEL).enumerate() {
            let used = PANEL.min(rows.end - first);
            let data = &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()];
            (kernels.pack)(w.format)(data, used, w.cols, &mut self.half[p * len..(p + 1) * len]);
        }
    }

    pub(super) fn unpack_floats(&mut self, cpu: &Cpu, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
        let len = w.cols * PANEL;
        self.floats.reserve(2 * len);
        for (p, first) in rows.clone().step_by(PANEL).enumerate() {
            let used = PANEL.min(rows.end - first);
            (cpu.kernels.pack_floats)(w.format)(
                &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()],
                used,
                w.cols,
                &mut self.floats[p * len..(p + 1) * len],
            );
        }
    }
}
