//! Where in a model the parameters are.

use super::lora::Lora;
use rushlight_models::model::{Linear, Table, Vector};

/// What is trained of one linear layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinearSite {
    /// The parameter that takes the weight's place.
    pub weight: Option<usize>,
    /// The parameter that takes the bias's place.
    pub bias: Option<usize>,
    /// The adapter.
    pub lora: Option<Lora>,
}

impl LinearSite {
    /// Whether anything is.
    pub fn learns(&self) -> bool {
        self.weight.is_some() || self.bias.is_some() || self.lora.is_some()
    }
}

/// A trained prefix.
#[derive(Clone, Debug)]
pub struct PrefixSite {
    /// Positions.
    pub len: usize,
    /// For each layer the parameters of keys, `[len, kv_width]`, and values.
    pub layers: Vec<(usize, usize)>,
}

/// For every weight of a model by its number: which parameter it is.
#[derive(Clone, Debug, Default)]
pub struct Sites {
    pub(super) linears: Vec<LinearSite>,
    pub(super) vectors: Vec<Option<usize>>,
    pub(super) tables: Vec<Option<usize>>,
    /// Layers in which something is trained.
    pub(super) layers: Vec<bool>,
    /// The trained prefix.
    pub prefix: Option<PrefixSite>,
    /// What dropout leaves out of an adapter's input.
    pub dropout: f32,
    /// NEFTune's alpha.
    pub neftune: Option<f32>,
    /// The head's weight, where its rows are to keep the length 1.
    pub(super) unit_rows: Option<usize>,
}

impl Sites {
    /// None, of a model of so many tensors and layers.
    pub fn new(tensors: usize, layers: usize) -> Sites {
        Sites {
            linears: vec![LinearSite::default(); tensors],
            vectors: vec![None; tensors],
            tables: vec![None; tensors],
            layers: vec![false; layers],
            ..Sites::default()
        }
    }

    /// What is trained of `linear`.
    pub fn linear(&self, linear: &Linear) -> LinearSite {
        self.linears.get(linear.id).copied().unwrap_or_default()
    }

    /// The parameter that takes the place of `vector`.
    pub fn vector(&self, vector: &Vector) -> Option<usize> {
        self.vectors.get(vector.id).copied().flatten()
    }

    /// The parameter that takes the place of `table`.
    pub fn table(&self, table: &Table) -> Option<usize> {
        self.tables.get(table.id).copied().flatten()
    }

    /// Whether anything is trained in layer `i`.
    pub fn layer_learns(&self, i: usize) -> bool {
        self.prefix.is_some() || self.layers[i]
    }
}
