//! Gradients on every instruction set that this machine has, against arithmetic in f64 and finite differences of it.

mod random;

use random::{Random, bf16, decode, differences, wide};
use rushlight_quant::formats::Format;
use rushlight_quant::ops::{Activation, RopeLayout, Waiting};
use rushlight_quant::{Back, Cpu, Down, Isa, Matrix, Up};

fn all() -> Vec<Cpu> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Cpu::new(2, isa)).collect()
}

/// `out[i, j] += sum_k a(i, k) b(k, j)` and the sums of magnitudes, by which errors are measured.
fn product(
    sizes: [usize; 3],
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let [m, n, k] = sizes;
    let (mut sums, mut sizes) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for l in 0..k {
            let a = a(i, l);
            for j in 0..n {
                let term = a * b(l, j);
                sums[i * n + j] += term;
                sizes[i * n + j] += term.abs();
            }
        }
    }
    (sums, sizes)
}

fn near(got: &[f32], want: &[f64], size: &[f64], room: f64, what: &str) {
    for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        assert!((f64::from(*got) - want).abs() <= room * size + 1e-6, "{what}: {i} is {got}, not {want} (of {size})");
    }
}

fn check_backward(format: Format, n: usize, rows: usize, cols: usize, seed: u64) {
    let mut random = Random(seed);
    let data = random.weights(format, rows, cols);
    let (dy, before) = (random.normals(n * rows), random.normals(n * cols));
    let w = decode(format, rows, cols, &data);
    let matrix = Matrix::new(format, rows, cols, &data).unwrap();
    let of = |dy: &[f64], w: &[f64]| product([n, cols, rows], |r, o| dy[r * rows + o], |o, c| w[o * cols + c]);
    let exact = of(&wide(&dy), &wide(&w));
    let halves = |x: &[f32]| x.iter().map(|x| bf16(*x)).collect::<Vec<_>>();
    let rounded = of(&halves(&dy), &halves(&w));
    for cpu in all() {
        let mut dx = before.clone();
        cpu.matmul_backward(&[&dy], n, &[matrix], &mut dx);
        let (want, size) = if cpu.rounds_gradients(format) { &rounded } else { &exact };
        let got: Vec<f32> = dx.iter().zip(&before).map(|(after, before)| after - before).collect();
        near(&got, want, size, 2e-6, &format!("{format} {} [{n}x{rows}] . [{rows}x{cols}]", cpu.isa().name()));
    }
}

#[test]
fn every_format_goes_back() {
    for format in Format::ALL {
        let cols = if format.block_len() == 256 { 512 } else { 576 };
        check_backward(format, 37, 50, cols, 1);
        check_backward(format, 100, 600, format.block_len() * 3, 2);
        check_backward(format, 1, 1, format.block_len(), 3);
    }
    check_backward(Format::F32, 5, 33, 41, 4);
    check_backward(Format::BF16, 98, 1100, 70, 5);
}

#[test]
fn gradients_of_shared_inputs_are_summed_and_do_not_depend_on_threads_or_neighbours() {
    let mut random = Random(6);
    let (n, cols) = (101, 256);
    let formats = [(Format::Q4_K, 70), (Format::Q6_K, 32), (Format::F32, 45), (Format::Q8_0, 530), (Format::NF4, 64)];
    let data: Vec<_> = formats.iter().map(|(f, rows)| random.weights(*f, *rows, cols)).collect();
    let matrices: Vec<_> =
        formats.iter().zip(&data).map(|((f, rows), d)| Matrix::new(*f, *rows, cols, d).unwrap()).collect();
    let dy: Vec<_> = formats.iter().map(|(_, rows)| random.normals(n * rows)).collect();
    let views: Vec<&[f32]> = dy.iter().map(|d| &d[..]).collect();
    for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
        let mut apart = vec![0.0; n * cols];
        for (dy, matrix) in views.iter().zip(&matrices) {
            Cpu::new(1, isa).matmul_backward(&[dy], n, &[*matrix], &mut apart);
        }
        for threads in [1, 2, 3] {
            let mut together = vec![0.0; n * cols];
            Cpu::new(threads, isa).matmul_backward(&views, n, &matrices, &mut together);
            assert_eq!(apart, together, "{} {threads}", isa.name());
        }
        for r in [0, 50, 100] {
            let mut alone = vec![0.0; cols];
            let rows: Vec<&[f32]> =
                views.iter().zip(&formats).map(|(d, (_, rows))| &d[r * rows..(r + 1) * rows]).collect();
            Cpu::new(2, isa).matmul_backward(&rows, 1, &matrices, &mut alone);
            assert_eq!(alone, apart[r * cols..(r + 1) * cols], "{} row {r}", isa.name());
        }
    }
}

