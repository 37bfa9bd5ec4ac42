//! The numbers that training changes, in f32 and in a fixed order.

use rushlight_quant::buffer::Aligned;
use std::ops::{Deref, DerefMut};

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
    /// Whether a step leaves it alone in which nothing met it, as PyTorch's optimizers do: an expert that no token chose.
    pub idles: bool,
}

/// All trained tensors.
#[derive(Clone, Debug, Default)]
pub struct Params {
    /// In the order in which they were made: gradients and the optimizer's states lie in the same.
    pub list: Vec<Param>,
}

/// A gradient for each of [`Params::list`], of the same length, and whether something has been added to it.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    list: Vec<Aligned<f32>>,
    met: Vec<bool>,
}

impl Gradients {
    /// Zeros again.
    pub fn clear(&mut self) {
        self.list.iter_mut().for_each(|g| g.fill(0.0));
        self.met.fill(false);
    }

    /// The gradient of parameter `param`, to be added to.
    pub fn meet(&mut self, param: usize) -> &mut [f32] {
        self.met[param] = true;
        &mut self.list[param]
    }

    /// Whether something has been added to that of parameter `param`.
    pub fn met(&self, param: usize) -> bool {
        self.met[param]
    }
}

impl FromIterator<Aligned<f32>> for Gradients {
    fn from_iter<I: IntoIterator<Item = Aligned<f32>>>(list: I) -> Gradients {
        let list: Vec<_> = list.into_iter().collect();
        Gradients { met: vec![false; list.len()], list }
    }
}

impl Deref for Gradients {
    type Target = [Aligned<f32>];

    fn deref(&self) -> &[Aligned<f32>] {
        &self.list
    }
}

impl DerefMut for Gradients {
    fn deref_mut(&mut self) -> &mut [Aligned<f32>] {
        &mut self.list
    }
}

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
