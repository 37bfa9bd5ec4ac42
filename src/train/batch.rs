//! What one forward and backward pass takes.

/// A sequence to learn from. Sequences never see each other, so that packing them costs nothing and needs no padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// The tokens, one row each.
    pub ids: Vec<u32>,
    /// For each row the token that should follow, where the loss falls on it: Hugging Face's `labels` moved one to the
    /// left. As long as `ids`; the last is `None` unless what follows the cut is known.
    pub targets: Vec<Option<u32>>,
}

impl Example {
    /// From tokens and Hugging Face's `labels` (as long as `ids`, `None` where it says -100).
    pub fn from_labels(ids: Vec<u32>, labels: &[Option<u32>]) -> Example {
        let targets = labels.iter().skip(1).copied().chain([None]).take(ids.len()).collect();
        Example { ids, targets }
    }

    /// Number of tokens that the loss falls on.
    pub fn counted(&self) -> usize {
        self.targets.iter().flatten().count()
    }
}

/// The loss of some rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Cross-entropy in nats, summed over the counted tokens.
    pub sum: f64,
    /// Counted tokens.
    pub tokens: usize,
}

impl Loss {
    /// Mean over the counted tokens; 0 of none.
    pub fn mean(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.sum / self.tokens as f64 }
    }
}

impl std::ops::AddAssign for Loss {
    fn add_assign(&mut self, other: Loss) {
        self.sum += other.sum;
        self.tokens += other.tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_to_the_row_that_predicts_them() {
        let e = Example::from_labels(vec![5, 6, 7], &[None, Some(6), Some(7)]);
        assert_eq!((e.targets.as_slice(), e.counted()), ([Some(6), Some(7), None].as_slice(), 2));
    }
}
