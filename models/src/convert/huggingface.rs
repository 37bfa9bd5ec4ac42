//! Hugging Face directories as GGUF: names, row orders and metadata from the family, vocabulary from the tokenizer.

use super::{Conversion, Converted, Source};
use crate::checkpoint::{Bytes, Checkpoint, TensorInfo, Value};
use crate::families::{self, Description, Family, GGUF_NAMES, Gguf, Naming, Role};
use crate::model::{Linear, Model};
use crate::packing::{self, Packing};
use crate::rope::{Rotary, reorder};
use crate::spec::{Branches, ModelSpec, Rope, RopeScaling};
use crate::tokenizer;
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap, HashSet};

/// What a GGUF file of the directory `checkpoint` holds.
pub(super) fn convert(checkpoint: &Checkpoint, generation_config: Option<&Json>) -> Result<Conversion> {
    // Loading finds everything that is wrong with the tensors; they stay where they are.
    let model = Model::load(checkpoint)?;
    let (family, spec) = (model.family, &model.spec);
    let form = family.gguf.ok_or_else(|| {
        let what = format!("the family {} has no form in GGUF; write a Hugging Face directory instead", family.name);
        Error::file(checkpoint.path(), what)
    })?;
    let mut tensors = tensors(checkpoint, &model, &form)?;
    let infos: Vec<TensorInfo> = tensors.iter().map(Converted::info).collect();
    let Description { mut metadata, spec: read, mut notes } =
        families::describe(spec, &form, &infos, checkpoint.path())?;
    for tensor in &mut tensors {
        adapt(tensor, spec, &read);
    }
    let mut set = |key: &str, value: Value| drop(metadata.0.insert(key.into(), value));
    set("general.type", Value::String("model".into()));
    set("general.size_label", Value::String(size_label(&infos)));
    let dir = checkpoint.path().canonicalize().unwrap_or_else(|_| checkpoint.path().to_owned());
    if let Some(name) = dir.file_name() {
        set("general.name", Value::String(name.to_string_lossy().into_owned()));
    }
    for (key, value) in generation_config.map(sampling).unwrap_or_default() {
        set(key, value);
    }
    let vocabulary = tokenizer::export(checkpoint.path(), spec.vocab_size)?;
    metadata.0.extend(vocabulary.metadata.0);
    notes.extend(vocabulary.notes);
    Ok(Conversion { metadata, tensors, notes })
}

