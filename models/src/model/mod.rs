//! A model in memory: a [`ModelSpec`] and the tensors it calls for, found, checked and left where the file has them.

mod find;
mod weight;

pub use weight::Weight;

use crate::checkpoint::Checkpoint;
use crate::families::{self, Family, Naming, Role};
use crate::packing::packed_in;
use crate::rope::Rotary;
use crate::spec::{ModelSpec, Outline};
use crate::{Error, Result};
use find::Finder;

/// A linear layer: what the file holds, and what is attached to it.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Number of the weight among the model's tensors, by which a backend may keep things of its own.
    pub id: usize,
    /// What it is in the model.
    pub role: Role,
    /// The layer it belongs to; 0 for the head.
    pub layer: usize,
    /// The frozen weight.
    pub weight: Weight,
    /// Added to each output.
    pub bias: Option<Vector>,
    /// Adapters in force: their contributions add up.
    pub adapters: Vec<LowRank>,
    /// Used instead of `weight`, where an adapter brings the whole matrix.
    pub replacement: Option<Weight>,
    /// The file's bias, where an adapter has put its own into `bias`.
    pub own_bias: Option<Vector>,
}

impl Linear {
    /// The layer's output for the rows of `x`, in plain arithmetic: for what is computed once.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        let (mut y, mut w) = (Vec::new(), vec![0.0; cols]);
        y.resize(x.len() / cols * rows, 0.0);
        for o in 0..rows {
            self.weight.decode_row(o, &mut w);
            let bias = self.bias.as_ref().map_or(0.0, |b| f64::from(b.values[o]));
            for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(rows)) {
                y[o] = (w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() + bias) as f32;
            }
        }
        y
    }

    /// The weight in force.
    pub fn weight(&self) -> &Weight {
        self.replacement.as_ref().unwrap_or(&self.weight)
    }
}

/// A low-rank adapter on one linear layer: `scale * b(a(x))` is added to its output.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[rank, inputs]`.
    pub a: Weight,
    /// `[outputs, rank]`.
    pub b: Weight,
    /// alpha over rank (or its root), as trained.
    pub scale: f32,
    /// How much of the adapter's change is wanted: 1 as trained.
    pub strength: f32,
    /// DoRA: for each output, the trained magnitude over the norm of `weight + scale * b * a`. The layer then gives
    /// `gain * (weight x + scale * b(a(x)))`.
    pub gain: Option<Vec<f32>>,
}

/// A vector of parameters, in f32.
#[derive(Clone, Debug)]
pub struct Vector {
    /// Number among the model's tensors.
    pub id: usize,
    /// The values.
    pub values: Vec<f32>,
}

/// A norm's parameters: those that its kind has.
#[derive(Clone, Debug, Default)]
pub struct NormWeights {
    /// Multiplied.
    pub weight: Option<Vector>,
    /// Added.
    pub bias: Option<Vector>,
}

/// Trained keys and values that stand before every sequence (prefix-tuning).
#[derive(Clone, Debug)]
pub struct Prefix {
    /// How many places they take.
    pub len: usize,
    /// Whether positions count them, so that a sequence's first token stands at position `len`.
    pub counted: bool,
    /// For each layer the keys and the values, `[len, kv_heads * head_dim]` each. The keys are not rotated.
    pub layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Prefix {
    /// A prefix from `values`, `[len, layers * 2 * kv_width]`, keys before values in each layer. The columns of keys take
    /// the order `order`.
    pub fn new(len: usize, counted: bool, spec: &ModelSpec, values: &[f32], order: Option<&[usize]>) -> Prefix {
        let (layers, width) = (spec.layers.len(), spec.kv_width());
        let at = |slot: usize| (0..len).map(move |token| (token * 2 * layers + slot) * width);
        let layer = |i: usize| {
            let key = |c: usize| order.map_or(c, |order| order[c]);
            let keys = at(2 * i).flat_map(|row| (0..width).map(move |c| values[row + key(c)])).collect();
            let rest = at(2 * i + 1).flat_map(|row| values[row..][..width].iter().copied()).collect();
            (keys, rest)
        };
        Prefix { len, counted, layers: (0..layers).map(layer).collect() }
    }
}

/// The embedding of tokens.
#[derive(Clone, Debug)]
pub struct Table {
    /// Number among the model's tensors.
    pub id: usize,
    /// `[vocabulary, hidden]`.
    pub weight: Weight,
    /// Used instead of `weight`, where an adapter brings the whole table.
    pub replacement: Option<Weight>,
}

impl Table {
    /// The table in force.
    pub fn weight(&self) -> &Weight {
        self.replacement.as_ref().unwrap_or(&self.weight)
    }
}

/// The weights of an MLP.
#[derive(Clone, Debug)]
pub struct MlpWeights {
    /// The gate, where there is one.
    pub gate: Option<Linear>,
    /// Up.
    pub up: Linear,
    /// Down.
    pub down: Linear,
}

impl MlpWeights {
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down])
    }
}

