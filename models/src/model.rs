//! A model in memory: a [`ModelSpec`] and the tensors it calls for, found, checked and left where the file has them.

use crate::checkpoint::{Bytes, Checkpoint, TensorInfo};
use crate::families::{self, Family, Naming, Role};
use crate::packing::{Rows, packed_in, parts};
use crate::rope::Rotary;
use crate::spec::{
    Branches, Experts, Latent, Mlp, ModelSpec, Norm, NormKind, Outline, Placement, PrefixSpec, QkNorm, RopeScaling,
};
use crate::{Error, Result};
use rushlight_quant::Matrix;
use rushlight_quant::formats::Format;
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// A matrix as its file stores it, usually in place.
#[derive(Clone, Debug)]
pub struct Weight {
    format: Format,
    rows: usize,
    cols: usize,
    data: Bytes,
    order: Option<Arc<[u32]>>,
    fine: bool,
}

impl Weight {
    /// `rows` packed rows of `cols` weights; `None` where `data` is not exactly that.
    pub fn new(format: Format, rows: usize, cols: usize, data: Bytes) -> Option<Weight> {
        let weight = Weight { format, rows, cols, data, order: None, fine: false };
        (rows.checked_mul(format.row_bytes(cols)?)? == weight.data.len()).then_some(weight)
    }

    /// A matrix of f32 values.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Option<Weight> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Weight::new(Format::F32, rows, cols, Bytes::new(bytes))
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The packed rows, one after another.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Row `row` as stored.
    pub fn row(&self, row: usize) -> &[u8] {
        let bytes = self.data.len() / self.rows;
        &self.data[row * bytes..][..bytes]
    }

    /// The same matrix, whose columns are stored in the order `order`: column `i` of a row is input `order[i]`. `None`
    /// where that is no order of its columns.
    pub fn with_order(self, order: Arc<[u32]>) -> Option<Weight> {
        let mut seen = vec![false; self.cols];
        let all = order.iter().all(|&i| seen.get_mut(i as usize).is_some_and(|seen| !std::mem::replace(seen, true)));
        (all && order.len() == self.cols).then_some(Weight { order: Some(order), ..self })
    }

    /// The order in which columns are stored, where it is not their own (see [`Weight::with_order`]). Whoever multiplies
    /// by [`Weight::matrix`] gathers the inputs in this order first.
    pub fn order(&self) -> Option<&Arc<[u32]>> {
        self.order.as_ref()
    }

    /// The same matrix; whether generated tokens meet it with activations of 16 bits
    /// ([`Matrix::with_fine_activations`]).
    pub fn with_fine_activations(self, fine: bool) -> Weight {
        Weight { fine, ..self }
    }

    /// Decodes row `row`, its columns in their own order.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        match &self.order {
            None => self.format.decode(self.row(row), out),
            Some(order) => {
                let mut stored = vec![0.0; self.cols];
                self.format.decode(self.row(row), &mut stored);
                for (&i, w) in order.iter().zip(stored) {
                    out[i as usize] = w;
                }
            }
        }
    }

    /// All of it in f32, row by row, columns in their own order.
    fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        (0..self.rows).for_each(|r| self.decode_row(r, &mut values[r * self.cols..][..self.cols]));
        values
    }

    /// What the kernels take: columns as they are stored.
    pub fn matrix(&self) -> Matrix<'_> {
        let matrix = Matrix::new(self.format, self.rows, self.cols, &self.data);
        matrix.expect("the length was checked by `new`").with_fine_activations(self.fine)
    }

    /// The rows `range`, in place; `None` where there are not so many.
    pub fn row_range(&self, range: Range<usize>) -> Option<Weight> {
        let bytes = self.data.len().checked_div(self.rows)?;
        let data = self.data.slice(range.start.checked_mul(bytes)?..range.end.checked_mul(bytes)?)?;
        Some(Weight { rows: range.len(), data, order: self.order.clone(), ..*self })
    }

    /// A copy with rows and columns exchanged, stored alike; `None` for formats that are not floating point.
    fn transposed(&self) -> Option<Weight> {
        let size = self.format.is_float().then(|| self.format.block_bytes())?;
        let mut data = Vec::with_capacity(self.data.len());
        for col in 0..self.cols {
            for row in 0..self.rows {
                data.extend_from_slice(&self.data[(row * self.cols + col) * size..][..size]);
            }
        }
        Weight::new(self.format, self.cols, self.rows, Bytes::new(data))
    }

    /// A copy whose rows are divided by their length, stored alike; `None` for formats that are not floating point.
    fn normalised(&self) -> Option<Weight> {
        let mut row = vec![0.0f32; self.cols];
        let mut data = Vec::with_capacity(self.data.len());
        for r in 0..self.rows {
            self.decode_row(r, &mut row);
            let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt().max(1e-12);
            for x in &row {
                let x = (f64::from(*x) / length) as f32;
                match self.format {
                    Format::F32 => data.extend_from_slice(&x.to_le_bytes()),
                    Format::F16 => data.extend_from_slice(&half::f16::from_f32(x).to_le_bytes()),
                    Format::BF16 => data.extend_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
                    _ => return None,
                }
            }
        }
        Weight::new(self.format, self.rows, self.cols, Bytes::new(data))
    }

    /// A copy with the rows `order`.
    pub fn with_rows(&self, order: &[usize]) -> Weight {
        let data: Vec<u8> = order.iter().flat_map(|&r| self.row(r).iter().copied()).collect();
        Weight { rows: order.len(), data: Bytes::new(data), order: self.order.clone(), ..*self }
    }
}

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
}

