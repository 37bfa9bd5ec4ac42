//! Encoding: against llama.cpp's bytes (`fixtures/encode/make.py`), and by what must be kept.

use proptest::prelude::*;
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::{Levels, encode, put_codes};

fn coded() -> impl Iterator<Item = Format> + Clone {
    Format::ALL.into_iter().filter(|f| !f.is_float() && !f.is_internal())
}

fn fixture(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/encode/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn floats(name: &str) -> Vec<f32> {
    fixture(name).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn encoded(format: Format, x: &[f32], cols: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0xa5; x.len() / cols * format.row_bytes(cols).unwrap()];
    encode(format, x, cols, importance, &mut out);
    out
}

fn decoded(format: Format, packed: &[u8], len: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; len];
    format.decode(packed, &mut out);
    out
}

/// Numbers that look like weights, by a generator that gives the same ones everywhere.
fn normal(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..len).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

fn error(x: &[f32], y: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    x.iter().zip(y).map(|(x, y)| square(f64::from(x - y))).sum::<f64>()
        / x.iter().map(|x| square(f64::from(*x))).sum::<f64>()
}

#[test]
fn rows_get_llama_cpps_bytes() {
    const COLS: usize = 512;
    let (rows, importance) = (floats("rows.f32"), floats("importance.f32"));
    for format in coded().filter(|f| *f != Format::MXFP4) {
        let want = fixture(&format!("{format}.bin"));
        let mut got = encoded(format, &rows, COLS, None);
        got.extend(encoded(format, &rows, COLS, Some(&importance)));
        assert_eq!(got.len(), want.len());
        let (bytes, len) = (format.block_bytes(), format.block_len());
        let blocks = rows.len() / len;
        for (i, (got, want)) in got.chunks(bytes).zip(want.chunks(bytes)).enumerate() {
            let at = i % blocks * len;
            let importance = (i >= blocks).then(|| &importance[at % COLS..][..len]);
            assert_eq!(
                got,
                want,
                "{format} row {} from {}, {importance:?}: {:?}",
                at / COLS,
                at % COLS,
                &rows[at..at + len]
            );
        }
    }
}

#[test]
fn floats_are_rounded_to_nearest_even_and_stay_finite() {
    let x = [1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, -65519.0, 1e9, -3.4e38, 1e-8, -0.0, 6e-8];
    let f16 = decoded(Format::F16, &encoded(Format::F16, &x, 8, None), 8);
    assert_eq!(f16, [1.0, 1.0 + 1.0 / 512.0, -65504.0, 65504.0, -65504.0, 0.0, -0.0, 5.960_464_5e-8]);
    assert!(f16[6].is_sign_negative());
    let x = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, -f32::MAX, 0.0, -2.0];
    let bf16 = decoded(Format::BF16, &encoded(Format::BF16, &x, 6, None), 6);
    let most = half::bf16::MAX.to_f32();
    assert_eq!(bf16, [1.0, 1.0 + 1.0 / 64.0, most, -most, 0.0, -2.0]);
    assert_eq!(decoded(Format::F32, &encoded(Format::F32, &x, 6, None), 6), x);
}

/// The share of the weights' square that rounding may lose, for numbers of a normal distribution.
fn allowed(format: Format) -> f64 {
    match format {
        Format::Q2_K => 0.1,
        Format::Q3_K => 0.025,
        Format::MXFP4 => 0.02,
        Format::Q4_0 | Format::Q4_1 => 0.0085,
        Format::IQ4_NL | Format::IQ4_XS => 0.0075,
        Format::Q4_K => 0.007,
        Format::Q5_0 | Format::Q5_1 | Format::Q5_K => 0.002,
        Format::Q6_K => 0.0006,
        Format::Q8_0 => 0.00005,
        Format::F32 | Format::F16 | Format::BF16 => 0.00001,
        Format::Q4_Z | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => {
            unreachable!("{format} is not encoded")
        }
    }
}

#[test]
fn normal_weights_keep_close() {
    let x = normal(16 * 512, 1);
    let importance: Vec<f32> = normal(512, 2).iter().map(|v| v * v).collect();
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        for importance in [None, Some(&importance[..])] {
            let y = decoded(format, &encoded(format, &x, 512, importance), x.len());
            let lost = error(&x, &y);
            let allowed = if importance.is_some() { 1.5 * allowed(format) } else { allowed(format) };
            assert!(lost < allowed, "{format}, importance {}: {lost}", importance.is_some());
        }
    }
}

#[test]
fn importance_moves_the_error_to_where_it_matters_less() {
    let x = normal(32 * 512, 3);
    let importance: Vec<f32> = (0..512).map(|i| if i % 7 == 0 { 50.0 } else { 0.5 }).collect();
    let weighted = |y: &[f32]| -> f64 {
        x.iter().zip(y).enumerate().map(|(i, (x, y))| f64::from(importance[i % 512] * (x - y) * (x - y))).sum()
    };
    for format in coded().filter(|f| !matches!(f, Format::Q8_0 | Format::MXFP4)) {
        let plain = weighted(&decoded(format, &encoded(format, &x, 512, None), x.len()));
        let better = weighted(&decoded(format, &encoded(format, &x, 512, Some(&importance)), x.len()));
        assert!(better < 0.95 * plain, "{format}: {better} with importance, {plain} without");
    }
}

#[test]
fn rows_of_zeros_stay_zeros_or_as_near_as_the_format_has() {
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        for importance in [None, Some(&[1.0; 256][..]), Some(&[0.0; 256][..])] {
            for zero in [0.0, -0.0] {
                let y = decoded(format, &encoded(format, &[zero; 512], 256, importance), 512);
                assert!(y.iter().all(|y| *y == 0.0), "{format}: {y:?}");
            }
        }
    }
}

