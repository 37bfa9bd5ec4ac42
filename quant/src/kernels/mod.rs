//! Kernels: one table of functions per instruction set, chosen once at start.
//!
//! Every function has a plain version in `scalar`, which is the oracle of the tests. Sums are cut by the shape of the
//! operands alone, so a result does not depend on the number of threads or on what else is in a batch.

#[cfg(target_arch = "x86_64")]
mod across512;
#[cfg(target_arch = "x86_64")]
mod ahead;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "x86_64")]
mod bf16;
#[cfg(target_arch = "x86_64")]
mod codes256;
#[cfg(target_arch = "x86_64")]
mod codes512;
mod columns;
#[cfg(target_arch = "x86_64")]
mod exp512;
#[cfg(target_arch = "x86_64")]
mod few256;
#[cfg(target_arch = "x86_64")]
mod few512;
#[cfg(target_arch = "x86_64")]
mod floats512;
#[cfg(target_arch = "x86_64")]
mod heads512;
pub(crate) mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod panel256;
#[cfg(target_arch = "x86_64")]
mod peaks;
#[cfg(target_arch = "x86_64")]
mod processor;
pub mod scalar;
#[cfg(test)]
mod tests;
#[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "emulate-amx")))]
mod tiles;
mod words;
#[cfg(target_arch = "x86_64")]
mod words256;

use crate::formats::Format;
pub use columns::{PackColumns, PackHalfColumns};

/// An instruction set that has kernels here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust: runs anywhere, and is what the others are checked against.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
    Avx2,
    /// AVX2 with AVX-VNNI (Alder Lake and later).
    AvxVnni,
    /// x86-64 with AVX-512 F/BW/DQ/VL and VNNI (Ice Lake, Zen 4 and later).
    Avx512,
    /// AVX-512 with the AMX bf16 matrix unit (Sapphire Rapids and later).
    Amx,
    /// AArch64 Advanced SIMD; dot products and i8mm are used where the processor has them.
    Neon,
}

impl Isa {
    /// Every instruction set, from the plainest to the most capable.
    pub const ALL: [Isa; 6] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];

    /// The name that `RUSHLIGHT_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
        }
    }

    /// Whether this machine (and its operating system) can run it.
    pub fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::available(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx_vnni::available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => avx512::available() && amx::available(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The most capable one that this machine can run.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Isa::Scalar)
    }

    /// The one that the environment variable `RUSHLIGHT_ISA` names, or else the best.
    ///
    /// # Errors
    /// When the variable names no instruction set, or one that this machine lacks.
    pub fn from_env() -> Result<Isa, String> {
        let Some(name) = std::env::var_os("RUSHLIGHT_ISA").filter(|v| !v.is_empty()) else { return Ok(Isa::best()) };
        let names = || Isa::ALL.iter().filter(|i| i.available()).map(|i| i.name()).collect::<Vec<_>>().join(", ");
        match Isa::ALL.into_iter().find(|isa| name == isa.name()) {
            Some(isa) if isa.available() => Ok(isa),
            Some(isa) => Err(format!(
                "RUSHLIGHT_ISA={}: this machine does not have it; unset it or choose from: {}",
                isa.name(),
                names()
            )),
            None => Err(format!(
                "RUSHLIGHT_ISA={}: no such instruction set; choose from: {}",
                name.to_string_lossy(),
                names()
            )),
        }
    }

    /// This instruction set's kernels. A caller has asked [`Isa::available`] first; where it has not, the scalar ones
    /// are given.
    pub(crate) fn kernels(self) -> Kernels {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if self.available() => avx2::kernels(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni if self.available() => avx_vnni::kernels(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if self.available() => avx512::kernels(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if self.available() => amx::kernels(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::kernels(),
            _ => scalar::kernels(),
        }
    }
}

/// One row of 8-bit activations: `x[i] ~ d[i/32] * q[i]` (round to nearest, `d = max|x| / 127` over each 32).
#[derive(Clone, Copy)]
pub struct QuantizedRow<'a> {
    /// Codes, -127..=127; `[cols]`.
    pub q: &'a [i8],
    /// Scales; `[cols / 32]`.
    pub d: &'a [f32],
    /// `d * sum(q)` over each 16; `[cols / 16]`.
    pub s16: &'a [f32],
    /// `d * sum(q)` over each 32; `[cols / 32]`.
    pub s32: &'a [f32],
    /// `-128 * sum(q)` over each 16; `[cols / 16]`.
    pub c16: &'a [i32],
    /// `-128 * sum(q)` over each 32; `[cols / 32]`.
    pub c32: &'a [i32],
}

/// A [`QuantizedRow`] being written.
pub struct QuantizedRowMut<'a> {
    /// See [`QuantizedRow::q`].
    pub q: &'a mut [i8],
    /// See [`QuantizedRow::d`].
    pub d: &'a mut [f32],
    /// See [`QuantizedRow::s16`].
    pub s16: &'a mut [f32],
    /// See [`QuantizedRow::s32`].
    pub s32: &'a mut [f32],
    /// See [`QuantizedRow::c16`].
    pub c16: &'a mut [i32],
    /// See [`QuantizedRow::c32`].
    pub c32: &'a mut [i32],
}

