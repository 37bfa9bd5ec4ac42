//! The products of activations with frozen weights, in the two shapes that work comes in.
//!
//! **Few rows** (generated tokens): bound by memory. Each packed weight row is read once, where it lies, with integer
//! dot products on 8-bit activations. **Many rows** (prompts, training, calibration): bound by arithmetic. Sixteen
//! weight rows at a time are unpacked into cache in the layout that the matrix unit wants and used for every row.
//!
//! How activations are rounded when they meet block formats (floats, and codes into a table of floats, meet f32
//! activations):
//!
//! | rows | instruction set | activations | weights |
//! | --- | --- | --- | --- |
//! | few | all | 8 bits, a scale over each 32 columns ([`QuantizedRow`]); 16 bits where the matrix asks for it | exact |
//! | many | AMX; AVX-512 with a fast bf16 ([`Cpu::prompts_in_bf16`]) | bf16 | rounded to bf16 |
//! | many | others | 16 bits: two rows of 8 bits, the second what the first left over | exact |
//!
//! [`PromptRounding::EightBits`] has many rows rounded as ggml rounds them.
//! Sums of integer products are exact within a scale group, and f32 across groups.

mod backward;
mod few;
mod floats;

use crate::buffer::Aligned;
use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::scalar::quantize_wide;
use crate::kernels::{
    CodePanel, GemmShape, HalfKernels, HalfRows, PANEL, QuantizedRow, QuantizedRowMut, QuantizedRows, ROW_BLOCK,
};
use crate::threads::Disjoint;
pub(crate) use few::Order;
use std::cell::RefCell;

/// Which of the two shapes of work this is. The caller says so by what the rows are, not by how many there happen to
/// be, so that a token's numbers do not depend on what was beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Tokens known beforehand: many rows at once.
    Prompt,
    /// A token for each sequence, one after another: few rows.
    Generate,
}

/// How the activations of a prompt are rounded when they meet block formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptRounding {
    /// bf16 or 16 bits, as the table above says.
    #[default]
    Fine,
    /// 8 bits, as ggml rounds them: a scale over each 32 columns, over each block where the format has larger ones.
    /// For figures that compare with llama.cpp's.
    EightBits,
}

/// A weight matrix in its packed form: `rows` outputs of `cols` inputs, row by row.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    data: &'a [u8],
    fine: bool,
}

impl<'a> Matrix<'a> {
    /// `None` where `data` is not exactly `rows` packed rows of `cols` weights.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8]) -> Option<Self> {
        let bytes = format.row_bytes(cols)?.checked_mul(rows)?;
        (bytes == data.len()).then_some(Matrix { format, rows, cols, data, fine: false })
    }

    /// The same matrix, which meets activations of 16 bits on every machine, those of generated tokens (instead of 8) and
    /// of prompts (instead of bf16): what it is multiplied with is then as good as its codes. Costs a second pass over
    /// codes in cache.
    pub fn with_fine_activations(self, fine: bool) -> Self {
        Matrix { fine: fine && self.format.is_coded(), ..self }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The storage format.
    pub fn format(&self) -> Format {
        self.format
    }

    fn row_bytes(&self) -> usize {
        self.data.len().checked_div(self.rows).unwrap_or(0)
    }
}

/// Rows of activations rounded for a kernel; the buffers are kept from call to call.
#[derive(Default)]
struct Rounded {
    q: Aligned<i8>,
    d: Aligned<f32>,
    s16: Aligned<f32>,
    s32: Aligned<f32>,
    c16: Aligned<i32>,
    c32: Aligned<i32>,
    half: Aligned<u16>,
}

/// How rows become 8-bit rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rounding {
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
    fn quantize(&mut self, cpu: &Cpu, x: &[f32], n: usize, cols: usize, rounding: Rounding) {
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

    fn rows(&self, cols: usize) -> QuantizedRows<'_> {
        let all =
            QuantizedRow { q: &self.q, d: &self.d, s16: &self.s16, s32: &self.s32, c16: &self.c16, c32: &self.c32 };
        QuantizedRows { all, cols }
    }

    /// Rounds the `n` rows of `x` to bf16.
    fn round_half(&mut self, cpu: &Cpu, kernels: &HalfKernels, x: &[f32], n: usize, cols: usize) {
        self.half.reserve(n.next_multiple_of(ROW_BLOCK) * cols);
        let half = Disjoint::new(&mut self.half);
        cpu.split(n, ROUND, &|rows| {
            // SAFETY: a block of 16 rows belongs to one task.
            let block = unsafe { half.slice(rows.start * cols..(rows.start + ROUND) * cols) };
            (kernels.round)(&x[rows.start * cols..rows.end * cols], cols, block);
        });
    }
}