#[test]
fn weights_of_any_size_decode_to_finite_numbers() {
    let shapes: [fn(f32) -> f32; 5] =
        [|v| v, |v| v.abs(), |v| -v.abs(), |_| 1.0, |v| if v > 1.7 { 90.0 * v } else { v }];
    let importance: Vec<f32> = normal(256, 5).iter().map(|v| (v * 8.0).exp()).collect();
    let huge: Vec<f32> = importance.iter().map(|v| (v * 1e38).min(f32::MAX)).collect();
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        for size in [1e-45f32, 1e-38, 1e-20, 1e-9, 1e-7, 1e-5, 1.0, 1e3, 1e6, 1e12, 1e30, 5e37] {
            for shape in shapes {
                let x: Vec<f32> = normal(256, 4).iter().map(|v| (shape(*v) * size).clamp(f32::MIN, f32::MAX)).collect();
                for importance in [None, Some(&importance[..]), Some(&huge[..])] {
                    let y = decoded(format, &encoded(format, &x, 256, importance), 256);
                    assert!(y.iter().all(|y| y.is_finite()), "{format} at {size:e}: {y:?}");
                    let largest = x.iter().fold(0f32, |a, v| a.max(v.abs()));
                    // Within the reach of an f16 scale nothing may grow, and what is not tiny must still be there.
                    if (1e-3..1e4).contains(&size) {
                        assert!(y.iter().all(|y| y.abs() <= 1.3 * largest), "{format} at {size:e}");
                        assert!(error(&x, &y) < 0.5, "{format} at {size:e}: {}", error(&x, &y));
                    }
                }
            }
        }
    }
}

#[test]
fn each_row_is_encoded_by_itself() {
    let x = normal(4 * 256, 6);
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        let together = encoded(format, &x, 256, None);
        let alone: Vec<u8> = x.chunks(256).flat_map(|row| encoded(format, row, 256, None)).collect();
        assert_eq!(together, alone, "{format}");
    }
}

#[test]
fn levels_are_what_groups_hold() {
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        let Some(levels) = format.levels() else {
            assert!(format.is_float());
            continue;
        };
        let all: Vec<i8> = match levels {
            Levels::Range(low, high) => (low..=high).collect(),
            Levels::Table(table) => table.to_vec(),
        };
        let mut row = vec![0; format.row_bytes(256).unwrap()];
        for g in 0..8 {
            for start in (0..all.len()).step_by(32) {
                let codes = std::array::from_fn(|i| all[(start + i * 7) % all.len()]);
                put_codes(format, &mut row, g, &codes);
                assert_eq!(format.group(&row, g).unwrap().codes, codes, "{format}");
                assert!(codes.iter().all(|&c| levels.nearest(c) == c), "{format}");
            }
        }
        assert_eq!(levels.nearest(i8::MIN), all[0]);
        assert_eq!(levels.nearest(i8::MAX), all[all.len() - 1]);
    }
}

#[test]
#[should_panic(expected = "Q4_K: a row of 576 weights is no whole number of blocks")]
fn a_row_that_is_no_whole_number_of_blocks_is_refused() {
    encode(Format::Q4_K, &[0.0; 576], 576, None, &mut [0; 288]);
}

proptest! {
    #[test]
    fn codes_are_put_where_they_are_read_and_nothing_else_changes(
        kind in 0..coded().count(),
        bytes in proptest::collection::vec(any::<u8>(), 2 * 8 * 34),
        codes in proptest::collection::vec(any::<i8>(), 32),
        g in 0usize..16,
    ) {
        let format = coded().nth(kind).unwrap();
        let before = &bytes[..format.row_bytes(512).unwrap()];
        let codes: [i8; 32] = codes.try_into().unwrap();
        let mut row = before.to_vec();
        put_codes(format, &mut row, g, &codes);
        for other in 0..16 {
            let (was, is) = (format.group(before, other).unwrap(), format.group(&row, other).unwrap());
            prop_assert_eq!(was.scale.map(f32::to_bits), is.scale.map(f32::to_bits));
            prop_assert_eq!(was.min.map(f32::to_bits), is.min.map(f32::to_bits));
            let want = if other == g { codes.map(|c| format.levels().unwrap().nearest(c)) } else { was.codes };
            prop_assert_eq!(is.codes, want, "{} group {}", format, other);
        }
    }

    #[test]
    fn a_group_that_lies_on_levels_of_its_scale_comes_back(
        seed in 1u64..1_000_000,
        exponent in -10i32..3,
    ) {
        // Both ends of the levels are there, so that the search has the right scale before it.
        let unit = f32::exp2(exponent as f32);
        let codes = |low: i32, high: i32| -> Vec<f32> {
            let mut x: Vec<f32> = normal(256, seed)
                .iter().map(|v| (v.abs() * 1e4) as i32 % (high - low + 1) + low).map(|q| q as f32 * unit).collect();
            for group in x.chunks_mut(16) {
                (group[3], group[9]) = (low as f32 * unit, high as f32 * unit);
            }
            x
        };
        for (format, low, high) in [
            (Format::Q4_0, -8, 7), (Format::Q4_1, -3, 12), (Format::Q5_0, -16, 15), (Format::Q5_1, 0, 31),
            (Format::Q8_0, -127, 127), (Format::Q3_K, -4, 3), (Format::Q6_K, -32, 31), (Format::Q4_K, 0, 15),
            (Format::Q5_K, 0, 31), (Format::Q2_K, 0, 3),
        ] {
            let x = codes(low, high);
            let y = decoded(format, &encoded(format, &x, 256, None), 256);
            prop_assert!(error(&x, &y) < 1e-6, "{}: {}", format, error(&x, &y));
        }
    }
}
