//! Quantizing one matrix with the help of its Hessian: several ways are tried and each row keeps what suits it best.

use super::drift::{Goal, Seen};
use super::factor::Factor;
use super::gptq::{Fit, Order, Plan, Variant, run};
use super::grid::Grid;
use super::hessian::Hessian;
use super::refine::refine;
use super::solution::{Problem, Solution};
use crate::buffer::Aligned;
use crate::cpu::Cpu;

/// Below this share of the outputs' energy an error is none: the weights lie on the grid already.
const NOTHING: f64 = 1e-6;

/// How [`gptq`] goes about it.
#[derive(Clone, Debug, PartialEq)]
pub struct GptqOptions {
    /// Ways to run GPTQ; each row keeps the best, or what rounding gives where that is better.
    pub variants: Vec<Variant>,
    /// Passes over all codes and scales afterwards, each changed wherever that lowers the error.
    pub sweeps: usize,
    /// For groups: search for the scale with the least error rather than span the largest weights.
    pub search: bool,
    /// For groups: scales are rounded to f16, as files store them.
    pub half_scales: bool,
    /// For groups: keep to those that follow the order of visits (`group_of` is the same for all rows of equal Hessians),
    /// where a variant makes such.
    pub ordered_groups: bool,
}

impl Default for GptqOptions {
    /// What served activations that it had not seen best, on layers of two models (see `docs/decisions.md`).
    fn default() -> Self {
        let variant = |order, fit| Variant { damping: 0.1, order, fit };
        GptqOptions {
            variants: vec![variant(Order::FallingBlocks, Fit::Fresh), variant(Order::Falling, Fit::Static)],
            sweeps: 2,
            search: true,
            half_scales: true,
            ordered_groups: false,
        }
    }
}

/// Where the codes of a row come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Rounding to nearest, as [`super::encode`] does without importance.
    Rounded,
    /// The same with the diagonal of the Hessian as importance.
    Weighted,
    /// GPTQ.
    Gptq(Variant),
}

/// What a matrix became.
#[derive(Clone, Debug, PartialEq)]
pub enum Codes {
    /// Packed rows of a block format.
    Blocks(Vec<u8>),
    /// Integer codes: weight = `scales[r, g] * (codes[r, c] - zeros[r, g])` with `g = group_of[c]`.
    Groups {
        /// `[rows, cols]`, columns in their own order.
        codes: Vec<u8>,
        /// `[rows, groups]`
        scales: Vec<f32>,
        /// `[rows, groups]`
        zeros: Vec<u8>,
        /// `[cols]`: the group of each column.
        group_of: Vec<u32>,
    },
}

/// The result of [`gptq`].
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// The quantized weights.
    pub codes: Codes,
    /// Twice the mean squared error of the outputs, summed over them, on what judged it: `tr(D H D^T)` with
    /// `D = quantized - weights` where no drift was seen.
    pub objective: f64,
    /// The same of rounding to nearest.
    pub rounded: f64,
    /// How many rows took their codes from where.
    pub methods: Vec<(Method, usize)>,
    /// Rows whose codes or scales were bettered afterwards.
    pub refined: usize,
}

/// Why a matrix cannot be quantized.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GptqError {
    /// The numbers do not form matrices that fit each other.
    #[error("{0}")]
    Shape(String),
    /// This grid is none.
    #[error("{0}")]
    Grid(String),
    /// NaN or infinite numbers.
    #[error("{0} not finite numbers: the checkpoint is damaged, or the model overflows on the calibration text")]
    NotFinite(&'static str),
    /// No damping makes the Hessian positive definite.
    #[error(
        "the Hessian is not positive definite, even with {0:.2} of its mean diagonal added: use more calibration text"
    )]
    NotPositiveDefinite(f64),
}

