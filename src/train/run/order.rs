//! Which examples a step learns from.

use crate::engine::random::Random;

/// The order of the examples, as a function of the seed and the step: there is nothing else to remember.
#[derive(Clone, Debug)]
pub struct Order {
    examples: usize,
    batch: usize,
    /// `None`: as they are given.
    seed: Option<u64>,
    /// An epoch's order.
    epoch: Option<(u64, Vec<u32>)>,
}

impl Order {
    /// `examples` examples, `batch` at a step, each epoch in an order of its own by `seed`.
    pub fn new(examples: usize, batch: usize, seed: Option<u64>) -> Order {
        Order { examples, batch: batch.max(1), seed, epoch: None }
    }

    /// Steps in which every example comes once; the last may have fewer than others.
    pub fn steps_per_epoch(&self) -> u64 {
        self.examples.div_ceil(self.batch).max(1) as u64
    }

    /// The examples of step `step` (from 0).
    pub fn of(&mut self, step: u64) -> Vec<usize> {
        let (epoch, within) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            let mut order: Vec<u32> = (0..self.examples as u32).collect();
            if let Some(seed) = self.seed {
                let mut random = Random::new(mix(seed, epoch));
                // Fisher and Yates.
                for i in (1..order.len()).rev() {
                    order.swap(i, (random.unit() * (i + 1) as f64) as usize);
                }
            }
            self.epoch = Some((epoch, order));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| order);
        let start = (within * self.batch).min(order.len());
        order[start..(start + self.batch).min(order.len())].iter().map(|&i| i as usize).collect()
    }
}

/// A number that follows from two, unlike its neighbours.
pub fn mix(seed: u64, n: u64) -> u64 {
    Random::new(seed ^ n.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)).bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_once_in_an_epoch() {
        let mut order = Order::new(10, 4, Some(7));
        assert_eq!(order.steps_per_epoch(), 3);
        let epoch = |order: &mut Order, e: u64| (3 * e..3 * e + 3).flat_map(|s| order.of(s)).collect::<Vec<_>>();
        let (first, second) = (epoch(&mut order, 0), epoch(&mut order, 1));
        for mut all in [first.clone(), second.clone()] {
            all.sort_unstable();
            assert_eq!(all, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(first, second);
        // Whoever asks for a step alone gets the same.
        assert_eq!(Order::new(10, 4, Some(7)).of(4), second[4..8]);
        assert_ne!(Order::new(10, 4, Some(8)).of(0), first[..4]);
        let mut plain = Order::new(5, 2, None);
        assert_eq!((plain.of(1), plain.of(2), plain.of(3)), (vec![2, 3], vec![4], vec![0, 1]));
    }
}