/// The weights of a mixture of experts.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// From the stream to a score for each expert.
    pub router: Linear,
    /// Added to the scores for the choice.
    pub choice_bias: Option<Vector>,
    /// From the stream to the number whose sigmoid the shared MLP's output is multiplied by.
    pub shared_gate: Option<Linear>,
    /// The experts.
    pub experts: Vec<MlpWeights>,
}

/// What attention over latent vectors has beside its other weights: there `q` makes queries of the stream or of their
/// latent vector, `k` the rotated part of all heads' keys, and `v` the latent vector of keys and values.
#[derive(Clone, Debug)]
pub struct LatentWeights {
    /// To the latent vector of queries, and its norm.
    pub query: Option<(Linear, NormWeights)>,
    /// The norm of the latent vector of keys and values.
    pub norm: NormWeights,
    /// To the keys and values of all heads.
    pub up: Linear,
}

/// The weights of one layer.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub struct Layer {
    pub attention_norm: Option<NormWeights>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub latent: Option<LatentWeights>,
    pub sinks: Option<Vector>,
    pub q_norm: Option<NormWeights>,
    pub k_norm: Option<NormWeights>,
    pub attention_post_norm: Option<NormWeights>,
    pub mlp_norm: Option<NormWeights>,
    /// The MLP, or the one that all tokens share beside the experts.
    pub mlp: Option<MlpWeights>,
    pub experts: Option<ExpertWeights>,
    pub mlp_post_norm: Option<NormWeights>,
}

/// A model ready for the decoder.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its shape and switches.
    pub spec: ModelSpec,
    /// The family that reads and names it.
    pub family: &'static Family,
    /// The names its checkpoint uses.
    pub naming: Naming,
    /// The rotary embeddings of `spec.ropes`, ready for use.
    pub rotaries: Vec<Rotary>,
    /// Token embeddings.
    pub embedding: Table,
    /// Learned positions.
    pub positions: Option<Table>,
    /// The norm of the embeddings.
    pub embedding_norm: Option<NormWeights>,
    /// The layers.
    pub layers: Vec<Layer>,
    /// The norm before the head.
    pub final_norm: NormWeights,
    /// From hidden states to logits.
    pub head: Linear,
    /// What an adapter, or else the checkpoint, puts before every sequence.
    pub prefix: Option<Prefix>,
    /// The checkpoint's own.
    pub own_prefix: Option<Prefix>,
    /// Number of tensors: ids of weights and vectors are below it.
    pub tensors: usize,
}

impl Model {
    /// Recognises the family of `checkpoint`, reads its spec and finds every tensor. Weights stay in the file.
    pub fn load(checkpoint: &Checkpoint) -> Result<Model> {
        let (family, spec) = families::recognise(checkpoint)?;
        Model::from_spec(checkpoint, family, spec)
    }

    /// The model of `spec` with the tensors of `checkpoint`, found under the names of `family`.
    pub fn from_spec(checkpoint: &Checkpoint, family: &'static Family, spec: ModelSpec) -> Result<Model> {
        let naming = Naming::of(checkpoint);
        let file = |what: String| Error::file(checkpoint.path(), what);
        spec.check().map_err(file)?;
        if spec.layers.len() > checkpoint.tensors().len() {
            return Err(file(format!(
                "it claims {} layers but holds {} tensors: it is incomplete or its configuration belongs to another model",
                spec.layers.len(),
                checkpoint.tensors().len()
            )));
        }
        let mut finder = Finder::new(checkpoint, family, naming);
        let (tied, layers) = (spec.tied_head, spec.layers.len());
        let spare = layers..layers.saturating_add(spec.spare_layers.min(layers));
        let model = finder.model(spec);
        finder.verdict(tied, spare)?;
        // `verdict` has returned the reasons where a tensor was not found.
        let mut model = model.ok_or_else(|| file("tensors are missing".into()))?;
        model.tensors = finder.ids;
        Ok(model)
    }