#[test]
fn products_with_trained_matrices() {
    let mut random = Random(7);
    for (n, rows, cols) in
        [(37, 8, 576), (130, 576, 8), (600, 4, 70), (70, 300, 64), (5, 1, 1), (33, 130, 210), (1, 16, 1100)]
    {
        let (x, w, dy) = (random.normals(n * cols), random.normals(rows * cols), random.normals(n * rows));
        let f = |v: f32| f64::from(v);
        let scale = 0.25;
        let forward = product([n, rows, cols], |r, c| f(x[r * cols + c]), |c, o| f(scale * w[o * cols + c]));
        let backward = product([n, cols, rows], |r, o| f(dy[r * rows + o]), |o, c| f(scale * w[o * cols + c]));
        let weights = product([rows, cols, n], |o, r| f(dy[r * rows + o]), |r, c| f(scale * x[r * cols + c]));
        for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
            let mut first: Option<[Vec<f32>; 3]> = None;
            for threads in [1, 2, 3] {
                let cpu = Cpu::new(threads, isa);
                let mut got = [vec![0.0; n * rows], vec![0.0; n * cols], vec![0.0; rows * cols]];
                cpu.floats_matmul(&x, n, &w, rows, cols, scale, &mut got[0]);
                cpu.floats_backward(&dy, n, &w, rows, cols, scale, &mut got[1]);
                cpu.weight_gradient(&dy, &x, n, rows, cols, scale, &mut got[2]);
                let what = format!("{} [{n}, {rows}, {cols}]", isa.name());
                near(&got[0], &forward.0, &forward.1, 2e-6, &what);
                near(&got[1], &backward.0, &backward.1, 2e-6, &what);
                near(&got[2], &weights.0, &weights.1, 2e-6, &what);
                // A second time adds the same again.
                let mut twice = got[2].clone();
                cpu.weight_gradient(&dy, &x, n, rows, cols, scale, &mut twice);
                let both: Vec<f64> = weights.0.iter().map(|w| 2.0 * w).collect();
                near(&twice, &both, &weights.1, 4e-6, &what);
                assert_eq!(first.get_or_insert_with(|| got.clone()), &got, "{what}: {threads} threads");
            }
        }
    }
}

/// Matrices with adapters: (format, rows, which of the downs).
struct Adapted {
    n: usize,
    cols: usize,
    ranks: Vec<usize>,
    matrices: Vec<(Format, usize, Option<usize>)>,
}

