//! Rotary position embeddings: from a [`Rope`] to angles.

use crate::spec::{Outline, Rope, RopeScaling};
use rushlight_quant::ops::RopeLayout;
use std::borrow::Cow;
use std::f64::consts::TAU;

/// A rotary embedding made ready: one frequency for each pair.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Radians per position, for each of the `dim / 2` pairs, in sequences of up to the original context.
    frequencies: Vec<f32>,
    rope: Rope,
    /// What cosine and sine are multiplied by.
    pub scale: f32,
    /// The first rotated value of a head.
    pub first: usize,
    /// Which values make a pair.
    pub layout: RopeLayout,
}

impl Rotary {
    /// The frequencies of `rope`; `stored` divides them where the checkpoint carries factors of its own.
    pub fn new(rope: &Rope, stored: Option<&[f32]>) -> Rotary {
        let (dim, theta) = (rope.dim as f64, f64::from(rope.theta));
        let stretch = |i: usize| -> f64 {
            let f = plain(rope, theta, i);
            match rope.scaling {
                RopeScaling::None | RopeScaling::Dynamic { .. } | RopeScaling::DynamicSteps { .. } => f,
                RopeScaling::Long { ref short, .. } => f / f64::from(short[i]),
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
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let frequencies = (0..rope.dim / 2).map(|i| stretch(i) as f32).collect();
        Rotary { frequencies, scale, first: rope.first, layout: rope.layout, rope: rope.clone() }
    }

    /// Radians per position, for each of the `dim / 2` pairs, in a sequence of `length` (an [`Outline`]'s).
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        let (rope, dim) = (&self.rope, self.rope.dim as f64);
        let at = |theta: f64| Cow::Owned((0..rope.dim / 2).map(|i| plain(rope, theta, i) as f32).collect());
        let grown = |alpha: f64| f64::from(rope.theta) * alpha.powf(dim / (dim - 2.0));
        match rope.scaling {
            RopeScaling::Long { ref long, original_context, .. } if length > original_context => {
                let each = long.iter().enumerate();
                Cow::Owned(
                    each.map(|(i, &by)| (plain(rope, f64::from(rope.theta), i) / f64::from(by)) as f32).collect(),
                )
            }
            RopeScaling::Dynamic { factor, original_context } if length > original_context => {
                let factor = f64::from(factor);
                at(grown(factor * length as f64 / original_context as f64 - (factor - 1.0)))
            }
            RopeScaling::DynamicSteps { original_context } if length > original_context => {
                let steps = ((length as f64 / original_context as f64).log2() + 1.0).ceil();
                at(grown(steps.exp2() - 1.0))
            }
            _ => Cow::Borrowed(&self.frequencies),
        }
    }

    /// How many of a head's values are rotated.
    pub fn dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// The rotation of sequences of this outline.
    pub fn at(&self, outline: &Outline) -> Turning<'_> {
        Turning { rotary: self, outline: *outline, frequencies: self.frequencies(outline.length) }
    }

    /// The rotation that moves a key by `shift` positions, to be applied to one already rotated. (Where positions are
    /// two-dimensional, keys cannot be moved: [`ModelSpec::shiftable`](crate::spec::ModelSpec::shiftable).)
    pub fn shift(&self, shift: isize, outline: &Outline, cos: &mut [f32], sin: &mut [f32]) {
        turn(&self.frequencies(outline.length), shift as f64, 1.0, cos, sin);
    }
}

/// A rotary embedding for sequences of one outline.
#[derive(Debug)]
pub struct Turning<'a> {
    rotary: &'a Rotary,
    outline: Outline,
    frequencies: Cow<'a, [f32]>,
}

impl Turning<'_> {
    /// Cosine and sine of each pair at `position`, multiplied by the embedding's scale. Angles are products in f64: an
    /// f32 one is off by a thousandth of a turn at long positions.
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        let (frequencies, scale) = (&self.frequencies, self.rotary.scale);
        if self.rotary.layout != RopeLayout::TwoHalves {
            return turn(frequencies, position as f64, scale, cos, sin);
        }
        // Each half of a head goes by one of the two positions, with the frequencies of a head of half the width.
        let (first, second) = match position < self.outline.context {
            true => (position, 0),
            false => (self.outline.anchor, position + 1 - self.outline.context),
        };
        let quarter = frequencies.len() / 2;
        let narrow: Vec<f32> = frequencies.iter().step_by(2).copied().collect();
        turn(&narrow, first as f64, scale, &mut cos[..quarter], &mut sin[..quarter]);
        turn(&narrow, second as f64, scale, &mut cos[quarter..], &mut sin[quarter..]);
    }
}

fn turn(frequencies: &[f32], by: f64, scale: f32, cos: &mut [f32], sin: &mut [f32]) {
    for ((c, s), &f) in cos.iter_mut().zip(sin).zip(frequencies) {
        let (sine, cosine) = (by * f64::from(f)).sin_cos();
        *c = (cosine * f64::from(scale)) as f32;
        *s = (sine * f64::from(scale)) as f32;
    }
}

/// The frequency of pair `i` without scaling.
fn plain(rope: &Rope, theta: f64, i: usize) -> f64 {
    theta.powf(-2.0 * i as f64 / rope.dim as f64)
}

/// The row order that turns one rotary layout into the other: row `i` of the result is row `order[i]` of the source.
/// `rows` is a whole number of heads of `head_dim`; only the first `dim` of each head take part.
pub fn reorder(rows: usize, head_dim: usize, dim: usize, from: RopeLayout, to: RopeLayout) -> Vec<usize> {
    let half = dim / 2;
    // Where in a head the two values of pair `i` lie.
    let place = |layout, i: usize, second: usize| match layout {
        RopeLayout::Half => i + second * half,
        RopeLayout::Interleaved => 2 * i + second,
        RopeLayout::TwoHalves => i % (half / 2) + i / (half / 2) * half + second * half / 2,
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
