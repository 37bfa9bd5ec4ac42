//! Every instruction set that this machine has, against arithmetic in f64 and against the scalar kernels.

mod random;

use proptest::prelude::*;
use random::{Random, decode};
use rushlight_quant::formats::Format;
use rushlight_quant::ops::{Activation, Attention, AttentionSequence, Kv, RopeLayout};
use rushlight_quant::{Cpu, Isa, Matrix, Phase, PromptRounding};

fn all() -> Vec<Cpu> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu::new(2, isa)).collect()
}

/// 8 bits with a scale over each 32.
fn rounded(x: &[f32]) -> Vec<f64> {
    rounded_over(32, x)
}

/// 8 bits with a scale over each `span`.
fn rounded_over(span: usize, x: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(span) {
        let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let d = most / 127.0;
        let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
        out.extend(x.iter().map(|v| f64::from(d) * f64::from((v * inverse).round_ties_even())));
    }
    out
}

/// 8 bits, and 8 bits for what that left over.
fn rounded_twice(x: &[f32]) -> Vec<f64> {
    let first = rounded(x);
    let rest: Vec<f32> = x.iter().zip(&first).map(|(x, f)| (f64::from(*x) - f) as f32).collect();
    first.iter().zip(rounded(&rest)).map(|(a, b)| a + b).collect()
}

/// 16 bits with a scale over each 32.
fn rounded_to_words(x: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(32) {
        let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let (d, inverse) = (most / 32767.0, if most == 0.0 { 0.0 } else { 32767.0 / most });
        out.extend(x.iter().map(|v| f64::from(d) * f64::from((v * inverse).round_ties_even())));
    }
    out
}

fn bf16(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| half::bf16::from_f32(*v).to_f64()).collect()
}

fn exact(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// How a matrix is met: the phase, and whether it asks for fine activations.
const WAYS: [(Phase, bool); 4] =
    [(Phase::Generate, false), (Phase::Generate, true), (Phase::Prompt, false), (Phase::Prompt, true)];

/// Products in f64 of what the path makes of activations and weights (the table in `matmul.rs`), and the sums of
/// magnitudes that errors are measured by.
fn reference(cpu: &Cpu, format: Format, way: (Phase, bool), x: &[f32], w: &[f32], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let (x, w) = match way {
        _ if !format.is_coded() => (exact(x), exact(w)),
        (Phase::Generate, false) => (rounded(x), exact(w)),
        (Phase::Prompt, false) if cpu.prompts_in_bf16() => (bf16(x), bf16(w)),
        (Phase::Prompt, _) if cpu.prompts_in_two_parts() => (exact(x), exact(w)),
        (Phase::Prompt, _) if cpu.prompts_in_words() => (rounded_to_words(x), exact(w)),
        _ => (rounded_twice(x), exact(w)),
    };
    products(&x, &w, cols)
}

/// Products of the rows of both, and the sums of magnitudes.
fn products(x: &[f64], w: &[f64], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut sums, mut sizes) = (Vec::new(), Vec::new());
    for x in x.chunks(cols) {
        for w in w.chunks(cols) {
            sums.push(x.iter().zip(w).map(|(x, w)| x * w).sum());
            sizes.push(x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f64>());
        }
    }
    (sums, sizes)
}

fn check_matmul(format: Format, n: usize, rows: usize, cols: usize, seed: u64) {
    let mut random = Random(seed);
    let data = random.weights(format, rows, cols);
    let x = random.normals(n * cols);
    let w = decode(format, rows, cols, &data);
    let matrix = Matrix::new(format, rows, cols, &data).unwrap();
    for cpu in all() {
        for way @ (phase, fine) in WAYS {
            let (want, size) = reference(&cpu, format, way, &x, &w, cols);
            let mut out = vec![f32::NAN; n * rows];
            cpu.matmul(phase, &x, n, &[matrix.with_fine_activations(fine)], &mut [&mut out]);
            for (i, ((got, want), size)) in out.iter().zip(&want).zip(&size).enumerate() {
                // A minimum is added and taken off again: errors are relative to the larger terms. And where what an 8-bit
                // code left over lies half way between two codes, f32 and f64 may choose differently: 2^-15 of a column.
                let room = 3e-5 * size + 1e-6;
                assert!(
                    (f64::from(*got) - want).abs() <= room,
                    "{format} {way:?} {} [{n}x{cols}] x [{rows}x{cols}]: {i} is {got}, not {want} (of {size})",
                    cpu.isa().name()
                );
            }
        }
    }
}