fn check_adapters(case: &Adapted, seed: u64) {
    let Adapted { n, cols, ranks, matrices } = case;
    let (n, cols, scale) = (*n, *cols, 0.5f32);
    let mut random = Random(seed);
    let data: Vec<_> = matrices.iter().map(|(f, rows, _)| random.weights(*f, *rows, cols)).collect();
    let views: Vec<_> =
        matrices.iter().zip(&data).map(|((f, rows, _), d)| Matrix::new(*f, *rows, cols, d).unwrap()).collect();
    let (x, before) = (random.normals(n * cols), random.normals(n * cols));
    let downs: Vec<_> = ranks.iter().map(|rank| random.normals(rank * cols)).collect();
    let b: Vec<_> = matrices.iter().map(|(_, rows, d)| d.map(|d| random.normals(rows * ranks[d]))).collect();
    let dys: Vec<_> = matrices.iter().map(|(_, rows, _)| random.normals(n * rows)).collect();
    let ups: Vec<_> = matrices
        .iter()
        .zip(&b)
        .map(|((.., down), b)| down.map(|down| Up { b: b.as_ref().unwrap(), rank: ranks[down], scale, down }))
        .collect();
    let halves = |x: &[f32]| x.iter().map(|x| bf16(*x)).collect::<Vec<_>>();
    let rounded = halves(&x);
    // What is exact here but for the rounding of activations, gradients and weights, and the magnitudes of its terms.
    let lows: Vec<_> = downs
        .iter()
        .zip(ranks)
        .map(|(a, rank)| product([n, *rank, cols], |r, c| rounded[r * cols + c], |c, k| f64::from(a[k * cols + c])))
        .collect();
    let mut dlows: Vec<_> = ranks.iter().map(|rank| (vec![0.0; n * rank], vec![0.0; n * rank])).collect();
    let mut dx = (vec![0.0; n * cols], vec![0.0; n * cols]);
    let add = |to: &mut (Vec<f64>, Vec<f64>), what: (Vec<f64>, Vec<f64>)| {
        to.0.iter_mut().zip(what.0).for_each(|(to, what)| *to += what);
        to.1.iter_mut().zip(what.1).for_each(|(to, what)| *to += what);
    };
    let mut ys = Vec::new();
    for (i, (format, rows, down)) in matrices.iter().enumerate() {
        let (w, dy, rows) = (halves(&decode(*format, *rows, cols, &data[i])), halves(&dys[i]), *rows);
        let mut y = product([n, rows, cols], |r, c| rounded[r * cols + c], |c, o| w[o * cols + c]);
        add(&mut dx, product([n, cols, rows], |r, o| dy[r * rows + o], |o, c| w[o * cols + c]));
        if let (Some(down), Some(b)) = (down, &b[i]) {
            let (rank, b) = (ranks[*down], |o: usize, k: usize| f64::from(scale * b[o * ranks[*down] + k]));
            let low = &lows[*down];
            let adapter = product([n, rows, rank], |r, k| low.0[r * rank + k], |k, o| b(o, k));
            let size = product([n, rows, rank], |r, k| low.1[r * rank + k], |k, o| b(o, k)).1;
            add(&mut y, (adapter.0, size));
            let dlow = product([n, rank, rows], |r, o| dy[r * rows + o], b);
            let a = &downs[*down];
            let wide = product([n, cols, rank], |r, k| dlow.0[r * rank + k], |k, c| f64::from(a[k * cols + c]));
            let size = product([n, cols, rank], |r, k| dlow.1[r * rank + k], |k, c| f64::from(a[k * cols + c])).1;
            add(&mut dx, (wide.0, size));
            add(&mut dlows[*down], dlow);
        }
        ys.push(y);
    }
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        if !views.iter().all(|w| Cpu::new(1, isa).takes_adapters_along(w)) {
            continue;
        }
        let mut first: Option<Vec<Vec<f32>>> = None;
        for threads in [1, 2, 3] {
            let (cpu, what) = (Cpu::new(threads, isa), format!("{} [{n}, {cols}] {ranks:?}", isa.name()));
            let mut out: Vec<Vec<f32>> = matrices.iter().map(|(_, rows, _)| vec![f32::NAN; n * rows]).collect();
            let mut low: Vec<Vec<f32>> = ranks.iter().map(|rank| vec![f32::NAN; n * rank]).collect();
            let sides = downs.iter().zip(ranks).zip(&mut low).map(|((a, rank), low)| Down { a, rank: *rank, low });
            let mut outs: Vec<&mut [f32]> = out.iter_mut().map(|out| &mut out[..]).collect();
            cpu.matmul_adapted(&x, n, &views, &ups, &mut sides.collect::<Vec<_>>(), &mut outs);
            let back = |dx: &mut Option<Vec<f32>>| {
                let mut dlow: Vec<Vec<f32>> = ranks.iter().map(|rank| vec![0.0; n * rank]).collect();
                let mut dbs: Vec<Vec<f32>> = b.iter().map(|b| vec![0.0; b.as_ref().map_or(0, Vec::len)]).collect();
                for (i, (.., down)) in matrices.iter().enumerate() {
                    let dx = dx.as_deref_mut();
                    match (down, &b[i]) {
                        (Some(down), Some(b)) => {
                            let adapter = Back {
                                a: &downs[*down],
                                b,
                                rank: ranks[*down],
                                scale,
                                low: &low[*down],
                                dlow: &mut dlow[*down],
                                db: &mut dbs[i],
                            };
                            cpu.matmul_backward_adapted(&dys[i], n, &views[i], adapter, dx);
                        }
                        _ => dx.into_iter().for_each(|dx| cpu.matmul_backward(&[&dys[i]], n, &[views[i]], dx)),
                    }
                }
                [dlow, dbs]
            };
            let mut got_dx = Some(before.clone());
            let [dlow, dbs] = back(&mut got_dx);
            let got_dx = got_dx.unwrap();
            assert_eq!(back(&mut None), [dlow.clone(), dbs.clone()], "{what}: without a gradient at the input");
            for (i, (.., down)) in matrices.iter().enumerate() {
                let Some(down) = down else { continue };
                let (rank, rows) = (ranks[*down], matrices[i].1);
                let dy = |o, r: usize| bf16(scale * dys[i][r * rows + o]);
                let want = product([rows, rank, n], dy, |r, k| f64::from(low[*down][r * rank + k]));
                near(&dbs[i], &want.0, &want.1, 3e-5, &format!("{what}: gradient of B {i}"));
            }
            for (i, (got, want)) in out.iter().zip(&ys).enumerate() {
                near(got, &want.0, &want.1, 3e-5, &format!("{what}: output {i}"));
            }
            for (got, want) in low.iter().zip(&lows).chain(dlow.iter().zip(&dlows)) {
                near(got, &want.0, &want.1, 3e-5, &format!("{what}: narrow side"));
            }
            let sums: Vec<f32> = got_dx.iter().zip(&before).map(|(after, before)| after - before).collect();
            near(&sums, &dx.0, &dx.1, 3e-5, &format!("{what}: gradient of the input"));
            let all: Vec<Vec<f32>> = [out, low, dlow, dbs, vec![got_dx]].concat();
            assert_eq!(first.get_or_insert_with(|| all.clone()), &all, "{what}: {threads} threads");
        }
    }
}

