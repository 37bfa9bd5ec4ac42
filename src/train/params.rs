//! The numbers that training changes, in f32 and in a fixed order.

use rushlight_quant::buffer::Aligned;

/// One trained tensor.
#[derive(Clone, Debug)]
pub struct Param {
    /// A name that no other has: it identifies the tensor in checkpoints of a run.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Its values, row by row.
    pub values: Aligned<f32>,
    /// What the learning rate is multiplied by for this tensor (LoRA+ has B learn faster; Hayou et al. 2024).
    pub rate: f32,
    /// Whether weight decay applies.
    pub decay: bool,
}

/// All trained tensors.
#[derive(Clone, Debug, Default)]
pub struct Params {
    /// In the order in which they were made: gradients and the optimizer's states lie in the same.
    pub list: Vec<Param>,
}

/// A gradient for each of [`Params::list`], of the same length.
pub type Gradients = Vec<Aligned<f32>>;

impl Params {
    /// Zeros in the shape of the parameters.
    pub fn gradients(&self) -> Gradients {
        self.list.iter().map(|p| Aligned::zeroed(p.values.len())).collect()
    }

    /// Number of trained values.
    pub fn count(&self) -> usize {
        self.list.iter().map(|p| p.values.len()).sum()
    }
}
