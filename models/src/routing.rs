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
