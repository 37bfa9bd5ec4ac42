//! The order in which examples are seen: shuffled anew for each epoch, the same for the same seed, and taken up again
//! from any place.

use crate::engine::random::Random;
use crate::train::batch::Example;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How far a run has come in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epochs that are done.
    pub epoch: u64,
    /// Items of the next that are done.
    pub item: usize,
}

/// Hands out the items of a [`Dataset`](super::Dataset) batch by batch, epoch after epoch, without end.
#[derive(Clone, Debug)]
pub struct Batches {
    len: usize,
    batch_size: usize,
    seed: Option<u64>,
    position: Position,
    /// The order of the epoch of [`Batches::position`].
    order: Vec<u32>,
}

impl Batches {
    /// Batches of `batch_size` of `len` items (neither is 0), shuffled by `seed` or, without one, in their own order.
    /// The last batch of an epoch has what is left.
    pub fn new(len: usize, batch_size: usize, seed: Option<u64>) -> Batches {
        assert!(len > 0 && batch_size > 0, "batches of nothing");
        let mut batches = Batches { len, batch_size, seed, position: Position::default(), order: Vec::new() };
        batches.order = batches.shuffled(0);
        batches
    }

    /// The items of the next batch.
    pub fn next_batch(&mut self) -> Vec<usize> {
        if self.position.item >= self.len {
            self.seek(Position { epoch: self.position.epoch + 1, item: 0 });
        }
        let at = self.position.item;
        let end = self.len.min(at + self.batch_size);
        self.position.item = end;
        self.order[at..end].iter().map(|&item| item as usize).collect()
    }

    /// How far the batches handed out so far have come: [`Batches::seek`] goes on from there.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes on from `position`.
    pub fn seek(&mut self, position: Position) {
        if position.epoch != self.position.epoch {
            self.order = self.shuffled(position.epoch);
        }
        self.position = position;
    }

    /// Batches in an epoch.
    pub fn per_epoch(&self) -> usize {
        self.len.div_ceil(self.batch_size)
    }

    /// Fisher and Yates's shuffle, from a generator of the epoch's own, so that any epoch can be had without those
    /// before it.
    fn shuffled(&self, epoch: u64) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.len as u32).collect();
        if let Some(seed) = self.seed {
            let mut random = Random::new(seed ^ Random::new(epoch).bits());
            for k in (1..order.len()).rev() {
                order.swap(k, random.below(k + 1));
            }
        }
        order
    }
}

/// Cuts the sequences of a batch into runs of `max_tokens` tokens at most, in their order: what is computed at once, and
/// so what bounds memory. A longer sequence is alone. Nothing but lengths decides, so a batch is cut alike everywhere.
pub fn micro_batches(examples: &[Example], max_tokens: usize) -> Vec<Range<usize>> {
    let (mut cuts, mut start, mut tokens) = (Vec::new(), 0, 0usize);
    for (k, example) in examples.iter().enumerate() {
        if k > start && tokens + example.ids.len() > max_tokens {
            cuts.push(start..k);
            (start, tokens) = (k, 0);
        }
        tokens += example.ids.len();
    }
    if start < examples.len() {
        cuts.push(start..examples.len());
    }
    cuts
}

/// The batch size that OpenAI's fine-tuning takes for `n` examples: 0.2 % of them, from 1 to 256.
pub fn auto_batch_size(n: usize) -> usize {
    ((n as f64 * 0.002).round() as usize).clamp(1, 256)
}

/// The epochs that OpenAI's fine-tuning takes.
pub const AUTO_EPOCHS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn epochs_differ_and_come_again() {
        let mut b = Batches::new(10, 4, Some(7));
        let epoch = |b: &mut Batches| (0..b.per_epoch()).map(|_| b.next_batch()).collect::<Vec<_>>();
        let (first, second) = (epoch(&mut b), epoch(&mut b));
        assert_eq!(first.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        assert_ne!(first, second);
        for e in [&first, &second] {
            let mut all = e.concat();
            all.sort_unstable();
            assert_eq!(all, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(epoch(&mut Batches::new(10, 4, Some(7))), first);
        assert_ne!(epoch(&mut Batches::new(10, 4, Some(8))), first);
        assert_eq!(Batches::new(3, 2, None).next_batch(), [0, 1]);
    }

    #[test]
    fn sizes_follow_openais_rules() {
        let sizes = [(0, 1), (100, 1), (749, 1), (750, 2), (1000, 2), (50_000, 100), (127_900, 256), (10_000_000, 256)];
        sizes.into_iter().for_each(|(n, size)| assert_eq!(auto_batch_size(n), size, "{n}"));
    }

    proptest! {
        #[test]
        fn a_saved_position_goes_on_exactly(len in 1usize..40, size in 1usize..9, done in 0usize..60, seed: Option<u64>) {
            let mut b = Batches::new(len, size, seed);
            (0..done).for_each(|_| drop(b.next_batch()));
            let saved: Position = serde_json::from_str(&serde_json::to_string(&b.position()).unwrap()).unwrap();
            let mut resumed = Batches::new(len, size, seed);
            resumed.seek(saved);
            for _ in 0..20 {
                prop_assert_eq!(b.next_batch(), resumed.next_batch());
            }
        }

        #[test]
        fn micro_batches_keep_to_the_budget(lens in prop::collection::vec(1usize..50, 0..30), budget in 1usize..120) {
            let examples: Vec<Example> =
                lens.iter().map(|&n| Example { ids: vec![0; n], targets: vec![None; n] }).collect();
            let cuts = micro_batches(&examples, budget);
            prop_assert_eq!(cuts.iter().flat_map(|c| c.clone()).collect::<Vec<_>>(), (0..lens.len()).collect::<Vec<_>>());
            for (c, next) in cuts.iter().zip(cuts.iter().skip(1).map(Some).chain([None])) {
                let tokens: usize = lens[c.clone()].iter().sum();
                prop_assert!(c.len() == 1 || tokens <= budget);
                prop_assert!(next.is_none_or(|n| tokens + lens[n.start] > budget));
            }
        }
    }
}
