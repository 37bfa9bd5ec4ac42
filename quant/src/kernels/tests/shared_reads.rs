//! Kernels in which several rows share what is read of weights, keys or values: each row's bits are those it has alone.

use super::*;

/// Row lengths with and without groups behind the last whole run of eight.
pub(super) fn all_lengths(format: Format) -> Vec<usize> {
    let mut lengths = lengths(format).to_vec();
    if format.block_len() == 32 {
        lengths.extend([2 * 32, 7 * 32, 18 * 32, 27 * 32]);
    }
    lengths
}

#[test]
fn rows_together_have_the_bits_of_rows_alone() {
    for (isa, kernels) in tables() {
        let mut random = Random(21);
        for format in coded() {
            let Some(together) = (kernels.dot_batch)(format) else { continue };
            for cols in all_lengths(format) {
                // Less than a panel of weights, and two with some that are left.
                let (count, rows) = (if cols % 64 == 0 { 37 } else { 13 }, 35);
                let data = random.rows(format, count, cols);
                let x = Activations::new(&kernels, &random.numbers(rows * cols), cols);
                let alone: Vec<Vec<f32>> = (0..rows)
                    .map(|r| {
                        let mut out = vec![f32::NAN; count];
                        (kernels.dot_codes)(format)(&data, x.rows().row(r), &mut out);
                        out
                    })
                    .collect();
                for range in [0..1, 1..3, 2..5, 0..4, 3..9, 1..18, 0..35] {
                    let mut out = vec![f32::NAN; range.len() * count];
                    together(&data, x.rows(), range.clone(), &mut out);
                    assert_eq!(out, alone[range.clone()].concat(), "{isa} {format} {cols} rows {range:?}");
                }
            }
        }
    }
}

/// What AVX-512 multiplies by where VBMI is missing.
#[cfg(target_arch = "x86_64")]
#[test]
fn codes_meet_one_row_without_vbmi() {
    if !Isa::Avx512.available() {
        return;
    }
    let mut random = Random(22);
    for format in coded() {
        for cols in all_lengths(format) {
            let rows = 7;
            let data = random.rows(format, rows, cols);
            let x = Activations::new(&scalar::kernels(), &random.numbers(cols), cols);
            let mut out = vec![f32::NAN; rows];
            avx512::dot_codes_256(format)(&data, x.rows().row(0), &mut out);
            for (r, row) in Decoded::rows(format, &data, rows, cols).iter().enumerate() {
                assert_close(out[r], row.dot(&x.value(0)), format_args!("{format} {cols} row {r}"));
            }
        }
    }
}

#[test]
fn heads_over_halves_have_the_bits_of_the_plain_functions() {
    for (isa, kernels) in tables() {
        let Some(half) = kernels.half_heads else { continue };
        let mut random = Random(23);
        for dim in [16, 48, 64, 80, 128] {
            for (heads, count) in [(1, 1), (2, 3), (3, 64), (4, 5), (7, 33), (8, 66)] {
                let halves =
                    |x: Vec<f32>| -> Vec<u16> { x.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect() };
                let keys = halves(random.numbers(count * dim));
                let wide: Vec<f32> = keys.iter().map(|h| half::f16::from_bits(*h).to_f32()).collect();
                let (q, stride) = (random.numbers(heads * dim), count + 2);
                let mut scores = vec![7.0; heads * stride];
                (half.scores)(&q, dim, &keys, &mut scores, stride);
                let distance = dim + 3;
                let mut mixed = random.numbers(heads * distance);
                let mut want = mixed.clone();
                (half.mix)(&scores, stride, heads, &keys, dim, &mut mixed, distance);
                for h in 0..heads {
                    let row = &scores[h * stride..(h + 1) * stride];
                    let mut plain = vec![f32::NAN; count];
                    lanes::scores(&q[h * dim..(h + 1) * dim], &wide, &mut plain);
                    assert_eq!(row[..count], plain, "{isa} {heads} heads of {dim}, {count} keys");
                    assert_eq!(row[count..], [7.0; 2], "{isa}");
                    lanes::mix(&row[..count], &wide, &mut want[h * distance..][..dim]);
                }
                assert_eq!(mixed, want, "{isa} {heads} heads of {dim}, {count} values");
            }
        }
    }
}

/// The numbers of bf16 that stand for `x`: what rounding leaves of it is rounded again.
fn in_parts(x: f32, parts: usize) -> Vec<half::bf16> {
    let mut rest = x;
    let mut rounded = || {
        let part = half::bf16::from_f32(rest);
        rest -= part.to_f32();
        part
    };
    (0..parts).map(|_| rounded()).collect()
}

