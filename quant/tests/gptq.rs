//! GPTQ on whole matrices: never worse than rounding, the same on any number of threads, and no input that breaks it.

use rushlight_quant::formats::Format;
use rushlight_quant::quantize::{
    Codes, Drift, Fit, GptqError, GptqOptions, Grid, Hessian, Method, Order, Quantized, Seen, Variant, encode, gptq,
};
use rushlight_quant::{Cpu, Isa};

const FORMATS: [Format; 12] = [
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q8_0,
    Format::Q2_K,
    Format::Q3_K,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
    Format::IQ4_NL,
    Format::IQ4_XS,
];

fn grids() -> Vec<Grid> {
    let group = |bits, group, symmetric| Grid::Group { bits, group, symmetric };
    let mut grids: Vec<Grid> = FORMATS.into_iter().map(Grid::Blocks).collect();
    grids.extend([group(4, 128, true), group(3, 100, false), group(2, 16, false), group(8, 1000, true)]);
    grids
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Weights, and two batches of activations that a few common directions dominate.
fn layer(rows: usize, cols: usize, seed: u64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut random = Random(seed);
    let mixing: Vec<f32> = (0..8 * cols).map(|_| random.next()).collect();
    let mut activations = |n: usize| {
        let mut x = vec![0f32; n * cols];
        for x in x.chunks_mut(cols) {
            let strong: [f32; 8] = std::array::from_fn(|_| 3.0 * random.next());
            for (c, x) in x.iter_mut().enumerate() {
                *x = random.next() + strong.iter().enumerate().map(|(s, a)| a * mixing[s * cols + c]).sum::<f32>();
            }
        }
        x
    };
    let (first, second) = (activations(2 * cols), activations(cols));
    let weights = (0..rows * cols).map(|_| 0.02 * (random.next() + random.next() + random.next())).collect();
    (weights, first, second)
}

fn hessian(cpu: &Cpu, cols: usize, x: &[f32]) -> Hessian {
    let mut hessian = Hessian::new(cols);
    hessian.add(cpu, x);
    hessian
}

fn decoded(q: &Quantized, grid: Grid, cols: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0f32; n];
    match (&q.codes, grid) {
        (Codes::Blocks(bytes), Grid::Blocks(format)) => format.decode(bytes, &mut out),
        (Codes::Groups { codes, scales, zeros, group_of }, Grid::Group { bits, .. }) => {
            let groups = scales.len() / (n / cols);
            for (i, out) in out.iter_mut().enumerate() {
                assert!(u32::from(codes[i]) < 1 << bits);
                let g = i / cols * groups + group_of[i % cols] as usize;
                *out = scales[g] * (f32::from(codes[i]) - f32::from(zeros[g]));
            }
        }
        _ => panic!("codes of another grid"),
    }
    out
}

fn objective(cpu: &Cpu, hessian: &Hessian, weights: &[f32], decoded: &[f32]) -> f64 {
    let errors: Vec<f32> = decoded.iter().zip(weights).map(|(a, b)| a - b).collect();
    hessian.objective(cpu, &errors).iter().sum()
}

