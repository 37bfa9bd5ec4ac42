//! Three rows of activations and more, of tokens being generated, by int8 tiles: sixteen rows of weights are a panel, a run of
//! which is unpacked at a time.
//!
//! Integers are exact, and what one row alone keeps in four lanes for each row of weights is four sums here: the terms of each
//! and their order, and with them the bits, are those of [`few512`].

use super::super::ahead::Ahead;
use super::super::codes512::by_quads;
use super::super::codes512::panels::{Panels, Rows};
use super::super::few512::{self, Factors, MOST, Meets};
use super::super::{DotBatch, PANEL, QuantizedRows};
use super::Config;
use crate::formats::Format;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The product for several rows.
pub(super) fn dot_batch(format: Format) -> Option<DotBatch> {
    fn entry<C: Panels>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
        let count = out.len() / rows.len().max(1);
        if rows.len() <= 2 || count < PANEL || x.cols < 256 {
            // SAFETY: as below.
            return unsafe { few512::dots::<C>(data, x, rows, out) };
        }
        // SAFETY: this table is handed out only where AMX and `codes512` are available.
        unsafe { panels::<C>(data, x, rows, out) }
    }
    by_quads!(format, entry)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
fn panels<C: Panels>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
    let (count, row_bytes) = (out.len() / rows.len(), few512::checked::<C>(data, x, &rows, out));
    let mut run = Run::new();
    let mut left = rows;
    while !left.is_empty() {
        // In equal parts.
        let n = left.len().div_ceil(left.len().div_ceil(MOST));
        let config = config::<C>(n);
        // SAFETY: the processor has AMX and the process the permission; `config` is 64 bytes in the layout of palette 1.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &config, options(nostack, preserves_flags)) };
        let to = out.len() - left.len() * count;
        for o in (0..count).step_by(PANEL) {
            // The last rows once more, where they are less than a panel.
            let o = o.min(count - PANEL);
            let of = Rows { first: data[o * row_bytes..].as_ptr(), row_bytes };
            // SAFETY: `checked` has seen all of these rows, there are sixteen of weights, and eight groups in each.
            unsafe { panel::<C>(of, x, left.start, n, &mut run, &mut out[to + o..], count) };
        }
        left.start += n;
    }
    // SAFETY: nothing is left in the tiles.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Registers of codes that share a scale.
const fn registers<C: Panels>() -> usize {
    if C::HALVES { 4 } else { 8 }
}

/// Tiles 0 to 3 for sums of `n` rows, 4 and 5 for their activations, 6 and 7 for codes that share a scale.
fn config<C: Panels>(n: usize) -> Config {
    let (n, k) = (n as u8, registers::<C>() as u8);
    let columns = 4 * u16::from(k);
    Config::of([(n, 64), (n, 64), (n, 64), (n, 64), (n, columns), (n, columns), (k, 64), (k, 64)])
}

/// A run of eight groups of a panel, and its products.
#[repr(C, align(64))]
struct Run {
    codes: [__m512i; 64],
    /// Of each group (or half of one), and of each row of activations: what tiles have stored.
    dots: MaybeUninit<[[__m512i; MOST]; 16]>,
    scales: [__m512; 16],
    mins: [__m512; 16],
}

impl Run {
    #[target_feature(enable = "avx512f")]
    fn new() -> Run {
        let (none, zero) = (_mm512_setzero_ps(), _mm512_setzero_si512());
        Run { codes: [zero; 64], dots: MaybeUninit::uninit(), scales: [none; 16], mins: [none; 16] }
    }