#[test]
fn adapters_go_along_with_products() {
    let case = |n, cols, ranks: &[usize], matrices: &[_]| Adapted {
        n,
        cols,
        ranks: ranks.to_vec(),
        matrices: matrices.to_vec(),
    };
    check_adapters(&case(37, 64, &[8], &[(Format::Q4_0, 50, Some(0))]), 21);
    // Three that share an input, one without an adapter; two halves of a matrix that share theirs.
    let three = [(Format::Q4_K, 100, Some(1)), (Format::Q6_K, 32, None), (Format::Q4_K, 33, Some(0))];
    check_adapters(&case(130, 256, &[8, 8], &three), 22);
    check_adapters(&case(98, 96, &[4], &[(Format::Q8_0, 70, Some(0)), (Format::Q4_1, 40, Some(0))]), 23);
    // Ranks beside each other, more terms than go at a time, one row.
    check_adapters(&case(65, 32, &[1, 16], &[(Format::Q5_0, 2100, Some(1)), (Format::Q8_0, 40, Some(0))]), 24);
    check_adapters(&case(1, 512, &[64], &[(Format::IQ4_XS, 130, Some(0))]), 25);
}

#[test]
fn gradients_of_adapters_that_go_along() {
    let mut random = Random(26);
    for (n, rank, cols) in [(37, 8, 576), (130, 3, 32), (2100, 4, 96), (70, 64, 224), (1, 1, 32)] {
        let (x, dlow) = (random.normals(n * cols), random.normals(n * rank));
        for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
            let mut first: Option<Vec<f32>> = None;
            for threads in [1, 2, 3] {
                let cpu = Cpu::new(threads, isa);
                if !cpu.rounds_gradients(Format::Q8_0) {
                    continue;
                }
                let what = format!("{} [{n}, {rank}, {cols}]", isa.name());
                let (mut half, mut quarter) = (vec![0.0; Cpu::half_len(x.len())], vec![0.0; Cpu::quarter_len(x.len())]);
                cpu.halve(&x, &mut half);
                cpu.quarter(&x, &mut quarter);
                for waiting in [Waiting::Whole(&x), Waiting::Half(&half), Waiting::Quarter(&quarter)] {
                    let mut there = x.clone();
                    match waiting {
                        Waiting::Half(_) => cpu.unhalve(&half, &mut there),
                        Waiting::Quarter(_) => cpu.unquarter(&quarter, &mut there),
                        Waiting::Whole(_) => {}
                    }
                    let column = |k, r: usize| f64::from(dlow[r * rank + k]);
                    let want = product([rank, cols, n], column, |r, c| bf16(there[r * cols + c]));
                    let mut got = vec![0.0; rank * cols];
                    cpu.adapter_gradient(&dlow, waiting, n, rank, cols, &mut got);
                    near(&got, &want.0, &want.1, 3e-5, &what);
                    let once = got.clone();
                    cpu.adapter_gradient(&dlow, waiting, n, rank, cols, &mut got);
                    let both: Vec<f64> = want.0.iter().map(|w| 2.0 * w).collect();
                    near(&got, &both, &want.1, 6e-5, &what);
                    if let Waiting::Whole(_) = waiting {
                        assert_eq!(first.get_or_insert_with(|| once.clone()), &once, "{what}: {threads} threads");
                    }
                }
            }
        }
    }
}

fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*got) - want).abs() <= 1e-5 * want.abs().max(1.0), "{what}: {i} is {got}, not {want}");
    }
}

#[test]
fn norms() {
    let mut random = Random(8);
    // Three rows, whose weights are one width, or three of which each row has its own.
    let (rows, width, eps) = (6, 21, 1e-3);
    let (x, dy, before) = (random.normals(rows * width), random.normals(rows * width), random.normals(rows * width));
    let mix = |y: &[f64]| y.iter().zip(&dy).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>();
    let plus = |want: Vec<f64>| -> Vec<f64> { want.iter().zip(&before).map(|(w, b)| w + f64::from(*b)).collect() };
    let rms = |x: &[f64], w: &[f64]| -> f64 {
        let mut y = vec![0.0; x.len()];
        for (x, y) in x.chunks(width).zip(y.chunks_mut(width)) {
            let scale = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
            (0..width).for_each(|i| y[i] = x[i] / scale * (w[i] + 1.0));
        }
        mix(&y)
    };
    let layer = |x: &[f64], w: &[f64], b: &[f64]| -> f64 {
        let mut y = vec![0.0; x.len()];
        for (r, (x, y)) in x.chunks(width).zip(y.chunks_mut(width)).enumerate() {
            let at = r % (w.len() / width) * width;
            let mean = x.iter().sum::<f64>() / width as f64;
            let scale = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64 + eps).sqrt();
            (0..width).for_each(|i| y[i] = (x[i] - mean) / scale * w[at + i] + b[at + i]);
        }
        mix(&y)
    };
    for cpu in all() {
        let what = cpu.isa().name();
        let w = random.normals(width);
        let (mut dx, mut dw) = (before.clone(), vec![0.0; width]);
        cpu.rms_norm_backward(&x, &w, eps as f32, 1.0, &dy, &mut dx, Some(&mut dw));
        close(&dx, &plus(differences(&x, &|x| rms(x, &wide(&w)))), what);
        close(&dw, &differences(&w, &|w| rms(&wide(&x), w)), what);
        for turns in [1, 3] {
            let (w, b) = (random.normals(turns * width), random.normals(turns * width));
            let (mut dx, mut dw, mut db) = (before.clone(), vec![0.0; w.len()], vec![0.0; w.len()]);
            cpu.layer_norm_backward(&x, width, Some(&w), eps as f32, &dy, &mut dx, Some(&mut dw), Some(&mut db));
            close(&dx, &plus(differences(&x, &|x| layer(x, &wide(&w), &wide(&b)))), what);
            close(&dw, &differences(&w, &|w| layer(&wide(&x), w, &wide(&b))), what);
            close(&db, &differences(&b, &|b| layer(&wide(&x), &wide(&w), b)), what);
        }
        let mut dx = before.clone();
        cpu.layer_norm_backward(&x, width, None, eps as f32, &dy, &mut dx, None, None);
        let (ones, zeros) = (vec![1.0; width], vec![0.0; width]);
        close(&dx, &plus(differences(&x, &|x| layer(x, &ones, &zeros))), what);
    }
}

