//! GPTQ against the 34 cases of a float64 reference.

use super::factor::Factor;
use super::gptq::{Fit, Order, Plan, Variant, run};
use super::solution::{Problem, Solution};
use super::{Grid, Hessian};
use crate::{Cpu, Isa};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Bytes of each tensor of a safetensors file.
fn tensors(path: &PathBuf) -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let len = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let data = &bytes[8 + len..];
    let entries = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    entries
        .map(|(name, entry)| {
            let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
            (name.clone(), data[at(0)..at(1)].to_vec())
        })
        .collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

struct Golden {
    weights: Vec<f32>,
    hessian: Hessian,
    expected: BTreeMap<String, Vec<u8>>,
    cases: serde_json::Value,
}

const ROWS: usize = 64;
const COLS: usize = 128;

/// `None` where the fixtures are not beside this checkout.
fn golden() -> Option<Golden> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures/gptq_golden");
    if !dir.is_dir() {
        eprintln!("skipped: {} is not there", dir.display());
        return None;
    }
    let input = tensors(&dir.join("input.safetensors"));
    let matrix: Vec<f64> = input["hessian"].as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    Some(Golden {
        weights: f32s(&input["weight"]),
        hessian: Hessian::from_matrix(COLS, &matrix),
        expected: tensors(&dir.join("expected.safetensors")),
        cases: golden["cases"].clone(),
    })
}

#[test]
fn codes_scales_and_zeros_equal_the_float64_reference() {
    let Some(mut golden) = golden() else { return };
    let cpu = Cpu::new(2, Isa::best());
    let diagonal: Vec<f64> =
        (0..COLS).map(|c| golden.hessian.get(c, c)).map(|d| if d == 0.0 { 1.0 } else { d }).collect();
    // The reference gives columns without activations a weight of zero and a diagonal of one.
    for row in golden.weights.chunks_mut(COLS) {
        for c in 0..COLS {
            if golden.hessian.get(c, c) == 0.0 {
                row[c] = 0.0;
            }
        }
    }
    let damping = 0.01 * diagonal.iter().sum::<f64>() / COLS as f64;
    let cases = golden.cases.as_object().unwrap();
    assert_eq!(cases.len(), 32);
    for (name, case) in cases {
        let number = |key: &str| case[key].as_u64().unwrap();
        let symmetric = number("sym") == 1;
        let problem = Problem {
            cpu: &cpu,
            weights: &golden.weights,
            rows: ROWS,
            cols: COLS,
            grid: Grid::Group { bits: number("bits") as u32, group: number("group") as usize, symmetric },
            search: false,
            half: false,
        };
        let variant = Variant {
            damping: 0.01,
            order: if number("act_order") == 1 { Order::Falling } else { Order::Natural },
            fit: if number("fresh") == 1 { Fit::Fresh } else { Fit::Lazy },
        };
        let plan = Plan::new(&problem, &variant, &diagonal);
        let factor = Factor::new(&cpu, &golden.hessian, &plan.order, damping, 1.0).unwrap();
        let solution = run(&problem, &plan, &factor, variant.fit, None);
        let expected = |what: &str| &golden.expected[&format!("{name}.{what}")];
        let group_of: Vec<u32> = expected("g_idx").as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        assert_eq!(solution.unit_of, group_of, "{name}: groups");
        let different = solution.codes.iter().zip(expected("codes")).filter(|(a, b)| a != b).count();
        let scales = f32s(expected("scales"));
        let worst = solution.scales.iter().zip(&scales).map(|(a, b)| (a - b).abs() / b).fold(0.0, f32::max);
        let zeros = solution.offsets.iter().zip(expected("zeros")).filter(|(a, b)| **a != f32::from(**b)).count();
        let mut errors = vec![0f32; ROWS * COLS];
        solution.errors(&problem, &mut errors);
        let objective: f64 = golden.hessian.objective(&cpu, &errors).iter().sum();
        let want = case["obj_gptq"].as_f64().unwrap();
        // Half of twice the mean square.
        assert!((objective / 2.0 - want).abs() < 1e-3 * want, "{name}: objective {objective}, reference {want}");
        if !symmetric {
            assert_eq!(different, 0, "{name}: codes");
        }
        // A symmetric grid has the group's largest weight half-way between two codes: where rounding of f32 breaks such
        // a tie otherwise, the columns after it follow.
        assert!(different <= 50, "{name}: {different} codes");
        assert!(
            zeros == 0 && worst < if different > 0 { 1e-2 } else { 2e-6 },
            "{name}: {zeros} zeros, scales {worst:e}"
        );
        let rtn = Solution::round(&problem, None);
        rtn.errors(&problem, &mut errors);
        let rtn: f64 = golden.hessian.objective(&cpu, &errors).iter().sum();
        let want = case["obj_rtn"].as_f64().unwrap();
        assert!((rtn / 2.0 - want).abs() < 2e-2 * want, "{name}: objective of rounding {rtn}, reference {want}");

        let oracle = textbook(&problem, &golden.hessian, &variant, damping, 1.0);
        let different = oracle.iter().zip(expected("codes")).filter(|(a, b)| a != b).count();
        assert!(different <= if symmetric { 50 } else { 0 }, "{name}: {different} of the textbook's codes");
    }
}