#[test]
fn every_format_at_the_shapes_of_real_layers() {
    for format in Format::ALL {
        let cols = if format.block_len() == 256 { 768 } else { 576 };
        check_matmul(format, 1, 192, cols, 1);
        check_matmul(format, 37, 50, cols, 2);
    }
}

#[test]
fn one_column_block_and_one_row() {
    for format in Format::ALL {
        let cols = format.block_len();
        check_matmul(format, 1, 1, cols, 3);
        check_matmul(format, 2, 17, cols, 4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn any_shape(format in 0..Format::ALL.len(), n in 1usize..70, rows in 1usize..70, blocks in 1usize..5, seed: u64) {
        let format = Format::ALL[format];
        let cols = if format.is_float() { blocks * 13 + seed as usize % 13 } else { blocks * format.block_len() };
        check_matmul(format, n, rows, cols, seed);
    }
}

#[test]
fn results_do_not_depend_on_neighbours_or_threads() {
    let mut random = Random(5);
    for format in [Format::F16, Format::Q4_0, Format::Q4_K, Format::Q6_K, Format::Q8_0, Format::Q4_Z, Format::NF4] {
        let (n, rows, cols) = (45, 70, 512);
        let data = random.weights(format, rows, cols);
        let x = random.normals(n * cols);
        let matrix = Matrix::new(format, rows, cols, &data).unwrap();
        for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
            for (phase, fine) in WAYS {
                let matrix = matrix.with_fine_activations(fine);
                let mut together = vec![0.0; n * rows];
                Cpu::new(1, isa).matmul(phase, &x, n, &[matrix], &mut [&mut together]);
                let cpu = Cpu::new(3, isa);
                for r in [0, 7, 44] {
                    let mut alone = vec![0.0; rows];
                    cpu.matmul(phase, &x[r * cols..(r + 1) * cols], 1, &[matrix], &mut [&mut alone]);
                    assert_eq!(alone, together[r * rows..(r + 1) * rows], "{format} {phase:?} {}", isa.name());
                }
            }
        }
    }
}

/// How far each path is from the exact product, as a share of the sum of magnitudes.
#[test]
fn rounding_stays_as_small_as_documented() {
    let mut random = Random(6);
    let (n, rows, cols) = (40, 40, 1024);
    for format in Format::ALL.into_iter().filter(|f| f.is_coded()) {
        let data = random.weights(format, rows, cols);
        let x = random.normals(n * cols);
        let w = decode(format, rows, cols, &data);
        let matrix = Matrix::new(format, rows, cols, &data).unwrap();
        let (want, size) = products(&exact(&x), &exact(&w), cols);
        for cpu in all() {
            for way @ (phase, fine) in WAYS {
                let mut out = vec![0.0; n * rows];
                cpu.matmul(phase, &x, n, &[matrix.with_fine_activations(fine)], &mut [&mut out]);
                let errors = out.iter().zip(&want).zip(&size).map(|((g, w), s)| (f64::from(*g) - w).abs() / s);
                let mean = errors.sum::<f64>() / out.len() as f64;
                let room = match (way, cpu.prompts_in_bf16()) {
                    ((Phase::Generate, false), _) => 6e-4,
                    ((Phase::Prompt, false), true) => 2e-4,
                    _ => 1e-5,
                };
                assert!(mean < room, "{format} {way:?} {}: {mean:.1e}", cpu.isa().name());
            }
        }
    }
}

#[test]
fn prompts_can_be_rounded_as_ggml_rounds_them() {
    let mut random = Random(14);
    let (n, rows, cols) = (37, 40, 512);
    let formats: Vec<Format> = Format::ALL.into_iter().filter(|f| f.is_coded()).collect();
    let x = random.normals(n * cols);
    let data: Vec<_> = formats.iter().map(|f| random.weights(*f, rows, cols)).collect();
    let matrices: Vec<_> = formats.iter().zip(&data).map(|(f, d)| Matrix::new(*f, rows, cols, d).unwrap()).collect();
    for cpu in all().into_iter().map(|cpu| cpu.with_prompt_rounding(PromptRounding::EightBits)) {
        // All in one call: those that are rounded over 32 columns and those over 256 each get theirs.
        let mut out = vec![vec![f32::NAN; n * rows]; formats.len()];
        let mut views: Vec<&mut [f32]> = out.iter_mut().map(|o| o.as_mut_slice()).collect();
        cpu.matmul(Phase::Prompt, &x, n, &matrices, &mut views);
        for ((format, data), out) in formats.iter().zip(&data).zip(&out) {
            let w = decode(*format, rows, cols, data);
            let rounded: Vec<f32> = rounded_over(format.block_len().max(32), &x).iter().map(|x| *x as f32).collect();
            let (want, size) = products(&exact(&rounded), &exact(&w), cols);
            for ((got, want), size) in out.iter().zip(&want).zip(&size) {
                assert!((f64::from(*got) - want).abs() <= 1e-5 * size + 1e-6, "{format} {}", cpu.isa().name());
            }
        }
    }
}

#[test]
fn a_nan_is_never_lost() {
    let mut random = Random(7);
    for format in Format::ALL {
        let (rows, cols) = (16, 512);
        let data = random.weights(format, rows, cols);
        let matrix = Matrix::new(format, rows, cols, &data).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = random.normals(cols);
            x[300] = bad;
            for cpu in all() {
                for phase in [Phase::Generate, Phase::Prompt] {
                    let mut out = vec![0.0; rows];
                    cpu.matmul(phase, &x, 1, &[matrix], &mut [&mut out]);
                    assert!(out.iter().any(|v| !v.is_finite()), "{format} {phase:?} {}", cpu.isa().name());
                }
            }
        }
    }
}

