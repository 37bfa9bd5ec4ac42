//! What training minimises.

use crate::cpu::Cpu;
use crate::threads::Disjoint;

impl Cpu {
    /// The sum over the rows of `-ln softmax(logits)[target]`. `logits` (`[targets.len(), vocabulary]`) become its
    /// gradient: `softmax(logits) - one at the target`. A row without a target counts nothing and its gradient is zero.
    ///
    /// # Panics
    /// When the logits are not that many whole rows, or a target is outside of the vocabulary.
    pub fn cross_entropy(&self, logits: &mut [f32], targets: &[Option<u32>]) -> f64 {
        if targets.is_empty() {
            return 0.0;
        }
        assert!(logits.len().is_multiple_of(targets.len()), "logits are not a row for each target");
        let vocabulary = logits.len() / targets.len();
        let lanes = &self.kernels.lanes;
        let mut losses = vec![0f64; targets.len()];
        let (rows, shared) = (Disjoint::new(logits), Disjoint::new(&mut losses));
        self.team.run(targets.len(), &|r| {
            // SAFETY: a row belongs to one task.
            let (row, loss) = unsafe { (rows.slice(r * vocabulary..(r + 1) * vocabulary), shared.slice(r..r + 1)) };
            let Some(target) = targets[r].map(|t| t as usize) else {
                row.fill(0.0);
                return;
            };
            let (most, at) = ((lanes.max)(row), row[target]);
            let total = (lanes.exp_sum)(most, row);
            loss[0] = f64::from(total).ln() + f64::from(most) - f64::from(at);
            (lanes.scale)(1.0 / total, row);
            row[target] -= 1.0;
        });
        losses.iter().sum()
    }
}