/// GPTQ as the paper writes it, in f64: the inverse of the Hessian, its Cholesky factor, and every update done at once to
/// all weights. Gives the codes, `[rows, cols]`.
fn textbook(p: &Problem<'_>, hessian: &Hessian, variant: &Variant, damping: f64, idle: f64) -> Vec<u8> {
    let (n, rows) = (p.cols, p.rows);
    let Grid::Group { bits, group, symmetric } = p.grid else { panic!("groups only") };
    let group = group.min(n);
    let diagonal: Vec<f64> = (0..n).map(|c| hessian.get(c, c)).map(|d| if d == 0.0 { idle } else { d }).collect();
    let mut order: Vec<usize> = (0..n).collect();
    if variant.order == Order::Falling {
        order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
    }
    let entry = |i: usize, j: usize| match (order[i], order[j]) {
        (a, b) if a == b => diagonal[a] + damping,
        (a, b) => hessian.get(a, b),
    };
    // Gauss-Jordan on [H | 1].
    let mut a: Vec<Vec<f64>> = (0..n)
        .map(|i| (0..2 * n).map(|j| if j < n { entry(i, j) } else { f64::from(u8::from(j - n == i)) }).collect())
        .collect();
    for i in 0..n {
        let pivot = a[i].clone();
        for (k, row) in a.iter_mut().enumerate() {
            let by = if k == i { 1.0 - 1.0 / pivot[i] } else { row[i] / pivot[i] };
            row.iter_mut().zip(&pivot).for_each(|(x, y)| *x -= by * y);
        }
    }
    // U with inverse = U^T U.
    let mut u = vec![vec![0f64; n]; n];
    for i in 0..n {
        for j in i..n {
            let sum = a[i][n + j] - (0..i).map(|k| u[k][i] * u[k][j]).sum::<f64>();
            u[i][j] = if i == j { sum.sqrt() } else { sum / u[i][i] };
        }
    }
    let top = f64::from((1u32 << bits) - 1);
    let fit = |weights: &[f64]| {
        let low = weights.iter().copied().fold(0.0, f64::min);
        let high = weights.iter().copied().fold(0.0, f64::max);
        let (low, high) = if symmetric { (-high.max(-low), high.max(-low)) } else { (low, high) };
        let (low, high) = if low == high { (-1.0, 1.0) } else { (low, high) };
        let scale = (high - low) / top;
        (scale, if symmetric { (top + 1.0) / 2.0 } else { (-low / scale).round_ties_even() })
    };
    let mut codes = vec![0; rows * n];
    for r in 0..rows {
        let mut w: Vec<f64> = order.iter().map(|c| f64::from(p.weights[r * n + c])).collect();
        let mut before = w.clone();
        let mut params = (1.0, 0.0);
        for i in 0..n {
            if i % 128 == 0 {
                before.clone_from(&w);
            }
            if i % group == 0 {
                let source = if variant.fit == Fit::Lazy { &before } else { &w };
                params = fit(&source[i..n.min(i + group)]);
            }
            let (scale, zero) = params;
            let code = ((w[i] / scale).round_ties_even() + zero).clamp(0.0, top);
            codes[r * n + order[i]] = code as u8;
            let error = (w[i] - scale * (code - zero)) / u[i][i];
            for j in i..n {
                w[j] -= error * u[i][j];
            }
        }
    }
    codes
}

/// Activations with a few strong directions, and weights.
fn layer(rows: usize, cols: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut state = seed;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let n = 2 * cols;
    let mixing: Vec<f32> = (0..6 * cols).map(|_| random()).collect();
    let mut x = vec![0f32; n * cols];
    for x in x.chunks_mut(cols) {
        let strong: Vec<f32> = (0..6).map(|_| 3.0 * random()).collect();
        for (c, x) in x.iter_mut().enumerate() {
            *x = random() + (0..6).map(|s| strong[s] * mixing[s * cols + c]).sum::<f32>();
        }
    }
    let weights = (0..rows * cols).map(|_| random() + random() + random()).collect();
    (x, weights)
}

#[test]
fn long_rows_and_groups_of_any_length_equal_the_textbook() {
    let cpu = Cpu::new(2, Isa::best());
    for (rows, cols) in [(50, 300), (3, 700)] {
        let (x, weights) = layer(rows, cols, 5);
        let mut hessian = Hessian::new(cols);
        hessian.add(&cpu, &x);
        let diagonal: Vec<f64> = (0..cols).map(|c| hessian.get(c, c)).collect();
        let damping = 0.01 * diagonal.iter().sum::<f64>() / cols as f64;
        for (group, fit, order) in [
            (32, Fit::Fresh, Order::Natural),
            (96, Fit::Fresh, Order::Natural),
            (128, Fit::Lazy, Order::Falling),
            (200, Fit::Fresh, Order::Natural),
            (270, Fit::Fresh, Order::Falling),
            (512, Fit::Fresh, Order::Natural),
            (usize::MAX, Fit::Lazy, Order::Falling),
        ] {
            let grid = Grid::Group { bits: 4, group, symmetric: false };
            let problem = Problem { cpu: &cpu, weights: &weights, rows, cols, grid, search: false, half: false };
            let variant = Variant { damping: 0.01, order, fit };
            let plan = Plan::new(&problem, &variant, &diagonal);
            let factor = Factor::new(&cpu, &hessian, &plan.order, damping, 1.0).unwrap();
            let solution = run(&problem, &plan, &factor, fit, None);
            let want = textbook(&problem, &hessian, &variant, damping, 1.0);
            let different = solution.codes.iter().zip(&want).filter(|(a, b)| a != b).count();
            // A weight within the rounding of f32 of a tie, and those after it in its row.
            assert!(different <= rows * cols / 100, "{rows}x{cols} {group} {variant:?}: {different} codes");
        }
    }
}