/// What a thread unpacks weights into.
#[derive(Default)]
struct Panels {
    codes: Aligned<i8>,
    scale: Aligned<f32>,
    min: Aligned<f32>,
    floats: Aligned<f32>,
    half: Aligned<u16>,
}

thread_local! {
    static ROUNDED: RefCell<Rounded> = RefCell::default();
    static PANELS: RefCell<Panels> = RefCell::default();
}

impl Cpu {
    /// `out[i][r, o] = sum_c x[r, c] * weights[i][o, c]` for the `n` rows of `x` (`[n, cols]`). Matrices that share
    /// their input (queries, keys and values; gate and up) go in one call: the input is rounded once and the work
    /// handed out once.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn matmul(&self, phase: Phase, x: &[f32], n: usize, weights: &[Matrix<'_>], out: &mut [&mut [f32]]) {
        let Some(cols) = weights.first().map(|w| w.cols) else { return };
        assert_eq!(x.len(), n * cols, "activations are not [n, cols]");
        assert_eq!(weights.len(), out.len(), "an output for each matrix");
        for (w, out) in weights.iter().zip(out.iter()) {
            assert_eq!(w.cols, cols, "matrices in one call share their input");
            assert_eq!(out.len(), n * w.rows, "output is not [n, rows]");
        }
        if n == 0 {
            return;
        }
        // Matrices that activations are rounded for differently cannot share what was rounded.
        let wide = |w: &Matrix<'_>| w.format.block_len() > 32;
        let differ = |is: &dyn Fn(&Matrix<'_>) -> bool| weights.iter().any(is) && !weights.iter().all(is);
        if self.wide(phase) && differ(&wide) || phase == Phase::Prompt && differ(&|w| w.fine) {
            for (w, out) in weights.iter().zip(out) {
                self.matmul(phase, x, n, &[*w], &mut [&mut **out]);
            }
            return;
        }
        ROUNDED.with_borrow_mut(|rounded| {
            let coded = weights.iter().any(|w| w.format.is_coded());
            let out: Vec<Disjoint<'_, f32>> = out.iter_mut().map(|o| Disjoint::new(o)).collect();
            match (phase, self.half()) {
                (Phase::Generate, _) => {
                    if coded {
                        let fine = weights.iter().any(|w| w.fine);
                        rounded.quantize(self, x, n, cols, if fine { Rounding::Twice } else { Rounding::Once });
                    }
                    self.few_rows(x, rounded.rows(cols), n, weights, &out);
                }
                (Phase::Prompt, half) => {
                    self.team.look_ahead(&[]);
                    // What asks to be met finely is not rounded to bf16.
                    let half = half.filter(|_| !weights.iter().any(|w| w.fine));
                    let rounded_floats = weights.iter().any(|w| self.rounds_floats(w));
                    match &half {
                        Some(half) if coded || rounded_floats => rounded.round_half(self, half, x, n, cols),
                        None if coded => {
                            let rounding = match self.fine() {
                                true => Rounding::Twice,
                                false if weights.iter().any(wide) => Rounding::Wide(weights[0].format.block_len()),
                                false => Rounding::Once,
                            };
                            rounded.quantize(self, x, n, cols, rounding);
                        }
                        _ => {}
                    }
                    self.many_rows(x, rounded, n, weights, half, &out);
                }
            }
        });
    }

    /// Whether the columns that share a scale depend on the weights' format.
    fn wide(&self, phase: Phase) -> bool {
        phase == Phase::Prompt && !self.fine()
    }

    fn fine(&self) -> bool {
        self.prompt_rounding == PromptRounding::Fine
    }

    /// Whether activations and weights of block formats meet as bf16 in prompts.
    pub fn prompts_in_bf16(&self) -> bool {
        self.half().is_some()
    }

    /// Whether these weights, which are floats, meet many rows as bf16 where that is faster.
    fn rounds_floats(&self, w: &Matrix<'_>) -> bool {
        self.coarse_floats && matches!(w.format, Format::F32 | Format::F16 | Format::BF16) && w.cols.is_multiple_of(32)
    }

    /// The kernels for bf16, where they are to be used.
    fn half(&self) -> Option<HalfKernels> {
        self.kernels.half.filter(|_| self.fine())
    }