/// The tensors under their GGUF names, in the order in which a model needs them, as the directory stores them.
fn tensors(checkpoint: &Checkpoint, model: &Model, form: &Gguf) -> Result<Vec<Converted>> {
    let (family, spec) = (model.family, &model.spec);
    let mut tensors = Vec::with_capacity(checkpoint.tensors().len() + 1);
    let linear: HashSet<(Role, usize)> = model.linears().map(|l| (l.role, l.layer)).collect();
    let gguf_name = |role: Role, layer: usize| {
        // Falcon's norms are called otherwise where each of two parallel branches has its own.
        let name = match (role, spec.branches) {
            (Role::AttentionNorm, Branches::ParallelShared | Branches::Sequential) => {
                family.names_of(Naming::Gguf, role, layer).last()
            }
            (Role::MlpNorm, Branches::Parallel) if family.names_itself(Naming::Gguf, role) => {
                family.names_of(Naming::Gguf, role, layer).nth(1)
            }
            (Role::Q, _) if spec.latent.as_ref().is_some_and(|l| l.query.is_none()) => {
                family.names_of(Naming::Gguf, role, layer).last()
            }
            _ => family.name(Naming::Gguf, role, layer),
        };
        name.ok_or_else(|| {
            let what = format!("GGUF files of the architecture '{}' have no place for {role:?}", form.architecture);
            Error::file(checkpoint.path(), what)
        })
    };
    let mut own = HashMap::new();
    for info in checkpoint.tensors() {
        // Loading has refused what is neither used nor known to be idle.
        let Some((role, layer, end)) = role_of(family, &info.name) else { continue };
        if linear.contains(&(role, layer)) {
            if end == "weight" && !family.is_transposed(Naming::HuggingFace, role) {
                own.insert((role, layer), info);
            }
            continue;
        }
        if !packing::parts(role, Packing::Stacked, spec, layer).is_empty() || role.expert().is_some() {
            continue;
        }
        if layer >= spec.layers.len() || family.names_by_head(Naming::HuggingFace, role, layer, 1).is_some() {
            continue;
        }
        let name = gguf_name(role, layer)?;
        tensors.push(Converted {
            name: if end.is_empty() { name } else { format!("{name}.{end}") },
            format: if info.shape.len() == 1 { Format::F32 } else { info.format },
            shape: info.shape.clone(),
            role: Some((role, layer)),
            source: Source::Tensor { name: info.name.clone(), rows: None, offset: 0.0 },
        });
    }
    for (layer, weights) in model.layers.iter().enumerate() {
        for (role, norm, heads) in
            [(Role::QNorm, &weights.q_norm, spec.heads), (Role::KNorm, &weights.k_norm, spec.kv_heads)]
        {
            let norm = norm.as_ref().and_then(|norm| norm.weight.as_ref());
            if let (Some(norm), Some(_)) = (norm, family.names_by_head(Naming::HuggingFace, role, layer, heads)) {
                let name = format!("{}.weight", gguf_name(role, layer)?);
                tensors.push(vector(name, (role, layer), vec![heads, spec.head_dim], &norm.values));
            }
        }
    }
    // What is packed there, gathered under its packed role.
    let mut packed: BTreeMap<(usize, String), (Role, Vec<&Linear>)> = BTreeMap::new();
    for linear in model.linears() {
        let (role, layer) = (linear.role, linear.layer);
        let whole = packing::packed_in(role, spec)
            .filter(|&whole| family.names_itself(Naming::Gguf, whole) || whole == Role::KvLatent);
        let group = match (whole, family.stacked(Naming::Gguf, role)) {
            (Some(whole), _) => Some(whole),
            (None, true) => Some(role.of_expert(0)),
            (None, false) => None,
        };
        if let Some(group) = group {
            packed.entry((layer, gguf_name(group, layer)?)).or_insert_with(|| (group, Vec::new())).1.push(linear);
            continue;
        }
        let name = gguf_name(role, layer)?;
        let weight = &linear.weight;
        let source = match own.get(&(role, layer)).filter(|_| role != Role::Head || !spec.normed_head) {
            Some(info) => Source::Tensor { name: info.name.clone(), rows: None, offset: 0.0 },
            None => Source::Parts { parts: vec![in_place(checkpoint, linear)?], rows: None },
        };
        let (format, shape) = (weight.format(), vec![weight.rows(), weight.cols()]);
        if role != Role::Head || !spec.tied_head {
            tensors.push(Converted {
                name: format!("{name}.weight"),
                format,
                shape,
                role: Some((role, layer)),
                source,
            });
        }
        tensors.extend(
            linear
                .bias
                .as_ref()
                .map(|bias| vector(format!("{name}.bias"), (role, layer), vec![bias.values.len()], &bias.values)),
        );
    }
    for ((layer, name), (role, mut linears)) in packed {
        // The latent vector's two parts stand in the model the other way.
        linears.sort_by_key(|l| (l.role.expert(), role == Role::KvLatent && l.role == Role::K));
        let [first, ..] = linears[..] else { continue };
        let rows: usize = linears.iter().map(|l| l.weight.rows()).sum();
        let shape = match role.expert() {
            Some(_) => vec![linears.len(), first.weight.rows(), first.weight.cols()],
            None => vec![rows, first.weight.cols()],
        };
        let biases: Vec<f32> =
            linears.iter().filter_map(|l| l.bias.as_ref()).flat_map(|b| b.values.iter().copied()).collect();
        let parts = linears.iter().map(|l| in_place(checkpoint, l)).collect::<Result<_>>()?;
        tensors.push(Converted {
            name: format!("{name}.weight"),
            format: first.weight.format(),
            shape: shape.clone(),
            role: Some((role, layer)),
            source: Source::Parts { parts, rows: None },
        });
        if biases.len() == rows {
            tensors.push(vector(format!("{name}.bias"), (role, layer), shape[..shape.len() - 1].to_vec(), &biases));
        }
    }
    for rope in &spec.ropes {
        let factors = match &rope.scaling {
            RopeScaling::Llama3 { .. } => vec![(Role::RopeFactors, factors(rope))],
            RopeScaling::Long { short, long, .. } => {
                vec![(Role::RopeFactorsShort, short.clone()), (Role::RopeFactorsLong, long.clone())]
            }
            _ => Vec::new(),
        };
        for (role, factors) in factors {
            tensors.push(vector(gguf_name(role, 0)?, (role, 0), vec![factors.len()], &factors));
        }
    }
    let place = |role: Role| GGUF_NAMES.iter().position(|(r, _)| *r == role.of_expert(0));
    tensors.sort_by_key(|t| {
        let (role, layer) = t.role.unwrap_or((Role::Embedding, 0));
        // What comes before the layers, the layers, what comes after them.
        let part = match role {
            Role::Embedding | Role::Positions | Role::EmbeddingNorm => 0,
            Role::RopeFactors | Role::RopeFactorsShort | Role::RopeFactorsLong => 0,
            Role::FinalNorm | Role::Head => 2,
            _ => 1,
        };
        (part, layer, place(role), t.name.ends_with(".bias"))
    });
    Ok(tensors)
}

