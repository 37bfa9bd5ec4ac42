//! The learning rate over the steps, as transformers' schedulers have it.

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Not at all.
    Constant,
    /// Straight to 0.
    Linear,
    /// Along half a cosine to 0.
    Cosine,
}

/// The learning rate of every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// How it falls.
    pub shape: Shape,
    /// Its height.
    pub rate: f64,
    /// Steps in which it grows from 0.
    pub warmup: u64,
    /// All steps.
    pub steps: u64,
}

impl Schedule {
    /// The rate at which step `step` (from 0) changes the parameters.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.rate * step as f64 / self.warmup.max(1) as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / span).min(1.0);
        self.rate
            * match self.shape {
                Shape::Constant => 1.0,
                Shape::Linear => 1.0 - done,
                Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rates_of_transformers() {
        let of = |shape| Schedule { shape, rate: 1e-3, warmup: 2, steps: 10 };
        // get_{constant,linear,cosine}_schedule_with_warmup, read after each step of a torch optimizer.
        let rates = |shape| (0..10).map(|i| (of(shape).at(i) * 1e9).round() as i64).collect::<Vec<_>>();
        assert_eq!(rates(Shape::Constant)[..4], [0, 500_000, 1_000_000, 1_000_000]);
        assert_eq!(rates(Shape::Linear)[..5], [0, 500_000, 1_000_000, 875_000, 750_000]);
        assert_eq!(rates(Shape::Linear)[9], 125_000);
        assert_eq!(rates(Shape::Cosine)[2..7], [1_000_000, 961_940, 853_553, 691_342, 500_000]);
        assert_eq!(rates(Shape::Cosine)[9], 38_060);
        let plain = Schedule { shape: Shape::Constant, rate: 0.005, warmup: 0, steps: 1 };
        assert_eq!((plain.at(0), plain.at(100)), (0.005, 0.005));
    }
}
