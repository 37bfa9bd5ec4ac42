//! Adapters folded into weights: what a stored tensor becomes when the adapters in force are made part of it.

use crate::checkpoint::TensorInfo;
use crate::convert::{Converted, Source, role_of};
use crate::families::{Naming, Role};
use crate::model::{Linear, LowRank, Model, Weight};
use crate::packing;
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// What the adapters in force on a [`Model`] change in the tensors of a file.
pub struct Folding<'a> {
    model: &'a Model,
    linears: HashMap<(Role, usize), &'a Linear>,
}

/// What is to be done with the rows of one stored tensor.
#[derive(Clone, Debug)]
pub struct Fold {
    parts: Vec<Part>,
    /// For each stored row (where the tensor is transposed, each of its columns): the part, and the row in it.
    places: Vec<(u32, u32)>,
    /// The tensor is stored as `[inputs, outputs]`.
    transposed: bool,
}

/// A matrix of the model that a stored tensor holds, alone or with others.
#[derive(Clone, Debug)]
struct Part {
    /// Which one it is.
    key: (Role, usize),
    /// Used instead of what is stored.
    replacement: Option<Weight>,
    adapters: Vec<LowRank>,
}

impl<'a> Folding<'a> {
    /// What the adapters of `model` change.
    ///
    /// # Errors
    /// When an adapter is a prefix, which is no change of weights.
    pub fn new(model: &'a Model) -> Result<Folding<'a>> {
        if model.prefix.as_ref().is_some_and(|prefix| prefix.counted) {
            return Err(Error::model(
                "a prefix stands before the text and cannot be merged into weights: give it with --adapter where the \
                 model is used",
            ));
        }
        let linears = model.linears().map(|l| ((l.role, l.layer), l)).collect();
        Ok(Folding { model, linears })
    }

    /// Whether the head, which was the embedding, has become another matrix than the embedding.
    pub fn unties(&self) -> bool {
        let (head, table) = (&self.model.head, &self.model.embedding);
        let same = match (&head.replacement, &table.replacement) {
            (None, None) => true,
            (Some(a), Some(b)) => a.format() == b.format() && a.data()[..] == b.data()[..],
            _ => false,
        };
        self.model.spec.tied_head && !(same && head.adapters.is_empty())
    }

    /// What becomes of a tensor of a GGUF file; `None` where it stays.
    ///
    /// # Errors
    /// When the change cannot be made in this tensor.
    pub fn converted(&self, tensor: &Converted) -> Result<Option<Fold>> {
        let Some((role, layer)) = tensor.role.filter(|_| tensor.name.ends_with(".weight")) else { return Ok(None) };
        let order = match &tensor.source {
            Source::Tensor { rows, .. } | Source::Parts { rows, .. } => rows.as_deref(),
            Source::Data(_) => None,
        };
        self.fold(&tensor.info(), Naming::Gguf, role, layer, order)
    }

    /// What becomes of a tensor of the Hugging Face directory that the model was read from; `None` where it stays.
    ///
    /// # Errors
    /// When the change cannot be made in this tensor.
    pub fn stored(&self, tensor: &TensorInfo) -> Result<Option<Fold>> {
        match role_of(self.model.family, &tensor.name) {
            Some((role, layer, "weight" | "")) => self.fold(tensor, Naming::HuggingFace, role, layer, None),
            _ => Ok(None),
        }
    }

    /// The role of a directory's tensor.
    pub fn role(&self, tensor: &TensorInfo) -> Option<Role> {
        role_of(self.model.family, &tensor.name).map(|(role, ..)| role)
    }

    /// Fails where an adapter changes a matrix that is in none of `folds`.
    pub fn check_complete<'f>(&self, folds: impl Iterator<Item = &'f Fold>) -> Result<()> {
        if let Some(linear) = self.model.linears().find(|l| l.own_bias.is_some()) {
            return Err(Error::model(format!(
                "an adapter brings its own bias for {:?} of layer {}, which cannot be merged: use it with --adapter",
                linear.role, linear.layer
            )));
        }
        let done: HashSet<(Role, usize)> = folds.flat_map(|f| f.parts.iter().map(|p| p.key)).collect();
        let embedding = self.model.embedding.replacement.is_some().then_some((Role::Embedding, 0));
        // A tied head that stays tied is the embedding.
        let tied = |l: &Linear| l.role == Role::Head && self.model.spec.tied_head && !self.unties();
        let changed = self.model.linears().filter(|l| !l.adapters.is_empty() || l.replacement.is_some());
        let mut changed = changed.filter(|l| !tied(l)).map(|l| (l.role, l.layer)).chain(embedding);
        match changed.find(|key| !done.contains(key)) {
            None => Ok(()),
            Some((role, layer)) => Err(Error::model(format!(
                "an adapter changes {role:?} of layer {layer}, which no tensor of the merged model holds"
            ))),
        }
    }