/// The rows of a matrix that is a part of another here or there.
fn in_place(checkpoint: &Checkpoint, linear: &Linear) -> Result<Bytes> {
    match linear.weight.order() {
        None => Ok(linear.weight.data().clone()),
        Some(_) => Err(Error::file(
            checkpoint.path(),
            format!(
                "{:?} of layer {} is packed and has its columns in an order of its own (act-order), which cannot be \
                     converted; convert the original checkpoint",
                linear.role, linear.layer
            ),
        )),
    }
}

/// A vector (or a row for each expert) that is computed here.
fn vector(name: String, role: (Role, usize), shape: Vec<usize>, values: &[f32]) -> Converted {
    let data = Bytes::new(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let source = Source::Parts { parts: vec![data], rows: None };
    Converted { name, format: Format::F32, shape, role: Some(role), source }
}

/// The role and layer of a directory's tensor, and what its name ends with beside the role's: `weight`, `bias` or
/// nothing. Checkpoints saved without their head leave the first part of names out.
pub(crate) fn role_of<'a>(family: &Family, name: &'a str) -> Option<(Role, usize, &'a str)> {
    let stem_end = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"));
    let known = |stem: &str| {
        let first = ["", "transformer.", "model."];
        first.iter().find_map(|first| family.role(Naming::HuggingFace, &format!("{first}{stem}")))
    };
    if let Some((role, layer)) = known(name) {
        return Some((role, layer, ""));
    }
    let (stem, end) = stem_end?;
    known(stem).map(|(role, layer)| (role, layer, end))
}

/// What the numbers of `tensor` need where readers of the new form take `read` for what the old one means by `spec`.
pub(super) fn adapt(tensor: &mut Converted, spec: &ModelSpec, read: &ModelSpec) {
    let Some((role, _)) = tensor.role else { return };
    let rows = match &mut tensor.source {
        Source::Tensor { rows, offset, .. } => {
            if tensor.name.ends_with(".weight") && is_norm(role) {
                *offset = spec.norm.weight_offset - read.norm.weight_offset;
            }
            rows
        }
        Source::Parts { rows, .. } => rows,
        Source::Data(_) => return,
    };
    if let (Role::Q | Role::K | Role::QNorm | Role::KNorm, Some(from), Some(to)) =
        (role, spec.ropes.first(), read.ropes.first())
        && from.layout != to.layout
    {
        let order = reorder(tensor.shape[0], spec.head_dim, from.dim, from.layout, to.layout);
        *rows = Some(order.into_iter().map(|row| row as u32).collect());
    }
}

fn is_norm(role: Role) -> bool {
    use Role::*;
    matches!(role, FinalNorm | AttentionNorm | QNorm | KNorm | AttentionPostNorm | MlpNorm | MlpPostNorm)
}

/// What the frequency of each rotary pair is divided by.
pub(super) fn factors(rope: &Rope) -> Vec<f32> {
    let plain = Rotary::new(&Rope { scaling: RopeScaling::None, ..rope.clone() }, None);
    let scaled = Rotary::new(rope, None);
    let (plain, scaled) = (plain.frequencies(0), scaled.frequencies(0));
    let pairs = plain.iter().zip(scaled.iter());
    pairs.map(|(&plain, &scaled)| (f64::from(plain) / f64::from(scaled)) as f32).collect()
}

/// The number of weights in words such as `135M`, with two digits at least, as llama.cpp's conversion writes it.
fn size_label(tensors: &[TensorInfo]) -> String {
    let weights: f64 = tensors.iter().filter_map(|t| t.elements()).map(|n| n as f64).sum();
    let (scale, unit) = match weights {
        w if w >= 1e12 => (1e12, "T"),
        w if w >= 1e9 => (1e9, "B"),
        w if w >= 1e6 => (1e6, "M"),
        _ => (1e3, "K"),
    };
    let scaled = weights / scale;
    let digits = usize::from(scaled.round() < 10.0);
    format!("{scaled:.digits$}{unit}")
}

/// The published sampling settings under GGUF's names for them.
fn sampling(config: &Json) -> Vec<(&'static str, Value)> {
    let names = [
        ("temperature", "general.sampling.temp"),
        ("top_k", "general.sampling.top_k"),
        ("top_p", "general.sampling.top_p"),
        ("min_p", "general.sampling.min_p"),
        ("repetition_penalty", "general.sampling.penalty_repeat"),
    ];
    let value = |name: &str, number: &Json| match name {
        "top_k" => number.as_i64().map(Value::Signed),
        _ => number.as_f64().map(Value::Float),
    };
    names.into_iter().filter_map(|(from, to)| Some((to, value(from, config.get(from)?)?))).collect()
}
