//! The few-row product in 512-bit registers, written once over [`Quads`].
//!
//! Four rows of weights go together. A register of sums holds one number for each of four groups and four rows (lane
//! `4 g + r`), so that one conversion and one multiplication by a factor serve sixteen of them. How many rows of activations
//! meet the weights changes how the integers come to these lanes, and no bit of a result: for one or two rows, sums of four
//! products are added up across lanes; for more, the codes change places once for all of them, and each four activations are
//! spread to the lanes that they meet.

use super::ahead::Ahead;
use super::codes512::{Quads, by_quads, turned};
use super::{DotBatch, DotCodes, QuantizedRow, QuantizedRows};
use crate::formats::{BlockFormat, Format, Q8_Z};
use std::arch::x86_64::*;
use std::ops::Range;

/// The product for one row, where the format has one here.
pub(super) fn dot_codes(format: Format) -> Option<DotCodes> {
    fn entry<C: Quads>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { alone::<C>(data, x, out) }
    }
    by_quads!(format, entry)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
fn alone<C: Quads>(data: &[u8], x: QuantizedRow<'_>, out: &mut [f32]) {
    let row_bytes = x.q.len() / C::FORMAT.block_len() * C::BYTES;
    let (groups, count) = (x.q.len() / 32, out.len());
    assert!(data.len() >= count * row_bytes, "weights are shorter than the rows asked for");
    assert!(x.d.len() == groups && x.s32.len() == groups && x.s16.len() == 2 * groups);
    assert!(x.c32.len() == groups && x.c16.len() == 2 * groups);
    let x = QuantizedRows { cols: x.q.len(), all: x };
    let ahead = Ahead::here();
    for o in (0..count).step_by(4) {
        let weights = Weights { first: data[o * row_bytes..].as_ptr(), row_bytes, count: (count - o).min(4), ahead };
        // SAFETY: the assertions keep every row of weights and the activations inside the slices.
        unsafe { one_or_two::<C, 1>(weights, x, 0, &mut out[o..], count) };
    }
}

/// The product for several rows.
pub(super) fn dot_batch(format: Format) -> Option<DotBatch> {
    fn entry<C: Quads>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
        // SAFETY: this table is handed out only where `available`.
        unsafe { dots::<C>(data, x, rows, out) }
    }
    by_quads!(format, entry)
}

/// Most rows of activations that codes which have changed places meet before the next codes do.
pub(super) const MOST: usize = 16;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) fn dots<C: Quads>(data: &[u8], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32]) {
    let row_bytes = checked::<C>(data, x, &rows, out);
    let count = out.len() / rows.len().max(1);
    let ahead = Ahead::here();
    let step = if rows.len() <= 2 { 4 } else { 8 };
    for o in (0..count).step_by(step) {
        let weights = Weights { first: data[o * row_bytes..].as_ptr(), row_bytes, count: (count - o).min(step), ahead };
        let mut r = rows.start;
        while r < rows.end {
            let to = &mut out[(r - rows.start) * count + o..];
            // In equal parts, none of which is of one or two rows where there are more.
            let left = rows.end - r;
            let part = r..r + left.div_ceil(left.div_ceil(MOST));
            // SAFETY: the assertions keep every row of weights, activations and sums inside the slices.
            unsafe {
                match part.len() {
                    1 => one_or_two::<C, 1>(weights, x, r, to, count),
                    2 => one_or_two::<C, 2>(weights, x, r, to, count),
                    _ if weights.count > 4 => several::<C, 2>(weights, x, part.clone(), to, count),
                    _ => several::<C, 1>(weights, x, part.clone(), to, count),
                }
            }
            r = part.end;
        }
    }
}

/// Bytes of a row of weights, all of which, with the activations and the sums, are in the slices.
pub(super) fn checked<C: Quads>(data: &[u8], x: QuantizedRows<'_>, rows: &Range<usize>, out: &[f32]) -> usize {
    let row_bytes = x.cols / C::FORMAT.block_len() * C::BYTES;
    let (groups, count) = (x.cols / 32, out.len() / rows.len().max(1));
    assert!(data.len() >= count * row_bytes, "weights are shorter than the rows asked for");
    assert!(x.all.q.len() >= rows.end * x.cols && x.all.d.len() >= rows.end * groups);
    assert!(x.all.s32.len() >= rows.end * groups && x.all.s16.len() >= 2 * rows.end * groups);
    assert!(x.all.c32.len() >= rows.end * groups && x.all.c16.len() >= 2 * rows.end * groups);
    assert!(out.len() == rows.len() * count);
    row_bytes
}