/// The products of all parts but of second ones with each other, and the sum of their magnitudes.
fn product_of_parts(x: &[Vec<half::bf16>], w: &[Vec<half::bf16>]) -> (f64, f64) {
    let (mut want, mut size) = (0.0, 0.0);
    for (x, w) in x.iter().zip(w) {
        for (i, x) in x.iter().enumerate() {
            for w in &w[..w.len().min(2 - i)] {
                want += x.to_f64() * w.to_f64();
                size += (x.to_f64() * w.to_f64()).abs();
            }
        }
    }
    (want, size)
}

/// The tables' kernels for bf16, in one part and in two.
fn halves() -> Vec<(String, HalfKernels)> {
    let tables = tables().into_iter();
    tables.flat_map(|(isa, k)| [k.half, k.split].into_iter().flatten().map(move |half| (isa.clone(), half))).collect()
}

/// The rows of `x`, rounded.
fn rounded_rows(half: &HalfKernels, x: &[f32], cols: usize) -> (Aligned<u16>, usize) {
    let padded = (x.len() / cols).next_multiple_of(ROW_BLOCK);
    let mut blocks = Aligned::<u16>::zeroed(padded * cols * half.parts);
    for (x, block) in x.chunks(16 * cols).zip(blocks.chunks_exact_mut(16 * cols * half.parts)) {
        (half.round)(x, cols, block);
    }
    (blocks, padded)
}

