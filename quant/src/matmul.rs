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
//! | few | all | 8 bits, a scale over each 32 columns (`kernels::QuantizedRow`); 16 bits where the matrix asks for it | exact |
//! | many | AMX; AVX-512 with a fast bf16 ([`Cpu::prompts_in_bf16`]) | bf16 | rounded to bf16 |
//! | many, where the matrix asks for more | AMX | bf16 in two parts ([`Cpu::prompts_in_two_parts`]) | in two parts |
//! | many | AVX2; plain Rust | 16 bits, a scale over each 32 columns (`kernels::WordRows`) | exact |
//! | many | others | 16 bits: two rows of 8 bits, the second what the first left over | exact |
//!
//! With AMX many rows meet F16 and BF16 in two parts too: nearly as exact as f32 and several times as fast.
//!
//! [`PromptRounding::EightBits`] has many rows rounded as ggml rounds them.
//! Sums of integer products are exact within a scale group, and f32 across groups.

mod backward;
mod few;
mod floats;
mod low_rank;
mod panels;
mod rounded;

use crate::cpu::Cpu;
use crate::formats::Format;
use crate::kernels::{GemmShape, HalfKernels, HalfRows, MulShort, NEAR, PANEL, ROW_BLOCK, WordKernels};
use crate::threads::Disjoint;
pub(crate) use few::Order;
use low_rank::Tail;
pub use low_rank::{Back, Down, Up};
use panels::Panels;
use rounded::{Rounded, Rounding};
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

/// What a prompt meets a matrix as.
#[derive(Clone, Copy)]
enum Meet {
    Floats,
    Half(HalfKernels),
    Words(WordKernels),
    /// Rows rounded so.
    Codes(Rounding),
}

impl Meet {
    /// Different for what rows must be rounded apart for.
    fn kind(&self) -> (usize, usize) {
        match self {
            Meet::Floats => (0, 0),
            Meet::Half(half) => (1, half.parts),
            Meet::Words(_) => (2, 0),
            Meet::Codes(Rounding::Wide(span)) => (3, *span),
            Meet::Codes(_) => (3, 0),
        }
    }

    /// Bytes of an activation.
    fn width(&self) -> usize {
        match self {
            Meet::Floats => 4,
            Meet::Half(half) => 2 * half.parts,
            Meet::Words(_) => 2,
            Meet::Codes(_) => 1,
        }
    }
}