#[test]
fn every_grid_gains_and_says_what_it_gained_on_any_number_of_threads() {
    let (rows, cols) = (50, 512);
    let (weights, x, y) = layer(rows, cols, 3);
    let cpu = Cpu::new(1, Isa::best());
    let (h, held) = (hessian(&cpu, cols, &x), hessian(&cpu, cols, &y));
    for grid in grids() {
        let options = GptqOptions::default();
        let q = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &options).unwrap();
        assert!(q.objective < 0.8 * q.rounded, "{grid:?}: {} of {}", q.objective, q.rounded);
        let again = objective(&cpu, &h, &weights, &decoded(&q, grid, cols, weights.len()));
        assert!((again - q.objective).abs() < 1e-4 * again, "{grid:?}: {again}, said {}", q.objective);
        assert_eq!(q.methods.iter().map(|m| m.1).sum::<usize>(), rows);
        let plain = GptqOptions { sweeps: 0, ..options.clone() };
        let unrefined = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &plain).unwrap();
        assert!(q.objective < unrefined.objective && q.refined > 0, "{grid:?}");

        let q = gptq(&cpu, &weights, rows, (&h).into(), Some((&held).into()), grid, &options).unwrap();
        let (gained, rounded) = (q.objective, q.rounded);
        assert!(gained < 0.9 * rounded, "{grid:?}: {gained} of {rounded} held out");
        let again = objective(&cpu, &held, &weights, &decoded(&q, grid, cols, weights.len()));
        assert!((again - gained).abs() < 1e-4 * again, "{grid:?}: {again}, said {gained}");
        let threaded =
            gptq(&Cpu::new(3, Isa::best()), &weights, rows, (&h).into(), Some((&held).into()), grid, &options).unwrap();
        assert!(q == threaded, "{grid:?}: other bits on three threads");
        // The plain kernels round products and sums apart, where the others fuse them.
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available() && *isa != Isa::Scalar) {
            let other =
                gptq(&Cpu::new(2, isa), &weights, rows, (&h).into(), Some((&held).into()), grid, &options).unwrap();
            assert!(q == other, "{grid:?}: other bits with {}", isa.name());
        }
    }
}

#[test]
fn no_row_is_worse_than_rounded_where_calibration_misleads() {
    // The held-out activations have nothing to do with those that GPTQ sees.
    let (rows, cols) = (20, 256);
    let (weights, x, _) = layer(rows, cols, 8);
    let (_, y, _) = layer(1, cols, 9);
    let cpu = Cpu::new(1, Isa::best());
    let (h, held) = (hessian(&cpu, cols, &x[..8 * cols]), hessian(&cpu, cols, &y));
    let costs = |decoded: &[f32]| {
        let errors: Vec<f32> = decoded.iter().zip(&weights).map(|(a, b)| a - b).collect();
        held.objective(&cpu, &errors)
    };
    for format in FORMATS {
        let grid = Grid::Blocks(format);
        let q = gptq(&cpu, &weights, rows, (&h).into(), Some((&held).into()), grid, &GptqOptions::default()).unwrap();
        let mut bytes = vec![0; format.row_bytes(weights.len()).unwrap()];
        encode(format, &weights, cols, None, &mut bytes);
        let mut rounded = vec![0f32; weights.len()];
        format.decode(&bytes, &mut rounded);
        let rows = costs(&decoded(&q, grid, cols, weights.len())).into_iter().zip(costs(&rounded));
        for (r, (a, b)) in rows.enumerate() {
            assert!(a <= b * (1.0 + 1e-6), "{format} row {r}: {a}, rounded {b}");
        }
        // Judged by what it was fitted to, GPTQ believes that it gains.
        let blind = gptq(&cpu, &weights, 20, (&h).into(), None, grid, &GptqOptions::default()).unwrap();
        let (misled, careful) = (costs(&decoded(&blind, grid, cols, weights.len())), q.objective);
        assert!(misled.iter().sum::<f64>() > careful, "{format}");
    }
}

#[test]
fn without_correlations_it_is_rounding() {
    let (rows, cols) = (9, 256);
    let (weights, _, _) = layer(rows, cols, 1);
    let cpu = Cpu::new(2, Isa::best());
    let mut x = vec![0f32; cols * cols];
    (0..cols).for_each(|c| x[c * cols + c] = 3.0);
    let h = hessian(&cpu, cols, &x);
    for group in [32, 100, usize::MAX] {
        for symmetric in [false, true] {
            let grid = Grid::Group { bits: 4, group, symmetric };
            let options =
                |variants| GptqOptions { variants, sweeps: 0, search: false, half_scales: true, ordered_groups: false };
            let rounded = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &options(vec![])).unwrap();
            for (order, fit) in
                [(Order::Natural, Fit::Lazy), (Order::Falling, Fit::Static), (Order::FallingBlocks, Fit::Fresh)]
            {
                let variants = vec![Variant { damping: 0.01, order, fit }];
                let q = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &options(variants)).unwrap();
                assert!(q.codes == rounded.codes, "{grid:?} {order:?} {fit:?}");
            }
        }
    }
}