    /// Takes a panel's run apart.
    ///
    /// # Safety
    /// A run in each row; AVX-512 with VBMI.
    #[inline(always)]
    unsafe fn unpack<C: Panels>(&mut self, rows: Rows) {
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..4 {
                // Two groups before they are stored: some share their bytes.
                let (a, b) = (C::half(rows, 2 * i, 0), C::half(rows, 2 * i, 1));
                let (c, d) = (C::half(rows, 2 * i + 1, 0), C::half(rows, 2 * i + 1, 1));
                for (to, half) in self.codes[16 * i..16 * i + 16].as_chunks_mut::<4>().0.iter_mut().zip([a, b, c, d]) {
                    *to = half;
                }
            }
            let mut factors = [Factors { scales: [_mm512_setzero_ps(); 4], mins: [_mm512_setzero_ps(); 4] }; 4];
            for (i, four) in factors.iter_mut().enumerate() {
                let a = rows.first.add(4 * i * rows.row_bytes);
                let (b, c) = (a.add(rows.row_bytes), a.add(2 * rows.row_bytes));
                *four = Factors::of::<C>([a, b, c, c.add(rows.row_bytes)]);
            }
            let [a, b, c, d] = factors;
            for k in 0..if C::HALVES { 4 } else { 2 } {
                let scales = quarters([a.scales[k], b.scales[k], c.scales[k], d.scales[k]]);
                self.scales[4 * k..4 * k + 4].copy_from_slice(&scales);
                if C::HAS_MIN {
                    let mins = quarters([a.mins[k], b.mins[k], c.mins[k], d.mins[k]]);
                    self.mins[4 * k..4 * k + 4].copy_from_slice(&mins);
                }
            }
        }
    }

    /// The products of all codes and the rows of activations whose numbers begin at `q`.
    ///
    /// # Safety
    /// The tiles are as [`config`] says, and 256 numbers are in each of its rows.
    #[inline(always)]
    unsafe fn multiply<C: Panels>(&mut self, q: (*const i8, usize)) {
        let k = registers::<C>();
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "2:",
                "tilezero tmm0",
                "tileloadd tmm4, [{q} + {row}]",
                "tileloadd tmm6, [{codes} + {line}]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tilezero tmm1",
                "add {q}, {columns}",
                "add {codes}, {bytes}",
                "tileloadd tmm5, [{q} + {row}]",
                "tileloadd tmm7, [{codes} + {line}]",
                "tdpbsud tmm1, tmm5, tmm7",
                "tilezero tmm2",
                "add {q}, {columns}",
                "add {codes}, {bytes}",
                "tileloadd tmm4, [{q} + {row}]",
                "tileloadd tmm6, [{codes} + {line}]",
                "tdpbsud tmm2, tmm4, tmm6",
                "tilezero tmm3",
                "add {q}, {columns}",
                "add {codes}, {bytes}",
                "tileloadd tmm5, [{q} + {row}]",
                "tileloadd tmm7, [{codes} + {line}]",
                "tdpbsud tmm3, tmm5, tmm7",
                "add {q}, {columns}",
                "add {codes}, {bytes}",
                "tilestored [{dots} + {line}], tmm0",
                "tilestored [{dots} + {line} + 1024], tmm1",
                "tilestored [{dots} + {line} + 2048], tmm2",
                "tilestored [{dots} + {line} + 3072], tmm3",
                "add {dots}, 4096",
                "dec {n}",
                "jnz 2b",
                q = inout(reg) q.0 => _,
                row = in(reg) q.1,
                codes = inout(reg) self.codes.as_ptr() => _,
                line = in(reg) 64usize,
                columns = in(reg) 4 * k,
                bytes = in(reg) 64 * k,
                dots = inout(reg) self.dots.as_mut_ptr() => _,
                n = inout(reg) 16 / k => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Adds to `sums` the products of the groups (or halves) from `first` on with row `b` of activations.
    ///
    /// # Safety
    /// What `meets` says of that row, the products that [`Run::multiply`] makes, and AVX-512.
    #[inline(always)]
    unsafe fn add<C: Panels>(&self, meets: Meets, b: usize, first: usize, sums: &mut [__m512; 4]) {
        // SAFETY: the caller's promise.
        unsafe {
            let units = 64 / registers::<C>();
            let (d, mins) = (meets.d.0.add(b * meets.d.1), meets.sums.0.add(b * meets.sums.1));
            let mut corrections = [0i32; 16];
            if C::ZERO != 0 {
                // What raising the codes has added, for all at once: each is broadcast where it is taken off.
                let by = _mm_cvtsi32_si128(7 - C::ZERO.trailing_zeros() as i32);
                let from = meets.corrections.0.add(b * meets.corrections.1);
                for i in (0..units).step_by(8) {
                    let eight = _mm256_sra_epi32(_mm256_loadu_si256(from.add(i).cast()), by);
                    _mm256_storeu_si256(corrections[i..].as_mut_ptr().cast(), eight);
                }
                // From memory a broadcast costs no more than a load, which the compiler would not do by itself.
                asm!("/* {0} */", in(reg) &corrections, options(nostack, preserves_flags));
            }
            for four in (0..units).step_by(4) {
                // A loop of known length, so that sums stay in registers.
                for i in 0..4 {
                    let u = four + i;
                    if u < first {
                        continue;
                    }
                    let mut dots = (*self.dots.as_ptr())[u][b];
                    if C::HAS_MIN {
                        sums[i] = _mm512_fnmadd_ps(self.mins[u], _mm512_set1_ps(*mins.add(u)), sums[i]);
                    }
                    if C::ZERO != 0 {
                        dots = _mm512_add_epi32(dots, _mm512_set1_epi32(corrections[u]));
                    }
                    let factor = _mm512_mul_ps(self.scales[u], _mm512_set1_ps(*d.add(u * registers::<C>() / 8)));
                    sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, sums[i]);
                }
            }
        }
    }
}

