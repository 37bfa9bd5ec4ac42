//! A model whose weights were changed in memory, written under the names of the checkpoint it was loaded from.

use super::directory::Directory;
use crate::checkpoint::safetensors::{self, Entry};
use crate::checkpoint::{Checkpoint, Kind, TensorInfo, Value, gguf};
use crate::families::{Role, floats};
use crate::model::{Linear, Model, NormWeights, Weight};
use crate::packing::{self, Rows};
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;

/// Some rows of a tensor, and the numbers they have now.
enum Change<'a> {
    /// Rows of a matrix: `rows[i]` (all where `None`), of expert `expert`, columns first where it is `transposed`.
    Matrix { weight: &'a Weight, rows: Option<Rows>, expert: usize, transposed: bool },
    /// Elements of a vector.
    Vector { values: &'a [f32], rows: Option<Rows>, first: usize },
}

/// Writes `model`, which was loaded from `source` and changed since (matrices in [`Linear::replacement`] and
/// [`Table::replacement`](crate::model::Table), vectors in place), with all numbers in f32: a Hugging Face directory of a
/// Hugging Face directory, which must not be there yet, and a GGUF file of a GGUF file.
///
/// # Errors
/// When a matrix of the model has no place in the checkpoint, or the files cannot be written.
pub fn write_trained(source: &Checkpoint, model: &Model, target: &Path) -> Result<()> {
    let changes = changes(source, model)?;
    let infos: Vec<TensorInfo> =
        source.tensors().iter().map(|t| TensorInfo { format: Format::F32, ..t.clone() }).collect();
    match source.kind() {
        Kind::Gguf(metadata) => {
            let mut metadata = metadata.clone();
            metadata.0.retain(|key, _| !key.starts_with("split."));
            metadata.0.insert("general.file_type".into(), Value::Unsigned(0));
            let mut writer = gguf::Writer::create(target, &metadata, &infos)?;
            for info in &infos {
                writer.write(&info.name, &numbers(source, info, changes.get(&info.name))?)?;
            }
            writer.finish()
        }
        Kind::HuggingFace { config, .. } => {
            let dir = Directory::create(target)?;
            let mut config = config.clone();
            if let Some(fields) = config.as_object_mut() {
                fields.shift_remove("quantization_config");
                let name = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
                fields.insert(name.into(), json!("float32"));
            }
            let entry = |t: &TensorInfo| Entry { name: t.name.clone(), dtype: "F32".into(), shape: t.shape.clone() };
            let entries: Vec<Entry> = infos.iter().map(entry).collect();
            let mut writer = safetensors::Writer::create(&dir.file("model.safetensors"), &entries)?;
            for info in &infos {
                writer.write(&info.name, &numbers(source, info, changes.get(&info.name))?)?;
            }
            writer.finish()?;
            dir.copy_companions(source.path())?;
            dir.json("config.json", &config)?;
            dir.commit()
        }
    }
}

/// What has changed in each tensor, by its name.
fn changes<'a>(source: &Checkpoint, model: &'a Model) -> Result<HashMap<String, Vec<Change<'a>>>> {
    let (family, naming, spec) = (model.family, model.naming, &model.spec);
    let mut changes: HashMap<String, Vec<Change<'a>>> = HashMap::new();
    let find = |role: Role, layer: usize, ends: &[&str]| {
        let names = family.names_of(naming, role, layer).flat_map(|name| {
            // Checkpoints saved without their head leave the first part of names out.
            let short = name.split_once('.').filter(|(first, _)| ["transformer", "model"].contains(first));
            let short = short.map(|(_, rest)| rest.to_owned());
            [Some(name), short].into_iter().flatten()
        });
        let mut names = names.flat_map(|name| ends.iter().map(move |end| format!("{name}{end}")).collect::<Vec<_>>());
        names.find(|name| source.find(name).is_some())
    };
    // A tensor of its own, or a part of a packed one; and which expert's.
    let place = |role: Role, layer: usize, ends: &[&str]| -> Option<(String, Role, Option<Rows>)> {
        if let Some(name) = find(role, layer, ends) {
            // A packed matrix may be called as one of its parts is elsewhere.
            let packed = packing::packed_in(role, spec).filter(|&p| find(p, layer, ends).as_ref() == Some(&name));
            if packed.is_none() {
                return Some((name, role, None));
            }
        }
        let packed = packing::packed_in(role, spec)?;
        let parts = packing::parts(packed, family.packing(naming, packed), spec, layer);
        let rows = parts.into_iter().find(|(r, _)| *r == role)?.1;
        Some((find(packed, layer, ends)?, packed, Some(rows)))
    };
    for linear in model.linears() {
        let (role, layer) = (linear.role, linear.layer);
        let tied = role == Role::Head && spec.tied_head;
        let missing = || Error::file(source.path(), format!("{role:?} of layer {layer} has no place in it"));
        if !tied {
            let (name, whole, rows) = place(role, layer, &[".weight", ""]).ok_or_else(missing)?;
            let (expert, transposed) = (expert(model, whole), family.is_transposed(naming, whole));
            let change = Change::Matrix { weight: linear.weight(), rows, expert, transposed };
            changes.entry(name).or_default().push(change);
        }
        if let Some(bias) = &linear.bias {
            let (name, whole, rows) = place(role, layer, &[".bias", "_bias"]).ok_or_else(missing)?;
            let first = self::expert(model, whole) * rows_of(model, whole, linear);
            changes.entry(name).or_default().push(Change::Vector { values: &bias.values, rows, first });
        }
    }
    let tables = [(Role::Embedding, Some(&model.embedding)), (Role::Positions, model.positions.as_ref())];
    for (role, table) in tables {
        if let (Some(table), Some(name)) = (table, find(role, 0, &[".weight", ""])) {
            let change = Change::Matrix { weight: table.weight(), rows: None, expert: 0, transposed: false };
            changes.entry(name).or_default().push(change);
        }
    }
    for (role, layer, norm) in norms(model) {
        let heads = if role == Role::QNorm { spec.heads } else { spec.kv_heads };
        if let (Some(names), Some(weight)) = (family.names_by_head(naming, role, layer, heads), &norm.weight) {
            for (name, values) in names.iter().zip(weight.values.chunks(spec.head_dim)) {
                let change = Change::Vector { values, rows: None, first: 0 };
                changes.entry(format!("{name}.weight")).or_default().push(change);
            }
            continue;
        }
        for (vector, end) in [(&norm.weight, ".weight"), (&norm.bias, ".bias")] {
            if let (Some(vector), Some(name)) = (vector, find(role, layer, &[end])) {
                let change = Change::Vector { values: &vector.values, rows: None, first: 0 };
                changes.entry(name).or_default().push(change);
            }
        }
    }
    for (i, layer) in model.layers.iter().enumerate() {
        if let (Some(sinks), Some(name)) = (&layer.sinks, find(Role::Sinks, i, &[""])) {
            let change = Change::Vector { values: &sinks.values, rows: None, first: 0 };
            changes.entry(name).or_default().push(change);
        }
    }
    Ok(changes)
}