/// Quantizes `weights` (`[rows, cols]`) to `grid` so that the layer's outputs change little on the activations that
/// `seen` is of; with a drift, so that they come close to what they should be in spite of it: weights are moved to where
/// the error is least before they are rounded.
///
/// Every row is judged by itself, by `held_out` where it is given (activations that GPTQ has not seen, so that fitting
/// the calibration text too closely shows) and else by `seen`, and is never worse than rounded to nearest.
/// The result does not depend on the number of threads. Where no drift was seen and rounding loses next to nothing, that is it.
///
/// Takes about `6 cols^2 + 20 rows * cols` bytes of memory beside the arguments.
///
/// # Errors
/// See [`GptqError`].
pub fn gptq(
    cpu: &Cpu,
    weights: &[f32],
    rows: usize,
    seen: Seen<'_>,
    held_out: Option<Seen<'_>>,
    grid: Grid,
    options: &GptqOptions,
) -> Result<Quantized, GptqError> {
    let hessian = seen.hessian;
    let cols = hessian.cols();
    check(weights, rows, seen, held_out, grid)?;
    let source = Problem { cpu, weights, rows, cols, grid, search: options.search, half: options.half_scales };
    let own = Goal::new(cpu, seen, weights, rows);
    let other = held_out.map(|seen| Goal::new(cpu, seen, weights, rows));
    let judge = other.as_ref().unwrap_or(&own);
    let mut diagonal: Vec<f64> = (0..cols).map(|c| hessian.get(c, c)).collect();
    let live: Vec<f64> = diagonal.iter().copied().filter(|d| *d > 0.0).collect();
    let mean = if live.is_empty() { 1.0 } else { live.iter().sum::<f64>() / live.len() as f64 };
    // A column that calibration never used is rounded as if it were an ordinary one: it may be used later.
    diagonal.iter_mut().filter(|d| **d <= 0.0).for_each(|d| *d = mean);

    let mut errors = Aligned::<f32>::zeroed(rows * cols);
    let rounded = Solution::round(&Problem { search: false, ..source }, None);
    rounded.errors(&source, &mut errors);
    let costs = judge.objective(cpu, &errors);
    let rounded_cost: f64 = costs.iter().sum();
    if seen.drift.is_none() && !options.ordered_groups {
        let outputs: f64 = judge.objective(cpu, weights).iter().sum();
        if rounded_cost <= NOTHING * outputs {
            let methods = vec![(Method::Rounded, rows)];
            let codes = rounded.into_codes(grid);
            return Ok(Quantized { objective: rounded_cost, rounded: rounded_cost, methods, refined: 0, codes });
        }
    }
    let mut methods = vec![Method::Rounded];
    let mut families = vec![Family { chosen: vec![0; rows], solution: rounded, costs }];
    let mut factors = Factors { cpu, hessian, mean, last: None };
    let mut moved = None;
    if let (Some(_), Some(variant)) = (seen.drift, options.variants.first()) {
        let order = Plan::new(&source, variant, &diagonal).order;
        let factor = factors.get(&order, variant.damping)?;
        moved = own.correction(cpu, factor, &order, judge);
    }
    let moved: Option<Vec<f32>> = moved.map(|change| change.iter().zip(weights).map(|(c, w)| c + w).collect());
    let p = Problem { weights: moved.as_deref().unwrap_or(weights), ..source };
    let importance: Vec<f32> = diagonal.iter().map(|d| *d as f32).collect();
    let weighted = Solution::round(&p, Some(&importance));
    if options.variants.is_empty() {
        // Beside GPTQ it suits next to no row.
        consider(&mut families, &mut methods, Method::Weighted, weighted.clone(), judge, &source, &mut errors);
    }

    for variant in &options.variants {
        let plan = Plan::new(&p, variant, &diagonal);
        let factor = factors.get(&plan.order, variant.damping)?;
        let start = variant.is_static(&p).then_some(&weighted);
        let solution = run(&p, &plan, factor, variant.fit, start);
        consider(&mut families, &mut methods, Method::Gptq(*variant), solution, judge, &source, &mut errors);
    }
    drop((factors, weighted));
    if options.ordered_groups && families.len() > 1 {
        // The first is that of rounding, whose groups are neighbours.
        families.remove(0);
    }

    let best = families
        .into_iter()
        .min_by(|a, b| a.costs.iter().sum::<f64>().total_cmp(&b.costs.iter().sum::<f64>()))
        .expect("rounding is always there");
    let Family { mut solution, mut costs, chosen } = best;
    let mut counts: Vec<(Method, usize)> = methods.iter().map(|m| (*m, 0)).collect();
    chosen.iter().for_each(|m| counts[*m].1 += 1);
    let mut refined = vec![false; rows];
    if options.sweeps > 0 {
        // As stiff as the way that suited most rows.
        let damping = match counts.iter().max_by_key(|(_, rows)| *rows) {
            Some((Method::Gptq(variant), _)) => variant.damping.max(0.0),
            _ => 0.1,
        } * mean;
        let mut next = solution.clone();
        refine(&p, hessian, damping, options.sweeps, &mut next);
        next.errors(&source, &mut errors);
        for (r, cost) in judge.objective(cpu, &errors).into_iter().enumerate() {
            if cost < costs[r] {
                solution.take_row(&next, r);
                (costs[r], refined[r]) = (cost, true);
            }
        }
    }
    Ok(Quantized {
        objective: costs.iter().sum(),
        rounded: rounded_cost,
        methods: counts,
        refined: refined.iter().filter(|r| **r).count(),
        codes: solution.into_codes(grid),
    })
}

