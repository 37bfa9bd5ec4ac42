//! Which format each tensor gets, so that as little as possible is lost at a given size.

use super::plan::Plan;
use super::types::Target;
use rushlight_models::checkpoint::Value;
use rushlight_quant::formats::Format;
use std::collections::HashMap;

/// A format that a tensor may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The format.
    pub format: Format,
    /// What the tensor takes in it.
    pub bytes: u64,
    /// What is lost by it; losses of different tensors add up.
    pub loss: f64,
}

/// For each tensor the index of one of its choices, so that all fit into `budget` bytes and the sum of losses is small:
/// along the lower convex hull of each tensor's choices, the step that saves most per byte comes first. That is optimal
/// but for what the last step leaves free (Lagrangian relaxation; Shoham and Gersho, 1988).
///
/// # Errors
/// With the fewest bytes that are possible, where those exceed the budget.
pub fn allocate(tensors: &[Vec<Choice>], budget: u64) -> Result<Vec<usize>, u64> {
    let hulls: Vec<Vec<usize>> = tensors.iter().map(|choices| hull(choices)).collect();
    let least: u64 = hulls.iter().zip(tensors).filter_map(|(hull, choices)| Some(choices[*hull.first()?].bytes)).sum();
    if least > budget {
        return Err(least);
    }
    // What a step along a hull saves for each byte that it costs.
    let rate = |tensor: usize, step: usize| {
        let (a, b) = (tensors[tensor][hulls[tensor][step]], tensors[tensor][hulls[tensor][step + 1]]);
        (a.loss - b.loss) / (b.bytes - a.bytes) as f64
    };
    let mut steps: Vec<(f64, usize, usize)> = (0..hulls.len())
        .flat_map(|tensor| (0..hulls[tensor].len().saturating_sub(1)).map(move |step| (tensor, step)))
        .map(|(tensor, step)| (rate(tensor, step), tensor, step))
        .collect();
    // The steps of one hull save less and less: in this order none comes before the one it follows.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let mut place = vec![0; hulls.len()];
    let mut left = budget - least;
    for (_, tensor, step) in steps {
        let cost = tensors[tensor][hulls[tensor][step + 1]].bytes - tensors[tensor][hulls[tensor][step]].bytes;
        // A step that does not fit ends that tensor's way; smaller ones of others may still fit.
        if place[tensor] == step && cost <= left {
            place[tensor] = step + 1;
            left -= cost;
        }
    }
    Ok(place.iter().zip(&hulls).map(|(place, hull)| hull.get(*place).copied().unwrap_or(0)).collect())
}

/// Gives each tensor of `plan` the one of its `choices` that [`allocate`] picks: the sum of their losses.
///
/// # Errors
/// With the fewest bytes that are possible, where those exceed the budget.
pub fn fit(plan: &mut Plan, choices: &[Vec<Choice>], budget: u64) -> Result<f64, u64> {
    let chosen = allocate(choices, budget)?;
    let mut loss = 0.0;
    let mut bytes: HashMap<Format, u64> = HashMap::new();
    for ((tensor, choices), i) in plan.tensors.iter_mut().zip(choices).zip(chosen) {
        let Some(choice) = choices.get(i) else { continue };
        if tensor.format != choice.format {
            (tensor.format, tensor.instead_of) = (choice.format, None);
        }
        loss += choice.loss;
        *bytes.entry(choice.format).or_default() += choice.bytes;
    }
    // Files have one number for the type: that of the format which takes the most.
    let most = bytes.into_iter().max_by_key(|(format, bytes)| (*bytes, *format)).map(|(format, _)| format);
    if let Some(named) = Target::ALL.into_iter().find(|t| Some(t.format) == most) {
        plan.metadata.0.insert("general.file_type".into(), Value::Unsigned(named.file_type.into()));
    }
    Ok(loss)
}

/// The choices on the lower convex hull, by rising bytes and falling loss.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (&choices[a], &choices[b]);
        a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss))
    });
    let mut hull: Vec<usize> = Vec::new();
    for i in order {
        let c = &choices[i];
        if hull.last().is_some_and(|&last| choices[last].bytes == c.bytes || choices[last].loss <= c.loss) {
            continue;
        }
        // The last point goes where the line from the one before it to this one passes below it.
        while let [.., a, b] = hull[..] {
            let (a, b) = (&choices[a], &choices[b]);
            let before = (a.loss - b.loss) / (b.bytes - a.bytes) as f64;
            let across = (a.loss - c.loss) / (c.bytes - a.bytes) as f64;
            if across < before {
                break;
            }
            hull.pop();
        }
        hull.push(i);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choice(bytes: u64, loss: f64) -> Choice {
        Choice { format: Format::Q4_0, bytes, loss }
    }

    #[test]
    fn bytes_go_where_they_save_most() {
        let sensitive = vec![choice(10, 8.0), choice(20, 2.0), choice(30, 1.0)];
        let dull = vec![choice(10, 1.0), choice(20, 0.5), choice(30, 0.4)];
        let both = [sensitive, dull];
        assert_eq!(allocate(&both, 20), Ok(vec![0, 0]));
        assert_eq!(allocate(&both, 30), Ok(vec![1, 0]));
        assert_eq!(allocate(&both, 40), Ok(vec![2, 0]));
        assert_eq!(allocate(&both, 59), Ok(vec![2, 1]));
        assert_eq!(allocate(&both, 60), Ok(vec![2, 2]));
        assert_eq!(allocate(&both, 19), Err(20));
    }

    #[test]
    fn choices_that_are_never_best_are_not_taken() {
        // The second is larger and worse than the first, the third lies above the line from the first to the fourth.
        let choices = vec![choice(10, 5.0), choice(12, 6.0), choice(20, 4.5), choice(30, 1.0)];
        assert_eq!(hull(&choices), [0, 3]);
        assert_eq!(allocate(&[choices], 25), Ok(vec![0]));
    }

    proptest! {
        #[test]
        fn no_single_change_that_fits_is_better(
            tensors in prop::collection::vec(prop::collection::vec((1u64..50, 0.0f64..10.0), 1..5), 1..6),
            extra in 0u64..100,
        ) {
            let tensors: Vec<Vec<Choice>> =
                tensors.iter().map(|t| t.iter().map(|&(bytes, loss)| choice(bytes, loss)).collect()).collect();
            let least: u64 = tensors.iter().map(|t| t.iter().map(|c| c.bytes).min().unwrap()).sum();
            let budget = least + extra;
            let chosen = allocate(&tensors, budget).unwrap();
            let used: u64 = tensors.iter().zip(&chosen).map(|(t, &i)| t[i].bytes).sum();
            prop_assert!(used <= budget);
            for (t, &i) in tensors.iter().zip(&chosen) {
                // Nothing that is no larger loses less.
                prop_assert!(t.iter().all(|c| c.bytes > t[i].bytes || c.loss >= t[i].loss));
            }
        }
    }
}