#[test]
fn weights_that_lie_on_the_grid_are_only_rounded() {
    let (rows, cols) = (6, 256);
    let (mut weights, x, _) = layer(rows, cols, 5);
    let cpu = Cpu::new(2, Isa::best());
    let h = hessian(&cpu, cols, &x);
    let (grid, options) = (Grid::Blocks(Format::Q8_0), GptqOptions::default());
    let first = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &options).unwrap();
    assert!(first.methods.iter().any(|(m, rows)| *m != Method::Rounded && *rows > 0), "{:?}", first.methods);
    weights = decoded(&first, grid, cols, rows * cols);
    let again = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &options).unwrap();
    assert_eq!(again.methods, [(Method::Rounded, rows)]);
    let mut packed = vec![0; rows * Format::Q8_0.row_bytes(cols).unwrap()];
    encode(Format::Q8_0, &weights, cols, None, &mut packed);
    assert!(again.codes == Codes::Blocks(packed));
}

#[test]
fn strange_numbers_are_quantized_too() {
    let cpu = Cpu::new(1, Isa::best());
    let (rows, cols) = (4, 256);
    let (mut weights, mut x, _) = layer(rows, cols, 2);
    weights[..cols].fill(0.0);
    weights[cols..2 * cols].iter_mut().for_each(|w| *w *= 1e-30);
    weights[2 * cols..3 * cols].iter_mut().for_each(|w| *w *= 1e8);
    // Columns that calibration never uses, and some that are always alike.
    for x in x.chunks_mut(cols) {
        x[5] = 0.0;
        x[40..80].fill(0.0);
        x[101] = x[100];
        x[102] = 2.0 * x[100];
    }
    for x in [&x[..], &x[..cols], &vec![0.0; 3 * cols][..]] {
        let h = hessian(&cpu, cols, x);
        for grid in grids() {
            for damping in [0.0, 0.1] {
                let mut options = GptqOptions::default();
                options.variants.iter_mut().for_each(|v| v.damping = damping);
                let q = gptq(&cpu, &weights, rows, (&h).into(), None, grid, &options).unwrap();
                assert!(q.objective <= q.rounded, "{grid:?}");
                assert!(decoded(&q, grid, cols, weights.len()).iter().all(|w| w.is_finite()), "{grid:?}");
            }
        }
    }
}

#[test]
fn impossible_input_is_refused() {
    let cpu = Cpu::new(1, Isa::best());
    let (rows, cols) = (2, 64);
    let (weights, x, _) = layer(rows, cols, 4);
    let h = hessian(&cpu, cols, &x);
    let options = GptqOptions::default();
    let q4_0 = Grid::Blocks(Format::Q4_0);
    let run = |weights: &[f32], rows, h: &Hessian, held: Option<&Hessian>, grid| {
        gptq(&cpu, weights, rows, h.into(), held.map(Into::into), grid, &options).unwrap_err()
    };
    let shape = |e: GptqError| assert!(matches!(e, GptqError::Shape(_)), "{e}");
    shape(run(&weights, 3, &h, None, q4_0));
    shape(run(&weights, usize::MAX, &h, None, q4_0));
    shape(run(&weights, rows, &Hessian::new(cols), None, q4_0));
    shape(run(&weights, rows, &h, Some(&hessian(&cpu, 32, &x)), q4_0));
    shape(run(&[], 0, &Hessian::new(0), None, q4_0));
    for grid in [
        Grid::Blocks(Format::F16),
        Grid::Blocks(Format::Q4_K),
        Grid::Group { bits: 5, group: 32, symmetric: true },
        Grid::Group { bits: 4, group: 0, symmetric: true },
    ] {
        assert!(matches!(run(&weights, rows, &h, None, grid), GptqError::Grid(_)));
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut weights = weights.clone();
        weights[70] = bad;
        assert!(matches!(run(&weights, rows, &h, None, q4_0), GptqError::NotFinite(_)));
        let mut x = x.clone();
        x[3] = bad;
        assert!(matches!(run(&weights[..cols], 1, &hessian(&cpu, cols, &x), None, q4_0), GptqError::NotFinite(_)));
    }
}