/// Rows of weights that go together, at most four for each set.
#[derive(Clone, Copy)]
struct Weights {
    first: *const u8,
    row_bytes: usize,
    count: usize,
    ahead: Ahead,
}

/// Bytes of the largest block of 32 weights here.
const LARGEST: usize = Q8_Z::BYTES;

/// The rows of activations that a run of weights meets: where the first one's numbers begin, and how far apart rows are.
#[derive(Clone, Copy)]
pub(super) struct Meets {
    pub(super) q: (*const i8, usize),
    /// Scales, eight.
    pub(super) d: (*const f32, usize),
    /// What minimums are multiplied by: eight sums, with [`BlockFormat::HALVES`] sixteen.
    pub(super) sums: (*const f32, usize),
    /// -128 times the sums of codes, likewise.
    pub(super) corrections: (*const i32, usize),
}

impl Meets {
    /// From group `g` of row `row` on.
    #[inline(always)]
    pub(super) fn at<C: Quads>(x: QuantizedRows<'_>, row: usize, g: usize) -> Self {
        let groups = x.cols / 32;
        let halves = if C::HALVES { 2 } else { 1 };
        let (sums, corrections) = if C::HALVES { (x.all.s16, x.all.c16) } else { (x.all.s32, x.all.c32) };
        let first = row * groups + g;
        Meets {
            q: (x.all.q.as_ptr().wrapping_add(first * 32), x.cols),
            d: (x.all.d.as_ptr().wrapping_add(first), groups),
            sums: (sums.as_ptr().wrapping_add(first * halves), groups * halves),
            corrections: (corrections.as_ptr().wrapping_add(first * halves), groups * halves),
        }
    }
}

/// Sums being made of the products of `S` sets of four rows of weights. (A trait rather than closures, which would not take on
/// the target features of the kernel.)
trait Sums<C: Quads, const S: usize>: Copy {
    /// Adds the products of the groups from `left` on of a run in each row; with `skip` 1 none of its first half.
    ///
    /// # Safety
    /// That run in each row, what `meets` says, AVX-512 with VNNI and VBMI.
    unsafe fn add(&mut self, rows: [[*const u8; 4]; S], meets: Meets, skip: usize, left: usize);
}

/// Adds to `sums` all of `weights` times the `n` (at most [`MOST`]) rows of activations from `row` on.
///
/// # Safety
/// `S` sets of weights and `n` rows of activations, AVX-512 with VNNI and VBMI.
#[inline(always)]
unsafe fn add_all<C: Quads, const S: usize>(
    weights: Weights,
    x: QuantizedRows<'_>,
    row: usize,
    n: usize,
    sums: &mut impl Sums<C, S>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let groups = x.cols / 32;
        let mut rows = [[weights.first; 4]; S];
        for i in 1..4 * S {
            // The last row stands for those that are missing.
            rows[i / 4][i % 4] = weights.first.wrapping_add(i.min(weights.count - 1) * weights.row_bytes);
        }
        for run in 0..groups / 8 {
            weights.ahead.fetch_behind(weights.first, 4 * S, weights.row_bytes, run * C::RUN, C::RUN);
            sums.add(rows, Meets::at::<C>(x, row, run * 8), 0, 0);
            for s in 0..S {
                for r in 0..4 {
                    rows[s][r] = rows[s][r].wrapping_add(C::RUN);
                }
            }
        }
        let rest = groups % 8;
        if C::GROUPS > 1 || rest == 0 {
            return;
        }
        let done = groups / 8 * C::RUN;
        weights.ahead.fetch_behind(weights.first, 4 * S, weights.row_bytes, done, weights.row_bytes - done);
        if groups > 8 {
            // The last eight once more, without those that have been.
            for p in rows.as_flattened_mut() {
                *p = p.wrapping_sub((8 - rest) * C::BYTES);
            }
            sums.add(rows, Meets::at::<C>(x, row, groups - 8), usize::from(rest <= 4), 8 - rest);
        } else {
            let mut all = *sums;
            add_few(rows, x, row, n, &mut all);
            *sums = all;
        }
    }
}