#[test]
fn large_norms_are_the_same_for_every_number_of_threads() {
    let mut random = Random(9);
    let (rows, width) = (300, 200);
    let (x, dy, w) = (random.normals(rows * width), random.normals(rows * width), random.normals(width));
    for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
        let results: Vec<_> = [1, 2, 3]
            .into_iter()
            .map(|threads| {
                let cpu = Cpu::new(threads, isa);
                let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; width], vec![0.0; width]);
                cpu.rms_norm_backward(&x, &w, 1e-5, 0.0, &dy, &mut dx, Some(&mut dw));
                cpu.layer_norm_backward(&x, width, Some(&w), 1e-5, &dy, &mut dx, Some(&mut dw), Some(&mut db));
                (dx, dw, db)
            })
            .collect();
        assert!(results[0] == results[1] && results[0] == results[2], "{}", isa.name());
    }
}

/// The error function by the series whose terms all have one sign.
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

fn activation(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::ClampedSilu => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
    }
}

#[test]
fn element_by_element() {
    let mut random = Random(10);
    // None falls on a kink.
    let points: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.005 + 0.0012).collect();
    let up: Vec<f32> = points.iter().map(|p| 0.8 * p + 0.3).collect();
    let dy = random.normals(points.len());
    let slope = |f: &dyn Fn(f64) -> f64, x: f64| (f(x + 1e-5) - f(x - 1e-5)) / 2e-5;
    for cpu in all() {
        let what = cpu.isa().name();
        let each = |want: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..points.len()).map(|i| f64::from(dy[i]) * want(i)).collect()
        };
        let x = |i: usize| f64::from(points[i]);
        for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ClampedSilu]
        {
            let mut dx = dy.clone();
            cpu.activate_backward(act, &points, &mut dx);
            close(&dx, &each(&|i| slope(&|x| activation(act, x), x(i))), &format!("{what} {act:?}"));
            let gated = |u: f64| if act == Activation::ClampedSilu { u.clamp(-7.0, 7.0) + 1.0 } else { u };
            let (mut dgate, mut dup) = (points.clone(), up.clone());
            cpu.gate_backward(act, &mut dgate, &mut dup, &dy);
            let u = |i: usize| f64::from(up[i]);
            let want = each(&|i| slope(&|x| activation(act, x), x(i)) * gated(u(i)));
            close(&dgate, &want, &format!("{what} {act:?} gate"));
            let want = each(&|i| slope(&gated, u(i)) * activation(act, x(i)));
            close(&dup, &want, &format!("{what} {act:?} up"));
        }
        let (mut y, mut dx) = (points.clone(), dy.clone());
        cpu.soft_cap(&mut y, 5.0);
        cpu.soft_cap_backward(&y, 5.0, &mut dx);
        close(&dx, &each(&|i| slope(&|x| 5.0 * (x / 5.0).tanh(), x(i))), what);
        let mut dx = dy.clone();
        cpu.clamp_backward(&points, 3.0, &mut dx);
        close(&dx, &each(&|i| slope(&|x| x.clamp(-3.0, 3.0), x(i))), what);
    }
}