#[test]
fn several_matrices_in_one_call_are_each_alone() {
    let mut random = Random(8);
    let cols = 256;
    let formats = [(Format::Q4_K, 48), (Format::Q6_K, 16), (Format::F32, 20)];
    let data: Vec<_> = formats.iter().map(|(f, rows)| random.weights(*f, *rows, cols)).collect();
    let mut matrices: Vec<_> =
        formats.iter().zip(&data).map(|((f, rows), d)| Matrix::new(*f, *rows, cols, d).unwrap()).collect();
    matrices[1] = matrices[1].with_fine_activations(true);
    let x = random.normals(5 * cols);
    for cpu in all() {
        for phase in [Phase::Generate, Phase::Prompt] {
            let mut out: Vec<Vec<f32>> = formats.iter().map(|(_, rows)| vec![0.0; 5 * rows]).collect();
            let mut views: Vec<&mut [f32]> = out.iter_mut().map(|o| o.as_mut_slice()).collect();
            cpu.matmul(phase, &x, 5, &matrices, &mut views);
            for (matrix, together) in matrices.iter().zip(&out) {
                let mut alone = vec![0.0; together.len()];
                cpu.matmul(phase, &x, 5, &[*matrix], &mut [&mut alone]);
                assert_eq!(&alone, together);
            }
        }
    }
}