/// The number of the expert in a tensor that holds all of them; 0 elsewhere.
fn expert(model: &Model, role: Role) -> usize {
    role.expert().filter(|_| model.family.stacked(model.naming, role)).unwrap_or(0)
}

/// Rows of one expert's matrix `whole`, of which `linear` is a part.
fn rows_of(model: &Model, whole: Role, linear: &Linear) -> usize {
    let parts = packing::parts(whole, model.family.packing(model.naming, whole), &model.spec, linear.layer);
    if parts.is_empty() { linear.weight.rows() } else { parts.iter().map(|(_, rows)| rows.len()).sum() }
}

fn norms(model: &Model) -> Vec<(Role, usize, &NormWeights)> {
    let mut norms: Vec<_> = model.embedding_norm.iter().map(|n| (Role::EmbeddingNorm, 0, n)).collect();
    for (i, layer) in model.layers.iter().enumerate() {
        let own = [
            (Role::AttentionNorm, layer.attention_norm.as_ref()),
            (Role::QNorm, layer.q_norm.as_ref()),
            (Role::KNorm, layer.k_norm.as_ref()),
            (Role::AttentionPostNorm, layer.attention_post_norm.as_ref()),
            (Role::MlpNorm, layer.mlp_norm.as_ref()),
            (Role::MlpPostNorm, layer.mlp_post_norm.as_ref()),
            (Role::KvLatentNorm, layer.latent.as_ref().map(|l| &l.norm)),
            (Role::QLatentNorm, layer.latent.as_ref().and_then(|l| l.query.as_ref()).map(|(_, norm)| norm)),
        ];
        norms.extend(own.into_iter().filter_map(|(role, norm)| Some((role, i, norm?))));
    }
    norms.push((Role::FinalNorm, 0, &model.final_norm));
    norms
}

/// All of a tensor in f32, changed where it has been.
fn numbers(source: &Checkpoint, info: &TensorInfo, changes: Option<&Vec<Change<'_>>>) -> Result<Vec<u8>> {
    let tensor = source.tensor(&info.name)?;
    let count = info.elements().unwrap_or(0);
    let mut values = match floats(tensor.info.format, &tensor.data) {
        Some(values) => values,
        None => {
            let mut values = vec![0.0; count];
            tensor.info.format.decode(&tensor.data, &mut values);
            values
        }
    };
    for change in changes.into_iter().flatten() {
        let wrong = || Error::file(source.path(), format!("{} has not the shape that the model has", info.name));
        match change {
            Change::Vector { values: new, rows, first } => {
                for (i, x) in new.iter().enumerate() {
                    *values.get_mut(first + at(rows, i)).ok_or_else(wrong)? = *x;
                }
            }
            Change::Matrix { weight, rows, expert, transposed } => {
                let cols = weight.cols();
                let mut row = vec![0.0; cols];
                // Of the tensor, or of the expert's part of it.
                let all = match info.shape[..] {
                    [_, all, _] if !transposed => all,
                    [_, _, all] if *transposed => all,
                    _ => count / cols,
                };
                for r in 0..weight.rows() {
                    weight.decode_row(r, &mut row);
                    let there = at(rows, r);
                    if *transposed {
                        let start = expert * all * cols;
                        for (c, x) in row.iter().enumerate() {
                            *values.get_mut(start + c * all + there).ok_or_else(wrong)? = *x;
                        }
                    } else {
                        let start = (expert * all + there) * cols;
                        values.get_mut(start..start + cols).ok_or_else(wrong)?.copy_from_slice(&row);
                    }
                }
            }
        }
    }
    Ok(values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn at(rows: &Option<Rows>, i: usize) -> usize {
    match rows {
        None => i,
        Some(Rows::Range(range)) => range.start + i,
        Some(Rows::Order(order)) => order[i],
    }
}