/// Outputs (weight rows) in one panel.
pub const PANEL: usize = 16;

/// 16 weight rows unpacked for many-row products. Codes are interleaved `[cols/4][16][4]`, so that 64 bytes hold four
/// consecutive columns of 16 rows; scales and minimums are `[cols/sub][16]`.
#[derive(Clone, Copy)]
pub struct CodePanel<'a> {
    /// Signed codes, or codes + 128 where the kernels set [`Kernels::biased_codes`].
    pub codes: &'a [i8],
    /// Scales.
    pub scale: &'a [f32],
    /// Minimums (weight = scale * code - min); empty for formats without.
    pub min: &'a [f32],
    /// Columns that share a scale: 16 or 32.
    pub sub: usize,
}

/// Rows of 8-bit activations, one after another: `QuantizedRow`s of `cols` columns.
#[derive(Clone, Copy)]
pub struct QuantizedRows<'a> {
    /// The arrays of all rows.
    pub all: QuantizedRow<'a>,
    /// Columns of a row.
    pub cols: usize,
}

/// Rows of bf16 activations in blocks of 16 rows by 32 columns, which lie as tiles are loaded.
#[derive(Clone, Copy)]
pub struct HalfRows<'a> {
    /// `[padded / 16][parts][cols / 32][16][32]`, see [`HalfKernels::parts`].
    pub all: &'a [u16],
    /// Columns of a row; a multiple of 32.
    pub cols: usize,
    /// Rows rounded up to a multiple of [`ROW_BLOCK`].
    pub padded: usize,
}