/// Outputs that lack what `lost` (`[rows, cols]`) gives on `x`, and something random.
fn lacking(x: &[f32], lost: &[f32], cols: usize, noise: f32) -> Vec<f32> {
    let mut random = Random(77);
    let output = |x: &[f32], row: &[f32]| x.iter().zip(row).map(|(x, w)| x * w).sum::<f32>();
    x.chunks(cols)
        .flat_map(|x| lost.chunks(cols).map(move |row| output(x, row)))
        .map(|y| y + noise * random.next())
        .collect()
}

#[test]
fn what_was_lost_before_is_made_good_where_that_can_be_told_from_chance() {
    let (rows, cols) = (40, 256);
    let (weights, x, y) = layer(rows, cols, 8);
    let lost: Vec<f32> = layer(rows, cols, 9).0.iter().map(|w| 0.3 * w).collect();
    let cpu = Cpu::new(2, Isa::best());
    let (h, held) = (hessian(&cpu, cols, &x), hessian(&cpu, cols, &y));
    let drift = |cpu: &Cpu, x: &[f32], t: &[f32]| {
        // What the outputs should be.
        let wanted: Vec<f32> = t.iter().zip(lacking(x, &weights, cols, 0.0)).map(|(t, y)| t + y).collect();
        let mut drift = Drift::of_outputs(rows, cols);
        let half = x.len() / cols / 2;
        drift.add(cpu, &wanted[..half * rows], &x[..half * cols]);
        drift.add(cpu, &wanted[half * rows..], &x[half * cols..]);
        drift
    };
    /// Twice the mean squared error of the outputs, by the activations themselves.
    fn error(x: &[f32], t: &[f32], weights: &[f32], decoded: &[f32], cols: usize) -> f64 {
        let (mut sum, n) = (0.0, x.len() / cols);
        let errors: Vec<f32> = decoded.iter().zip(weights).map(|(a, b)| a - b).collect();
        for (x, t) in x.chunks(cols).zip(t.chunks(weights.len() / cols)) {
            for (t, e) in t.iter().zip(errors.chunks(cols)) {
                let y: f64 = x.iter().zip(e).map(|(x, e)| f64::from(*x) * f64::from(*e)).sum();
                sum += (f64::from(*t) - y).powi(2);
            }
        }
        2.0 * sum / n as f64
    }
    for grid in
        [Grid::Blocks(Format::Q4_0), Grid::Blocks(Format::Q3_K), Grid::Group { bits: 3, group: 128, symmetric: true }]
    {
        let (t, u) = (lacking(&x, &lost, cols, 0.01), lacking(&y, &lost, cols, 0.01));
        let (most, others) = (drift(&cpu, &x, &t), drift(&cpu, &y, &u));
        let want: f64 = t.iter().map(|t| f64::from(*t).powi(2)).sum::<f64>() * cols as f64 / x.len() as f64;
        let seen = Seen { hessian: &h, drift: Some((&most, 0)) };
        let got: f64 = seen.lacking(&cpu, &weights).iter().sum();
        assert!((got - want).abs() < 1e-4 * want, "{got} {want}");
        let judge = Seen { hessian: &held, drift: Some((&others, 0)) };
        let options = GptqOptions::default();
        let q = gptq(&cpu, &weights, rows, seen, Some(judge), grid, &options).unwrap();
        let (gained, rounded) = (q.objective, q.rounded);
        let codes = decoded(&q, grid, cols, weights.len());
        let again = error(&y, &u, &weights, &codes, cols);
        assert!((again - gained).abs() < 1e-3 * again, "{grid:?}: {again}, said {gained}");
        let blind = gptq(&cpu, &weights, rows, (&h).into(), Some((&held).into()), grid, &options).unwrap();
        let blind = error(&y, &u, &weights, &decoded(&blind, grid, cols, weights.len()), cols);
        assert!(gained < 0.6 * blind && gained < 0.6 * rounded, "{grid:?}: {gained}, blind {blind}, rounded {rounded}");

        // Any number of threads, and some of the rows alone: the same bits.
        let three = Cpu::new(3, Isa::best());
        assert!(q == gptq(&three, &weights, rows, seen, Some(judge), grid, &options).unwrap());
        let again = drift(&three, &x, &t);
        let seen = Seen { hessian: &h, drift: Some((&again, 0)) };
        assert!(q == gptq(&three, &weights, rows, seen, Some(judge), grid, &options).unwrap());

        // Where the others lack the very opposite, nothing is moved.
        let against: Vec<f32> = u.iter().map(|u| -u).collect();
        let against = drift(&cpu, &y, &against);
        let judge = Seen { hessian: &held, drift: Some((&against, 0)) };
        let q = gptq(&cpu, &weights, rows, seen, Some(judge), grid, &options).unwrap();
        let (gained, rounded) = (q.objective, q.rounded);
        assert!(gained <= rounded, "{grid:?}: {gained} of {rounded}");

        let seen = Seen { hessian: &h, drift: Some((&most, 1)) };
        let error = gptq(&cpu, &weights, rows, seen, None, grid, &options).unwrap_err();
        assert!(matches!(error, GptqError::Shape(_)), "{error}");
    }
}

