//! A model in memory: a [`ModelSpec`] and the tensors it calls for, found, checked and left where the file has them.

use crate::checkpoint::{Bytes, Checkpoint, TensorInfo};
use crate::families::{self, Family, Naming, Role};
use crate::rope::Rotary;
use crate::spec::{Branches, ModelSpec, NormKind, Placement, QkNorm, RopeScaling};
use crate::{Error, Result};
use rushlight_quant::Matrix;
use rushlight_quant::formats::Format;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// A matrix as its file stores it, usually in place.
#[derive(Clone, Debug)]
pub struct Weight {
    format: Format,
    rows: usize,
    cols: usize,
    data: Bytes,
    order: Option<Arc<[u32]>>,
}

impl Weight {
    /// `rows` packed rows of `cols` weights; `None` where `data` is not exactly that.
    pub fn new(format: Format, rows: usize, cols: usize, data: Bytes) -> Option<Weight> {
        let weight = Weight { format, rows, cols, data, order: None };
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

    /// What the kernels take: columns as they are stored.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.format, self.rows, self.cols, &self.data).expect("the length was checked by `new`")
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
    /// How many positions they take.
    pub len: usize,
    /// For each layer the keys and the values, `[len, kv_heads * head_dim]` each. The keys are not rotated.
    pub layers: Vec<(Vec<f32>, Vec<f32>)>,
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

/// The weights of one layer.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub struct Layer {
    pub attention_norm: Option<NormWeights>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub q_norm: Option<NormWeights>,
    pub k_norm: Option<NormWeights>,
    pub attention_post_norm: Option<NormWeights>,
    pub mlp_norm: Option<NormWeights>,
    pub mlp: MlpWeights,
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
    /// The layers.
    pub layers: Vec<Layer>,
    /// The norm before the head.
    pub final_norm: NormWeights,
    /// From hidden states to logits.
    pub head: Linear,
    /// What an adapter puts before every sequence.
    pub prefix: Option<Prefix>,
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
        let tied = spec.tied_head;
        let model = finder.model(spec);
        finder.verdict(tied)?;
        // `verdict` has returned the reasons where a tensor was not found.
        let mut model = model.ok_or_else(|| file("tensors are missing".into()))?;
        model.tensors = finder.used.len();
        Ok(model)
    }

    /// Every linear layer, the head last.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let layers = self
            .layers
            .iter()
            .flat_map(|l| [&l.q, &l.k, &l.v, &l.o].into_iter().chain(&l.mlp.gate).chain([&l.mlp.up, &l.mlp.down]));
        layers.chain([&self.head])
    }

    /// Every linear layer, the head last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let layers = self.layers.iter_mut().flat_map(|l| {
            let (m, gate) = (&mut l.mlp.up, &mut l.mlp.gate);
            [&mut l.q, &mut l.k, &mut l.v, &mut l.o].into_iter().chain(gate).chain([m, &mut l.mlp.down])
        });
        layers.chain([&mut self.head])
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
    /// Ids of the tensors found so far.
    used: HashMap<String, usize>,
    missing: Vec<String>,
    wrong: Vec<String>,
    failed: Option<Error>,
}

impl<'a> Finder<'a> {
    fn new(checkpoint: &'a Checkpoint, family: &'static Family, naming: Naming) -> Self {
        let (used, missing, wrong) = Default::default();
        Finder { checkpoint, family, naming, used, missing, wrong, failed: None }
    }

