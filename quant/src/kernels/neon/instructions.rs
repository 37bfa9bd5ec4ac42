//! Single instructions as safe functions, and the few small groups of them that the kernels share.
//!
//! What the compiler has no stable intrinsic for is a line of assembly. Like the rest it is always inlined, and so takes
//! the features of the function it lands in.

use std::arch::aarch64 as arch;
use std::arch::asm;

pub use arch::{float32x4_t, float64x2_t, int8x8_t, int8x16_t, int16x8_t, int32x4_t, int64x2_t, uint16x4_t};

/// The intrinsics of the same names.
macro_rules! instructions {
    ($($name:ident($($arg:ident: $from:ty),*) -> $to:ty;)*) => {$(
        #[inline(always)]
        pub fn $name($($arg: $from),*) -> $to {
            // SAFETY: an instruction of every AArch64 processor, on registers only.
            unsafe { arch::$name($($arg),*) }
        }
    )*};
}

instructions! {
    vdupq_n_s8(x: i8) -> int8x16_t;
    vdupq_n_s32(x: i32) -> int32x4_t;
    vdupq_n_f32(x: f32) -> float32x4_t;
    vget_low_s8(x: int8x16_t) -> int8x8_t;
    vmull_s8(a: int8x8_t, b: int8x8_t) -> int16x8_t;
    vmull_high_s8(a: int8x16_t, b: int8x16_t) -> int16x8_t;
    vpaddq_s16(a: int16x8_t, b: int16x8_t) -> int16x8_t;
    vpadalq_s16(acc: int32x4_t, x: int16x8_t) -> int32x4_t;
    vcvtq_f32_s32(x: int32x4_t) -> float32x4_t;
    vaddq_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vaddvq_f32(x: float32x4_t) -> f32;
    vmulq_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vmulq_n_f32(a: float32x4_t, b: f32) -> float32x4_t;
    vfmaq_f32(acc: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vfmaq_n_f32(acc: float32x4_t, a: float32x4_t, b: f32) -> float32x4_t;
    vfmsq_n_f32(acc: float32x4_t, a: float32x4_t, b: f32) -> float32x4_t;
    vtrn1q_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vtrn2q_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vtrn1q_f64(a: float64x2_t, b: float64x2_t) -> float64x2_t;
    vtrn2q_f64(a: float64x2_t, b: float64x2_t) -> float64x2_t;
    vzip1q_s32(a: int32x4_t, b: int32x4_t) -> int32x4_t;
    vzip2q_s32(a: int32x4_t, b: int32x4_t) -> int32x4_t;
    vzip1q_s64(a: int64x2_t, b: int64x2_t) -> int64x2_t;
    vzip2q_s64(a: int64x2_t, b: int64x2_t) -> int64x2_t;
    vreinterpretq_f32_f64(x: float64x2_t) -> float32x4_t;
    vreinterpretq_f32_s8(x: int8x16_t) -> float32x4_t;
    vreinterpretq_f64_f32(x: float32x4_t) -> float64x2_t;
    vreinterpretq_s32_s64(x: int64x2_t) -> int32x4_t;
    vreinterpretq_s32_s8(x: int8x16_t) -> int32x4_t;
    vreinterpretq_s64_s32(x: int32x4_t) -> int64x2_t;
    vreinterpretq_s64_s8(x: int8x16_t) -> int64x2_t;
    vreinterpretq_s8_f32(x: float32x4_t) -> int8x16_t;
    vreinterpretq_s8_s32(x: int32x4_t) -> int8x16_t;
    vreinterpretq_s8_s64(x: int64x2_t) -> int8x16_t;
}

/// `acc + a * b[LANE]`
#[inline(always)]
pub fn vfmaq_laneq_f32<const LANE: i32>(acc: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: an instruction of every AArch64 processor, on registers only.
    unsafe { arch::vfmaq_laneq_f32::<LANE>(acc, a, b) }
}

/// `x[LANE]` in all lanes.
#[inline(always)]
fn vdupq_laneq_s32<const LANE: i32>(x: int32x4_t) -> int32x4_t {
    // SAFETY: an instruction of every AArch64 processor, on registers only.
    unsafe { arch::vdupq_laneq_s32::<LANE>(x) }
}

#[inline(always)]
pub fn load_i8(from: &[i8; 16]) -> int8x16_t {
    // SAFETY: 16 bytes are there.
    unsafe { arch::vld1q_s8(from.as_ptr()) }
}

#[inline(always)]
pub fn load_f32(from: &[f32; 4]) -> float32x4_t {
    // SAFETY: four numbers are there.
    unsafe { arch::vld1q_f32(from.as_ptr()) }
}

#[inline(always)]
pub fn store_f32(to: &mut [f32; 4], v: float32x4_t) {
    // SAFETY: there is room for four numbers.
    unsafe { arch::vst1q_f32(to.as_mut_ptr(), v) }
}

#[inline(always)]
pub fn load_u16(from: &[u16; 4]) -> uint16x4_t {
    // SAFETY: four numbers are there.
    unsafe { arch::vld1_u16(from.as_ptr()) }
}

#[inline(always)]
pub fn store_i8(to: &mut [i8; 16], v: int8x16_t) {
    // SAFETY: there is room for 16 bytes.
    unsafe { arch::vst1q_s8(to.as_mut_ptr(), v) }
}

#[inline(always)]
pub fn store_u16(to: &mut [u16; 4], v: uint16x4_t) {
    // SAFETY: there is room for four numbers.
    unsafe { arch::vst1_u16(to.as_mut_ptr(), v) }
}

/// Four f16 to f32.
#[inline(always)]
pub fn widen_f16(half: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: an instruction of every AArch64 processor, on registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) half, options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// Four f32 to f16, to nearest even.
#[inline(always)]
pub fn narrow_f16(x: float32x4_t) -> uint16x4_t {
    let out;
    // SAFETY: an instruction of every AArch64 processor, on registers only.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) out, in(vreg) x, options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// The product of each row of `a` (2 x 8) with each row of `b`, added to `acc` (2 x 2). Only for functions compiled for
/// i8mm, which run only where the processor has it.
#[inline(always)]
pub fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: on registers only; the processor has it, see above.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Dot products of 8-bit integers.
pub trait Sdot {
    /// Adds to each of the four lanes of `acc` the products of its four bytes of `a` and `b`.
    fn sdot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
    /// The same with the four bytes of `b` at `LANE` for all lanes.
    fn sdot_lane<const LANE: i32>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
}

/// By widening multiplications.
pub struct Widening;

impl Sdot for Widening {
    #[inline(always)]
    fn sdot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // Activations stay within 127, so that two products fit into 16 bits: 2 * 128 * 127 < 2^15.
        let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
        let high = vmull_high_s8(a, b);
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }

    #[inline(always)]
    fn sdot_lane<const LANE: i32>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        let b = vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(b)));
        Self::sdot(acc, a, b)
    }
}

