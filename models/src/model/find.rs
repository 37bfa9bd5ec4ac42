//! The tensors that a model calls for, found in its checkpoint by role.

use super::{
    ExpertWeights, LatentWeights, Layer, Linear, MlpWeights, Model, NormWeights, Prefix, Table, Vector, Weight,
};
use crate::checkpoint::{Bytes, Checkpoint, TensorInfo};
use crate::families::{self, Family, Naming, Role};
use crate::packing::{Rows, packed_in, parts};
use crate::rope::Rotary;
use crate::spec::{
    Branches, Experts, Latent, Mlp, ModelSpec, Norm, NormKind, Placement, PrefixSpec, QkNorm, RopeScaling,
};
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

/// Finds tensors by role, and collects everything that is wrong so that it can be said at once.
pub(super) struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    family: &'static Family,
    naming: Naming,
    /// The tensors found so far.
    used: HashSet<String>,
    /// Numbers given to weights and vectors.
    pub(super) ids: usize,
    missing: Vec<String>,
    wrong: Vec<String>,
    failed: Option<Error>,
}

impl<'a> Finder<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, family: &'static Family, naming: Naming) -> Self {
        let (used, missing, wrong) = Default::default();
        Finder { checkpoint, family, naming, used, ids: 0, missing, wrong, failed: None }
    }

    pub(super) fn model(&mut self, spec: ModelSpec) -> Option<Model> {
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let embedding = self.table(Role::Embedding, vocab, hidden);
        let positions = spec.learned_positions.map(|rows| self.table(Role::Positions, rows, hidden));
        let embedding_norm = spec.embedding_norm.then(|| self.norm(Role::EmbeddingNorm, 0, &spec.norm, &[hidden]));
        let final_norm = self.norm(Role::FinalNorm, 0, &spec.norm, &[hidden]);
        let head = match (spec.tied_head, &embedding) {
            (true, Some(table)) => {
                // Its weight alone is the embedding's.
                let name = self.stored(&self.name(Role::Head, 0), ".bias", "_bias");
                let bias = all_or_none(spec.bias.head.then(|| self.vector(&name, &[vocab])));
                let (id, weight) = (table.id, table.weight.clone());
                let (role, layer, adapters, replacement, own_bias) = (Role::Head, 0, Vec::new(), None, None);
                bias.map(|bias| Linear { id, role, layer, weight, bias, adapters, replacement, own_bias })
            }
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
        // Norms of each head by itself have no bias, though others may.
        let qk_norm = match (spec.qk_norm, spec.norm.kind) {
            (QkNorm::Heads, NormKind::Layer { .. }) => {
                Norm { kind: NormKind::Layer { weight: true, bias: false }, ..spec.norm }
            }
            _ => spec.norm,
        };
        let mut qk = |role, shape: &[usize]| match spec.qk_norm {
            QkNorm::None => Some(None),
            _ => self.norm(role, i, &qk_norm, shape).map(Some),
        };
        let (q_norm, k_norm) = (qk(Role::QNorm, q_shape), qk(Role::KNorm, k_shape));
        let (q_from, k_rows, v_rows) = match &spec.latent {
            Some(latent) => (latent.query.unwrap_or(hidden), latent.rotated, latent.kv),
            None => (hidden, kv_width, spec.value_width()),
        };
        let latent = spec.latent.as_ref().map(|latent| self.latent(i, spec, latent));
        // Made from latent vectors, queries have no bias: what makes those has it.
        let q = self.linear(Role::Q, i, spec, q_width, q_from, spec.bias.qkv && spec.latent.is_none());
        let k = self.linear(Role::K, i, spec, k_rows, hidden, spec.bias.qkv);
        let v = self.linear(Role::V, i, spec, v_rows, hidden, spec.bias.qkv);
        let o = self.linear(Role::O, i, spec, hidden, spec.heads * spec.value_dim, spec.bias.output);
        let sinks = spec.sinks.then(|| self.vector(&self.filed(self.name(Role::Sinks, i)), &[spec.heads]));
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
        let there = |role| self.checkpoint.find(&format!("{}.weight", self.name(role, i))).is_some();
        let up = match there(Role::KeyUp) && !there(Role::KvUp) {
            true => self.joined(i, spec, latent),
            false => self.linear(Role::KvUp, i, spec, rows, latent.kv, false),
        };
        Some(LatentWeights { query: all_or_none(query)?, norm: norm?, up: up? })
    }

    /// The matrix from the latent vector to keys and values of files that have it in two parts, the keys' transposed.
    fn joined(&mut self, i: usize, spec: &ModelSpec, latent: &Latent) -> Option<Linear> {
        let (heads, plain, wide, kv) = (spec.heads, spec.head_dim - latent.rotated, spec.value_dim, latent.kv);
        let name = |this: &Self, role| format!("{}.weight", this.name(role, i));
        let keys = self.find(&name(self, Role::KeyUp), &[heads, kv, plain]);
        let values = self.find(&name(self, Role::ValueUp), &[heads, wide, kv]);
        let ((id, keys, key_data), (_, values, value_data)) = (keys?, values?);
        let keys = Weight::new(keys.format, heads * kv, plain, key_data)?;
        let values = Weight::new(values.format, heads * wide, kv, value_data)?;
        let weight = Weight::of_heads(heads, &keys, &values)?;
        let (adapters, replacement, own_bias) = (Vec::new(), None, None);
        Some(Linear { id, role: Role::KvUp, layer: i, weight, bias: None, adapters, replacement, own_bias })
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
        let choice_bias =
            experts.choice_bias.then(|| self.vector(&self.filed(self.name(Role::ChoiceBias, i)), &[experts.count]));
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
        Some(Linear {
            id,
            role,
            layer,
            weight,
            bias: all_or_none(bias)?,
            adapters: Vec::new(),
            replacement: None,
            own_bias: None,
        })
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
        let repacked = self.checkpoint.is_repacked(&name);
        // What another tool has packed has a row for each output, whatever the family does with floats.
        let transposed = place.transposed && !repacked;
        let (rows, cols) = if transposed { (cols, place.rows) } else { (place.rows, cols) };
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
            // MXFP4 is met as in GGUF files, which hold the same blocks: twice as fast, and 4 bits need no finer company.
            let fine = repacked && info.format != Format::MXFP4;
            let weight = Weight::new(info.format, rows, cols, data)?.with_fine_activations(fine);
            let weight = match self.checkpoint.column_order(&name) {
                Some(order) => weight.with_order(order)?,
                None => weight,
            };
            let weight = if transposed { weight.transposed()? } else { weight };
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
        let weight = weight.then(|| match self.family.names_by_head(self.naming, role, layer, shape[0]) {
            Some(names) => self.by_head(&names, &shape[1..]),
            None => self.vector(&self.filed(format!("{name}.weight")), shape),
        });
        let bias = bias.then(|| self.vector(&self.filed(format!("{name}.bias")), shape));
        Some(NormWeights { weight: all_or_none(weight)?, bias: all_or_none(bias)? })
    }

    fn table(&mut self, role: Role, rows: usize, cols: usize) -> Option<Table> {
        let place = Place { name: self.name(role, 0), rows, part: None, expert: None, transposed: false };
        let (id, weight) = self.matrix(&place, cols)?;
        Some(Table { id, weight, replacement: None })
    }

    /// A vector of which each head has its part under a name of its own.
    fn by_head(&mut self, names: &[String], shape: &[usize]) -> Option<Vector> {
        let parts: Vec<_> =
            names.iter().map(|name| self.vector(&self.filed(format!("{name}.weight")), shape)).collect();
        let parts = parts.into_iter().collect::<Option<Vec<Vector>>>()?;
        Some(Vector { id: parts.first()?.id, values: parts.into_iter().flat_map(|part| part.values).collect() })
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
    pub(super) fn verdict(&mut self, tied_head: bool, spare_layers: Range<usize>) -> Result<()> {
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