/// Quarter `i` of register `j` is quarter `j` of `x[i]`.
#[inline(always)]
unsafe fn quarters([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let (ab, cd) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d));
        let (ab2, cd2) = (_mm512_shuffle_f32x4::<0xee>(a, b), _mm512_shuffle_f32x4::<0xee>(c, d));
        [
            _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _mm512_shuffle_f32x4::<0xdd>(ab, cd),
            _mm512_shuffle_f32x4::<0x88>(ab2, cd2),
            _mm512_shuffle_f32x4::<0xdd>(ab2, cd2),
        ]
    }
}

/// A panel times `n` rows of activations from `row` on, whose sums are `stride` apart at `out`.
///
/// # Safety
/// At least eight groups in each row of weights, all of these rows, tiles as [`config`] says, AVX-512 with VBMI.
#[inline(always)]
unsafe fn panel<C: Panels>(
    weights: Rows,
    x: QuantizedRows<'_>,
    row: usize,
    n: usize,
    run: &mut Run,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (groups, ahead) = (x.cols / 32, Ahead::here());
        let mut sums = [[_mm512_setzero_ps(); 4]; MOST];
        for done in (0..groups).step_by(8) {
            // What remains behind the last whole run: the last eight once more, without those that have been.
            let g = done.min(groups - 8);
            let first = weights.first.add(g / C::GROUPS * C::BYTES);
            ahead.fetch_behind(weights.first, PANEL, weights.row_bytes, done / 8 * C::RUN, C::RUN);
            run.unpack::<C>(Rows { first, ..weights });
            let meets = Meets::at::<C>(x, row, g);
            run.multiply::<C>(meets.q);
            for (b, sums) in sums[..n].iter_mut().enumerate() {
                match done - g {
                    0 => run.add::<C>(meets, b, 0, sums),
                    // Of formats with one group a block, which have no halves.
                    first => run.add::<C>(meets, b, first, sums),
                }
            }
        }
        for (b, [p, q, r, t]) in sums[..n].iter().enumerate() {
            let sum = _mm512_add_ps(_mm512_add_ps(*p, *r), _mm512_add_ps(*q, *t));
            _mm512_storeu_ps(out[b * stride..][..PANEL].as_mut_ptr(), sum);
        }
    }
}