#[test]
fn rows_gated_biased_turned_and_reordered() {
    let mut random = Random(11);
    let (rows, width) = (5, 32);
    let (x, by, dy) = (random.normals(rows * width), random.normals(rows), random.normals(rows * width));
    let mix = |y: &[f64]| y.iter().zip(&dy).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>();
    let angles = random.normals(rows * 6);
    let cos: Vec<f32> = angles.iter().map(|a| 1.3 * a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| 1.3 * a.sin()).collect();
    let order: Vec<u32> = (0..width as u32).map(|i| (i * 7 + 3) % width as u32).collect();
    for cpu in all() {
        let what = cpu.isa().name();
        let gated = |x: &[f64], by: &[f64]| -> f64 {
            mix(&x.iter().enumerate().map(|(i, x)| x / (1.0 + (-by[i / width]).exp())).collect::<Vec<_>>())
        };
        let mut y = x.clone();
        cpu.gate_rows(&mut y, &by);
        let sums = |y: &[f32]| y.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>();
        assert!((sums(&y) - gated(&wide(&x), &wide(&by))).abs() < 1e-5);
        let (mut dx, mut dby) = (dy.clone(), vec![1.0; rows]);
        cpu.gate_rows_backward(&x, &by, &mut dx, &mut dby);
        close(&dx, &differences(&x, &|x| gated(x, &wide(&by))), what);
        dby.iter_mut().for_each(|d| *d -= 1.0);
        close(&dby, &differences(&by, &|by| gated(&wide(&x), by)), what);

        let mut dbias = vec![0.0; width];
        cpu.add_bias_backward(&dy, &mut dbias);
        let columns: Vec<f64> = (0..width).map(|c| (0..rows).map(|r| f64::from(dy[r * width + c])).sum()).collect();
        close(&dbias, &columns, what);

        // What goes forward by a linear map and back by its gradient keeps the scalar product.
        for layout in [RopeLayout::Half, RopeLayout::Interleaved, RopeLayout::TwoHalves] {
            let (mut y, mut dx) = (x.clone(), dy.clone());
            cpu.rope(&mut y, width, 16, &cos, &sin, 4, 12, layout);
            cpu.rope_backward(&mut dx, width, 16, &cos, &sin, 4, 12, layout);
            let back = dx.iter().zip(&x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            assert!((sums(&y) - back).abs() < 1e-4, "{what} {layout:?}: {} {back}", sums(&y));
        }
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        cpu.gather_columns(&x, &order, &mut y);
        cpu.scatter_columns(&dy, &order, &mut dx);
        let back = dx.iter().zip(&x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        assert!((sums(&y) - back).abs() < 1e-4, "{what}");
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    let mut random = Random(12);
    let (rows, vocabulary) = (7, 103);
    let logits: Vec<f32> = random.normals(rows * vocabulary).iter().map(|x| 5.0 * x).collect();
    let targets = [Some(3), None, Some(102), Some(0), Some(50), None, Some(51)];
    let loss = |logits: &[f64]| -> f64 {
        let mut sum = 0.0;
        for (row, target) in logits.chunks(vocabulary).zip(targets) {
            let Some(target) = target else { continue };
            let most = row.iter().cloned().fold(f64::MIN, f64::max);
            sum += row.iter().map(|x| (x - most).exp()).sum::<f64>().ln() + most - row[target as usize];
        }
        sum
    };
    for isa in Isa::ALL.into_iter().filter(|i| i.available()) {
        for threads in [1, 3] {
            let mut gradient = logits.clone();
            let got = Cpu::new(threads, isa).cross_entropy(&mut gradient, &targets);
            assert!((got - loss(&wide(&logits))).abs() < 1e-5, "{}: {got}", isa.name());
            close(&gradient, &differences(&logits, &loss), isa.name());
        }
    }
    assert_eq!(Cpu::new(1, Isa::Scalar).cross_entropy(&mut [], &[]), 0.0);
}