    /// The matrix that holds that of `role` in files of `naming`, where that may be several in one: its role and name.
    pub fn module(&self, naming: Naming, role: Role, layer: usize) -> Option<(Role, String)> {
        let unnamed = self.family.name(naming, role, layer).is_none();
        let packed = packed_in(role, &self.spec).filter(|&p| unnamed || self.family.names_itself(naming, p));
        let whole = packed.unwrap_or(role);
        // The first name for queries is that of the second of two matrices, which not all models have.
        let plain = whole == Role::Q && self.spec.latent.as_ref().is_some_and(|l| l.query.is_none());
        let mut names = self.family.names_of(naming, whole, layer);
        let name = if plain { names.last() } else { names.next() };
        Some((whole, name?))
    }

    /// Every linear layer, the head last.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let layers = self.layers.iter().flat_map(|l| {
            let latent = l.latent.iter().flat_map(|l| l.query.iter().map(|(q, _)| q).chain([&l.up]));
            let experts = l.experts.iter().flat_map(|e| {
                [&e.router].into_iter().chain(&e.shared_gate).chain(e.experts.iter().flat_map(MlpWeights::linears))
            });
            let mlp = l.mlp.iter().flat_map(MlpWeights::linears);
            [&l.q, &l.k, &l.v, &l.o].into_iter().chain(latent).chain(mlp).chain(experts)
        });
        layers.chain([&self.head])
    }

    /// Every linear layer, the head last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let layers = self.layers.iter_mut().flat_map(|l| {
            let latent = l.latent.iter_mut().flat_map(|l| l.query.iter_mut().map(|(q, _)| q).chain([&mut l.up]));
            let experts = l.experts.iter_mut().flat_map(|e| {
                let each = e.experts.iter_mut().flat_map(MlpWeights::linears_mut);
                [&mut e.router].into_iter().chain(&mut e.shared_gate).chain(each)
            });
            let mlp = l.mlp.iter_mut().flat_map(MlpWeights::linears_mut);
            [&mut l.q, &mut l.k, &mut l.v, &mut l.o].into_iter().chain(latent).chain(mlp).chain(experts)
        });
        layers.chain([&mut self.head])
    }

    /// Every vector of parameters but the biases of linear layers: norms and sinks.
    pub fn vectors_mut(&mut self) -> impl Iterator<Item = &mut Vector> {
        fn both(norm: &mut NormWeights) -> impl Iterator<Item = &mut Vector> {
            norm.weight.iter_mut().chain(&mut norm.bias)
        }
        let layers = self.layers.iter_mut().flat_map(|l| {
            let latent = l.latent.iter_mut().flat_map(|l| l.query.iter_mut().map(|(_, n)| n).chain([&mut l.norm]));
            let own = [&mut l.attention_norm, &mut l.q_norm, &mut l.k_norm, &mut l.attention_post_norm];
            let rest = [&mut l.mlp_norm, &mut l.mlp_post_norm];
            own.into_iter().chain(rest).flatten().chain(latent).flat_map(both).chain(&mut l.sinks)
        });
        self.embedding_norm.iter_mut().flat_map(both).chain(layers).chain(both(&mut self.final_norm))
    }

    /// What the rows of the sequence `ids` need to know of the whole of it.
    pub fn outline(&self, ids: &[u32]) -> Outline {
        let before = self.prefix.as_ref().map_or(0, |p| if p.counted { 0 } else { p.len });
        Outline { before, ..self.spec.outline(ids) }
    }

    /// Whether every matrix is stored in floating point.
    pub fn is_float(&self) -> bool {
        self.embedding.weight.format().is_float() && self.linears().all(|l| l.weight.format().is_float())
    }
}
