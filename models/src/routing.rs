//! Which experts a token goes through.

use crate::spec::{Experts, Groups, Routing};

/// The experts for a token with the router's `scores` and the weight of each, ordered by number; `bias` is added for the
/// choice alone. Of equal scores the first wins.
pub fn choose(spec: &Experts, scores: &[f32], bias: Option<&[f32]>) -> Vec<(usize, f32)> {
    let probabilities: Vec<f32> = match spec.routing {
        Routing::Softmax => softmax(scores),
        Routing::Sigmoid => scores.iter().map(|&s| 1.0 / (1.0 + (-s).exp())).collect(),
        Routing::SoftmaxOfChosen => scores.to_vec(),
    };
    let mut wanted = match bias {
        Some(bias) => probabilities.iter().zip(bias).map(|(p, b)| p + b).collect(),
        None => probabilities.clone(),
    };
    if let Some(Groups { count, used, best }) = spec.groups {
        let size = (wanted.len() / count).max(1);
        let worth: Vec<f32> = wanted.chunks(size).map(|g| greatest(g, best).iter().map(|&i| g[i]).sum()).collect();
        let kept = greatest(&worth, used);
        for (group, wanted) in wanted.chunks_mut(size).enumerate() {
            if !kept.contains(&group) {
                wanted.fill(f32::NEG_INFINITY);
            }
        }
    }
    let mut chosen = greatest(&wanted, spec.used);
    chosen.sort_unstable();
    let mut weights: Vec<f32> = chosen.iter().map(|&i| probabilities[i]).collect();
    if spec.routing == Routing::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    if spec.renormalise {
        let sum = weights.iter().sum::<f32>() + 1e-20;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    chosen.into_iter().zip(weights.into_iter().map(|w| w * spec.scale)).collect()
}

/// [`choose`] backward: adds to `dscores` what the gradients of the weights of the `chosen`, in their order, say of the
/// router's `scores`. The choice itself has no gradient.
///
/// # Panics
/// When there is not a gradient for each of the chosen, or one of them is not there.
pub fn choose_backward(spec: &Experts, scores: &[f32], chosen: &[(usize, f32)], dweights: &[f32], dscores: &mut [f32]) {
    assert_eq!(chosen.len(), dweights.len(), "a gradient for each of the chosen");
    let probabilities: Vec<f32> = match spec.routing {
        Routing::Softmax => softmax(scores),
        Routing::Sigmoid => scores.iter().map(|&s| 1.0 / (1.0 + (-s).exp())).collect(),
        Routing::SoftmaxOfChosen => {
            let own = softmax(&chosen.iter().map(|&(i, _)| scores[i]).collect::<Vec<_>>());
            let mut all = vec![0.0; scores.len()];
            chosen.iter().zip(own).for_each(|(&(i, _), p)| all[i] = p);
            all
        }
    };
    let mut gradients: Vec<f32> = dweights.iter().map(|d| d * spec.scale).collect();
    if spec.renormalise {
        let sum = chosen.iter().map(|&(i, _)| probabilities[i]).sum::<f32>() + 1e-20;
        let along: f32 = chosen.iter().zip(&gradients).map(|(&(i, _), d)| d * probabilities[i] / sum).sum();
        gradients.iter_mut().for_each(|d| *d = (*d - along) / sum);
    }
    match spec.routing {
        Routing::Sigmoid => {
            for (&(i, _), d) in chosen.iter().zip(gradients) {
                dscores[i] += d * probabilities[i] * (1.0 - probabilities[i]);
            }
        }
        Routing::Softmax | Routing::SoftmaxOfChosen => {
            let along: f32 = chosen.iter().zip(&gradients).map(|(&(i, _), d)| d * probabilities[i]).sum();
            // Those that were not chosen have a part in a softmax over all; elsewhere their probability is zero.
            for (dscore, p) in dscores.iter_mut().zip(&probabilities) {
                *dscore -= p * along;
            }
            for (&(i, _), d) in chosen.iter().zip(gradients) {
                dscores[i] += d * probabilities[i];
            }
        }
    }
}

/// Where the `n` greatest of `values` are, greatest first.
fn greatest(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(n);
    order
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = scores.iter().map(|&s| (s - most).exp()).collect();
    let sum: f32 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Mlp;
    use rushlight_quant::ops::Activation;

    fn experts(count: usize, used: usize, routing: Routing) -> Experts {
        let mlp = Mlp { width: 1, activation: Activation::Silu, gated: true };
        let (router_bias, choice_bias, groups, renormalise, scale, shared_gate) =
            (false, false, None, false, 1.0, false);
        Experts { count, used, mlp, routing, router_bias, choice_bias, groups, renormalise, scale, shared_gate }
    }

    #[test]
    fn the_greatest_are_chosen_and_weighed() {
        let spec = experts(4, 2, Routing::Softmax);
        let e = |x: f32| x.exp();
        let sum = e(1.0) + e(3.0) + e(2.0) + e(0.0);
        let chosen = choose(&spec, &[1.0, 3.0, 2.0, 0.0], None);
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [1, 2]);
        assert!((chosen[0].1 - e(3.0) / sum).abs() < 1e-6 && (chosen[1].1 - e(2.0) / sum).abs() < 1e-6);
        let chosen = choose(&Experts { renormalise: true, scale: 2.0, ..spec }, &[1.0, 3.0, 2.0, 0.0], None);
        assert!((chosen[0].1 + chosen[1].1 - 2.0).abs() < 1e-6);
        let chosen = choose(&experts(3, 2, Routing::SoftmaxOfChosen), &[0.0, 1.0, 0.0], None);
        assert_eq!((chosen[0].0, chosen[1].0), (0, 1), "of equals the first");
        assert!((chosen[1].1 - e(1.0) / (e(1.0) + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn gradients_are_those_of_the_weights() {
        let scores = [0.3f32, -0.8, 1.1, 0.6, -0.2];
        let wanted = [0.7f32, -1.3];
        for routing in [Routing::Softmax, Routing::Sigmoid, Routing::SoftmaxOfChosen] {
            for renormalise in [false, true] {
                let spec = Experts { renormalise, scale: 2.5, ..experts(5, 2, routing) };
                let loss = |scores: &[f32]| -> f64 {
                    let chosen = choose(&spec, scores, None);
                    assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [2, 3]);
                    chosen.iter().zip(wanted).map(|(c, w)| f64::from(c.1) * f64::from(w)).sum()
                };
                let mut got = [0.0; 5];
                choose_backward(&spec, &scores, &choose(&spec, &scores, None), &wanted, &mut got);
                for i in 0..5 {
                    let moved = |by: f32| {
                        let mut scores = scores;
                        scores[i] += by;
                        loss(&scores)
                    };
                    let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                    assert!(
                        (f64::from(got[i]) - want).abs() < 1e-3,
                        "{routing:?} {renormalise} {i}: {} {want}",
                        got[i]
                    );
                }
            }
        }
    }

    #[test]
    fn a_bias_and_groups_decide_but_do_not_weigh() {
        let spec = Experts { groups: Some(Groups { count: 2, used: 1, best: 2 }), ..experts(4, 2, Routing::Sigmoid) };
        // The best expert stands alone in the weaker group.
        let chosen = choose(&spec, &[2.0, -9.0, 1.0, 1.0], None);
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [2, 3]);
        let chosen = choose(&spec, &[2.0, -9.0, 1.0, 1.0], Some(&[0.0, 1.0, 0.0, 0.0]));
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [0, 1]);
        assert!((chosen[1].1 - 1.0 / (1.0 + 9f32.exp())).abs() < 1e-6);
    }
}
