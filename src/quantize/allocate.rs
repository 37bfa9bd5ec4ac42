//! Choosing the bits: a format for each matrix so that the least is lost at a given size.

use super::plan::Plan;
use crate::calibrate::imatrix::gguf_name;
use crate::calibrate::sensitivity::Sensitivity;
use anyhow::{Result, bail};
use rushlight_models::model::Model;
use rushlight_quant::formats::Format;
use std::collections::HashMap;

/// What a matrix may become. None is better than another in every way.
const FORMATS: [Format; 11] = [
    Format::Q2_K,
    Format::Q3_K,
    Format::IQ4_XS,
    Format::IQ4_NL,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q4_K,
    Format::Q5_0,
    Format::Q5_K,
    Format::Q6_K,
    Format::Q8_0,
];

/// Gives each matrix of `plan` that belongs to a linear layer of `model` the format that loses least when all tensors
/// together take at most `budget` bytes. Those that `fixed` names keep what they have.
pub fn fit(
    plan: &mut Plan,
    model: &Model,
    sensitivity: &Sensitivity,
    budget: u64,
    fixed: &dyn Fn(&str) -> bool,
) -> Result<()> {
    let places: HashMap<String, usize> =
        plan.tensors.iter().enumerate().map(|(i, t)| (t.source.name.clone(), i)).collect();
    let mut rest = plan.bytes().0;
    let (mut matrices, mut all) = (Vec::new(), Vec::new());
    for linear in model.linears() {
        let Some(&place) = gguf_name(model, linear).and_then(|name| places.get(&name)) else { continue };
        let planned = &plan.tensors[place];
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        if planned.source.shape != [rows, cols] || fixed(&planned.source.name) {
            continue;
        }
        let candidate = |format: Format| {
            let bytes = (format.row_bytes(cols)? * rows) as u64;
            Some(Candidate { format, bytes, loss: sensitivity.loss(linear, format)? })
        };
        let candidates: Vec<Candidate> = FORMATS.into_iter().filter_map(candidate).collect();
        if !candidates.is_empty() {
            rest -= planned.bytes().0;
            matrices.push(place);
            all.push(candidates);
        }
    }
    let Some(chosen) = allocate(&all, budget.saturating_sub(rest)) else {
        let least = |c: &Vec<Candidate>| c.iter().map(|c| c.bytes).min().unwrap_or(0);
        let least = rest + all.iter().map(least).sum::<u64>();
        bail!("the model does not fit: with the smallest formats its tensors take {} MB", least.div_ceil(1_000_000));
    };
    for (place, candidate) in matrices.into_iter().zip(chosen) {
        let tensor = &mut plan.tensors[place];
        (tensor.format, tensor.instead_of) = (candidate.format, None);
    }
    Ok(())
}

/// A way to store a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The format.
    pub format: Format,
    /// What it takes.
    pub bytes: u64,
    /// What it costs, in any unit that adds up over matrices, such as expected KL divergence.
    pub loss: f64,
}

/// Chooses one of the `candidates` of each matrix so that the sum of their bytes is at most `budget` and the sum of
/// losses small: upgrades are taken in the order of what they save for each byte, along the lower convex hull of each
/// matrix's candidates, as long as they fit. (Where every upgrade fits until one does not, that is the optimum for the
/// bytes used: no choice of the same size loses less.) `None` where not even the smallest of all fit, or a matrix has no
/// candidate.
pub fn allocate(candidates: &[Vec<Candidate>], budget: u64) -> Option<Vec<Candidate>> {
    let hulls: Vec<Vec<Candidate>> = candidates.iter().map(|c| hull(c)).collect();
    let mut chosen = vec![0; hulls.len()];
    let mut bytes: u64 = 0;
    for hull in &hulls {
        bytes = bytes.checked_add(hull.first()?.bytes)?;
    }
    if bytes > budget {
        return None;
    }
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (i, hull) in hulls.iter().enumerate() {
        let saved = |pair: &[Candidate]| (pair[0].loss - pair[1].loss) / (pair[1].bytes - pair[0].bytes) as f64;
        steps.extend(hull.windows(2).enumerate().map(|(step, pair)| (saved(pair), i, step)));
    }
    // Along a hull savings fall, so that the steps of a matrix come in their order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    for (_, i, step) in steps {
        let more = hulls[i][step + 1].bytes - hulls[i][step].bytes;
        // A matrix whose step did not fit stays where it is.
        if chosen[i] == step && bytes + more <= budget {
            bytes += more;
            chosen[i] = step + 1;
        }
    }
    Some(hulls.iter().zip(chosen).map(|(hull, i)| hull[i]).collect())
}

/// The candidates that lose least for their size: by growing size and falling loss, each saving less for a byte than the
/// one before it.
fn hull(candidates: &[Candidate]) -> Vec<Candidate> {
    let mut sorted: Vec<Candidate> = candidates.iter().copied().filter(|c| c.loss.is_finite()).collect();
    sorted.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)));
    let mut hull: Vec<Candidate> = Vec::new();
    for c in sorted {
        if hull.last().is_some_and(|last| c.loss >= last.loss) {
            continue;
        }
        while let [.., a, b] = hull[..] {
            let (first, second) =
                ((a.loss - b.loss) * (c.bytes - b.bytes) as f64, (b.loss - c.loss) * (b.bytes - a.bytes) as f64);
            if first > second {
                break;
            }
            hull.pop();
        }
        hull.push(c);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(bytes: u64, loss: f64) -> Candidate {
        Candidate { format: Format::Q4_0, bytes, loss }
    }

    #[test]
    fn a_hull_leaves_out_what_is_never_best() {
        let all = [(10, 9.0), (20, 5.0), (20, 4.0), (30, 3.9), (40, 1.0), (50, 1.0), (60, f64::NAN)];
        let got = hull(&all.map(|(bytes, loss)| candidate(bytes, loss)));
        assert_eq!(got, [candidate(10, 9.0), candidate(20, 4.0), candidate(40, 1.0)]);
    }

    #[test]
    fn no_choice_of_the_same_size_loses_less() {
        // Three matrices of three candidates each: compare with all 27 choices, for every budget.
        let of = |scale: f64, size: u64| {
            vec![candidate(size, 8.0 * scale), candidate(2 * size, 3.0 * scale), candidate(3 * size, scale)]
        };
        let all = [of(1.0, 4), of(5.0, 3), of(0.7, 6)];
        // At the sizes that whole steps lead to; between them something does not fit.
        let whole = [13, 16, 19, 23, 29, 33, 39];
        for budget in 13..=39 {
            let got = allocate(&all, budget).unwrap();
            let sums = |of: &[Candidate]| of.iter().fold((0, 0.0), |(b, l), c| (b + c.bytes, l + c.loss));
            let (bytes, loss) = sums(&got);
            assert!(bytes <= budget);
            for i in (0..27).filter(|_| whole.contains(&budget)) {
                let other = [all[0][i % 3], all[1][i / 3 % 3], all[2][i / 9]];
                let (b, l) = sums(&other);
                assert!(b > budget || l >= loss - 1e-9, "{budget}: {other:?} instead of {got:?}");
            }
        }
        assert!(allocate(&all, 12).is_none());
        assert!(allocate(&[vec![]], 12).is_none());
    }
}