/// Unpacks `rows` (at most 16) packed weight rows of `cols` columns into a panel of bf16, interleaved
/// `[parts][cols / 2][16][2]`; absent rows become zeros.
pub type PackHalf = fn(data: &[u8], rows: usize, cols: usize, out: &mut [u16]);
/// [`MulPanels`] for bf16. The rows begin at a multiple of [`ROW_BLOCK`].
pub type MulHalf = fn(panels: &[&[u16]], x: HalfRows<'_>, rows: std::ops::Range<usize>, out: &mut [f32], stride: usize);

/// Products of `used` packed weight rows, of at most two panels, with few rows of activations: the sums that
/// [`HalfKernels::pack`] and [`HalfKernels::mul`] give, but of the panels only [`NEAR`] columns are there at a time, in
/// `near` (twice [`NEAR`] times [`PANEL`] numbers). `out` has room for a multiple of eight rows.
pub type MulShort = fn(
    data: &[u8],
    used: usize,
    x: HalfRows<'_>,
    rows: std::ops::Range<usize>,
    near: &mut [u16],
    out: &mut [f32],
    stride: usize,
);
/// See [`MulShort`].
pub const NEAR: usize = 256;

/// [`MulHalf`] to wherever sums belong.
///
/// # Safety
/// At `out` is a row of sums for each of `rows`, each `stride` behind the one before.
pub type MulHalfTo =
    unsafe fn(panels: &[&[u16]], x: HalfRows<'_>, rows: std::ops::Range<usize>, out: *mut f32, stride: usize);

/// Kernels for many rows of bf16.
///
/// With two `parts` a number is the sum of two of bf16, the second what rounding left of the first: 16 bits of it, nearly
/// f32. Of the four products of two such numbers the smallest is left out (Henry, Tang and Heinecke 2019, "Leveraging the
/// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations"). Where something has two parts, the second
/// lies behind the whole of the first: of a block of rows, of a panel.
#[derive(Clone, Copy)]
pub struct HalfKernels {
    /// Numbers of bf16 that stand for one: 1 or 2.
    pub parts: usize,
    /// Up to 16 rows of f32 to a block of bf16 (see [`HalfRows`]), to nearest even.
    pub round: fn(x: &[f32], cols: usize, out: &mut [u16]),
    /// For block formats, and for F32, F16 and BF16. See [`HalfKernels::weight_parts`].
    pub pack: fn(Format) -> PackHalf,
    /// Up to 16 rows of `len` f32, `stride` apart, as a panel `[parts][len / 2][16][2]`: a right side whose columns they
    /// are. Absent rows, and columns up to a multiple of 32, are zeros.
    pub across: fn(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [u16]),
    /// `used` rows of `len` f32, `stride` apart, as panels `[parts][used / 2][16][2]` at distance `ldb`: a right side whose
    /// rows they are. Rows up to a multiple of 32, and columns of a panel behind the last, are zeros.
    pub pairs: fn(rows: &[f32], stride: usize, used: usize, len: usize, ldb: usize, out: &mut [u16]),
    /// 32 columns of rows in one part, from column `32 * step` on, as two panels `[padded / 2][16][2]`, one behind the other:
    /// a right side whose rows they are.
    pub turn: fn(x: HalfRows<'_>, step: usize, out: &mut [u16]),
    /// The products. A panel that is as long as one part has no second.
    pub mul: MulHalf,
    /// The same, where each sum is written once and need not be near.
    pub mul_to: Option<MulHalfTo>,
    /// For block formats, where few rows are multiplied faster while weights are unpacked.
    pub short: Option<fn(Format) -> MulShort>,
}

impl HalfKernels {
    /// Parts that [`HalfKernels::pack`] makes of weights: those of BF16 leave nothing.
    pub fn weight_parts(&self, format: Format) -> usize {
        if format == Format::BF16 { 1 } else { self.parts }
    }
}

/// Rows of 16-bit activations: `x[i] ~ d[i/32] * q[i]` (round to nearest, `d = max|x| / 32767` over each 32).
#[derive(Clone, Copy)]
pub struct WordRows<'a> {
    /// Codes, -32767..=32767; `[rows][cols]`.
    pub q: &'a [i16],
    /// Scales; `[rows][cols / 32]`.
    pub d: &'a [f32],
    /// `d * sum(q)` over each 16; `[rows][cols / 16]`.
    pub s16: &'a [f32],
    /// `d * sum(q)` over each 32; `[rows][cols / 32]`.
    pub s32: &'a [f32],
    /// Columns of a row.
    pub cols: usize,
}

/// One of the [`WordRows`] being written.
pub struct WordRowMut<'a> {
    /// See [`WordRows::q`].
    pub q: &'a mut [i16],
    /// See [`WordRows::d`].
    pub d: &'a mut [f32],
    /// See [`WordRows::s16`].
    pub s16: &'a mut [f32],
    /// See [`WordRows::s32`].
    pub s32: &'a mut [f32],
}

/// A [`CodePanel`] whose codes are words, interleaved `[cols / 2][16][2]`.
#[derive(Clone, Copy)]
pub struct WordPanel<'a> {
    /// Signed codes.
    pub codes: &'a [i16],
    /// See [`CodePanel::scale`].
    pub scale: &'a [f32],
    /// See [`CodePanel::min`].
    pub min: &'a [f32],
    /// See [`CodePanel::sub`].
    pub sub: usize,
}

