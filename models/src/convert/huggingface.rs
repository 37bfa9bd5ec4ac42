//! Hugging Face directories as GGUF: names, row orders and metadata from the family, vocabulary from the tokenizer.

use super::{Conversion, Converted, Source};
use crate::checkpoint::{Bytes, Checkpoint, TensorInfo, Value};
use crate::families::{self, Description, Family, GGUF_NAMES, Gguf, Naming, Role};
use crate::model::Model;
use crate::rope::{Rotary, reorder};
use crate::spec::{ModelSpec, Rope, RopeScaling};
use crate::tokenizer;
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use serde_json::Value as Json;

/// What a GGUF file of the directory `checkpoint` holds.
pub(super) fn convert(checkpoint: &Checkpoint, generation_config: Option<&Json>) -> Result<Conversion> {
    // Loading finds everything that is wrong with the tensors; they stay where they are.
    let Model { family, spec, .. } = Model::load(checkpoint)?;
    let form = family.gguf.ok_or_else(|| {
        let what = format!("the family {} has no form in GGUF; write a Hugging Face directory instead", family.name);
        Error::file(checkpoint.path(), what)
    })?;
    let mut tensors = tensors(checkpoint, family, &form, &spec)?;
    let infos: Vec<TensorInfo> = tensors.iter().map(Converted::info).collect();
    let Description { mut metadata, spec: read, mut notes } =
        families::describe(&spec, &form, &infos, checkpoint.path())?;
    for tensor in &mut tensors {
        adapt(tensor, &spec, &read);
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
fn tensors(checkpoint: &Checkpoint, family: &Family, form: &Gguf, spec: &ModelSpec) -> Result<Vec<Converted>> {
    let mut tensors = Vec::with_capacity(checkpoint.tensors().len() + 1);
    for info in checkpoint.tensors() {
        let stem_end = info.name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"));
        let role = stem_end.and_then(|(stem, _)| family.role(Naming::HuggingFace, stem));
        let (Some((role, layer)), Some((_, end))) = (role, stem_end) else {
            // Loading has refused what is neither used nor known to be idle.
            continue;
        };
        if role == Role::Head && spec.tied_head {
            continue;
        }
        let name = family.name(Naming::Gguf, role, layer).ok_or_else(|| {
            let what =
                format!("GGUF files of the architecture '{}' have no place for {}", form.architecture, info.name);
            Error::file(checkpoint.path(), what)
        })?;
        tensors.push(Converted {
            name: format!("{name}.{end}"),
            format: if info.shape.len() == 1 { Format::F32 } else { info.format },
            shape: info.shape.clone(),
            role: Some((role, layer)),
            source: Source::Tensor { name: info.name.clone(), rows: None, offset: 0.0 },
        });
    }
    if let Some(rope) = spec.ropes.iter().find(|r| matches!(r.scaling, RopeScaling::Llama3 { .. }))
        && let Some(name) = family.name(Naming::Gguf, Role::RopeFactors, 0)
    {
        let factors = factors(rope);
        tensors.push(Converted {
            name,
            format: Format::F32,
            shape: vec![factors.len()],
            role: Some((Role::RopeFactors, 0)),
            source: Source::Data(Bytes::new(factors.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>())),
        });
    }
    let place = |role: Role| GGUF_NAMES.iter().position(|(r, _)| *r == role.of_expert(0));
    tensors.sort_by_key(|t| {
        let (role, layer) = t.role.unwrap_or((Role::Embedding, 0));
        // What comes before the layers, the layers, what comes after them.
        let part = match role {
            Role::Embedding | Role::RopeFactors => 0,
            Role::FinalNorm | Role::Head => 2,
            _ => 1,
        };
        (part, layer, place(role), t.name.ends_with(".bias"))
    });
    Ok(tensors)
}

/// What the numbers of `tensor` need where readers of the new form take `read` for what the old one means by `spec`.
pub(super) fn adapt(tensor: &mut Converted, spec: &ModelSpec, read: &ModelSpec) {
    let (Some((role, _)), Source::Tensor { rows, offset, .. }) = (tensor.role, &mut tensor.source) else { return };
    if tensor.name.ends_with(".weight") && is_norm(role) {
        *offset = spec.norm.weight_offset - read.norm.weight_offset;
    }
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