/// Adds the products of rows of fewer than eight groups, of formats of one group a block.
///
/// # Safety
/// As for [`add_all`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
#[cold]
#[inline(never)]
unsafe fn add_few<C: Quads, const S: usize>(
    mut rows: [[*const u8; 4]; S],
    x: QuantizedRows<'_>,
    row: usize,
    n: usize,
    sums: &mut impl Sums<C, S>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let groups = x.cols / 32;
        let mut blocks = [[[0u8; 8 * LARGEST]; 4]; S];
        for (p, block) in rows.as_flattened_mut().iter_mut().zip(blocks.as_flattened_mut()) {
            p.copy_to_nonoverlapping(block.as_mut_ptr(), groups * C::BYTES);
            *p = block.as_ptr();
        }
        let (mut q, mut corrections) = ([[0i8; 256]; MOST], [[0i32; 8]; MOST]);
        let (mut d, mut mins) = ([[0f32; 8]; MOST], [[0f32; 8]; MOST]);
        let from = Meets::at::<C>(x, row, 0);
        for b in 0..n {
            from.q.0.add(b * x.cols).copy_to_nonoverlapping(q[b].as_mut_ptr(), groups * 32);
            from.d.0.add(b * groups).copy_to_nonoverlapping(d[b].as_mut_ptr(), groups);
            from.sums.0.add(b * groups).copy_to_nonoverlapping(mins[b].as_mut_ptr(), groups);
            from.corrections.0.add(b * groups).copy_to_nonoverlapping(corrections[b].as_mut_ptr(), groups);
        }
        let meets = Meets {
            q: (q.as_flattened().as_ptr(), 256),
            d: (d.as_flattened().as_ptr(), 8),
            sums: (mins.as_flattened().as_ptr(), 8),
            corrections: (corrections.as_flattened().as_ptr(), 8),
        };
        sums.add(rows, meets, 0, 0);
    }
}

/// Sums of one or two rows of activations, by adding up across lanes.
#[derive(Clone, Copy)]
struct Across<const B: usize>([__m512; B]);

impl<C: Quads, const B: usize> Sums<C, 1> for Across<B> {
    #[inline(always)]
    unsafe fn add(&mut self, [rows]: [[*const u8; 4]; 1], meets: Meets, skip: usize, left: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let factors = Factors::of::<C>(rows);
            for i in skip..2 {
                let codes = [C::quad(rows[0], i), C::quad(rows[1], i), C::quad(rows[2], i), C::quad(rows[3], i)];
                for b in 0..B {
                    let a = activations::<C>(meets, b, i);
                    let mut dots = [[_mm512_setzero_si512(); 4]; 2];
                    for h in 0..2 {
                        let to = if C::HALVES { h } else { 0 };
                        for r in 0..4 {
                            dots[to][r] = _mm512_dpbusd_epi32(dots[to][r], codes[r][h], a[h]);
                        }
                    }
                    if C::HALVES {
                        self.0[b] = factors.add::<C>(self.0[b], by_fours(dots[0]), meets, b, 2 * i, left);
                        self.0[b] = factors.add::<C>(self.0[b], by_fours(dots[1]), meets, b, 2 * i + 1, left);
                    } else {
                        self.0[b] = factors.add::<C>(self.0[b], by_fours(dots[0]), meets, b, i, left);
                    }
                }
            }
        }
    }
}

/// The rows from `row` on of activations, `B` (one or two) of them, whose sums are `stride` apart.
///
/// # Safety
/// All of these rows, and AVX-512 with VNNI and VBMI.
#[inline(always)]
unsafe fn one_or_two<C: Quads, const B: usize>(
    weights: Weights,
    x: QuantizedRows<'_>,
    row: usize,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = Across([_mm512_setzero_ps(); B]);
        add_all::<C, 1>(weights, x, row, B, &mut sums);
        for b in 0..B {
            store(sums.0[b], &mut out[b * stride..], weights.count);
        }
    }
}

/// Sums of `n` rows of activations, by codes that have changed places.
#[derive(Clone, Copy)]
struct Turned<const S: usize> {
    n: usize,
    sums: [[__m512; S]; MOST],
}

