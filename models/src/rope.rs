//! Rotary position embeddings: from a [`Rope`] to angles.

use crate::spec::{Rope, RopeScaling};
use rushlight_quant::ops::RopeLayout;
use std::f64::consts::TAU;

/// A rotary embedding made ready: one frequency for each pair.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Radians per position, for each of the `dim / 2` pairs.
    pub frequencies: Vec<f32>,
    /// What cosine and sine are multiplied by.
    pub scale: f32,
    /// Which values make a pair.
    pub layout: RopeLayout,
}

impl Rotary {
    /// The frequencies of `rope`; `stored` divides them where the checkpoint carries factors of its own.
    pub fn new(rope: &Rope, stored: Option<&[f32]>) -> Rotary {
        let (dim, theta) = (rope.dim as f64, f64::from(rope.theta));
        let plain = |i: usize| theta.powf(-2.0 * i as f64 / dim);
        let stretch = |i: usize| -> f64 {
            let f = plain(i);
            match rope.scaling {
                RopeScaling::None => f,
                RopeScaling::Stored => f / stored.map_or(1.0, |factors| f64::from(factors[i])),
                RopeScaling::Linear { factor } => f / f64::from(factor),
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                    let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
                    // Turns within the original context decide; 0 stretches whole, 1 keeps.
                    let turns = original_context as f64 * f / TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - keep) * f / f64::from(factor) + keep * f
                }
                RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
                    // The dimension that makes `turns` turns within the original context.
                    let at = |turns: f32| {
                        dim * (original_context as f64 / (f64::from(turns) * TAU)).ln() / (2.0 * theta.ln())
                    };
                    let (mut low, mut high) = (at(beta_fast), at(beta_slow));
                    if truncate {
                        (low, high) = (low.floor(), high.ceil());
                    }
                    (low, high) = (low.max(0.0), high.min(dim - 1.0));
                    let stretched = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    stretched * f / f64::from(factor) + (1.0 - stretched) * f
                }
            }
        };
        let scale = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        Rotary { frequencies: (0..rope.dim / 2).map(|i| stretch(i) as f32).collect(), scale, layout: rope.layout }
    }

    /// How many of a head's leading values are rotated.
    pub fn dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Cosine and sine of each pair at `position`, multiplied by `scale`. Angles are products in f64: an f32 one is
    /// off by a thousandth of a turn at long positions.
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        self.turn(position as f64, self.scale, cos, sin);
    }

    /// The rotation that moves a key by `shift` positions, to be applied to one already rotated.
    pub fn shift(&self, shift: isize, cos: &mut [f32], sin: &mut [f32]) {
        self.turn(shift as f64, 1.0, cos, sin);
    }

    fn turn(&self, by: f64, scale: f32, cos: &mut [f32], sin: &mut [f32]) {
        for ((c, s), &f) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
            let (sine, cosine) = (by * f64::from(f)).sin_cos();
            *c = (cosine * f64::from(scale)) as f32;
            *s = (sine * f64::from(scale)) as f32;
        }
    }
}

/// The row order that turns one rotary layout into the other: row `i` of the result is row `order[i]` of the source.
/// `rows` is a whole number of heads of `head_dim`; only the first `dim` of each head take part.
pub fn reorder(rows: usize, head_dim: usize, dim: usize, from: RopeLayout, to: RopeLayout) -> Vec<usize> {
    let half = dim / 2;
    // Where in a head the two values of pair `i` lie.
    let place = |layout, i: usize, second: usize| match layout {
        RopeLayout::Half => i + second * half,
        RopeLayout::Interleaved => 2 * i + second,
    };
    let mut order: Vec<usize> = (0..rows).collect();
    for head in (0..rows).step_by(head_dim) {
        for i in 0..half {
            for second in 0..2 {
                order[head + place(to, i, second)] = head + place(from, i, second);
            }
        }
    }
    order
}