/// [`PackCodes`] for a [`WordPanel`].
pub type PackWords = fn(data: &[u8], rows: usize, cols: usize, codes: &mut [i16], scale: &mut [f32], min: &mut [f32]);
/// [`MulPanels`] for words.
pub type MulWords =
    fn(panels: &[WordPanel<'_>], x: WordRows<'_>, rows: std::ops::Range<usize>, out: &mut [f32], stride: usize);

/// Kernels for many rows of 16-bit activations.
#[derive(Clone, Copy)]
pub struct WordKernels {
    /// Rounds a row.
    pub round: fn(x: &[f32], out: WordRowMut<'_>),
    /// For block formats.
    pub pack: fn(Format) -> PackWords,
    /// The products.
    pub mul: MulWords,
}

/// `out[h * distance ..][..dim] += sum_j p[h * stride + j] * values[j]` for `heads` rows.
pub type MixHeads =
    fn(p: &[f32], stride: usize, heads: usize, values: &[u16], dim: usize, out: &mut [f32], distance: usize);

/// Attention of one position: a row for each of the query heads that share a key head, and f16 keys and values whose
/// width is a multiple of 16.
#[derive(Clone, Copy)]
pub struct HalfHeads {
    /// `out[h * stride + j] = q[h] . keys[j]` for the rows of `q` and of `keys`, which are `dim` wide.
    pub scores: fn(q: &[f32], dim: usize, keys: &[u16], out: &mut [f32], stride: usize),
    /// See [`MixHeads`].
    pub mix: MixHeads,
}

/// Rows that the widest kernels take at a time.
pub const ROW_BLOCK: usize = 32;

impl<'a> QuantizedRows<'a> {
    /// Row `i`.
    pub fn row(&self, i: usize) -> QuantizedRow<'a> {
        let (a, k) = (&self.all, self.cols);
        QuantizedRow {
            q: &a.q[i * k..(i + 1) * k],
            d: &a.d[i * (k / 32)..(i + 1) * (k / 32)],
            s16: &a.s16[i * (k / 16)..(i + 1) * (k / 16)],
            s32: &a.s32[i * (k / 32)..(i + 1) * (k / 32)],
            c16: &a.c16[i * (k / 16)..(i + 1) * (k / 16)],
            c32: &a.c32[i * (k / 32)..(i + 1) * (k / 32)],
        }
    }
}

/// Dot products of `out.len()` packed weight rows (`data`, one after another) with one row of 8-bit activations.
pub type DotCodes = fn(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]);
/// The same for the rows `rows` of `x`, bit for bit: `out[i * (out.len() / rows.len()) + o]` is row `rows.start + i` times
/// weight row `o`.
pub type DotBatch = fn(data: &[u8], x: QuantizedRows<'_>, rows: std::ops::Range<usize>, out: &mut [f32]);
/// Dot products of `out.len()` rows of floats with a row of f32.
pub type DotFloats = fn(data: &[u8], x: &[f32], out: &mut [f32]);
/// Unpacks `rows` (at most 16) packed weight rows of `cols` columns into a panel; absent rows become zeros.
pub type PackCodes = fn(data: &[u8], rows: usize, cols: usize, codes: &mut [i8], scale: &mut [f32], min: &mut [f32]);
/// Unpacks `rows` (at most 16) rows of `cols` floats into `[cols][16]` f32; absent rows become zeros.
pub type PackFloats = fn(data: &[u8], rows: usize, cols: usize, out: &mut [f32]);
/// `out[r * stride + p * 16 + o] = x[r] . panels[p][o]` for the rows `rows` of `x` and one or two
/// panels.
pub type MulPanels =
    fn(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: std::ops::Range<usize>, out: &mut [f32], stride: usize);
/// `c[r * ldc + j] (+)= sum_k a[r * lda + k] * b[j / 16][k][j % 16]` for `m` rows and `n` columns, where `b` holds
/// panels `[k][16]` at distance `ldb`; with `add` the products are added to `c`.
pub type Gemm = fn(shape: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]);