    fn model(&mut self, spec: ModelSpec) -> Option<Model> {
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let embedding = self.weight(Role::Embedding, 0, vocab, hidden);
        let final_norm = self.norm(Role::FinalNorm, 0, &spec, hidden);
        let head = match (spec.tied_head, &embedding) {
            (true, Some((id, weight))) => Some(Linear {
                id: *id,
                role: Role::Head,
                layer: 0,
                weight: weight.clone(),
                bias: None,
                adapters: Vec::new(),
                replacement: None,
            }),
            (true, None) => None,
            (false, _) => self.linear(Role::Head, 0, vocab, hidden, spec.bias.head),
        };
        let layers: Vec<Option<Layer>> = (0..spec.layers.len()).map(|i| self.layer(i, &spec)).collect();
        let rotaries = spec
            .ropes
            .iter()
            .map(|rope| match rope.scaling {
                RopeScaling::Stored => {
                    let factors = self.vector(&self.name(Role::RopeFactors, 0), rope.dim / 2)?.values;
                    if factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
                        self.wrong
                            .push(format!("{} holds a factor that is not positive", self.name(Role::RopeFactors, 0)));
                    }
                    Some(Rotary::new(rope, Some(&factors)))
                }
                _ => Some(Rotary::new(rope, None)),
            })
            .collect::<Vec<_>>();
        let (id, weight) = embedding?;
        Some(Model {
            family: self.family,
            naming: self.naming,
            rotaries: rotaries.into_iter().collect::<Option<_>>()?,
            embedding: Table { id, weight, replacement: None },
            layers: layers.into_iter().collect::<Option<_>>()?,
            final_norm: final_norm?,
            head: head?,
            prefix: None,
            tensors: 0,
            spec,
        })
    }

    /// Looks for all of a layer's tensors before it gives up on any, so that every missing one is named.
    fn layer(&mut self, i: usize, spec: &ModelSpec) -> Option<Layer> {
        let (hidden, q_width, kv_width) = (spec.hidden_size, spec.query_width(), spec.kv_width());
        let (before, after) = match spec.placement {
            Placement::Before => (true, false),
            Placement::After => (false, true),
            Placement::Both => (true, true),
        };
        let norm = |this: &mut Self, there: bool, role, width| match there {
            true => this.norm(role, i, spec, width).map(Some),
            false => Some(None),
        };
        let attention_norm = norm(self, before, Role::AttentionNorm, hidden);
        let mlp_norm = norm(self, before && spec.branches != Branches::ParallelShared, Role::MlpNorm, hidden);
        let attention_post_norm = norm(self, after, Role::AttentionPostNorm, hidden);
        let mlp_post_norm = norm(self, after, Role::MlpPostNorm, hidden);
        let (q_norm_width, k_norm_width) = match spec.qk_norm {
            QkNorm::Projection => (q_width, kv_width),
            QkNorm::Head | QkNorm::None => (spec.head_dim, spec.head_dim),
        };
        let q_norm = norm(self, spec.qk_norm != QkNorm::None, Role::QNorm, q_norm_width);
        let k_norm = norm(self, spec.qk_norm != QkNorm::None, Role::KNorm, k_norm_width);
        let q = self.linear(Role::Q, i, q_width, hidden, spec.bias.qkv);
        let k = self.linear(Role::K, i, kv_width, hidden, spec.bias.qkv);
        let v = self.linear(Role::V, i, kv_width, hidden, spec.bias.qkv);
        let o = self.linear(Role::O, i, hidden, q_width, spec.bias.output);
        let mlp = &spec.layers[i].mlp;
        let gate = match mlp.gated {
            true => self.linear(Role::Gate, i, mlp.width, hidden, spec.bias.up).map(Some),
            false => Some(None),
        };
        let up = self.linear(Role::Up, i, mlp.width, hidden, spec.bias.up);
        let down = self.linear(Role::Down, i, hidden, mlp.width, spec.bias.down);
        Some(Layer {
            attention_norm: attention_norm?,
            q: q?,
            k: k?,
            v: v?,
            o: o?,
            q_norm: q_norm?,
            k_norm: k_norm?,
            attention_post_norm: attention_post_norm?,
            mlp_norm: mlp_norm?,
            mlp: MlpWeights { gate: gate?, up: up?, down: down? },
            mlp_post_norm: mlp_post_norm?,
        })
    }

    fn name(&self, role: Role, layer: usize) -> String {
        self.family.name(self.naming, role, layer).unwrap_or_else(|| format!("{role:?} of layer {layer}"))
    }

    fn linear(&mut self, role: Role, layer: usize, rows: usize, cols: usize, bias: bool) -> Option<Linear> {
        let bias_name = format!("{}.bias", self.name(role, layer));
        let bias = if bias { self.vector(&bias_name, rows).map(Some) } else { Some(None) };
        let (id, weight) = self.weight(role, layer, rows, cols)?;
        Some(Linear { id, role, layer, weight, bias: bias?, adapters: Vec::new(), replacement: None })
    }

    fn norm(&mut self, role: Role, layer: usize, spec: &ModelSpec, width: usize) -> Option<NormWeights> {
        let name = self.name(role, layer);
        let (weight, bias) = match spec.norm.kind {
            NormKind::Rms => (true, false),
            NormKind::Layer { weight, bias } => (weight, bias),
        };
        let mut find = |there, suffix| match there {
            true => self.vector(&format!("{name}.{suffix}"), width).map(Some),
            false => Some(None),
        };
        let (weight, bias) = (find(weight, "weight"), find(bias, "bias"));
        Some(NormWeights { weight: weight?, bias: bias? })
    }

    fn weight(&mut self, role: Role, layer: usize, rows: usize, cols: usize) -> Option<(usize, Weight)> {
        let name = format!("{}.weight", self.name(role, layer));
        let (id, info, data) = self.find(&name, &[rows, cols])?;
        let weight =
            Weight::new(info.format, rows, cols, data).and_then(|weight| match self.checkpoint.column_order(&name) {
                Some(order) => weight.with_order(order),
                None => Some(weight),
            });
        if weight.is_none() {
            self.wrong.push(format!("{name} does not hold {rows} rows of {cols} {} weights", info.format));
        }
        Some((id, weight?))
    }

    fn vector(&mut self, name: &str, len: usize) -> Option<Vector> {
        let (id, info, data) = self.find(name, &[len])?;
        match families::floats(info.format, &data) {
            Some(values) if values.len() == len => Some(Vector { id, values }),
            _ => {
                self.wrong.push(format!("{name} is stored as {}, not in floating point", info.format));
                None
            }
        }
    }

    /// The tensor `name` if it is there and has this shape.
    fn find(&mut self, name: &str, shape: &[usize]) -> Option<(usize, TensorInfo, Bytes)> {
        let Some(info) = self.checkpoint.find(name) else {
            self.missing.push(name.to_owned());
            return None;
        };
        let id = self.used.len();
        let id = *self.used.entry(name.to_owned()).or_insert(id);
        if info.shape != shape {
            self.wrong.push(format!("{name} should be {shape:?} but is {:?}", info.shape));
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
    fn verdict(&mut self, tied_head: bool) -> Result<()> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        // A tied head may be stored all the same; it is not used.
        let tied = if tied_head { format!("{}.weight", self.name(Role::Head, 0)) } else { String::new() };
        // Quantizing tools add biases of zeros to layers that have none.
        let nothing = |name: &str| {
            name.ends_with(".bias") && self.checkpoint.tensor(name).is_ok_and(|t| t.data.iter().all(|&byte| byte == 0))
        };
        let left: BTreeSet<&str> = (self.checkpoint.tensors().iter())
            .map(|t| t.name.as_str())
            .filter(|name| !self.used.contains_key(*name) && !self.family.ignores(name) && *name != tied)
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

/// All of `items`, unless they would fill pages.
fn listed(items: &[String]) -> String {
    const MOST: usize = 500;
    let mut text = items[..items.len().min(MOST)].join(", ");
    if items.len() > MOST {
        text.push_str(&format!(" and {} more", items.len() - MOST));
    }
    text
}