/// Makes factors of one Hessian, and keeps the last.
struct Factors<'a> {
    cpu: &'a Cpu,
    hessian: &'a Hessian,
    /// Of its diagonal.
    mean: f64,
    last: Option<(Vec<u32>, f64, Factor)>,
}

impl Solution {
    fn into_codes(self, grid: Grid) -> Codes {
        match grid {
            Grid::Blocks(_) => Codes::Blocks(self.packed),
            Grid::Group { .. } => Codes::Groups {
                zeros: self.offsets.iter().map(|z| *z as u8).collect(),
                codes: self.codes,
                scales: self.scales,
                group_of: self.unit_of,
            },
        }
    }
}

impl Factors<'_> {
    /// For columns in this order, with `damping` of the mean diagonal; with more where that is not enough.
    fn get(&mut self, order: &[u32], damping: f64) -> Result<&Factor, GptqError> {
        let (mean, wanted) = (self.mean, damping.max(0.0) * self.mean);
        if self.last.as_ref().is_none_or(|(known, d, _)| known != order || *d != wanted) {
            self.last = None;
            let mut damping = wanted;
            let factor = loop {
                if let Some(factor) = Factor::new(self.cpu, self.hessian, order, damping, mean) {
                    break factor;
                }
                damping = (damping * 10.0).max(1e-4 * mean);
                if damping > 100.0 * mean {
                    return Err(GptqError::NotPositiveDefinite(damping / mean));
                }
            };
            self.last = Some((order.to_vec(), wanted, factor));
        }
        let (_, _, factor) = self.last.as_ref().expect("it was made above");
        Ok(factor)
    }
}

/// Solutions whose columns are grouped alike, and so can be mixed row by row.
struct Family {
    solution: Solution,
    costs: Vec<f64>,
    /// The method of each row.
    chosen: Vec<usize>,
}

/// Takes the rows of `solution` that are better than those so far.
fn consider(
    families: &mut Vec<Family>,
    methods: &mut Vec<Method>,
    method: Method,
    solution: Solution,
    judge: &Goal<'_>,
    p: &Problem<'_>,
    errors: &mut [f32],
) {
    let m = methods.len();
    methods.push(method);
    solution.errors(p, errors);
    let costs = judge.objective(p.cpu, errors);
    match families.iter_mut().find(|f| f.solution.unit_of == solution.unit_of) {
        Some(family) => {
            for (r, cost) in costs.into_iter().enumerate() {
                if cost < family.costs[r] {
                    family.solution.take_row(&solution, r);
                    (family.costs[r], family.chosen[r]) = (cost, m);
                }
            }
        }
        None => families.push(Family { solution, costs, chosen: vec![m; p.rows] }),
    }
}

fn check(
    weights: &[f32],
    rows: usize,
    seen: Seen<'_>,
    held_out: Option<Seen<'_>>,
    grid: Grid,
) -> Result<(), GptqError> {
    let cols = seen.hessian.cols();
    if cols == 0 || rows.checked_mul(cols) != Some(weights.len()) {
        let message = format!("{} weights are no matrix of {rows} rows and {cols} columns", weights.len());
        return Err(GptqError::Shape(message));
    }
    for seen in [Some(seen), held_out].into_iter().flatten() {
        let h = seen.hessian;
        if h.cols() != cols {
            return Err(GptqError::Shape(format!("a held-out Hessian of {} columns beside one of {cols}", h.cols())));
        }
        if h.rows() == 0 {
            return Err(GptqError::Shape("a Hessian of no activations".into()));
        }
        if !seen.fits(rows) {
            return Err(GptqError::Shape("a drift of a layer of another shape".into()));
        }
        if !seen.is_finite() {
            return Err(GptqError::NotFinite("the layer's activations are"));
        }
    }
    match grid {
        Grid::Blocks(format) if format.levels().is_none() => {
            return Err(GptqError::Grid(format!("{format} holds no codes")));
        }
        Grid::Blocks(format) if format.row_bytes(cols).is_none() => {
            return Err(GptqError::Grid(format!("{cols} columns are no whole number of {format} blocks")));
        }
        Grid::Group { bits, .. } if ![2, 3, 4, 8].contains(&bits) => {
            return Err(GptqError::Grid(format!("{bits}-bit groups: only 2, 3, 4 and 8 bits")));
        }
        Grid::Group { group: 0, .. } => return Err(GptqError::Grid("groups of no columns".into())),
        _ => {}
    }
    if weights.iter().any(|w| !w.is_finite()) {
        return Err(GptqError::NotFinite("the weights are"));
    }
    Ok(())
}