#[test]
fn panels_of_bf16_are_the_weights_rounded_and_meet_many_rows() {
    for (isa, half) in halves() {
        let mut random = Random(24);
        for format in coded().chain([Format::F32, Format::F16, Format::BF16]) {
            let (parts, made) = (half.parts, half.weight_parts(format));
            for (cols, used) in all_lengths(format).into_iter().zip([16, 13, 1, 16, 5, 16, 16]) {
                if !cols.is_multiple_of(32) {
                    continue;
                }
                let data = match format.is_coded() {
                    true => random.rows(format, used, cols),
                    false => random.floats(format, used * cols),
                };
                let mut panel = Aligned::<u16>::zeroed(made * cols * PANEL);
                panel.fill(77);
                (half.pack)(format)(&data, used, cols, &mut panel);
                let mut weights = vec![vec![vec![half::bf16::ZERO; made]; cols]; PANEL];
                for (row, data) in weights.iter_mut().zip(data.chunks_exact(data.len() / used)) {
                    let mut decoded = vec![0f32; cols];
                    format.decode(data, &mut decoded);
                    *row = decoded.iter().map(|w| in_parts(*w, made)).collect();
                    for (w, parts) in decoded.iter().zip(row) {
                        let sum: f64 = parts.iter().map(|p| p.to_f64()).sum();
                        let left = f64::from(*w) - sum;
                        let room = if made == 2 { 1.0 / 131_072.0 } else { 1.0 / 256.0 };
                        assert!(left.abs() <= room * f64::from(w.abs()), "{w} in {made} parts");
                    }
                }
                for (i, got) in panel.iter().enumerate() {
                    let (part, i) = (i / (cols * PANEL), i % (cols * PANEL));
                    let (pair, r, second) = (i / (2 * PANEL), i / 2 % PANEL, i % 2);
                    let got = half::bf16::from_bits(*got);
                    assert_eq!(got, weights[r][2 * pair + second][part], "{isa} {format} {cols} row {r} part {part}");
                }
                let n = 41;
                let x = random.numbers(n * cols);
                let (blocks, padded) = rounded_rows(&half, &x, cols);
                let x: Vec<_> = x.iter().map(|x| in_parts(*x, parts)).collect();
                let x_rows = HalfRows { all: &blocks, cols, padded };
                for (panels, rows) in [(1, 0..41), (2, 0..32), (2, 32..41), (2, 0..5)] {
                    let stride = panels * PANEL + 3;
                    let mut out = vec![f32::NAN; rows.len() * stride];
                    (half.mul)(&[&panel[..]; 2][..panels], x_rows, rows.clone(), &mut out, stride);
                    for (i, r) in rows.clone().enumerate() {
                        for o in 0..panels * PANEL {
                            let want = product_of_parts(&x[r * cols..(r + 1) * cols], &weights[o % PANEL]);
                            let what = format_args!("{isa} {format} {r} {o} in {parts} and {made}");
                            assert_close(out[i * stride + o], want, what);
                        }
                    }
                }
                let Some(short) = half.short.filter(|_| format.is_coded()) else { continue };
                let mut near = Aligned::<u16>::zeroed(2 * NEAR * PANEL);
                let twice = [&data[..], &data[..]].concat();
                let pairs = [(29, 0..41), (32, 32..40)].into_iter().filter(|_| used == PANEL);
                for (used, rows) in [(used, 0..41), (used, 32..41)].into_iter().chain(pairs) {
                    let (panels, stride) = (used.div_ceil(PANEL), 2 * PANEL + 3);
                    let room = rows.len().next_multiple_of(8) * stride;
                    let (mut want, mut out) = (vec![f32::NAN; room], vec![f32::NAN; room]);
                    (half.mul)(&[&panel[..]; 2][..panels], x_rows, rows.clone(), &mut want, stride);
                    short(format)(&twice, used, x_rows, rows.clone(), &mut near, &mut out, stride);
                    for r in 0..rows.len() {
                        let sums = r * stride..r * stride + used;
                        assert_eq!(out[sums.clone()], want[sums], "{isa} {format} {cols} {used} rows, {r}");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_of_f32_are_right_sides_in_bf16() {
    for (isa, half) in halves() {
        let mut random = Random(25);
        for (n, wide, terms) in [(3, 16, 32usize), (35, 21, 50), (16, 7, 33), (40, 48, 64), (2, 1, 1)] {
            let cols = terms.next_multiple_of(32);
            let x = random.numbers(n * terms);
            let mut rows = vec![0f32; n * cols];
            for (to, from) in rows.chunks_exact_mut(cols).zip(x.chunks_exact(terms)) {
                to[..terms].copy_from_slice(from);
            }
            let (blocks, padded) = rounded_rows(&half, &rows, cols);
            let x_rows = HalfRows { all: &blocks, cols, padded };
            let in_all = |x: &[f32]| -> Vec<_> { x.iter().map(|x| in_parts(*x, half.parts)).collect() };
            // The right side once as `wide` rows of terms, and once as rows of `wide` columns for each term.
            let stride = terms + 5;
            let across = random.numbers(wide * stride);
            let along: Vec<f32> = (0..terms * (wide + 3))
                .map(|i| match (i / (wide + 3), i % (wide + 3)) {
                    (term, column) if column < wide => across[column * stride + term],
                    _ => 9.0,
                })
                .collect();
            let (panels, ldb) = (wide.div_ceil(PANEL), cols * PANEL * half.parts);
            for right in [false, true] {
                let mut b = Aligned::<u16>::zeroed(panels * ldb);
                b.fill(77);
                if right {
                    (half.pairs)(&along, wide + 3, terms, wide, ldb, &mut b);
                } else {
                    for (p, panel) in b.chunks_exact_mut(ldb).enumerate() {
                        let used = PANEL.min(wide - p * PANEL);
                        (half.across)(&across[p * PANEL * stride..], stride, used, terms, panel);
                    }
                }
                for (p, panel) in b.chunks_exact(ldb).enumerate() {
                    let mut out = vec![f32::NAN; n * PANEL];
                    (half.mul)(&[panel], x_rows, 0..n, &mut out, PANEL);
                    for r in 0..n {
                        let left = in_all(&x[r * terms..(r + 1) * terms]);
                        for o in 0..PANEL {
                            let want = match p * PANEL + o {
                                column if column < wide => {
                                    product_of_parts(&left, &in_all(&across[column * stride..][..terms]))
                                }
                                _ => (0.0, 0.0),
                            };
                            let what = format_args!("{isa} {} parts, {n}x{terms}x{wide}, {right}: {r} {o}", half.parts);
                            assert_close(out[r * PANEL + o], want, what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_exponent_of_mxfp4_is_met() {
    for (isa, kernels) in tables() {
        // From the smallest, which are below the smallest normal numbers, to what sums still hold.
        for e in 0..=240u8 {
            let data: Vec<u8> =
                (0..8 * 17).map(|i: usize| if i.is_multiple_of(17) { e } else { (i * 37 % 251) as u8 }).collect();
            let x = Activations::new(&kernels, &vec![1.0; 256], 256);
            let mut out = [f32::NAN];
            (kernels.dot_codes)(Format::MXFP4)(&data, x.rows().row(0), &mut out);
            let mut weights = vec![0f32; 256];
            Format::MXFP4.decode(&data, &mut weights);
            let want: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            assert!((f64::from(out[0]) - want).abs() <= want.abs() * 1e-5, "{isa} exponent {e}: {} not {want}", out[0]);
        }
    }
}