    fn many_rows(
        &self,
        x: &[f32],
        rounded: &Rounded,
        n: usize,
        weights: &[Matrix<'_>],
        half: Option<HalfKernels>,
        out: &[Disjoint<'_, f32>],
    ) {
        /// Rows whose sums are held in the nearest cache until their used columns are copied out.
        const BLOCK: usize = 96;
        const WIDTH: usize = 2 * PANEL;
        let tasks = tasks(weights, |_| WIDTH);
        self.team.run(tasks.len(), &|t| {
            let (i, rows) = (tasks[t].0, tasks[t].1.clone());
            let w = &weights[i];
            let (cols, width) = (w.cols, rows.len());
            PANELS.with_borrow_mut(|panels| {
                let mut tile = [0f32; BLOCK * WIDTH];
                let mut second = [0f32; BLOCK * WIDTH];
                let as_floats = !(w.format.is_coded() || half.is_some() && self.rounds_floats(w));
                match half {
                    _ if as_floats => panels.unpack_floats(self, w, &rows),
                    Some(half) => panels.unpack_half(&half, w, &rows),
                    None => panels.unpack_codes(self, w, &rows),
                }
                for start in (0..n).step_by(BLOCK) {
                    let end = n.min(start + BLOCK);
                    match half {
                        _ if as_floats => {
                            let shape = GemmShape {
                                m: end - start,
                                n: width.next_multiple_of(PANEL),
                                k: cols,
                                lda: cols,
                                ldb: cols * PANEL,
                                ldc: WIDTH,
                                add: false,
                            };
                            (self.kernels.gemm)(shape, &x[start * cols..end * cols], &panels.floats, &mut tile);
                        }
                        Some(half) => {
                            let (a, b) = panels.half.split_at(cols * PANEL);
                            let x = HalfRows { all: &rounded.half, cols, padded: n.next_multiple_of(ROW_BLOCK) };
                            (half.mul)(&[a, b][..width.div_ceil(PANEL)], x, start..end, &mut tile, WIDTH);
                        }
                        None => {
                            let (two, used) = panels.code_panels(w, width);
                            let x = rounded.rows(cols);
                            (self.kernels.mul_panels)(&two[..used], x, start..end, &mut tile, WIDTH);
                            if self.fine() {
                                (self.kernels.mul_panels)(&two[..used], x, n + start..n + end, &mut second, WIDTH);
                                (self.kernels.lanes.add)(&second, &mut tile);
                            }
                        }
                    }
                    for r in start..end {
                        // SAFETY: a column range of the output belongs to one task.
                        let out = unsafe { out[i].slice(r * w.rows + rows.start..r * w.rows + rows.end) };
                        let from = &tile[(r - start) * WIDTH..][..WIDTH];
                        match out.as_chunks_mut::<WIDTH>().0 {
                            // A copy of known size is a few moves and no call.
                            [out] => *out = *from.first_chunk().expect("a row of the tile"),
                            _ => out.copy_from_slice(&from[..width]),
                        }
                    }
                }
            });
        });
    }
}

/// Cuts the rows of several matrices into tasks of `grain(matrix)` rows: (matrix, rows).
fn tasks(weights: &[Matrix<'_>], grain: impl Fn(&Matrix<'_>) -> usize) -> Vec<(usize, std::ops::Range<usize>)> {
    let mut tasks = Vec::new();
    for (i, w) in weights.iter().enumerate() {
        let grain = grain(w);
        tasks.extend((0..w.rows).step_by(grain).map(|start| (i, start..w.rows.min(start + grain))));
    }
    tasks
}

/// Columns that share a scale once unpacked.
fn sub(format: Format) -> usize {
    if matches!(format, Format::Q2_K | Format::Q3_K | Format::Q6_K) { 16 } else { 32 }
}

fn has_min(format: Format) -> bool {
    matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q2_K | Format::Q4_K | Format::Q5_K | Format::Q8_Z)
}

impl Panels {
    fn unpack_codes(&mut self, cpu: &Cpu, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
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

    fn code_panels(&self, w: &Matrix<'_>, width: usize) -> ([CodePanel<'_>; 2], usize) {
        let (code_len, scale_len) = (w.cols * PANEL, w.cols / sub(w.format) * PANEL);
        let panel = |p: usize| CodePanel {
            codes: &self.codes[p * code_len..(p + 1) * code_len],
            scale: &self.scale[p * scale_len..(p + 1) * scale_len],
            min: if has_min(w.format) { &self.min[p * scale_len..(p + 1) * scale_len] } else { &[] },
            sub: sub(w.format),
        };
        ([panel(0), panel(1)], width.div_ceil(PANEL))
    }

    fn unpack_half(&mut self, kernels: &HalfKernels, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
        let len = w.cols * PANEL;
        self.half.reserve(2 * len);
        for (p, first) in rows.clone().step_by(PANEL).enumerate() {
            let used = PANEL.min(rows.end - first);
            let data = &w.data[first * w.row_bytes()..(first + used) * w.row_bytes()];
            (kernels.pack)(w.format)(data, used, w.cols, &mut self.half[p * len..(p + 1) * len]);
        }
    }

    fn unpack_floats(&mut self, cpu: &Cpu, w: &Matrix<'_>, rows: &std::ops::Range<usize>) {
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