/// Most rows whose sums are held in the nearest cache until their used columns are copied out.
const BLOCK: usize = 96;
/// Outputs of a pair of panels, which products take together.
const WIDTH: usize = 2 * PANEL;

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
        ROUNDED.with_borrow_mut(|rounded| match phase {
            Phase::Generate => {
                if weights.iter().any(|w| w.format.is_coded()) {
                    let fine = weights.iter().any(|w| w.fine);
                    rounded.quantize(self, x, n, cols, if fine { Rounding::Twice } else { Rounding::Once });
                }
                self.few_rows(x, rounded.rows(cols), n, weights, &disjoint(out));
            }
            Phase::Prompt => {
                self.team.look_ahead(&[]);
                let meets: Vec<Meet> = weights.iter().map(|w| self.meet(w)).collect();
                // Matrices that activations are rounded for differently cannot share what was rounded.
                let mut rest = 0..weights.len();
                while let Some(first) = rest.next() {
                    let same = rest.clone().take_while(|i| meets[*i].kind() == meets[first].kind()).count();
                    rest.start += same;
                    let run = first..first + 1 + same;
                    match meets[first] {
                        Meet::Floats => {}
                        Meet::Half(half) => rounded.round_half(self, &half, x, n, cols, 0),
                        Meet::Words(words) => rounded.round_words(self, &words, x, n, cols),
                        Meet::Codes(rounding) => rounded.quantize(self, x, n, cols, rounding),
                    }
                    let (weights, tail) = (&weights[run.clone()], Tail::default());
                    self.many_rows(x, rounded, n, weights, meets[first], tail, &disjoint(&mut out[run]));
                }
            }
        });
    }

    fn meet(&self, w: &Matrix<'_>) -> Meet {
        let (half, split) = (self.half(), self.kernels.split.filter(|_| self.fine()));
        let words = self.kernels.words.filter(|_| self.fine());
        match (w.format, half, split, words) {
            (Format::F32 | Format::F16 | Format::BF16, Some(half), ..)
                if self.coarse_floats && w.cols.is_multiple_of(32) =>
            {
                Meet::Half(half)
            }
            (Format::F16 | Format::BF16, _, Some(split), _) if w.cols.is_multiple_of(32) => Meet::Half(split),
            (format, ..) if !format.is_coded() => Meet::Floats,
            (_, Some(half), ..) if !w.fine => Meet::Half(half),
            (_, _, Some(split), _) => Meet::Half(split),
            (.., Some(words)) => Meet::Words(words),
            (format, ..) => Meet::Codes(match (self.fine(), format.block_len()) {
                (true, _) => Rounding::Twice,
                (false, 32) => Rounding::Once,
                (false, span) => Rounding::Wide(span),
            }),
        }
    }

    fn fine(&self) -> bool {
        self.prompt_rounding == PromptRounding::Fine
    }

    /// Whether activations and weights of block formats meet as bf16 in prompts.
    pub fn prompts_in_bf16(&self) -> bool {
        self.half().is_some()
    }

    /// Whether matrices that ask for more than that, F16 and BF16 meet activations as bf16 in two parts in prompts.
    pub fn prompts_in_two_parts(&self) -> bool {
        self.kernels.split.is_some()
    }

    /// Whether what meets block formats in prompts exactly is rounded to 16 bits over each 32 columns, in one piece.
    pub fn prompts_in_words(&self) -> bool {
        self.kernels.words.is_some()
    }

    /// The kernels for bf16, where they are to be used.
    fn half(&self) -> Option<HalfKernels> {
        self.kernels.half.filter(|_| self.fine())
    }

    /// The kernel that takes `n` rows without panels, where there is one and a task has them at once.
    fn short(&self, half: HalfKernels, n: usize, w: &Matrix<'_>, tail: Tail<'_>) -> Option<MulShort> {
        let few = n <= BLOCK && tail.width == 0 && w.format.is_coded();
        half.short.filter(|_| few).map(|of| of(w.format))
    }

    /// How a task with many rows goes: pairs of panels that it unpacks, and rows that meet all of them before the next do.
    /// Where the rounded rows do not stay near ([`Cpu::near`]), they are then fetched from farther away less often.
    fn blocking(&self, n: usize, w: &Matrix<'_>, width: usize) -> (usize, usize) {
        let (room, row) = (self.near, w.cols * width);
        let pair = WIDTH * row;
        let block = if BLOCK * row <= room / 2 { BLOCK } else { ROW_BLOCK };
        // Enough tasks that no thread waits long for the last.
        let most = w.rows / WIDTH / (16 * self.threads());
        let pairs = room.saturating_sub(block * row).checked_div(pair).unwrap_or(0).min(most);
        if n * row + pair <= room || pairs < 2 { (1, BLOCK) } else { (pairs, block) }
    }

    fn many_rows(
        &self,
        x: &[f32],
        rounded: &Rounded,
        n: usize,
        weights: &[Matrix<'_>],
        meet: Meet,
        tail: Tail<'_>,
        out: &[Disjoint<'_, f32>],
    ) {
        let blocking = |w: &Matrix<'_>| self.blocking(n, w, meet.width());
        let tasks = tasks(weights, |w| blocking(w).0 * WIDTH);
        let task = |t: usize| {
            let (i, rows) = (tasks[t].0, tasks[t].1.clone());
            let w = &weights[i];
            let (cols, panel) = (w.cols, w.cols * PANEL);
            let block = blocking(w).1;
            let short = match meet {
                Meet::Half(half) => self.short(half, n, w, tail),
                _ => None,
            };
            PANELS.with_borrow_mut(|panels| {
                let mut tile = [0f32; BLOCK * WIDTH];
                let mut second = [0f32; BLOCK * WIDTH];
                match meet {
                    Meet::Floats => panels.unpack_floats(self, w, &rows),
                    Meet::Half(_) if short.is_some() => panels.half.reserve(WIDTH * NEAR),
                    Meet::Half(half) => panels.unpack_half(&half, w, &rows, tail),
                    Meet::Words(words) => panels.unpack_words(&words, w, &rows),
                    Meet::Codes(_) => panels.unpack_codes(self, w, &rows),
                }
                let pairs = rows.clone().step_by(WIDTH).enumerate();
                let parts = (0..n).step_by(block).flat_map(|start| pairs.clone().map(move |pair| (start, pair)));
                for (start, (pair, first)) in parts {
                    let (end, last) = (n.min(start + block), rows.end.min(first + WIDTH));
                    let width = last - first;
                    let used = width.div_ceil(PANEL);
                    match meet {
                        Meet::Floats => {
                            let shape = GemmShape {
                                m: end - start,
                                n: used * PANEL,
                                k: cols,
                                lda: cols,
                                ldb: panel,
                                ldc: WIDTH,
                                add: false,
                            };
                            let panels = &panels.floats[2 * pair * panel..];
                            (self.kernels.gemm)(shape, &x[start * cols..end * cols], panels, &mut tile);
                        }
                        Meet::Half(half) => {
                            let (cols, padded) = (cols + tail.width, n.next_multiple_of(ROW_BLOCK));
                            let x = HalfRows { all: &rounded.half, cols, padded };
                            if let Some(short) = short {
                                let data = &w.data[first * w.row_bytes()..];
                                short(data, width, x, start..end, &mut panels.half, &mut tile, WIDTH);
                            } else {
                                let panel = panel * half.weight_parts(w.format) + tail.width * PANEL;
                                let (a, b) = panels.half[2 * pair * panel..2 * (pair + 1) * panel].split_at(panel);
                                if let Some(mul_to) = half.mul_to.filter(|_| width == used * PANEL) {
                                    let to = out[i].pointer(start * w.rows + first..(end - 1) * w.rows + last);
                                    // SAFETY: a column range of the output belongs to one task.
                                    unsafe { mul_to(&[a, b][..used], x, start..end, to, w.rows) };
                                    continue;
                                }
                                (half.mul)(&[a, b][..used], x, start..end, &mut tile, WIDTH);
                            }
                        }
                        Meet::Words(words) => {
                            let panels = panels.word_panels(w, pair);
                            (words.mul)(&panels[..used], rounded.word_rows(cols), start..end, &mut tile, WIDTH);
                        }
                        Meet::Codes(rounding) => {
                            let panels = panels.code_panels(w, pair);
                            let x = rounded.rows(cols);
                            (self.kernels.mul_panels)(&panels[..used], x, start..end, &mut tile, WIDTH);
                            if rounding == Rounding::Twice {
                                (self.kernels.mul_panels)(&panels[..used], x, n + start..n + end, &mut second, WIDTH);
                                (self.kernels.lanes.add)(&second, &mut tile);
                            }
                        }
                    }
                    for r in start..end {
                        // SAFETY: a column range of the output belongs to one task.
                        let out = unsafe { out[i].slice(r * w.rows + first..r * w.rows + last) };
                        let from = &tile[(r - start) * WIDTH..][..WIDTH];
                        match out.as_chunks_mut::<WIDTH>().0 {
                            // A copy of known size is a few moves and no call.
                            [out] => *out = *from.first_chunk().expect("a row of the tile"),
                            _ => out.copy_from_slice(&from[..width]),
                        }
                    }
                }
            });
        };
        // Few rows are done soon: then what lies behind must have been fetched by the thread that takes it. Many are no faster so.
        if n <= BLOCK {
            self.team.run_in_stretches(tasks.len(), &task);
        } else {
            self.team.run(tasks.len(), &task);
        }
    }
}

fn disjoint<'a>(out: &'a mut [&mut [f32]]) -> Vec<Disjoint<'a, f32>> {
    out.iter_mut().map(|o| Disjoint::new(o)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;

    #[test]
    fn blocks_that_stay_near_give_the_same_bits() {
        let (n, rows, cols) = (111, 16 * 32 * 3 + 40, 256);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for format in [Format::Q4_0, Format::F16] {
                let data: Vec<u8> = (0..rows * format.row_bytes(cols).expect("whole blocks"))
                    .map(|i| 0x38 | ((i * 37 + i / 251) % 8) as u8)
                    .collect();
                let x: Vec<f32> = (0..n * cols).map(|i| (i * 31 % 61) as f32 / 16.0 - 1.9).collect();
                let matrix = Matrix::new(format, rows, cols, &data).expect("whole rows");
                let product = |near: usize| {
                    let mut cpu = Cpu::new(1, isa).with_coarse_floats(true);
                    cpu.near = near;
                    let blocking = cpu.blocking(n, &matrix, 2);
                    let mut out = vec![f32::NAN; n * rows];
                    cpu.matmul(Phase::Prompt, &x, n, &[matrix], &mut [&mut out]);
                    (blocking, out)
                };
                let (one, plain) = product(usize::MAX);
                assert_eq!(one, (1, 96));
                let mut weights = vec![0f32; rows * cols];
                format.decode(&data, &mut weights);
                for (i, got) in plain.iter().enumerate() {
                    let (x, w) = (&x[i / rows * cols..][..cols], &weights[i % rows * cols..][..cols]);
                    let (want, size) = x
                        .iter()
                        .zip(w)
                        .fold((0.0, 0.0), |(sum, size): (f32, f32), (x, w)| (x.mul_add(*w, sum), size + (x * w).abs()));
                    assert!((got - want).abs() <= 0.01 * size, "{} {format}: {i} is {got}, not {want}", isa.name());
                }
                for (near, blocking) in [(51 << 10, (2, 32)), (70 << 10, (3, 32)), (20 << 10, (1, 96))] {
                    let (got, out) = product(near);
                    assert_eq!(got, blocking, "{near}");
                    assert!(out == plain, "{} {format} {near}", isa.name());
                }
            }
        }
    }

    #[test]
    fn a_prompts_length_changes_no_bit() {
        let (rows, cols) = (16 * 3 + 5, 512);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for format in [Format::Q4_0, Format::Q4_K, Format::Q8_0, Format::F16] {
                let data: Vec<u8> = (0..rows * format.row_bytes(cols).expect("whole blocks"))
                    .map(|i| 0x34 | ((i * 29 + i / 253) % 4) as u8)
                    .collect();
                let x: Vec<f32> = (0..200 * cols).map(|i| (i * 31 % 61) as f32 / 16.0 - 1.9).collect();
                let matrix = Matrix::new(format, rows, cols, &data).expect("whole rows");
                let product = |n: usize, threads: usize| {
                    let mut out = vec![f32::NAN; n * rows];
                    let cpu = Cpu::new(threads, isa);
                    cpu.matmul(Phase::Prompt, &x[..n * cols], n, &[matrix], &mut [&mut out]);
                    out
                };
                let whole = product(200, 1);
                assert!(whole.iter().all(|y| y.is_finite()), "{} {format}", isa.name());
                for n in [1, 7, 16, 33, 95, 96, 97, 128] {
                    for threads in [1, 2] {
                        assert!(product(n, threads) == whole[..n * rows], "{} {format} {n}", isa.name());
                    }
                }
            }
        }
    }
}