    fn fold(
        &self,
        tensor: &TensorInfo,
        naming: Naming,
        role: Role,
        layer: usize,
        order: Option<&[u32]>,
    ) -> Result<Option<Fold>> {
        let family = self.model.family;
        let stacked = family.stacked(naming, role);
        let transposed = family.is_transposed(naming, role);
        let roles: Vec<Role> = match self.model.spec.layers.get(layer).and_then(|l| l.experts.as_ref()) {
            Some(experts) if stacked => (0..experts.count).map(|i| role.of_expert(i)).collect(),
            _ => vec![role],
        };
        let (mut parts, mut places) = (Vec::new(), Vec::new());
        for role in roles {
            self.parts(naming, role, layer, &mut parts, &mut places);
        }
        if parts.iter().all(|p| p.replacement.is_none() && p.adapters.is_empty()) {
            return Ok(None);
        }
        let cannot = |why: &str| Error::model(format!("an adapter cannot be merged into {}: {why}", tensor.name));
        if transposed && stacked {
            return Err(cannot("it holds all experts the other way round"));
        }
        if role == Role::Head && self.model.spec.normed_head && naming == Naming::HuggingFace {
            return Err(cannot("the family normalises it when it is loaded; write a GGUF file instead"));
        }
        let rows = match &tensor.shape[..] {
            [rest @ .., cols] if transposed => (rest.len() == 1).then_some(*cols),
            [rest @ .., _] => Some(rest.iter().product()),
            [] => None,
        };
        if rows != Some(places.len()) {
            return Err(cannot(&format!("it is {:?} but should have {} rows", tensor.shape, places.len())));
        }
        if let Some(order) = order {
            places = order.iter().map(|&row| places[row as usize]).collect();
        }
        Ok(Some(Fold { parts, places, transposed }))
    }

    /// Adds what the stored matrix `role` consists of. In GGUF files packed matrices are always stacked.
    fn parts(&self, naming: Naming, role: Role, layer: usize, parts: &mut Vec<Part>, places: &mut Vec<(u32, u32)>) {
        let mut add = |key: (Role, usize), replacement: &Option<Weight>, adapters: &[LowRank]| {
            parts.push(Part { key, replacement: replacement.clone(), adapters: adapters.to_vec() });
            parts.len() as u32 - 1
        };
        let key = (role, layer);
        let table = &self.model.embedding;
        let whole = |part: u32, rows: usize| (0..rows as u32).map(move |row| (part, row));
        if let Some(linear) = self.linears.get(&key) {
            let part = add(key, &linear.replacement, &linear.adapters);
            places.extend(whole(part, linear.weight.rows()));
        } else if role == Role::Embedding {
            let part = add(key, &table.replacement, &[]);
            places.extend(whole(part, table.weight.rows()));
        } else {
            let packed = packing::parts(role, self.model.family.packing(naming, role), &self.model.spec, layer);
            let first = places.len();
            places.resize(first + packed.iter().map(|(_, rows)| rows.len()).sum::<usize>(), (0, 0));
            for (role, rows) in packed {
                let key = (role, layer);
                let part = match self.linears.get(&key) {
                    Some(linear) => add(key, &linear.replacement, &linear.adapters),
                    None => add(key, &None, &[]),
                };
                for row in 0..rows.len() {
                    let at = match &rows {
                        packing::Rows::Range(range) => range.start + row,
                        packing::Rows::Order(order) => order[row],
                    };
                    places[first + at] = (part, row as u32);
                }
            }
        }
    }
}

