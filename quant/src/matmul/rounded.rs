//! Activations rounded for the kernels that meet them.

use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::kernels::scalar::quantize_wide;
use crate::kernels::{
    HalfKernels, QuantizedRow, QuantizedRowMut, QuantizedRows, ROW_BLOCK, WordKernels, WordRowMut, WordRows,
};
use crate::threads::Disjoint;

/// Rows of activations rounded for a kernel; the buffers are kept from call to call.
#[derive(Default)]
pub(super) struct Rounded {
    q: Aligned<i8>,
    d: Aligned<f32>,
    s16: Aligned<f32>,
    s32: Aligned<f32>,
    c16: Aligned<i32>,
    c32: Aligned<i32>,
    pub(super) half: Aligned<u16>,
    words: Aligned<i16>,
}

/// How rows become 8-bit rows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rounding {
    /// A scale over each 32 columns.
    Once,
    /// The same, and rows `n..2n` are what that left over, rounded likewise: both together are within `max|x| / 2^15`
    /// of `x`.
    Twice,
    /// A scale over each so many columns.
    Wide(usize),
}

/// Rows that one task rounds: a block of [`HalfRows`].
const ROUND: usize = 16;

impl Rounded {
    /// Rounds the `n` rows of `x` to 8 bits.
    pub(super) fn quantize(&mut self, cpu: &Cpu, x: &[f32], n: usize, cols: usize, rounding: Rounding) {
        let twice = rounding == Rounding::Twice;
        let total = if twice { 2 * n } else { n } * cols;
        self.q.reserve(total);
        self.d.reserve(total / 32);
        self.s16.reserve(total / 16);
        self.s32.reserve(total / 32);
        self.c16.reserve(total / 16);
        self.c32.reserve(total / 32);
        let q = Disjoint::new(&mut self.q);
        let d = Disjoint::new(&mut self.d);
        let s16 = Disjoint::new(&mut self.s16);
        let s32 = Disjoint::new(&mut self.s32);
        let c16 = Disjoint::new(&mut self.c16);
        let c32 = Disjoint::new(&mut self.c32);
        let row = |r: usize| {
            let (a, b) = (r * cols, (r + 1) * cols);
            // SAFETY: each row, and so its ranges, is asked for by one task alone, and used before it asks again.
            unsafe {
                QuantizedRowMut {
                    q: q.slice(a..b),
                    d: d.slice(a / 32..b / 32),
                    s16: s16.slice(a / 16..b / 16),
                    s32: s32.slice(a / 32..b / 32),
                    c16: c16.slice(a / 16..b / 16),
                    c32: c32.slice(a / 32..b / 32),
                }
            }
        };
        cpu.split(n, ROUND, &|rows| {
            let mut rest = vec![0f32; if twice { cols } else { 0 }];
            for r in rows {
                let x = &x[r * cols..(r + 1) * cols];
                match rounding {
                    Rounding::Wide(span) => quantize_wide(x, span, row(r)),
                    _ => (cpu.kernels.quantize)(x, row(r)),
                }
                if twice {
                    let first = row(r);
                    for (g, d) in first.d.iter().enumerate() {
                        for i in g * 32..(g + 1) * 32 {
                            rest[i] = x[i] - d * f32::from(first.q[i]);
                        }
                    }
                    (cpu.kernels.quantize)(&rest, row(n + r));
                }
            }
        });
    }

    pub(super) fn rows(&self, cols: usize) -> QuantizedRows<'_> {
        let all =
            QuantizedRow { q: &self.q, d: &self.d, s16: &self.s16, s32: &self.s32, c16: &self.c16, c32: &self.c32 };
        QuantizedRows { all, cols }
    }

    /// Rounds the `n` rows of `x` to 16 bits.
    pub(super) fn round_words(&mut self, cpu: &Cpu, kernels: &WordKernels, x: &[f32], n: usize, cols: usize) {
        let total = n * cols;
        self.words.reserve(total);
        self.d.reserve(total / 32);
        self.s16.reserve(total / 16);
        self.s32.reserve(total / 32);
        let q = Disjoint::new(&mut self.words);
        let d = Disjoint::new(&mut self.d);
        let s16 = Disjoint::new(&mut self.s16);
        let s32 = Disjoint::new(&mut self.s32);
        cpu.split(n, ROUND, &|rows| {
            for (a, b) in rows.map(|r| (r * cols, (r + 1) * cols)) {
                // SAFETY: a row, and so its ranges, belongs to one task.
                let out = unsafe {
                    WordRowMut {
                        q: q.slice(a..b),
                        d: d.slice(a / 32..b / 32),
                        s16: s16.slice(a / 16..b / 16),
                        s32: s32.slice(a / 32..b / 32),
                    }
                };
                (kernels.round)(&x[a..b], out);
            }
        });
    }

    pub(super) fn word_rows(&self, cols: usize) -> WordRows<'_> {
        WordRows { q: &self.words, d: &self.d, s16: &self.s16, s32: &self.s32, cols }
    }

    /// Rounds the `n` rows of `x` to bf16, with a tail of so many zeros.
    pub(super) fn round_half(
        &mut self,
        cpu: &Cpu,
        kernels: &HalfKernels,
        x: &[f32],
        n: usize,
        cols: usize,
        tail: usize,
    ) {
        let row = (cols + tail) * kernels.parts;
        self.half.reserve(n.next_multiple_of(ROW_BLOCK) * row);
        let half = Disjoint::new(&mut self.half);
        cpu.split(n, ROUND, &|rows| {
            // SAFETY: a block of 16 rows belongs to one task.
            let block = unsafe { half.slice(rows.start * row..(rows.start + ROUND) * row) };
            let (block, behind) = block.split_at_mut(ROUND * cols * kernels.parts);
            (kernels.round)(&x[rows.start * cols..rows.end * cols], cols, block);
            behind.fill(0);
        });
    }
}
