//! The rotations of a batch's rows.

use rushlight_models::backend::{Batch, Sequence};
use rushlight_models::model::Model;
use rushlight_quant::ops::RopeLayout;

/// Cosines and sines for the rows of a batch, `[rows, dim / 2]` each, of one rotary embedding.
#[derive(Default)]
pub struct Angles {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// The first rotated value of a head.
    pub first: usize,
    /// How many are rotated.
    pub dim: usize,
    /// Which values make a pair; `None` before the first batch.
    pub layout: Option<RopeLayout>,
}

impl Angles {
    /// Puts those of `batch` into `all`, one for each rotary embedding of the model.
    pub fn update(all: &mut Vec<Angles>, model: &Model, batch: &Batch<'_>) {
        all.resize_with(model.rotaries.len(), Angles::default);
        for (angles, rotary) in all.iter_mut().zip(&model.rotaries) {
            let half = rotary.dim() / 2;
            (angles.first, angles.dim, angles.layout) = (rotary.first, rotary.dim(), Some(rotary.layout));
            angles.cos.resize(batch.ids.len() * half, 0.0);
            angles.sin.resize(batch.ids.len() * half, 0.0);
            let mut rows = angles.cos.chunks_exact_mut(half).zip(angles.sin.chunks_exact_mut(half));
            for s in batch.sequences {
                let turning = rotary.at(&s.outline);
                for (position, (cos, sin)) in s.positions().zip(&mut rows) {
                    turning.angles(position, cos, sin);
                }
            }
        }
    }
}

/// What logn attention multiplies the queries of each row by that begins to be stretched at `n` positions: the row's
/// number among all of `sequences`, and the factor.
pub fn logn(sequences: &[Sequence], n: usize) -> impl Iterator<Item = (usize, f32)> {
    let positions = sequences.iter().flat_map(Sequence::positions).enumerate();
    positions.filter(move |(_, position)| position + 1 > n).map(move |(row, position)| {
        let by = ((position + 1) as f64).ln() / (n as f64).ln();
        (row, by as f32)
    })
}
