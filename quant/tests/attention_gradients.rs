//! Attention for training on every instruction set that this machine has, against its definition in f64.

mod random;

use random::{Random, bf16, differences, wide};
use rushlight_quant::ops::{Attention, AttentionGradients, AttentionRows};
use rushlight_quant::{Cpu, Isa};

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// Attention by its definition in f64: the output, and the gradients of `sum(out * dout)` by q, k, v and sinks.
struct Reference {
    out: Vec<f64>,
    gradients: [Vec<f64>; 4],
}

fn reference(
    spec: &Attention<'_>,
    sequences: &[AttentionRows],
    [q, k, v, dout]: [&[f64]; 4],
    sinks: Option<&[f64]>,
) -> Reference {
    let (dim, value_dim, group) = (spec.head_dim, spec.value_dim, spec.heads / spec.kv_heads);
    let mut out = vec![0.0; dout.len()];
    let mut gradients = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()], vec![0.0; spec.heads]];
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for s in sequences {
        for (i, row) in s.queries.clone().enumerate() {
            let at = s.keys.len() - s.queries.len() + i;
            for h in 0..spec.heads {
                let first = spec.window.map_or(0, |w| (at + 1).saturating_sub(w));
                let last = if at < s.context { s.context - 1 } else { at };
                let qi = (row * spec.heads + h) * dim;
                let oi = (row * spec.heads + h) * value_dim;
                let kj = |j: usize| ((s.keys.start + j) * spec.kv_heads + h / group) * dim;
                let vj = |j: usize| ((s.keys.start + j) * spec.kv_heads + h / group) * value_dim;
                let (mut scores, mut slopes) = (Vec::new(), Vec::new());
                for j in first..=last {
                    let mut score = dot(&q[qi..qi + dim], &k[kj(j)..kj(j) + dim]) * f64::from(spec.scale);
                    let mut slope = f64::from(spec.scale);
                    if let Some(cap) = spec.softcap {
                        let t = (score / f64::from(cap)).tanh();
                        score = f64::from(cap) * t;
                        slope *= 1.0 - t * t;
                    }
                    score += match (spec.slopes, spec.rounded_slopes) {
                        (None, _) => 0.0,
                        (Some(m), None) => f64::from(m[h]) * (j as f64 - at as f64),
                        (Some(m), Some(by)) => f64::from(by) * bf16(m[h] * j as f32),
                    };
                    scores.push(score);
                    slopes.push(slope);
                }
                let most = scores.iter().cloned().chain(sinks.map(|s| s[h])).fold(f64::MIN, f64::max);
                let sink = sinks.map_or(0.0, |s| (s[h] - most).exp());
                let total = scores.iter().map(|s| (s - most).exp()).sum::<f64>() + sink;
                let p: Vec<f64> = scores.iter().map(|s| (s - most).exp() / total).collect();
                let dout = &dout[oi..oi + value_dim];
                for (p, j) in p.iter().zip(first..) {
                    (0..value_dim).for_each(|d| out[oi + d] += p * v[vj(j) + d]);
                }
                let delta = dot(dout, &out[oi..oi + value_dim]);
                gradients[3][h] -= sink / total * delta;
                for ((p, slope), j) in p.iter().zip(slopes).zip(first..) {
                    let ds = p * (dot(dout, &v[vj(j)..vj(j) + value_dim]) - delta) * slope;
                    for d in 0..dim {
                        gradients[0][qi + d] += ds * k[kj(j) + d];
                        gradients[1][kj(j) + d] += ds * q[qi + d];
                    }
                    (0..value_dim).for_each(|d| gradients[2][vj(j) + d] += p * dout[d]);
                }
            }
        }
    }
    Reference { out, gradients }
}

const SLOPES: [f32; 6] = [0.5, 0.25, 0.1, 0.05, 0.02, 0.01];
const SINKS: [f32; 6] = [0.3, -1.0, 2.0, 0.0, 1.0, -0.5];

fn kind(kind: usize, heads: usize, kv_heads: usize, dim: usize, window: usize) -> Attention<'static> {
    Attention {
        heads,
        kv_heads,
        head_dim: dim,
        value_dim: if kind == 6 { dim + 5 } else { dim },
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: (kind == 1).then_some(2.0),
        window: (kind == 2 || kind == 8).then_some(window),
        slopes: (kind == 3 || kind == 5).then_some(&SLOPES[..heads]),
        rounded_slopes: (kind == 5).then_some(0.3),
        sinks: (kind == 4).then_some(&SINKS[..heads]),
    }
}

