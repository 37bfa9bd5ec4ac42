//! Codes of sixteen rows at a time, a row in each lane.

use super::{Codes, IQ4_TABLE, MXFP4_TABLE, Quads, raised, turned};
use crate::formats::*;
use std::arch::x86_64::*;

/// Where a run begins in each row of a panel.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Rows {
    pub(in crate::kernels) first: *const u8,
    pub(in crate::kernels) row_bytes: usize,
}

impl Rows {
    /// Sixteen bytes from byte `at` on: lane `r` of register `j` holds bytes `4 j..4 j + 4` of row `r`.
    ///
    /// # Safety
    /// These bytes in each row, and AVX-512.
    #[inline(always)]
    unsafe fn piece(self, at: usize) -> [__m512i; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut x = [_mm512_setzero_si512(); 4];
            for i in 0..4 {
                let p = self.first.add(at + i * self.row_bytes);
                let (a, b) = (p.cast(), p.add(4 * self.row_bytes).cast());
                let (c, d) = (p.add(8 * self.row_bytes).cast(), p.add(12 * self.row_bytes).cast());
                let two = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(_mm_loadu_si128(a)), _mm_loadu_si128(b));
                let three = _mm512_inserti32x4::<2>(two, _mm_loadu_si128(c));
                x[i] = _mm512_inserti32x4::<3>(three, _mm_loadu_si128(d));
            }
            turned(x)
        }
    }
}

/// A block format, sixteen rows at a time.
///
/// # Safety
/// The method needs AVX-512 with VBMI, and a run in each row.
pub(in crate::kernels) trait Panels: Quads {
    /// Half `h` of the codes of group `g`, raised by `ZERO`, four columns a register.
    unsafe fn half(rows: Rows, g: usize, h: usize) -> [__m512i; 4];
}

/// `(x >> by) & mask`.
#[inline(always)]
unsafe fn field(x: __m512i, by: usize, mask: i8) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_and_si512(_mm512_srl_epi64(x, _mm_cvtsi32_si128(by as i32)), _mm512_set1_epi8(mask)) }
}

/// `codes` with `value` added where a byte of `bits` has the bit of that place in `bit`.
#[inline(always)]
unsafe fn with_bit(codes: __m512i, bits: __m512i, bit: __m512i, value: i8) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(bits, bit), codes, _mm512_set1_epi8(value)) }
}

/// Byte `k` of each lane in all of its bytes.
#[inline(always)]
unsafe fn byte(x: __m512i, k: usize) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let k = k as i32 * 0x0101_0101;
        let places = _mm_setr_epi32(k, k + 0x0404_0404, k + 0x0808_0808, k + 0x0c0c_0c0c);
        _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(places))
    }
}

/// `code`, of columns `4 c..4 c + 4` of a group, with the fifth bits that begin at byte `at`.
#[inline(always)]
unsafe fn fifth_bit(rows: Rows, at: usize, c: usize, code: __m512i) -> __m512i {
    // SAFETY: the caller's rows, sixteen bytes from there on.
    unsafe {
        let bit = _mm512_set1_epi32(if c.is_multiple_of(2) { 0x0804_0201 } else { 0x8040_2010_u32 as i32 });
        with_bit(code, byte(rows.piece(at)[0], c / 2), bit, 16)
    }
}

/// For each format, where the sixteen bytes begin that hold half `h` of group `g`, and what code comes from register `j` of them.
/// (What is asked for again and again, like bits that several groups share, the compiler finds and loads once.)
macro_rules! halves {
    ($($name:ident |$rows:ident, $g:ident, $h:ident| $at:expr, |$x:ident, $j:ident| $code:expr;)*) => {
        $(impl Panels for $name {
            #[inline(always)]
            unsafe fn half($rows: Rows, $g: usize, $h: usize) -> [__m512i; 4] {
                // SAFETY: the caller's rows.
                unsafe {
                    let mut codes = $rows.piece($at);
                    for $j in 0..4 {
                        let $x = codes[$j];
                        codes[$j] = $code;
                    }
                    codes
                }
            }
        })*
    };
}

halves! {
    Q4_0 |rows, g, h| 18 * g + 2, |x, j| field(x, 4 * h, 15);
    Q4_1 |rows, g, h| 20 * g + 4, |x, j| field(x, 4 * h, 15);
    Q5_0 |rows, g, h| 22 * g + 6, |x, j| fifth_bit(rows, 22 * g + 2, 4 * h + j, field(x, 4 * h, 15));
    Q5_1 |rows, g, h| 24 * g + 8, |x, j| fifth_bit(rows, 24 * g + 4, 4 * h + j, field(x, 4 * h, 15));
    IQ4_NL |rows, g, h| 18 * g + 2, |x, j| raised(&IQ4_TABLE, 128, [field(x, 4 * h, 15)])[0];
    IQ4_XS |rows, g, h| 16 * g + 8, |x, j| raised(&IQ4_TABLE, 128, [field(x, 4 * h, 15)])[0];
    MXFP4 |rows, g, h| 17 * g + 1, |x, j| raised(&MXFP4_TABLE, Self::ZERO, [field(x, 4 * h, 15)])[0];
    // Each block has its own zero point, in the byte before its codes.
    Q4_Z |rows, g, h| 19 * g + 3, |x, j| {
        let up = _mm512_sub_epi8(_mm512_set1_epi8(Self::ZERO as i8), byte(rows.piece(19 * g + 2)[0], 0));
        _mm512_add_epi8(field(x, 4 * h, 15), up)
    };
    Q8_0 |rows, g, h| 34 * g + 2 + 16 * h, |x, j| _mm512_xor_si512(x, _mm512_set1_epi8(-128));
    Q8_F |rows, g, h| 36 * g + 4 + 16 * h, |x, j| _mm512_xor_si512(x, _mm512_set1_epi8(-128));
    Q8_Z |rows, g, h| 40 * g + 8 + 16 * h, |x, j| _mm512_xor_si512(x, _mm512_set1_epi8(-128));
    Q2_K |rows, g, h| 16 + g / 4 * 32 + 16 * h, |x, j| field(x, g % 4 * 2, 3);
    Q3_K |rows, g, h| 32 + g / 4 * 32 + 16 * h, |x, j| {
        with_bit(field(x, g % 4 * 2, 3), rows.piece(16 * h)[j], _mm512_set1_epi8((1 << g) as i8), 4)
    };
    Q4_K |rows, g, h| 16 + g / 2 * 32 + 16 * h, |x, j| field(x, g % 2 * 4, 15);
    Q5_K |rows, g, h| 48 + g / 2 * 32 + 16 * h, |x, j| {
        with_bit(field(x, g % 2 * 4, 15), rows.piece(16 + 16 * h)[j], _mm512_set1_epi8((1 << g) as i8), 16)
    };
    Q6_K |rows, g, h| g / 4 * 64 + g % 2 * 32 + 16 * h, |x, j| {
        let high = field(rows.piece(128 + g / 4 * 32 + 16 * h)[j], g % 4 * 2, 3);
        _mm512_or_si512(field(x, g % 4 / 2 * 4, 15), _mm512_slli_epi16::<4>(high))
    };
}
