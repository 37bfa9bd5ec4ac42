//! Mixtures of experts: each is run on the rows that chose it, and the router learns through the weights of the chosen.

use super::elementwise::{activate, gate};
use super::linear::linears;
use super::pool::Buffer;
use super::record::{Step, Tape, Value};
use super::rows::rows;
use rushlight_models::Result;
use rushlight_models::model::{ExpertWeights, MlpWeights};
use rushlight_models::routing;
use rushlight_models::spec::Experts;
use std::rc::Rc;

/// The chosen experts of each row of `x`, weighed by the router's `scores`.
pub(super) fn experts(
    tape: &mut Tape<'_>,
    x: &Value,
    scores: Value,
    spec: &Experts,
    weights: &ExpertWeights,
) -> Result<Value> {
    let bias = weights.choice_bias.as_ref().map(|b| &b.values[..]);
    let chosen: Vec<_> = (0..x.data.rows()).map(|row| routing::choose(spec, scores.data.row(row), bias)).collect();
    let mut out = tape.pool.zeros(x.data.rows(), x.data.width());
    let mut shares = Vec::new();
    for (number, expert) in weights.experts.iter().enumerate() {
        let mut places = Vec::new();
        for (row, chosen) in chosen.iter().enumerate() {
            places.extend(chosen.iter().position(|(e, _)| *e == number).map(|place| (row, place)));
        }
        if places.is_empty() {
            continue;
        }
        let y = one(tape, x, &places, spec, expert)?;
        for (i, &(row, place)) in places.iter().enumerate() {
            tape.cpu.add_scaled(out.row_mut(row), chosen[row][place].1, y.data.row(i));
        }
        // What it gave is looked at again only for the router's sake.
        let kept = scores.slot.is_some().then(|| y.data.clone());
        shares.push(Share { places, y: kept, slot: y.slot });
    }
    let learns = scores.slot.is_some() || shares.iter().any(|s| s.slot.is_some());
    let y = tape.value(out, learns);
    if let Some(slot) = y.slot {
        tape.push(Combine { spec: spec.clone(), scores: scores.data, from: scores.slot, chosen, shares, slot });
    }
    Ok(y)
}

/// One expert on the rows of `x` that chose it.
fn one(
    tape: &mut Tape<'_>,
    x: &Value,
    places: &[(usize, usize)],
    spec: &Experts,
    expert: &MlpWeights,
) -> Result<Value> {
    let mine: Vec<usize> = places.iter().map(|(row, _)| *row).collect();
    let mine = rows(tape, x, &mine);
    let y = match &expert.gate {
        Some(weight) => {
            let [g, up] = linears(tape, &mine, [weight, &expert.up])?;
            gate(tape, spec.mlp.activation, g, up)
        }
        None => {
            let [up] = linears(tape, &mine, [&expert.up])?;
            activate(tape, spec.mlp.activation, up)
        }
    };
    let [y] = linears(tape, &y, [&expert.down])?;
    Ok(y)
}

/// What one expert gave.
struct Share {
    /// For each of its rows the row of the whole and the place among that row's chosen.
    places: Vec<(usize, usize)>,
    y: Option<Rc<Buffer>>,
    slot: Option<usize>,
}

struct Combine {
    spec: Experts,
    scores: Rc<Buffer>,
    from: Option<usize>,
    chosen: Vec<Vec<(usize, f32)>>,
    shares: Vec<Share>,
    slot: usize,
}

impl Step for Combine {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Combine { spec, scores, from, chosen, shares, slot } = *self;
        let Some(dout) = tape.take(slot) else { return Ok(()) };
        let mut dweights: Vec<Vec<f32>> = chosen.iter().map(|c| vec![0.0; c.len()]).collect();
        for share in shares {
            if let Some(y) = &share.y {
                for (i, &(row, place)) in share.places.iter().enumerate() {
                    let products = dout.row(row).iter().zip(y.row(i));
                    dweights[row][place] = products.map(|(d, y)| f64::from(*d) * f64::from(*y)).sum::<f64>() as f32;
                }
            }
            if share.slot.is_some() {
                let mut dy = tape.pool.zeros(share.places.len(), dout.width());
                for (i, &(row, place)) in share.places.iter().enumerate() {
                    tape.cpu.add_scaled(dy.row_mut(i), chosen[row][place].1, dout.row(row));
                }
                tape.give(share.slot, Rc::new(dy));
            }
        }
        if from.is_some() {
            let mut dscores = tape.pool.zeros(scores.rows(), scores.width());
            for (row, (chosen, dweights)) in chosen.iter().zip(&dweights).enumerate() {
                routing::choose_backward(&spec, scores.row(row), chosen, dweights, dscores.row_mut(row));
            }
            tape.give(from, Rc::new(dscores));
        }
        Ok(())
    }
}
