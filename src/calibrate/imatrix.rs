//! The importance of columns: how large the inputs of each linear layer are, as llama.cpp's imatrix tells it.

use super::capture::{Capture, Observer};
use crate::engine::cpu::{Activations, CpuBackend};
use anyhow::{Result, bail};
use rushlight_models::backend::{Batch, Sequence};
use rushlight_models::decoder;
use rushlight_models::families::{Naming, Role};
use rushlight_models::model::{Linear, Model};
use rushlight_quant::{Cpu, Phase};
use std::ops::ControlFlow;

/// What went into one linear layer, or into several that share their input.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Ids of the [`Linear`]s.
    pub ids: Vec<usize>,
    /// For each column the sum of the squares.
    pub sums: Vec<f64>,
    /// Rows added up.
    pub rows: u64,
}

/// Adds up the squares of what goes into each linear layer.
#[derive(Default)]
pub struct Squares {
    inputs: Vec<Inputs>,
    /// Where among `inputs` the linear layer of an id is.
    places: std::collections::HashMap<usize, usize>,
}

impl Squares {
    /// What was seen of the layer `id`.
    pub fn of(&self, id: usize) -> Option<&Inputs> {
        self.places.get(&id).map(|&i| &self.inputs[i])
    }
}

impl Observer for Squares {
    fn input(&mut self, _: &Cpu, x: &Activations, layers: &[&Linear]) -> ControlFlow<()> {
        let cols = x.len() / x.rows().max(1);
        let place = *self.places.entry(layers[0].id).or_insert_with(|| {
            let ids = layers.iter().map(|l| l.id).collect();
            self.inputs.push(Inputs { ids, sums: vec![0.0; cols], rows: 0 });
            self.inputs.len() - 1
        });
        for layer in layers {
            self.places.insert(layer.id, place);
        }
        let inputs = &mut self.inputs[place];
        for row in x.chunks_exact(cols) {
            for (sum, &x) in inputs.sums.iter_mut().zip(row) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        inputs.rows += x.rows() as u64;
        ControlFlow::Continue(())
    }
}

/// Runs `sequences` through `model`, each from an empty cache in the first slot, and through its `head` where that is
/// asked for. `progress` hears how many are done.
pub fn collect(
    model: &Model,
    backend: &mut CpuBackend,
    sequences: &[Vec<u32>],
    head: bool,
    progress: &mut dyn FnMut(usize),
) -> Result<Squares> {
    let mut squares = Squares::default();
    for (i, ids) in sequences.iter().enumerate() {
        let sequence = [Sequence { slot: 0, start: 0, len: ids.len(), outline: model.outline(ids) }];
        let batch = Batch { ids, sequences: &sequence, phase: Phase::Prompt };
        let mut capture = Capture::new(&mut *backend, &mut squares);
        let hidden = capture.run(|b| decoder::hidden(model, b, &batch))?;
        if let (true, Some(hidden)) = (head, hidden) {
            capture.run(|b| decoder::logits(model, b, &hidden))?;
        }
        progress(i + 1);
    }
    if let Some(bad) = squares.inputs.iter().find(|i| i.sums.iter().any(|s| !s.is_finite())) {
        let name = model.linears().find(|l| l.id == bad.ids[0]).and_then(|l| gguf_name(model, l));
        bail!("what goes into {} is not a number: the model's weights are damaged", name.unwrap_or("a layer".into()));
    }
    Ok(squares)
}

/// The name of the weight of `linear` in GGUF files; `None` where the family has no such form. A tied head goes under
/// the embedding's name, as the one tensor that it is.
pub fn gguf_name(model: &Model, linear: &Linear) -> Option<String> {
    let role = match linear.role {
        Role::Head if model.spec.tied_head => Role::Embedding,
        role => role,
    };
    Some(format!("{}.weight", model.family.name(Naming::Gguf, role, linear.layer)?))
}