impl Fold {
    /// Changes the stored rows `rows`, whose weights are `weights`.
    pub fn apply(&self, rows: Range<usize>, weights: &mut [f32]) {
        if rows.is_empty() {
            return;
        }
        let cols = weights.len() / rows.len();
        for (i, part) in self.parts.iter().enumerate().filter(|(_, p)| p.changes()) {
            if self.transposed {
                self.apply_transposed(i as u32, part, rows.clone(), cols, weights);
                continue;
            }
            let mine = rows.clone().filter(|&row| self.places[row].0 == i as u32);
            let mut a = None;
            let (mut base, mut change, mut low) = (vec![0.0; cols], vec![0.0; cols], Vec::new());
            for row in mine {
                let a = a.get_or_insert_with(|| part.adapters.iter().map(|x| decoded(&x.a)).collect::<Vec<_>>());
                let row_weights = &mut weights[(row - rows.start) * cols..][..cols];
                let output = self.places[row].1 as usize;
                if let Some(replacement) = &part.replacement {
                    replacement.decode_row(output, row_weights);
                }
                base.copy_from_slice(row_weights);
                for (adapter, a) in part.adapters.iter().zip(a) {
                    low.resize(adapter.a.rows(), 0.0);
                    adapter.b.decode_row(output, &mut low);
                    change.fill(0.0);
                    for (a, b) in a.chunks_exact(cols).zip(&low) {
                        change.iter_mut().zip(a).for_each(|(c, a)| *c += b * a);
                    }
                    for ((w, base), change) in row_weights.iter_mut().zip(&base).zip(&change) {
                        *w += step(adapter, output, *base, *change);
                    }
                }
            }
        }
    }

    /// The same where rows are inputs and columns are outputs.
    fn apply_transposed(&self, i: u32, part: &Part, rows: Range<usize>, cols: usize, weights: &mut [f32]) {
        let mine = || self.places.iter().enumerate().filter(|(_, place)| place.0 == i).map(|(c, p)| (c, p.1 as usize));
        if let Some(replacement) = &part.replacement {
            // Whole matrices come as floats, so that a few columns can be had.
            let size = replacement.format().block_bytes();
            let mut values = vec![0.0; rows.len()];
            for (col, output) in mine() {
                replacement.format().decode(&replacement.row(output)[rows.start * size..rows.end * size], &mut values);
                values.iter().enumerate().for_each(|(row, &w)| weights[row * cols + col] = w);
            }
        }
        let base = weights.to_vec();
        for adapter in &part.adapters {
            let (a, b) = (decoded(&adapter.a), decoded(&adapter.b));
            let (rank, inputs) = (adapter.a.rows(), adapter.a.cols());
            for row in rows.clone() {
                let start = (row - rows.start) * cols;
                for (col, output) in mine() {
                    let b = &b[output * rank..][..rank];
                    let change = b.iter().enumerate().fold(0.0, |sum, (k, b)| sum + b * a[k * inputs + row]);
                    weights[start + col] += step(adapter, output, base[start + col], change);
                }
            }
        }
    }
}

impl Part {
    fn changes(&self) -> bool {
        self.replacement.is_some() || !self.adapters.is_empty()
    }
}

/// What an adapter adds to a weight that was `base`, where its two matrices give `change`.
fn step(adapter: &LowRank, output: usize, base: f32, change: f32) -> f32 {
    match &adapter.gain {
        None => adapter.strength * adapter.scale * change,
        Some(gain) => adapter.strength * (gain[output] * (base + adapter.scale * change) - base),
    }
}

fn decoded(weight: &Weight) -> Vec<f32> {
    let mut values = vec![0.0; weight.rows() * weight.cols()];
    weight.format().decode(weight.data(), &mut values);
    values
}