/// The sizes of a [`Gemm`].
#[derive(Clone, Copy, Debug)]
pub struct GemmShape {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `c` (and 16-column panels of `b`, the last of which may be partly used).
    pub n: usize,
    /// Columns of `a`.
    pub k: usize,
    /// Distance between rows of `a`.
    pub lda: usize,
    /// Distance between panels of `b`.
    pub ldb: usize,
    /// Distance between rows of `c`.
    pub ldc: usize,
    /// Add to `c` instead of overwriting it.
    pub add: bool,
}

/// Functions that keep an arithmetic unit busy for about so many steps and give the number of operations; none where it
/// is not measured.
#[derive(Clone, Copy, Default)]
pub struct Peaks {
    /// 8-bit integers.
    pub int8: Option<fn(steps: u64) -> u64>,
    /// bf16.
    pub bf16: Option<fn(steps: u64) -> u64>,
    /// Single precision.
    pub f32: Option<fn(steps: u64) -> u64>,
}

/// Has the processor bring all of `data` closer. What is then read in short pieces of many rows does not wait for memory
/// at each of them.
pub(crate) fn fetch<T>(data: &[T]) {
    for line in data.chunks(64 / size_of::<T>()) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has it, and it changes nothing.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: every AArch64 processor has it, and it changes nothing.
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) line.as_ptr(), options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = line;
    }
}

/// The kernels of one instruction set.
pub struct Kernels {
    /// Which one.
    pub isa: Isa,
    /// Whether [`PackCodes`] stores codes + 128 (VNNI multiplies unsigned by signed).
    pub biased_codes: bool,
    /// See [`QuantizedRow`].
    pub quantize: fn(x: &[f32], out: QuantizedRowMut<'_>),
    /// For block formats.
    pub dot_codes: fn(Format) -> DotCodes,
    /// For block formats, where several rows of activations can share the unpacking of weights.
    pub dot_batch: fn(Format) -> Option<DotBatch>,
    /// For the formats that are multiplied as floats (not [`Format::is_coded`]).
    pub dot_floats: fn(Format) -> DotFloats,
    /// For block formats.
    pub pack_codes: fn(Format) -> PackCodes,
    /// For the formats that are multiplied as floats.
    pub pack_floats: fn(Format) -> PackFloats,
    /// For all formats.
    pub columns: fn(Format) -> PackColumns,
    /// Many rows of 8-bit activations.
    pub mul_panels: MulPanels,
    /// Many rows of f32.
    pub gemm: Gemm,
    /// f16 bits to f32, element by element.
    pub f16_to_f32: fn(src: &[u16], dst: &mut [f32]),
    /// f32 to f16 bits, round to nearest even.
    pub f32_to_f16: fn(src: &[f32], dst: &mut [u16]),
    /// Attention over f16, where that is faster than over f32 read from it.
    pub half_heads: Option<HalfHeads>,
    /// Many rows of bf16, where that is faster than integers for block formats.
    pub half: Option<HalfKernels>,
    /// Columns of all formats, for the products of `half`.
    pub half_columns: Option<fn(Format) -> PackHalfColumns>,
    /// Many rows of bf16 in two parts, where that is faster than f32.
    pub split: Option<HalfKernels>,
    /// Many rows of 16-bit activations, where that is faster than twice 8 bits.
    pub words: Option<WordKernels>,
    /// What its arithmetic is measured by.
    pub peaks: Peaks,
    /// Element-wise operations and short reductions, compiled for this instruction set.
    pub lanes: Lanes,
}

pub(crate) use lanes::{Lanes, QUERIES, exp};