/// By `sdot`. Only for functions compiled for dotprod, which run only where the processor has it.
pub struct Dotprod;

impl Sdot for Dotprod {
    #[inline(always)]
    fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: on registers only; the processor has it, see above.
        unsafe {
            asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
                options(pure, nomem, nostack, preserves_flags));
        }
        acc
    }

    #[inline(always)]
    fn sdot_lane<const LANE: i32>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: on registers only; the processor has it, see above.
        unsafe {
            asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) acc, in(vreg) a, in(vreg) b, const LANE,
                options(pure, nomem, nostack, preserves_flags));
        }
        acc
    }
}

/// A table of 16 floats, byte by byte: `tbl` looks up bytes.
pub struct FloatTable([arch::uint8x16_t; 4]);

impl FloatTable {
    /// The table, ready.
    #[inline(always)]
    pub fn new(table: &[f32; 16]) -> Self {
        let mut bytes = [[0u8; 16]; 4];
        for (i, x) in table.iter().enumerate() {
            for (k, byte) in x.to_le_bytes().into_iter().enumerate() {
                bytes[k][i] = byte;
            }
        }
        // SAFETY: 16 bytes are there each.
        FloatTable(bytes.map(|plane| unsafe { arch::vld1q_u8(plane.as_ptr()) }))
    }