impl Linear {
    /// The layer's output for the rows of `x`, in plain arithmetic: for what is computed once.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
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
        self.embedding.weight.format.is_float() && self.linears().all(|l| l.weight.format.is_float())
    }
}

/// Finds tensors by role, and collects everything that is wrong so that it can be said at once.
struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    family: &'static Family,
    naming: Naming,
    /// The tensors found so far.
    used: HashSet<String>,
    /// Numbers given to weights and vectors.
    ids: usize,
    missing: Vec<String>,
    wrong: Vec<String>,
    failed: Option<Error>,
}

impl<'a> Finder<'a> {
    fn new(checkpoint: &'a Checkpoint, family: &'static Family, naming: Naming) -> Self {
        let (used, missing, wrong) = Default::default();
        Finder { checkpoint, family, naming, used, ids: 0, missing, wrong, failed: None }
    }

    fn model(&mut self, spec: ModelSpec) -> Option<Model> {
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let embedding = self.table(Role::Embedding, vocab, hidden);
        let positions = spec.learned_positions.map(|rows| self.table(Role::Positions, rows, hidden));
        let embedding_norm = spec.embedding_norm.then(|| self.norm(Role::EmbeddingNorm, 0, &spec.norm, &[hidden]));
        let final_norm = self.norm(Role::FinalNorm, 0, &spec.norm, &[hidden]);
        let head = match (spec.tied_head, &embedding) {
            (true, Some(table)) => Some(Linear {
                id: table.id,
                role: Role::Head,
                layer: 0,
                weight: table.weight.clone(),
                bias: None,
                adapters: Vec::new(),
                replacement: None,
            }),
            (true, None) => None,
            (false, _) => self.linear(Role::Head, 0, &spec, vocab, hidden, spec.bias.head),
        };
        let head = head.map(|mut head| {
            if spec.normed_head && self.naming == Naming::HuggingFace {
                match head.weight.normalised() {
                    Some(weight) => head.weight = weight,
                    None => self.wrong.push("the head, which is to be normalised, is not in floating point".into()),
                }
            }
            head
        });
        let layers: Vec<Option<Layer>> = (0..spec.layers.len()).map(|i| self.layer(i, &spec)).collect();
        let prefix = spec.prefix.map(|prefix| self.prefix(prefix, &spec));
        let rotaries = spec
            .ropes
            .iter()
            .map(|rope| match rope.scaling {
                RopeScaling::Stored => {
                    let factors = self.vector(&self.name(Role::RopeFactors, 0), &[rope.dim / 2])?.values;
                    if factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
                        self.wrong
                            .push(format!("{} holds a factor that is not positive", self.name(Role::RopeFactors, 0)));
                    }
                    Some(Rotary::new(rope, Some(&factors)))
                }
                // The description has read them; here they are found to have a place, and the right size.
                RopeScaling::Long { .. } if self.naming == Naming::Gguf => {
                    let roles = [Role::RopeFactorsShort, Role::RopeFactorsLong];
                    let found = roles.map(|role| self.vector(&self.name(role, 0), &[rope.dim / 2]).is_some());
                    found.iter().all(|&found| found).then(|| Rotary::new(rope, None))
                }
                _ => Some(Rotary::new(rope, None)),
            })
            .collect::<Vec<_>>();
        let prefix = match prefix {
            Some(found) => Some(found?),
            None => None,
        };
        Some(Model {
            family: self.family,
            naming: self.naming,
            rotaries: rotaries.into_iter().collect::<Option<_>>()?,
            embedding: embedding?,
            positions: all_or_none(positions)?,
            embedding_norm: all_or_none(embedding_norm)?,
            layers: layers.into_iter().collect::<Option<_>>()?,
            final_norm: final_norm?,
            head: head?,
            own_prefix: prefix.clone(),
            prefix,
            tensors: 0,
            spec,
        })
    }

    /// Looks for all of a layer's tensors before it gives up on any, so that every missing one is named.
    fn layer(&mut self, i: usize, spec: &ModelSpec) -> Option<Layer> {
        let (hidden, q_width, kv_width) = (spec.hidden_size, spec.query_width(), spec.kv_width());
        let (before, after) = match spec.placement {
            Placement::Before | Placement::Stream => (true, false),
            Placement::After => (false, true),
            Placement::Both => (true, true),
        };
        let norm = |this: &mut Self, there: bool, role, shape: &[usize]| match there {
            true => this.norm(role, i, &spec.norm, shape).map(Some),
            false => Some(None),
        };
        let attention_norm = norm(self, before, Role::AttentionNorm, &[hidden]);
        let mlp_norm = norm(self, before && spec.branches != Branches::ParallelShared, Role::MlpNorm, &[hidden]);
        let attention_post_norm = norm(self, after, Role::AttentionPostNorm, &[hidden]);
        let mlp_post_norm = norm(self, after, Role::MlpPostNorm, &[hidden]);
        let (q_shape, k_shape): (&[usize], &[usize]) = match spec.qk_norm {
            QkNorm::Projection => (&[q_width], &[kv_width]),
            QkNorm::Heads => (&[spec.heads, spec.head_dim], &[spec.kv_heads, spec.head_dim]),
            QkNorm::Head | QkNorm::None => (&[spec.head_dim], &[spec.head_dim]),
        };
        let q_norm = norm(self, spec.qk_norm != QkNorm::None, Role::QNorm, q_shape);
        let k_norm = norm(self, spec.qk_norm != QkNorm::None, Role::KNorm, k_shape);
        let (q_from, k_rows, v_rows) = match &spec.latent {
            Some(latent) => (latent.query.unwrap_or(hidden), latent.rotated, latent.kv),
            None => (hidden, kv_width, spec.value_width()),
        };
        let latent = spec.latent.as_ref().map(|latent| self.latent(i, spec, latent));
        let q = self.linear(Role::Q, i, spec, q_width, q_from, spec.bias.qkv);
        let k = self.linear(Role::K, i, spec, k_rows, hidden, spec.bias.qkv);
        let v = self.linear(Role::V, i, spec, v_rows, hidden, spec.bias.qkv);
        let o = self.linear(Role::O, i, spec, hidden, spec.heads * spec.value_dim, spec.bias.output);
        let sinks = spec.sinks.then(|| self.vector(&self.name(Role::Sinks, i), &[spec.heads]));
        let layer = &spec.layers[i];
        let mlp = layer.mlp.as_ref().map(|mlp| {
            let roles = match layer.experts {
                Some(_) => [Role::SharedGate, Role::SharedUp, Role::SharedDown],
                None => [Role::Gate, Role::Up, Role::Down],
            };
            self.mlp(i, spec, mlp, roles)
        });
        let experts = layer.experts.as_ref().map(|experts| self.experts(i, spec, experts));
        Some(Layer {
            attention_norm: attention_norm?,
            q: q?,
            k: k?,
            v: v?,
            o: o?,
            latent: all_or_none(latent)?,
            sinks: all_or_none(sinks)?,
            q_norm: q_norm?,
            k_norm: k_norm?,
            attention_post_norm: attention_post_norm?,
            mlp_norm: mlp_norm?,
            mlp: all_or_none(mlp)?,
            experts: all_or_none(experts)?,
            mlp_post_norm: mlp_post_norm?,
        })
    }

    fn latent(&mut self, i: usize, spec: &ModelSpec, latent: &Latent) -> Option<LatentWeights> {
        let query = latent.query.map(|width| {
            let down = self.linear(Role::QLatent, i, spec, width, spec.hidden_size, spec.bias.qkv);
            let norm = self.norm(Role::QLatentNorm, i, &latent.norm, &[width]);
            Some((down?, norm?))
        });
        let norm = self.norm(Role::KvLatentNorm, i, &latent.norm, &[latent.kv]);
        let rows = spec.heads * (spec.head_dim - latent.rotated + spec.value_dim);
        let up = self.linear(Role::KvUp, i, spec, rows, latent.kv, false);
        Some(LatentWeights { query: all_or_none(query)?, norm: norm?, up: up? })
    }

    fn mlp(&mut self, i: usize, spec: &ModelSpec, mlp: &Mlp, roles: [Role; 3]) -> Option<MlpWeights> {
        let (hidden, [gate, up, down]) = (spec.hidden_size, roles);
        let gate = mlp.gated.then(|| self.linear(gate, i, spec, mlp.width, hidden, spec.bias.up));
        let up = self.linear(up, i, spec, mlp.width, hidden, spec.bias.up);
        let down = self.linear(down, i, spec, hidden, mlp.width, spec.bias.down);
        Some(MlpWeights { gate: all_or_none(gate)?, up: up?, down: down? })
    }

    fn experts(&mut self, i: usize, spec: &ModelSpec, experts: &Experts) -> Option<ExpertWeights> {
        let router = self.linear(Role::Router, i, spec, experts.count, spec.hidden_size, experts.router_bias);
        let choice_bias = experts.choice_bias.then(|| self.vector(&self.name(Role::ChoiceBias, i), &[experts.count]));
        let shared_gate =
            experts.shared_gate.then(|| self.linear(Role::SharedRouter, i, spec, 1, spec.hidden_size, false));
        let each: Vec<_> = (0..experts.count)
            .map(|e| self.mlp(i, spec, &experts.mlp, [Role::ExpertGate(e), Role::ExpertUp(e), Role::ExpertDown(e)]))
            .collect();
        Some(ExpertWeights {
            router: router?,
            choice_bias: all_or_none(choice_bias)?,
            shared_gate: all_or_none(shared_gate)?,
            experts: each.into_iter().collect::<Option<_>>()?,
        })
    }

    /// The prefix that the checkpoint brings: a table, `[len, layers * 2 * kv_width]`, or one that two linear layers
    /// with a tanh between them make of a narrower one.
    fn prefix(&mut self, prefix: PrefixSpec, spec: &ModelSpec) -> Option<Prefix> {
        let width = 2 * spec.layers.len() * spec.kv_width();
        let table = self.table(Role::Prefix, prefix.len, width);
        let layers = prefix.projected.then(|| {
            let inner = self.linear(Role::PrefixIn, 0, spec, spec.hidden_size, width, true);
            let outer = self.linear(Role::PrefixOut, 0, spec, width, spec.hidden_size, true);
            Some((inner?, outer?))
        });
        let (table, layers) = (table?.weight.values(), all_or_none(layers)?);
        let values = match layers {
            None => table,
            Some((inner, outer)) => {
                let middle: Vec<f32> = inner.apply(&table).into_iter().map(f32::tanh).collect();
                outer.apply(&middle)
            }
        };
        Some(Prefix::new(prefix.len, false, spec, &values, None))
    }

    fn name(&self, role: Role, layer: usize) -> String {
        let there = self.family.names_of(self.naming, role, layer).find(|name| {
            ["", ".weight", ".bias"]
                .iter()
                .any(|end| self.checkpoint.find(&self.filed(format!("{name}{end}"))).is_some())
        });
        let name = there.or_else(|| self.family.name(self.naming, role, layer));
        name.unwrap_or_else(|| format!("{role:?} of layer {layer}"))
    }

    fn linear(
        &mut self,
        role: Role,
        layer: usize,
        spec: &ModelSpec,
        rows: usize,
        cols: usize,
        bias: bool,
    ) -> Option<Linear> {
        let place = self.place(role, layer, spec, rows);
        let bias = bias.then(|| {
            let shape: Vec<usize> = place.expert.iter().map(|e| e.1).chain([place.rows]).collect();
            let all = self.vector(&self.stored(&place.name, ".bias", "_bias"), &shape)?;
            let first = place.expert.map_or(0, |e| e.0) * place.rows;
            let mine = Vector { id: all.id, values: all.values[first..first + place.rows].to_vec() };
            Some(place.part.as_ref().map_or(mine.clone(), |part| part.of_vector(&mine)))
        });
        let weight = self.matrix(&place, cols);
        let (id, weight) = weight?;
        Some(Linear { id, role, layer, weight, bias: all_or_none(bias)?, adapters: Vec::new(), replacement: None })
    }

    /// Where the matrix of a role is to be found: under a name of its own, or else as a part of another.
    fn place(&self, role: Role, layer: usize, spec: &ModelSpec, rows: usize) -> Place {
        let has = |name: &String| self.checkpoint.find(&self.stored(name, ".weight", "")).is_some();
        let experts = |role: Role| {
            let count = spec.layers[layer].experts.as_ref().map_or(0, |e| e.count);
            role.expert().filter(|_| self.family.stacked(self.naming, role)).map(|e| (e, count))
        };
        let own = self.family.name(self.naming, role, layer).map(|_| self.name(role, layer));
        let packed = packed_in(role, spec)
            .and_then(|packed| self.family.name(self.naming, packed, layer).map(|_| (packed, self.name(packed, layer))))
            .filter(|(packed, name)| {
                let itself = self.family.names_itself(self.naming, *packed);
                own.as_ref().is_none_or(|own| (itself || !has(own)) && (has(name) || itself && !has(own)))
            });
        if let Some((packed, name)) = packed {
            let parts = parts(packed, self.family.packing(self.naming, packed), spec, layer);
            let rows = parts.iter().map(|(_, rows)| rows.len()).sum();
            let part = parts.into_iter().find(|(r, _)| *r == role).map(|(_, rows)| rows);
            let transposed = self.family.is_transposed(self.naming, packed);
            return Place { name, rows, part, expert: experts(packed), transposed };
        }
        let transposed = self.family.is_transposed(self.naming, role);
        Place { name: self.name(role, layer), rows, part: None, expert: experts(role), transposed }
    }

    /// `name` with what the file adds to it.
    fn stored(&self, name: &str, usual: &str, other: &str) -> String {
        let (usual, other) = (self.filed(format!("{name}{usual}")), self.filed(format!("{name}{other}")));
        if self.checkpoint.find(&usual).is_none() && self.checkpoint.find(&other).is_some() { other } else { usual }
    }

    /// The name under which the file has `name`: checkpoints saved without their head leave the first part out.
    fn filed(&self, name: String) -> String {
        let there = |name: &str| self.checkpoint.find(name).is_some();
        match name.split_once('.') {
            Some(("transformer" | "model", rest)) if !there(&name) && there(rest) => rest.to_owned(),
            _ => name,
        }
    }

    fn matrix(&mut self, place: &Place, cols: usize) -> Option<(usize, Weight)> {
        let name = self.stored(&place.name, ".weight", "");
        let (rows, cols) = if place.transposed { (cols, place.rows) } else { (place.rows, cols) };
        let shape: Vec<usize> = place.expert.iter().map(|e| e.1).chain([rows, cols]).collect();
        let (id, info, data) = self.find(&name, &shape)?;
        let whole = |data: Bytes| {
            let data = match place.expert {
                Some((expert, count)) => {
                    let bytes = data.len() / count.max(1);
                    data.slice(expert * bytes..(expert + 1) * bytes)?
                }
                None => data,
            };
            let fine = self.checkpoint.is_repacked(&name);
            let weight = Weight::new(info.format, rows, cols, data)?.with_fine_activations(fine);
            let weight = match self.checkpoint.column_order(&name) {
                Some(order) => weight.with_order(order)?,
                None => weight,
            };
            let weight = if place.transposed { weight.transposed()? } else { weight };
            place.part.as_ref().map_or(Some(weight.clone()), |part| part.of(&weight))
        };
        let weight = whole(data);
        if weight.is_none() {
            self.wrong.push(format!("{name} does not hold {rows} rows of {cols} {} weights", info.format));
        }
        Some((id, weight?))
    }

    fn norm(&mut self, role: Role, layer: usize, norm: &Norm, shape: &[usize]) -> Option<NormWeights> {
        let name = self.name(role, layer);
        let (weight, bias) = match norm.kind {
            NormKind::Rms => (true, false),
            NormKind::Layer { weight, bias } => (weight, bias),
        };
        let weight = weight.then(|| self.vector(&self.filed(format!("{name}.weight")), shape));
        let bias = bias.then(|| self.vector(&self.filed(format!("{name}.bias")), shape));
        Some(NormWeights { weight: all_or_none(weight)?, bias: all_or_none(bias)? })
    }

    fn table(&mut self, role: Role, rows: usize, cols: usize) -> Option<Table> {
        let place = Place { name: self.name(role, 0), rows, part: None, expert: None, transposed: false };
        let (id, weight) = self.matrix(&place, cols)?;
        Some(Table { id, weight, replacement: None })
    }

    fn vector(&mut self, name: &str, shape: &[usize]) -> Option<Vector> {
        let (id, info, data) = self.find(name, shape)?;
        match families::floats(info.format, &data) {
            Some(values) => Some(Vector { id, values }),
            None => {
                self.wrong.push(format!("{name} is stored as {}, not in floating point", info.format));
                None
            }
        }
    }

    /// The tensor `name` if it is there and has this shape.
    fn find(&mut self, name: &str, shape: &[usize]) -> Option<(usize, TensorInfo, Bytes)> {
        let Some(info) = self.checkpoint.find(name) else {
            // A packed tensor is looked for once for each of its parts.
            if !self.missing.iter().any(|other| other == name) {
                self.missing.push(name.to_owned());
            }
            return None;
        };
        let id = self.ids;
        self.ids += 1;
        let first = self.used.insert(name.to_owned());
        // Dimensions of 1 in front say nothing.
        let plain = |shape: &[usize]| shape.iter().copied().skip_while(|&n| n == 1).collect::<Vec<_>>();
        if plain(&info.shape) != plain(shape) {
            if first {
                self.wrong.push(format!("{name} should be {shape:?} but is {:?}", info.shape));
            }
            return None;
        }
        match self.checkpoint.tensor(name) {
            Ok(tensor) => Some((id, tensor.info, tensor.data)),
            Err(e) => {
                self.failed.get_or_insert(e);
                None
            }
        }
    }

    /// Everything that is wrong, in one error.
    fn verdict(&mut self, tied_head: bool, spare_layers: Range<usize>) -> Result<()> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        // A tied head may be stored all the same; it is not used.
        let tied = if tied_head { format!("{}.weight", self.name(Role::Head, 0)) } else { String::new() };
        // Quantizing tools add biases of zeros to layers that have none.
        let nothing = |name: &str| {
            name.ends_with(".bias") && self.checkpoint.tensor(name).is_ok_and(|t| t.data.iter().all(|&byte| byte == 0))
        };
        let spare: Vec<String> = spare_layers.map(|i| format!("model.layers.{i}.")).collect();
        let left: BTreeSet<&str> = (self.checkpoint.tensors().iter())
            .map(|t| t.name.as_str())
            .filter(|name| !self.used.contains(*name) && !self.family.ignores(name) && *name != tied)
            .filter(|name| !spare.iter().any(|layer| name.starts_with(layer)))
            .filter(|name| !nothing(name))
            .collect();
        let mut what = Vec::new();
        if !self.missing.is_empty() {
            what.push(format!("{} tensors are missing: {}", self.missing.len(), listed(&self.missing)));
        }
        if !self.wrong.is_empty() {
            what.push(format!("wrong shape: {}", listed(&self.wrong)));
        }
        if !left.is_empty() {
            let left: Vec<String> = left.into_iter().map(str::to_owned).collect();
            what.push(format!("{} tensors have no place in this model: {}", left.len(), listed(&left)));
        }
        if what.is_empty() {
            return Ok(());
        }
        Err(Error::file(
            self.checkpoint.path(),
            format!(
                "it does not hold the {} model that its configuration describes; {}",
                self.family.name,
                what.join("; ")
            ),
        ))
    }
}

/// Where a matrix is to be found.
struct Place {
    /// The tensor, without `.weight`.
    name: String,
    /// Its rows.
    rows: usize,
    /// Those that are wanted, where they are not all.
    part: Option<Rows>,
    /// Which of how many experts' it is, where the tensor holds all of them.
    expert: Option<(usize, usize)>,
    /// It is stored as `[inputs, outputs]`.
    transposed: bool,
}

/// What is not called for is there; what is called for must have been found.
fn all_or_none<T>(found: Option<Option<T>>) -> Option<Option<T>> {
    match found {
        None => Some(None),
        Some(found) => found.map(Some),
    }
}

/// All of `items`, unless they would fill pages.
fn listed(items: &[String]) -> String {
    const MOST: usize = 500;
    let mut text = items[..items.len().min(MOST)].join(", ");
    if items.len() > MOST {
        text.push_str(&format!(" and {} more", items.len() - MOST));
    }
    text
}