impl<C: Quads, const S: usize> Sums<C, S> for Turned<S> {
    #[inline(always)]
    unsafe fn add(&mut self, rows: [[*const u8; 4]; S], meets: Meets, skip: usize, left: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let none = _mm512_setzero_si512();
            let mut factors = [Factors { scales: [_mm512_setzero_ps(); 4], mins: [_mm512_setzero_ps(); 4] }; S];
            for s in 0..S {
                factors[s] = Factors::of::<C>(rows[s]);
            }
            for i in skip..2 {
                let mut codes = [[[none; 4]; 2]; S];
                for s in 0..S {
                    let [a, b, c, d] = rows[s];
                    let (a, b, c, d) = (C::quad(a, i), C::quad(b, i), C::quad(c, i), C::quad(d, i));
                    codes[s] = [turned([a[0], b[0], c[0], d[0]]), turned([a[1], b[1], c[1], d[1]])];
                }
                for b in 0..self.n {
                    let mut dots = [[none; 2]; S];
                    let a = activations::<C>(meets, b, i);
                    for h in 0..2 {
                        let to = if C::HALVES { h } else { 0 };
                        let spread = [
                            _mm512_shuffle_epi32::<0x00>(a[h]),
                            _mm512_shuffle_epi32::<0x55>(a[h]),
                            _mm512_shuffle_epi32::<0xaa>(a[h]),
                            _mm512_shuffle_epi32::<0xff>(a[h]),
                        ];
                        for j in 0..4 {
                            for s in 0..S {
                                dots[s][to] = _mm512_dpbusd_epi32(dots[s][to], codes[s][h][j], spread[j]);
                            }
                        }
                    }
                    for s in 0..S {
                        let sums = &mut self.sums[b][s];
                        if C::HALVES {
                            *sums = factors[s].add::<C>(*sums, dots[s][0], meets, b, 2 * i, left);
                            *sums = factors[s].add::<C>(*sums, dots[s][1], meets, b, 2 * i + 1, left);
                        } else {
                            *sums = factors[s].add::<C>(*sums, dots[s][0], meets, b, i, left);
                        }
                    }
                }
            }
        }
    }
}

/// The rows `rows` of activations, at most [`MOST`], whose sums are `stride` apart.
///
/// # Safety
/// As for [`one_or_two`].
#[inline(always)]
unsafe fn several<C: Quads, const S: usize>(
    weights: Weights,
    x: QuantizedRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let n = rows.len();
        let mut sums = Turned { n, sums: [[_mm512_setzero_ps(); S]; MOST] };
        add_all::<C, S>(weights, x, rows.start, n, &mut sums);
        for b in 0..n {
            for s in 0..S {
                store(sums.sums[b][s], &mut out[b * stride + 4 * s..], (weights.count - 4 * s).min(4));
            }
        }
    }
}

/// The activations that the quad `i` of a run meets, in its order.
#[inline(always)]
unsafe fn activations<C: Quads>(meets: Meets, b: usize, i: usize) -> [__m512i; 2] {
    // SAFETY: the caller has these rows, and AVX-512.
    unsafe {
        let q = meets.q.0.add(b * meets.q.1 + 128 * i);
        let (x, y) = (_mm512_loadu_si512(q.cast()), _mm512_loadu_si512(q.add(64).cast()));
        if C::HALVES {
            return [x, y];
        }
        [
            _mm512_permutex2var_epi64(x, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), y),
            _mm512_permutex2var_epi64(x, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), y),
        ]
    }
}

/// Scales and minimums of a run of four rows, in the lanes of the sums that they meet: one register for each quad, with
/// [`BlockFormat::HALVES`] for each half of one.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    pub(super) scales: [__m512; 4],
    pub(super) mins: [__m512; 4],
}

/// Where number `4 k + g` of row `r` is found, for lane `4 g + r`: those of rows with an odd `r` in a second register, and of the
/// last two rows `apart` numbers behind those of the first two (0: in registers of their own).
const fn places(k: usize, apart: usize) -> [i32; 16] {
    let mut from = [0; 16];
    let mut lane = 0;
    while lane < 16 {
        let (g, r) = (lane / 4, lane % 4);
        from[lane] = (4 * k + g + r / 2 * apart + r % 2 * 16) as i32;
        lane += 1;
    }
    from
}
static EIGHTS: [[i32; 16]; 2] = [places(0, 8), places(1, 8)];
static SIXTEENS: [[i32; 16]; 4] = [places(0, 0), places(1, 0), places(2, 0), places(3, 0)];