/// Attention by its definition, in f64.
fn plain_attention(
    spec: &Attention<'_>,
    q: &[f32],
    start: usize,
    keys: &[f32],
    values: &[f32],
    cap: usize,
    context: usize,
) -> Vec<f64> {
    let (dim, value_dim, group) = (spec.head_dim, spec.value_dim, spec.heads / spec.kv_heads);
    let rows = q.len() / (spec.heads * dim);
    let mut out = vec![0f64; rows * spec.heads * value_dim];
    for r in 0..rows {
        let i = start + r;
        let last = if i < context { context - 1 } else { i };
        for h in 0..spec.heads {
            let q = &q[(r * spec.heads + h) * dim..][..dim];
            let first = spec.window.map_or(0, |w| (i + 1).saturating_sub(w));
            let at = |j: usize| (h / group) * cap + j;
            let mut scores: Vec<f64> = (first..=last)
                .map(|j| {
                    let dot: f64 =
                        q.iter().zip(&keys[at(j) * dim..][..dim]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let mut s = dot * f64::from(spec.scale);
                    if let Some(cap) = spec.softcap {
                        s = f64::from(cap) * (s / f64::from(cap)).tanh();
                    }
                    s + match (spec.slopes, spec.rounded_slopes) {
                        (None, _) => 0.0,
                        (Some(m), None) => f64::from(m[h]) * (j as f64 - i as f64),
                        (Some(m), Some(by)) => f64::from(by) * half::bf16::from_f32(m[h] * j as f32).to_f64(),
                    }
                })
                .collect();
            if let Some(sinks) = spec.sinks {
                scores.push(f64::from(sinks[h]));
            }
            let most = scores.iter().cloned().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            for (n, j) in (first..=last).enumerate() {
                let p = (scores[n] - most).exp() / total;
                for d in 0..value_dim {
                    out[(r * spec.heads + h) * value_dim + d] += p * f64::from(values[at(j) * value_dim + d]);
                }
            }
        }
    }
    out
}

#[test]
fn attention_of_every_kind() {
    let mut random = Random(9);
    let slopes = [0.5, 0.25, 0.1, 0.05, 0.02, 0.01];
    let sinks = [0.3, -1.0, 2.0, 0.0, 1.0, -0.5];
    let one = &all()[0];
    for (heads, kv_heads, dim) in [(6, 2, 24), (4, 4, 16), (6, 1, 7), (3, 3, 64)] {
        for kind in 0..8 {
            let value_dim = if kind == 6 { dim + 5 } else { dim };
            let spec = Attention {
                heads,
                kv_heads,
                head_dim: dim,
                value_dim,
                scale: 1.0 / (dim as f32).sqrt(),
                softcap: (kind == 1).then_some(2.0),
                window: (kind == 2).then_some(70),
                slopes: (kind == 3 || kind == 5).then_some(&slopes[..heads]),
                rounded_slopes: (kind == 5).then_some(0.3),
                sinks: (kind == 4).then_some(&sinks[..heads]),
            };
            for (start, rows) in [(0, 1), (0, 130), (300, 1), (90, 61), (255, 3), (64, 64)] {
                let capacity = start + rows + 5;
                let context = if kind == 7 { start + rows - 1 } else { 0 };
                let q = random.normals(rows * heads * dim);
                let keys = random.normals(kv_heads * capacity * dim);
                let values = random.normals(kv_heads * capacity * value_dim);
                let halves = |x: &[f32]| -> Vec<u16> { x.iter().map(|v| half::f16::from_f32(*v).to_bits()).collect() };
                let (keys16, values16) = (halves(&keys), halves(&values));
                let eights = |x: &[f32], width: usize| -> (Vec<i8>, Vec<f32>) {
                    let blocks = width.div_ceil(32);
                    let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; x.len() / width * blocks]);
                    let rows = x.chunks(width).zip(codes.chunks_mut(width)).zip(scales.chunks_mut(blocks));
                    rows.for_each(|((x, codes), scales)| one.store_q8(x, codes, scales));
                    (codes, scales)
                };
                let (keys8, values8) = (eights(&keys, dim), eights(&values, value_dim));
                let want = plain_attention(&spec, &q, start, &keys, &values, capacity, context);
                for cpu in all() {
                    for phase in [Phase::Generate, Phase::Prompt] {
                        for (bits, room) in [(32, 2e-5), (16, 4e-3), (8, 6e-2)] {
                            let (keys, values) = match bits {
                                8 => (
                                    Kv::Q8 { codes: &keys8.0, scales: &keys8.1, width: dim },
                                    Kv::Q8 { codes: &values8.0, scales: &values8.1, width: value_dim },
                                ),
                                16 => (Kv::F16(&keys16), Kv::F16(&values16)),
                                _ => (Kv::F32(&keys), Kv::F32(&values)),
                            };
                            // A product of two parts is within 2^-16 of the exact one.
                            let in_parts = phase == Phase::Prompt && cpu.prompts_in_two_parts();
                            let room = if in_parts { room + 4e-5 } else { room };
                            let sequence = AttentionSequence { rows: 0..rows, start, keys, values, capacity, context };
                            let mut out = vec![f32::NAN; want.len()];
                            cpu.attention(phase, &spec, &q, &[sequence], &mut out);
                            for (got, want) in out.iter().zip(&want) {
                                assert!(
                                    (f64::from(*got) - want).abs() < room,
                                    "{spec:?} start {start} rows {rows} {phase:?} {bits} bits {}: {got} not {want}",
                                    cpu.isa().name()
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn attention_rows_do_not_depend_on_how_the_prompt_is_cut() {
    let mut random = Random(10);
    let spec = Attention {
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        value_dim: 32,
        scale: 0.2,
        softcap: None,
        window: None,
        slopes: None,
        rounded_slopes: None,
        sinks: None,
    };
    let (rows, capacity, width) = (200, 200, 128);
    let q = random.normals(rows * width);
    let keys = random.normals(2 * capacity * 32);
    let values = random.normals(2 * capacity * 32);
    let sequence = |rows, start| AttentionSequence {
        rows,
        start,
        keys: Kv::F32(&keys),
        values: Kv::F32(&values),
        capacity,
        context: 0,
    };
    for cpu in all() {
        let mut whole = vec![0.0; q.len()];
        cpu.attention(Phase::Prompt, &spec, &q, &[sequence(0..rows, 0)], &mut whole);
        for (from, to) in [(0, 70), (70, 71), (71, 200)] {
            let mut part = vec![0.0; (to - from) * width];
            let sequences = [sequence(0..to - from, from)];
            cpu.attention(Phase::Prompt, &spec, &q[from * width..to * width], &sequences, &mut part);
            assert_eq!(part, whole[from * width..to * width], "{}", cpu.isa().name());
        }
    }
}

#[test]
fn small_operations() {
    let mut random = Random(11);
    let (rows, width) = (37, 75);
    let x = random.normals(rows * width);
    let (w, b) = (random.normals(width), random.normals(width));
    for cpu in all() {
        let isa = cpu.isa().name();
        let near = |got: f32, want: f64, room: f64| {
            assert!((f64::from(got) - want).abs() <= room * want.abs().max(1.0), "{isa}: {got} is not {want}")
        };
        let mut out = vec![0.0; x.len()];
        cpu.rms_norm(&x, &w, 1e-5, 1.0, &mut out);
        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                near(out[i], f64::from(x[i]) / (mean + 1e-5).sqrt() * (f64::from(w[i]) + 1.0), 2e-6);
            }
        }
        cpu.layer_norm(&x, width, Some(&w), Some(&b), 1e-5, &mut out);
        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
            let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let want = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt() * f64::from(w[i]) + f64::from(b[i]);
                near(out[i], want, 4e-6);
            }
        }
        // Five heads of 15 with weights of their own are normed one by one.
        let mut heads = vec![0.0; rows * width];
        cpu.layer_norm(&x, 15, Some(&w), Some(&b), 1e-5, &mut heads);
        for (i, (x, got)) in x.chunks(15).zip(heads.chunks(15)).enumerate() {
            let at = i % 5 * 15;
            let mut one = [0.0; 15];
            cpu.layer_norm(x, 15, Some(&w[at..at + 15]), Some(&b[at..at + 15]), 1e-5, &mut one);
            assert_eq!(got, one);
        }
        let points: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.005).collect();
        let up: Vec<f32> = points.iter().map(|p| p * 0.3 + 1.0).collect();
        let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ClampedSilu];
        for act in all {
            let mut alone = points.clone();
            cpu.activate(act, &mut alone);
            let mut gated = points.clone();
            cpu.gate(act, &mut gated, &up);
            for i in 0..points.len() {
                let x = f64::from(points[i]);
                let want = match act {
                    Activation::Silu => x / (1.0 + (-x).exp()),
                    Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
                    Activation::GeluTanh => {
                        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
                    }
                    Activation::Relu => x.max(0.0),
                    Activation::ClampedSilu => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
                };
                near(alone[i], want, 1e-6);
                let up = match act {
                    Activation::ClampedSilu => f64::from(up[i]).clamp(-7.0, 7.0) + 1.0,
                    _ => f64::from(up[i]),
                };
                near(gated[i], want * up, 1e-6);
            }
        }
        let mut capped = points.clone();
        cpu.soft_cap(&mut capped, 5.0);
        for (got, x) in capped.iter().zip(&points) {
            near(*got, 5.0 * (f64::from(*x) / 5.0).tanh(), 1e-6);
        }
    }
}

/// What waits in bf16 comes back as bf16, whatever the length.
#[test]
fn halves() {
    let mut random = Random(31);
    let mut x: Vec<f32> = (0..40_000).map(|i| random.normal() * 10f32.powi(i % 60 - 30)).collect();
    // The last two lie in the middle between neighbours.
    x[..6].copy_from_slice(&[0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX]);
    x[6..8].copy_from_slice(&[1.003_906_3, 1.011_718_8]);
    x[9] = f32::from_bits(0x7f80_0001);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let cpu = Cpu::new(2, isa);
        for len in [1, 31, 32, 33, 1000, 32_768, 32_769, x.len()] {
            let (mut half, mut back) = (vec![0.0; Cpu::half_len(len)], vec![0.0; len]);
            cpu.halve(&x[..len], &mut half);
            cpu.unhalve(&half, &mut back);
            for (got, x) in back.iter().zip(&x) {
                let want = half::bf16::from_f32(*x).to_f32();
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{isa:?} {len}: {x} {got}");
            }
        }
    }
}

/// The error function by the series whose terms all have one sign, in f64.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..300 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    sum * (-x * x).exp() * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn rotary_positions() {
    let mut random = Random(12);
    let (rows, heads, dim, rotary, first) = (5, 3, 20, 12, 4);
    let x = random.normals(rows * heads * dim);
    let angles = random.normals(rows * rotary / 2);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    for cpu in all() {
        for layout in [RopeLayout::Half, RopeLayout::Interleaved, RopeLayout::TwoHalves] {
            let mut out = x.clone();
            cpu.rope(&mut out, heads * dim, dim, &cos, &sin, first, rotary, layout);
            for r in 0..rows {
                for h in 0..heads {
                    let head = (r * heads + h) * dim;
                    let at = head + first;
                    for i in 0..rotary / 2 {
                        let (a, b) = match layout {
                            RopeLayout::Half => (i, i + rotary / 2),
                            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                            RopeLayout::TwoHalves => (i + i / 3 * 3, i + i / 3 * 3 + 3),
                        };
                        let (c, s) = (cos[r * rotary / 2 + i], sin[r * rotary / 2 + i]);
                        assert!((out[at + a] - (x[at + a] * c - x[at + b] * s)).abs() < 1e-6);
                        assert!((out[at + b] - (x[at + a] * s + x[at + b] * c)).abs() < 1e-6);
                    }
                    assert_eq!(out[head..at], x[head..at], "unturned columns stay");
                    assert_eq!(out[at + rotary..head + dim], x[at + rotary..head + dim], "unturned columns stay");
                }
            }
        }
    }
}

#[test]
fn halves_round_as_the_format_says() {
    let mut random = Random(13);
    let mut x: Vec<f32> = random.normals(100);
    x.extend([0.0, -0.0, 65504.0, 65520.0, 1e-8, 6e-8, 5.96e-8, f32::INFINITY, 1e30, 0.333]);
    for cpu in all() {
        let mut bits = vec![0; x.len()];
        cpu.store_f16(&x, &mut bits);
        let want: Vec<u16> = x.iter().map(|v| half::f16::from_f32(*v).to_bits()).collect();
        assert_eq!(bits, want, "{}", cpu.isa().name());
        let mut back = vec![0.0; x.len()];
        cpu.load_f16(&bits, &mut back);
        let want: Vec<f32> = bits.iter().map(|b| half::f16::from_bits(*b).to_f32()).collect();
        assert_eq!(back, want, "{}", cpu.isa().name());
    }
}
