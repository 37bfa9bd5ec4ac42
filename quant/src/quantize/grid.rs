//! The values that quantized weights may take, and how the scales of a group are found.

use crate::formats::Format;

/// What a matrix is quantized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// A block format of GGUF: the result is packed rows.
    Blocks(Format),
    /// Integer codes with a scale (and a zero) for each group of columns, as GPTQ checkpoints hold them.
    Group {
        /// Bits of a code: 2, 3, 4 or 8.
        bits: u32,
        /// Columns of a group; the last may be shorter, and one longer than a row is the whole row.
        group: usize,
        /// Whether the zero is always in the middle of the codes.
        symmetric: bool,
    },
}

/// Which integers a code may be, before it is multiplied by its scale.
#[derive(Clone, Copy)]
pub(super) enum Levels {
    /// From the first to the second.
    Range(f32, f32),
    /// One of these, which rise.
    Table(&'static [i8]),
    /// `-zero ..= this - zero`, where the zero is the group's own.
    Zero(f32),
}

/// The whole number nearest to `x`, even where two are: for numbers below 2^22, without the call that
/// `round_ties_even` is where nothing is known of the processor.
#[inline(always)]
fn whole(x: f32) -> f32 {
    const ONES: f32 = 12_582_912.0;
    (x + ONES) - ONES
}

/// Nearest value on the grid to `x`: (code, value). `offset` is the minimum (value = scale * code - minimum), or the
/// zero for [`Levels::Zero`] (value = scale * code).
#[inline(always)]
pub(super) fn nearest(levels: Levels, scale: f32, offset: f32, x: f32) -> (f32, f32) {
    if scale == 0.0 {
        let code = match levels {
            Levels::Range(low, high) => 0f32.clamp(low, high),
            Levels::Table(table) => f32::from(table[0]),
            Levels::Zero(_) => 0.0,
        };
        let minimum = if matches!(levels, Levels::Zero(_)) { 0.0 } else { offset };
        return (code, scale * code - minimum);
    }
    match levels {
        Levels::Range(low, high) => {
            let code = whole(((x + offset) / scale).clamp(low, high));
            (code, scale * code - offset)
        }
        Levels::Zero(top) => {
            let code = whole((x / scale).clamp(-offset, top - offset));
            (code, scale * code)
        }
        Levels::Table(table) => {
            let at = (x + offset) / scale;
            let above = table.partition_point(|&v| f32::from(v) < at).clamp(1, table.len() - 1);
            let (a, b) = (f32::from(table[above - 1]), f32::from(table[above]));
            let code = if at - a <= b - at { a } else { b };
            (code, scale * code - offset)
        }
    }
}

/// Scale and zero of a group of integer codes.
#[derive(Clone, Copy)]
pub(super) struct GroupFit {
    pub bits: u32,
    pub symmetric: bool,
    /// Whether to search for the scale with the least weighted error instead of spanning the largest weights.
    pub search: bool,
    /// Whether the scale will be stored as f16, and so has to be one.
    pub half: bool,
}

impl GroupFit {
    pub fn top(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Scale and zero for `weights`, whose squared errors count `importance` (or all alike).
    pub fn fit(&self, weights: &[f32], importance: Option<&[f32]>) -> (f32, f32) {
        let (mut low, mut high) = (0f32, 0f32);
        for w in weights {
            low = low.min(*w);
            high = high.max(*w);
        }
        let whole = self.span(low, high);
        if !self.search {
            return whole;
        }
        let error = |(scale, zero): (f32, f32)| -> f32 {
            let levels = Levels::Zero(self.top());
            weights
                .iter()
                .enumerate()
                .map(|(i, w)| {
                    let e = w - nearest(levels, scale, zero, *w).1;
                    importance.map_or(1.0, |importance| importance[i]) * e * e
                })
                .sum()
        };
        let mut best = (error(whole), whole);
        let mut consider = |fit: (f32, f32)| {
            let error = error(fit);
            if error < best.0 {
                best = (error, fit);
            }
        };
        const STEPS: usize = 24;
        for step in 1..STEPS {
            let shrink = 1.0 - 0.6 * step as f32 / STEPS as f32;
            consider(self.span(low * shrink, high * shrink));
            if !self.symmetric {
                consider(self.span(low * shrink, high));
                consider(self.span(low, high * shrink));
            }
        }
        best.1
    }

    /// Scale and zero of codes that span `low ..= high` (`low <= 0 <= high`).
    fn span(&self, low: f32, high: f32) -> (f32, f32) {
        let top = self.top();
        let (low, high) = match (self.symmetric, low == 0.0 && high == 0.0) {
            (_, true) => (-1.0, 1.0),
            (true, _) => (-high.max(-low), high.max(-low)),
            (false, _) => (low, high),
        };
        let mut scale = ((f64::from(high) - f64::from(low)) / f64::from(top)) as f32;
        if self.half {
            scale = half::f16::from_f32(scale).to_f32();
            if scale == 0.0 || !scale.is_finite() {
                // Weights below or above what f16 can scale: the nearest scale it has.
                scale = if scale == 0.0 { half::f16::from_bits(1).to_f32() } else { half::f16::MAX.to_f32() };
            }
        }
        let zero = if self.symmetric { (top + 1.0) / 2.0 } else { (-low / scale).round_ties_even().clamp(0.0, top) };
        (scale, zero)
    }
}