#[test]
fn what_inputs_lack_says_what_all_outputs_of_theirs_lack() {
    let (rows, cols) = (40, 150);
    let (weights, x, _) = layer(rows, cols, 12);
    // Each input lacks a part of its neighbour.
    let wanted: Vec<f32> = (0..x.len()).map(|i| x[i] + 0.2 * x[(i + 1) % x.len()]).collect();
    let cpu = Cpu::new(2, Isa::best());
    let h = hessian(&cpu, cols, &x);
    let less: Vec<f32> = wanted.iter().zip(&x).map(|(w, x)| w - x).collect();
    let mut of_inputs = Drift::of_inputs(cols);
    of_inputs.add(&cpu, &less, &x);
    let mut of_outputs = Drift::of_outputs(rows, cols);
    of_outputs.add(&cpu, &lacking(&wanted, &weights, cols, 0.0), &x);
    let lacks = lacking(&less, &weights, cols, 0.0);
    for first in [0, 3] {
        let weights = &weights[first * cols..];
        let inputs = Seen { hessian: &h, drift: Some((&of_inputs, 0)) };
        let outputs = Seen { hessian: &h, drift: Some((&of_outputs, first)) };
        for got in [inputs.lacking(&cpu, weights), outputs.lacking(&cpu, weights)] {
            for (r, got) in got.into_iter().enumerate() {
                let squares = lacks.iter().skip(first + r).step_by(rows).map(|t| f64::from(*t).powi(2));
                let want = squares.sum::<f64>() * cols as f64 / x.len() as f64;
                assert!((got - want).abs() < 1e-4 * want, "row {r}: {got}, not {want}");
            }
        }
        let grid = Grid::Group { bits: 3, group: 64, symmetric: false };
        let run = |seen| gptq(&cpu, weights, rows - first, seen, None, grid, &GptqOptions::default()).unwrap();
        let (a, b) = (run(inputs), run(outputs));
        assert!((a.objective - b.objective).abs() < 1e-2 * a.objective, "{} {}", a.objective, b.objective);
        assert!(a.objective < 0.8 * a.rounded);
    }
}