impl Factors {
    /// # Safety
    /// A run in each row, and AVX-512 with VBMI.
    #[inline(always)]
    pub(super) unsafe fn of<C: Quads>(rows: [*const u8; 4]) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let [a, b, c, d] = rows;
            let (a, b, c, d) = (C::factors(a), C::factors(b), C::factors(c), C::factors(d));
            let none = [_mm512_setzero_ps(); 4];
            Factors {
                scales: in_lanes::<C>([a[0], b[0], c[0], d[0]]),
                mins: if C::HAS_MIN { in_lanes::<C>([a[1], b[1], c[1], d[1]]) } else { none },
            }
        }
    }

    /// `acc` and the products of `sums`, which are the `k`-th of this run with row `b` of activations; those of the groups before
    /// `left` are zeros.
    ///
    /// # Safety
    /// As for [`Factors::of`], and this row.
    #[inline(always)]
    unsafe fn add<C: Quads>(
        &self,
        acc: __m512,
        sums: __m512i,
        meets: Meets,
        b: usize,
        k: usize,
        left: usize,
    ) -> __m512 {
        // SAFETY: the caller's promise: eight scales a row, and as many sums as there are groups or halves.
        unsafe {
            let each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let mut acc = acc;
            let kept = (u32::MAX << left >> (4 * k)) as __mmask8;
            if C::HAS_MIN {
                let four = _mm512_castps128_ps512(_mm_maskz_loadu_ps(kept, meets.sums.0.add(b * meets.sums.1 + 4 * k)));
                let sums = _mm512_permutexvar_ps(each, four);
                acc = _mm512_fnmadd_ps(self.mins[k], sums, acc);
            }
            let mut sums = sums;
            if C::ZERO != 0 {
                // Take off what raising the codes has added.
                let p = meets.corrections.0.add(b * meets.corrections.1 + 4 * k);
                let by = _mm_cvtsi32_si128(7 - C::ZERO.trailing_zeros() as i32);
                let by = _mm_sra_epi32(_mm_loadu_si128(p.cast()), by);
                sums = _mm512_add_epi32(sums, _mm512_permutexvar_epi32(each, _mm512_castsi128_si512(by)));
            }
            let d = meets.d.0.add(b * meets.d.1);
            let d = if C::HALVES {
                let two = _mm512_castsi128_si512(_mm_loadl_epi64(d.add(2 * k).cast()));
                let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
                _mm512_castsi512_ps(_mm512_permutexvar_epi32(halves, two))
            } else {
                _mm512_permutexvar_ps(each, _mm512_castps128_ps512(_mm_maskz_loadu_ps(kept, d.add(4 * k))))
            };
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(self.scales[k], d), acc)
        }
    }
}

/// The factors of four rows, one after another in a register for each, in the lanes of sums.
#[inline(always)]
unsafe fn in_lanes<C: Quads>([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let mut lanes = [_mm512_setzero_ps(); 4];
        if C::HALVES {
            for k in 0..4 {
                let place = _mm512_loadu_si512(SIXTEENS[k].as_ptr().cast());
                let (first, last) = (_mm512_permutex2var_ps(a, place, b), _mm512_permutex2var_ps(c, place, d));
                lanes[k] = _mm512_mask_blend_ps(0xcccc, first, last);
            }
        } else {
            let even = _mm512_insertf32x8::<1>(a, _mm512_castps512_ps256(c));
            let odd = _mm512_insertf32x8::<1>(b, _mm512_castps512_ps256(d));
            for k in 0..2 {
                let place = _mm512_loadu_si512(EIGHTS[k].as_ptr().cast());
                lanes[k] = _mm512_permutex2var_ps(even, place, odd);
            }
        }
        lanes
    }
}

/// Lane `4 g + r`: the four numbers of quarter `g` in `dots[r]`, added up.
#[inline(always)]
unsafe fn by_fours([a, b, c, d]: [__m512i; 4]) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// The sums of `count` (at most four) rows, over all groups.
#[inline(always)]
unsafe fn store(acc: __m512, out: &mut [f32], count: usize) {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let two = _mm256_add_ps(_mm512_castps512_ps256(acc), _mm512_extractf32x8_ps::<1>(acc));
        let sums = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps::<1>(two));
        if count == 4 {
            // Four moves of known size are one, and no call.
            _mm_storeu_ps(out[..4].as_mut_ptr(), sums);
            return;
        }
        let mut four = [0f32; 4];
        _mm_storeu_ps(four.as_mut_ptr(), sums);
        out[..count].copy_from_slice(&four[..count]);
    }
}