    /// What the low halves of 16 bytes stand for, and the high ones.
    #[inline(always)]
    pub fn nibbles(&self, codes: &[u8; 16]) -> ([float32x4_t; 4], [float32x4_t; 4]) {
        // SAFETY: 16 bytes are there; instructions of every AArch64 processor.
        unsafe {
            let codes = arch::vld1q_u8(codes.as_ptr());
            (self.look_up(arch::vandq_u8(codes, arch::vdupq_n_u8(15))), self.look_up(arch::vshrq_n_u8::<4>(codes)))
        }
    }

    #[inline(always)]
    fn look_up(&self, codes: arch::uint8x16_t) -> [float32x4_t; 4] {
        // SAFETY: instructions of every AArch64 processor, on registers only.
        unsafe {
            let planes = self.0.map(|plane| arch::vqtbl1q_u8(plane, codes));
            let wide = |v| arch::vreinterpretq_u16_u8(v);
            // The low halves of the floats and their high halves, for the first eight codes and the last.
            let low = [wide(arch::vzip1q_u8(planes[0], planes[1])), wide(arch::vzip2q_u8(planes[0], planes[1]))];
            let high = [wide(arch::vzip1q_u8(planes[2], planes[3])), wide(arch::vzip2q_u8(planes[2], planes[3]))];
            [
                arch::vreinterpretq_f32_u16(arch::vzip1q_u16(low[0], high[0])),
                arch::vreinterpretq_f32_u16(arch::vzip2q_u16(low[0], high[0])),
                arch::vreinterpretq_f32_u16(arch::vzip1q_u16(low[1], high[1])),
                arch::vreinterpretq_f32_u16(arch::vzip2q_u16(low[1], high[1])),
            ]
        }
    }
}

/// How four floats of a row become f32.
pub trait Floats {
    const BYTES: usize;
    /// The four numbers at the start of `bytes`, of which there are enough.
    fn four(bytes: &[u8]) -> float32x4_t;
}

pub struct F32;
pub struct F16;
pub struct BF16;

impl Floats for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn four(bytes: &[u8]) -> float32x4_t {
        let bytes: &[u8; 16] = first(bytes);
        // SAFETY: 16 bytes are there, and loads need no alignment.
        unsafe { arch::vld1q_f32(bytes.as_ptr().cast()) }
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn four(bytes: &[u8]) -> float32x4_t {
        widen_f16(four_halves(bytes))
    }
}

impl Floats for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn four(bytes: &[u8]) -> float32x4_t {
        let half = four_halves(bytes);
        // SAFETY: instructions of every AArch64 processor, on registers only.
        unsafe { arch::vreinterpretq_f32_u32(arch::vshlq_n_u32::<16>(arch::vmovl_u16(half))) }
    }
}

#[inline(always)]
fn four_halves(bytes: &[u8]) -> uint16x4_t {
    let bytes: &[u8; 8] = first(bytes);
    // SAFETY: 8 bytes are there, and loads need no alignment.
    unsafe { arch::vld1_u16(bytes.as_ptr().cast()) }
}

#[inline(always)]
fn first<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    match bytes.first_chunk() {
        Some(array) => array,
        None => panic!("{N} bytes of floats cut to {}", bytes.len()),
    }
}

/// Rows to columns, 4 x 4.
#[inline(always)]
pub fn transpose(v: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let wide = |v| vreinterpretq_f64_f32(v);
    let (a, b) = (vtrn1q_f32(v[0], v[1]), vtrn1q_f32(v[2], v[3]));
    let (c, d) = (vtrn2q_f32(v[0], v[1]), vtrn2q_f32(v[2], v[3]));
    [
        vreinterpretq_f32_f64(vtrn1q_f64(wide(a), wide(b))),
        vreinterpretq_f32_f64(vtrn1q_f64(wide(c), wide(d))),
        vreinterpretq_f32_f64(vtrn2q_f64(wide(a), wide(b))),
        vreinterpretq_f32_f64(vtrn2q_f64(wide(c), wide(d))),
    ]
}
