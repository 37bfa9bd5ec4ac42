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
                let (count, rows) = (11, 9);
                let data = random.rows(format, count, cols);
                let x = Activations::new(&kernels, &random.numbers(rows * cols), cols);
                let alone: Vec<Vec<f32>> = (0..rows)
                    .map(|r| {
                        let mut out = vec![f32::NAN; count];
                        (kernels.dot_codes)(format)(&data, x.rows().row(r), &mut out);
                        out
                    })
                    .collect();
                for range in [0..1, 1..3, 2..5, 0..4, 3..9, 0..9] {
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

#[test]
fn panels_of_bf16_are_the_weights_rounded_and_meet_many_rows() {
    for (isa, kernels) in tables() {
        let Some(half) = kernels.half else { continue };
        let mut random = Random(24);
        for format in coded() {
            for (cols, used) in all_lengths(format).into_iter().zip([16, 13, 1, 16, 5, 16, 16]) {
                let data = random.rows(format, used, cols);
                let mut panel = Aligned::<u16>::zeroed(cols * PANEL);
                panel.fill(77);
                (half.pack)(format)(&data, used, cols, &mut panel);
                let mut weights = vec![vec![0f32; cols]; PANEL];
                for (row, data) in weights.iter_mut().zip(data.chunks_exact(data.len() / used)) {
                    format.decode(data, row);
                }
                let rounded = |r: usize, c: usize| half::bf16::from_f32(weights[r][c]);
                for (i, got) in panel.iter().enumerate() {
                    let (pair, r, second) = (i / (2 * PANEL), i / 2 % PANEL, i % 2);
                    let got = half::bf16::from_bits(*got);
                    assert_eq!(got, rounded(r, 2 * pair + second), "{isa} {format} {cols} row {r}");
                }
                let n = 41;
                let x = random.numbers(n * cols);
                let padded = n.next_multiple_of(ROW_BLOCK);
                let mut blocks = Aligned::<u16>::zeroed(padded * cols);
                for (x, block) in x.chunks(16 * cols).zip(blocks.chunks_exact_mut(16 * cols)) {
                    (half.round)(x, cols, block);
                }
                let x_rows = HalfRows { all: &blocks, cols, padded };
                for (panels, rows) in [(1, 0..41), (2, 0..32), (2, 32..41), (2, 0..5)] {
                    let stride = panels * PANEL + 3;
                    let mut out = vec![f32::NAN; rows.len() * stride];
                    (half.mul)(&[&panel[..]; 2][..panels], x_rows, rows.clone(), &mut out, stride);
                    for (i, r) in rows.clone().enumerate() {
                        for o in 0..panels * PANEL {
                            let (mut want, mut size) = (0.0, 0.0);
                            for c in 0..cols {
                                let x = half::bf16::from_f32(x[r * cols + c]).to_f64();
                                let w = rounded(o % PANEL, c).to_f64();
                                want += x * w;
                                size += (x * w).abs();
                            }
                            assert_close(out[i * stride + o], (want, size), format_args!("{isa} {format} {r} {o}"));
                        }
                    }
                }
            }
        }
    }
}