#[test]
fn the_reference_of_attention_has_the_slopes_of_its_differences() {
    let mut random = Random(13);
    for number in 0..9 {
        let spec = kind(number, 4, 2, 5, 3);
        let context = if number >= 7 { 4 } else { 0 };
        let sequences = [
            AttentionRows { queries: 0..6, keys: 0..6, context },
            AttentionRows { queries: 6..9, keys: 6..13, context: 0 },
        ];
        let (q, k) = (random.normals(9 * 4 * 5), random.normals(13 * 2 * 5));
        let (v, dout) = (random.normals(13 * 2 * spec.value_dim), random.normals(9 * 4 * spec.value_dim));
        let (q64, k64, v64, d64) = (wide(&q), wide(&k), wide(&v), wide(&dout));
        let sinks: Option<Vec<f64>> = spec.sinks.map(wide);
        let of = |q: &[f64], k: &[f64], v: &[f64], sinks: Option<&[f64]>| -> f64 {
            let out = reference(&spec, &sequences, [q, k, v, &d64], sinks).out;
            out.iter().zip(&d64).map(|(a, b)| a * b).sum()
        };
        let got = reference(&spec, &sequences, [&q64, &k64, &v64, &d64], sinks.as_deref()).gradients;
        let want = [
            differences(&q, &|q| of(q, &k64, &v64, sinks.as_deref())),
            differences(&k, &|k| of(&q64, k, &v64, sinks.as_deref())),
            differences(&v, &|v| of(&q64, &k64, v, sinks.as_deref())),
            spec.sinks.map_or(vec![0.0; 4], |s| differences(s, &|s| of(&q64, &k64, &v64, Some(s)))),
        ];
        for (got, want) in got.iter().zip(&want) {
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-7, "{spec:?}: {got} {want}");
            }
        }
    }
}

#[test]
fn attention_of_every_kind_goes_back() {
    let mut random = Random(14);
    for (heads, kv_heads, dim) in [(6, 2, 24), (3, 3, 16), (6, 1, 7)] {
        for number in 0..9 {
            let spec = kind(number, heads, kv_heads, dim, 70);
            let context = if number >= 7 { 100 } else { 0 };
            // Rows between and behind the sequences are nobody's.
            let sequences = [
                AttentionRows { queries: 0..130, keys: 2..132, context },
                AttentionRows { queries: 131..132, keys: 132..133, context: 0 },
                AttentionRows { queries: 132..197, keys: 133..270, context: context / 2 },
            ];
            let (rows, keys) = (200, 271);
            let (q, k) = (random.normals(rows * heads * dim), random.normals(keys * kv_heads * dim));
            let v = random.normals(keys * kv_heads * spec.value_dim);
            let dout = random.normals(rows * heads * spec.value_dim);
            let sinks: Option<Vec<f64>> = spec.sinks.map(wide);
            let given = [&wide(&q)[..], &wide(&k), &wide(&v), &wide(&dout)];
            let want = reference(&spec, &sequences, given, sinks.as_deref());
            for (isa, half) in isas().flat_map(|isa| [(isa, false), (isa, true)]) {
                let mut first: Option<[Vec<f32>; 5]> = None;
                for threads in [1, 3] {
                    let cpu = Cpu::new(threads, isa).with_half_attention(half);
                    if half && !cpu.prompts_in_bf16() {
                        continue;
                    }
                    let (mut out, mut lse) = (vec![0.0; dout.len()], vec![f32::NAN; rows * heads]);
                    cpu.attention_train(&spec, &sequences, &q, &k, &v, &mut out, &mut lse);
                    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
                    let mut dsinks = vec![0.0; heads];
                    let gradients =
                        AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv, dsinks: Some(&mut dsinks) };
                    cpu.attention_backward(&spec, &sequences, [&q, &k, &v], &out, &lse, &dout, gradients);
                    if spec.sinks.is_none() {
                        assert!(dsinks.iter().all(|d| *d == 0.0));
                    }
                    let got = [out, dq, dk, dv, dsinks];
                    let wants = [&want.out].into_iter().chain(&want.gradients);
                    for (i, (got, want)) in got.iter().zip(wants).enumerate() {
                        let what = format!("{spec:?} {} half {half}: {i}", isa.name());
                        match half {
                            true => check_norm(got, want, &what),
                            false => check_each(got, want, &what),
                        }
                    }
                    assert!(first.get_or_insert_with(|| got.clone()) == &got, "{} {threads} threads", isa.name());
                }
            }
        }
    }
}

fn check_each(got: &[f32], want: &[f64], what: &str) {
    for (j, (got, want)) in got.iter().zip(want).enumerate() {
        let room = 1e-5 * want.abs().max(1.0);
        assert!((f64::from(*got) - want).abs() < room, "{what} at {j} is {got}, not {want}");
    }
}

/// With sides of 8 significant bits, single numbers may be far off where large terms cancel; all together may not.
fn check_norm(got: &[f32], want: &[f64], what: &str) {
    let off: f64 = got.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).powi(2)).sum();
    let size: f64 = want.iter().map(|want| want * want).sum();
    assert!(off.sqrt() <= 8e-3 * size.sqrt(), "{what} is off by {} of {}", off.sqrt(), size.sqrt());
}
