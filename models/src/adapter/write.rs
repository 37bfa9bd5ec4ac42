//! Adapters written: PEFT's directories, and llama.cpp's GGUF files.

use super::Reorder;
use crate::checkpoint::safetensors::{self, Entry};
use crate::checkpoint::{AtomicFile, Metadata, TensorInfo, Value, gguf};
use crate::families::{Naming, Role};
use crate::model::Model;
use crate::packing::{self, Rows};
use crate::{Error, Result};
use rushlight_quant::formats::Format;
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::Path;

/// What was trained besides its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// The base model, as PEFT is to find it: a directory, or a name on the hub.
    pub base: String,
    /// The rank.
    pub rank: usize,
    /// What the change is multiplied by, times the rank (or its root).
    pub alpha: f32,
    /// The share of inputs that were dropped in training.
    pub dropout: f32,
    /// The scale is alpha over the root of the rank (Kalajdzievski 2023).
    pub rslora: bool,
}

impl Description {
    fn scale(&self) -> f32 {
        self.alpha / if self.rslora { (self.rank as f32).sqrt() } else { self.rank as f32 }
    }
}

/// What was trained for one linear layer of the model, in the model's own order of rows.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// What the layer is.
    pub role: Role,
    /// Its number.
    pub layer: usize,
    /// `[rank, inputs]`.
    pub a: &'a [f32],
    /// `[outputs, rank]`.
    pub b: &'a [f32],
    /// DoRA's length of each output's weights.
    pub magnitude: Option<&'a [f32]>,
}

/// A matrix that was trained whole, in the model's own order of rows.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    /// What it is: a linear layer or the embedding.
    pub role: Role,
    /// Its layer.
    pub layer: usize,
    /// Row by row.
    pub values: &'a [f32],
}

/// An adapter's tensors for one module of the files' naming.
struct Module {
    name: String,
    role: Role,
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    magnitude: Option<Vec<f32>>,
    rows: usize,
    cols: usize,
}

/// Writes `pairs` and `wholes` as the PEFT adapter `dir`: adapter_config.json and adapter_model.safetensors, each whole or
/// not at all.
///
/// What the base's files hold as one matrix is one module there. Where its parts were trained with one A, that is its A;
/// otherwise its rank is the sum of theirs, with zeros where a part has nothing to say.
///
/// # Errors
/// When a pair fits no layer of `model`, or the files cannot be written.
pub fn write_peft(
    dir: &Path,
    model: &Model,
    description: &Description,
    pairs: &[Pair<'_>],
    wholes: &[Whole<'_>],
) -> Result<()> {
    let modules = modules(dir, model, Naming::HuggingFace, description.rank, pairs)?;
    let wholes: Vec<Saved> =
        groups(dir, model, wholes)?.iter().map(|group| group.in_files(dir, model)).collect::<Result<_>>()?;
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    let own: HashSet<&str> = modules.iter().map(|m| m.name.as_str()).collect();
    // Modules that were left as they are: where one shares the end of its name with a trained one, the end says too much.
    let others: HashSet<String> = (model.linears())
        .filter_map(|l| model.module(Naming::HuggingFace, l.role, l.layer).map(|(_, name)| name))
        .filter(|name| !own.contains(name.as_str()))
        .map(|name| last(&name))
        .collect();
    let target = |name: &str| if others.contains(&last(name)) { name.to_owned() } else { last(name) };
    let mut targets: Vec<String> = Vec::new();
    let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
    for module in &modules {
        let target = target(&module.name);
        if !targets.contains(&target) {
            targets.push(target.clone());
        }
        if module.rank != description.rank {
            // The same scale at another rank.
            let grown = module.rank as f32 / description.rank as f32;
            let alpha = description.alpha * if description.rslora { grown.sqrt() } else { grown };
            ranks.insert(target.clone(), json!(module.rank));
            alphas.insert(target, json!(alpha));
        }
    }
    let saved = saved_names(model, wholes.iter().map(|saved| saved.name.as_str()));
    let transposed = modules.iter().any(|m| model.family.is_transposed(Naming::HuggingFace, m.role));
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": description.base,
        "inference_mode": true,
        "r": description.rank,
        "lora_alpha": description.alpha,
        "lora_dropout": description.dropout,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": description.rslora,
        "use_dora": modules.iter().any(|m| m.magnitude.is_some()),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": true,
        "modules_to_save": if saved.is_empty() { Json::Null } else { json!(saved) },
    });
    let mut tensors = Vec::new();
    for module in modules {
        let Module { name, rank, rows, cols, .. } = module;
        tensors.push((format!("{name}.lora_A.weight"), vec![rank, cols], module.a));
        tensors.push((format!("{name}.lora_B.weight"), vec![rows, rank], module.b));
        if let Some(magnitude) = module.magnitude {
            tensors.push((format!("{name}.lora_magnitude_vector"), vec![rows], magnitude));
        }
    }
    for Saved { name, shape, values, bias } in wholes {
        if let Some(bias) = bias {
            tensors.push((format!("{name}.bias"), vec![bias.len()], bias));
        }
        tensors.push((format!("{name}.weight"), shape, values));
    }
    let prefixed = tensors.into_iter().map(|(name, shape, values)| (format!("base_model.model.{name}"), shape, values));
    write(dir, &config, prefixed.collect())
}

/// Writes a trained prefix as a PEFT adapter: for each layer the keys and values of [`Prefix`](crate::model::Prefix),
/// `[len, kv_width]` each, in the model's own order of columns.
pub fn write_prefix(dir: &Path, model: &Model, base: &str, len: usize, layers: &[(&[f32], &[f32])]) -> Result<()> {
    let spec = &model.spec;
    let width = spec.kv_width();
    if layers.len() != spec.layers.len() || layers.iter().any(|(k, v)| k.len() != len * width || v.len() != len * width)
    {
        return Err(Error::file(
            dir,
            format!("a prefix of {len} for this model has {} layers of {width}", spec.layers.len()),
        ));
    }
    let order = Reorder::of(model, Naming::HuggingFace).rows(Role::K, width, spec.head_dim);
    let columns = layers.len() * 2 * width;
    let mut values = vec![0.0; len * columns];
    for (slot, (keys, rest)) in layers.iter().enumerate() {
        for token in 0..len {
            let at = token * columns + 2 * slot * width;
            for c in 0..width {
                values[at + order.as_ref().map_or(c, |order| order[c])] = keys[token * width + c];
            }
            values[at + width..][..width].copy_from_slice(&rest[token * width..][..width]);
        }
    }
    let config = json!({
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "num_virtual_tokens": len,
        "num_layers": layers.len(),
        "num_attention_heads": spec.kv_heads,
        "num_transformer_submodules": 1,
        "token_dim": width,
        "encoder_hidden_size": width,
        "prefix_projection": false,
    });
    write(dir, &config, vec![("prompt_embeddings".to_owned(), vec![len, columns], values)])
}

/// Writes `pairs` as the adapter file that llama.cpp reads (`--lora`).
///
/// # Errors
/// When the family has no form in GGUF, or llama.cpp's adapters cannot say what was trained: DoRA, experts.
pub fn write_gguf(path: &Path, model: &Model, description: &Description, pairs: &[Pair<'_>]) -> Result<()> {
    let wrong = |what: &str| Error::file(path, what.to_owned());
    let form = model.family.gguf.ok_or_else(|| wrong("the family has no form in GGUF, so no adapter of it has"))?;
    if pairs.iter().any(|p| p.magnitude.is_some()) {
        return Err(wrong("llama.cpp's adapters have no DoRA: merge the adapter into the model instead"));
    }
    if pairs.iter().any(|p| p.role.expert().is_some()) {
        return Err(wrong("adapters on experts are not written as GGUF: merge the adapter into the model instead"));
    }
    if model.spec.tied_head && pairs.iter().any(|p| p.role == Role::Head) {
        return Err(wrong("the head is the embedding's matrix in GGUF, which takes no adapter of its own"));
    }
    let modules = modules(path, model, Naming::Gguf, description.rank, pairs)?;
    let mut metadata = Metadata::default();
    let mut set = |key: &str, value: Value| drop(metadata.0.insert(key.into(), value));
    set("general.architecture", Value::String(form.architecture.into()));
    set("general.type", Value::String("adapter".into()));
    set("adapter.type", Value::String("lora".into()));
    // Readers divide by the rank, whatever the adapter's own rule is.
    let alpha = description.scale() * description.rank as f32;
    set("adapter.lora.alpha", Value::Float(f64::from(alpha)));
    let mut tensors = Vec::new();
    for mut module in modules {
        // There is one alpha for all ranks: what a larger rank takes away is given back here.
        let grown = (module.rank / description.rank) as f32;
        module.b.iter_mut().for_each(|b| *b *= grown);
        let info =
            |end: &str, shape| TensorInfo { name: format!("{}.weight.{end}", module.name), format: Format::F32, shape };
        tensors.push((info("lora_a", vec![module.rank, module.cols]), module.a));
        tensors.push((info("lora_b", vec![module.rows, module.rank]), module.b));
    }
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = gguf::Writer::create(path, &metadata, &infos)?;
    for (info, values) in &tensors {
        writer.write(&info.name, &bytes(values))?;
    }
    writer.finish()
}

/// `pairs` under the names of `naming`, in the order of layers.
fn modules(path: &Path, model: &Model, naming: Naming, rank: usize, pairs: &[Pair<'_>]) -> Result<Vec<Module>> {
    let wrong = |what: String| Error::file(path, what);
    let family = model.family;
    // The parts of each module.
    type Parts<'a> = Vec<(Pair<'a>, Option<Rows>)>;
    let mut groups: BTreeMap<(usize, String), (Role, Parts<'_>)> = BTreeMap::new();
    for pair in pairs {
        let (role, layer) = (pair.role, pair.layer);
        let (whole, name, rows) = seat(model, naming, role, layer)
            .ok_or_else(|| wrong(format!("{role:?} of layer {layer} has no name to be written under")))?;
        groups.entry((layer, name)).or_insert_with(|| (whole, Vec::new())).1.push((*pair, rows));
    }
    let mut modules = Vec::with_capacity(groups.len());
    for ((layer, name), (role, mut parts)) in groups {
        let order = packing::parts(role, family.packing(naming, role), &model.spec, layer);
        parts.sort_by_key(|(pair, _)| order.iter().position(|(r, _)| *r == pair.role));
        let linear = |pair: &Pair<'_>| model.linears().find(|l| (l.role, l.layer) == (pair.role, pair.layer));
        // Parts that were trained with one A stay of its rank; others stand beside each other.
        let shared = parts.iter().all(|(pair, _)| pair.a == parts[0].0.a);
        let mut module = Module {
            cols: 0,
            rank: if shared { rank } else { rank * parts.len() },
            a: Vec::new(),
            b: Vec::new(),
            magnitude: None,
            rows: order.iter().map(|(_, rows)| rows.len()).sum(),
            role,
            name,
        };
        for (i, (pair, part)) in parts.iter().enumerate() {
            let linear =
                linear(pair).ok_or_else(|| wrong(format!("{:?} is no linear layer of the model", pair.role)))?;
            let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
            let whole = (rank > 0 && pair.a.len() == rank * cols && pair.b.len() == rows * rank)
                && pair.magnitude.is_none_or(|m| m.len() == rows);
            if !whole {
                return Err(wrong(format!("what was trained for {} has not the shape of its layer", module.name)));
            }
            if part.is_none() {
                module.rows = rows;
            }
            module.cols = cols;
            module.b.resize(module.rows * module.rank, 0.0);
            let first = if shared { 0 } else { i * rank };
            if first == module.a.len() / cols {
                module.a.extend_from_slice(pair.a);
            }
            let order = Reorder::of(model, naming).rows(pair.role, rows, model.spec.head_dim);
            for row in 0..rows {
                let there = place(order.as_deref(), part.as_ref(), row);
                module.b[there * module.rank + first..][..rank].copy_from_slice(&pair.b[row * rank..][..rank]);
                if let Some(magnitude) = pair.magnitude {
                    let rows = module.rows;
                    module.magnitude.get_or_insert_with(|| vec![0.0; rows])[there] = magnitude[row];
                }
            }
        }
        let dora = parts.iter().filter(|(pair, _)| pair.magnitude.is_some()).count();
        if dora > 0 && (dora < parts.len() || parts.len() < order.len()) {
            return Err(wrong(format!("DoRA on a part of {} cannot be written: train all of its parts", module.name)));
        }
        modules.push(module);
    }
    Ok(modules)
}

/// Fails where a matrix that is trained whole could not be written by [`write_peft`].
pub fn check_wholes(dir: &Path, model: &Model, wholes: &[Whole<'_>]) -> Result<()> {
    groups(dir, model, wholes).map(drop)
}

/// What is one matrix in the base's own files, and was trained whole.
struct Group<'a> {
    name: String,
    role: Role,
    layer: usize,
    /// The model's matrices, and which of its rows each has: `None` where it is all of it.
    parts: Vec<(Whole<'a>, Option<Rows>)>,
}

/// A module as PEFT saves it.
struct Saved {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
    /// The base's: it is not trained, and PEFT looks for it.
    bias: Option<Vec<f32>>,
}

fn groups<'a>(dir: &Path, model: &Model, wholes: &[Whole<'a>]) -> Result<Vec<Group<'a>>> {
    let family = model.family;
    let (mut groups, mut places) = (Vec::<Group<'a>>::new(), HashMap::<String, usize>::new());
    for whole in wholes {
        let (role, layer) = (whole.role, whole.layer);
        let (module, name, rows) = seat(model, Naming::HuggingFace, role, layer)
            .filter(|(module, ..)| !family.stacked(Naming::HuggingFace, *module))
            .ok_or_else(|| Error::file(dir, format!("{role:?} has no name that PEFT knows")))?;
        let at = *places.entry(name.clone()).or_insert(groups.len());
        if at == groups.len() {
            groups.push(Group { name, role: module, layer, parts: Vec::new() });
        }
        groups[at].parts.push((*whole, rows));
    }
    let incomplete = |g: &&Group<'_>| {
        let parts = packing::parts(g.role, family.packing(Naming::HuggingFace, g.role), &model.spec, g.layer);
        !parts.is_empty() && parts.len() != g.parts.len()
    };
    match groups.iter().find(incomplete) {
        Some(group) => Err(Error::file(dir, format!("only a part of {} was trained whole", group.name))),
        None => Ok(groups),
    }
}

impl Group<'_> {
    /// The matrix as the base's own files hold it.
    fn in_files(&self, dir: &Path, model: &Model) -> Result<Saved> {
        let naming = Naming::HuggingFace;
        let linear = |w: &Whole<'_>| model.linears().find(|l| (l.role, l.layer) == (w.role, w.layer));
        let shape = |w: &Whole<'_>| match linear(w) {
            Some(linear) => Some((linear.weight.rows(), linear.weight.cols())),
            None => (w.role == Role::Embedding).then(|| (model.embedding.weight.rows(), model.embedding.weight.cols())),
        };
        let mut all = 0;
        for (whole, _) in &self.parts {
            match shape(whole).filter(|(rows, cols)| rows * cols == whole.values.len()) {
                Some((rows, _)) => all += rows,
                None => {
                    let what = format!("what was trained for {} has not the shape of its layer", self.name);
                    return Err(Error::file(dir, what));
                }
            }
        }
        let cols = self.parts.first().and_then(|(whole, _)| shape(whole)).map_or(0, |(_, cols)| cols);
        let (mut values, mut bias) = (vec![0.0; all * cols], None);
        for (whole, part) in &self.parts {
            let rows = whole.values.len() / cols;
            let order = Reorder::of(model, naming).rows(whole.role, rows, model.spec.head_dim);
            let own = linear(whole).and_then(|l| l.bias.as_ref());
            for row in 0..rows {
                let there = place(order.as_deref(), part.as_ref(), row);
                values[there * cols..][..cols].copy_from_slice(&whole.values[row * cols..][..cols]);
                if let Some(own) = own {
                    bias.get_or_insert_with(|| vec![0.0; all])[there] = own.values[row];
                }
            }
        }
        let name = self.name.clone();
        if model.family.is_transposed(naming, self.role) {
            let turned = (0..cols).flat_map(|c| (0..all).map(move |r| r * cols + c)).map(|at| values[at]).collect();
            return Ok(Saved { name, shape: vec![cols, all], values: turned, bias });
        }
        Ok(Saved { name, shape: vec![all, cols], values, bias })
    }
}

/// The module of files of `naming` that the matrix `role` is in, its name, and which of its rows are the matrix's: `None`
/// where it is all of it.
fn seat(model: &Model, naming: Naming, role: Role, layer: usize) -> Option<(Role, String, Option<Rows>)> {
    let (module, name) = model.module(naming, role, layer)?;
    let parts = packing::parts(module, model.family.packing(naming, module), &model.spec, layer);
    Some((module, name, parts.into_iter().find(|(r, _)| *r == role).map(|(_, rows)| rows)))
}

/// Where a file has row `row` of the model's matrix, whose rows stand there in `order` and among others as `part` says.
fn place(order: Option<&[usize]>, part: Option<&Rows>, row: usize) -> usize {
    let there = order.map_or(row, |order| order[row]);
    match part {
        None => there,
        Some(Rows::Range(range)) => range.start + there,
        Some(Rows::Order(order)) => order[there],
    }
}

/// How PEFT is told of the modules `saved`: by the ends of their names, or by all of each name where its end is that of
/// another module, too. PEFT compares letters, so `gate` would mean a `shared_gate`.
fn saved_names<'a>(model: &Model, saved: impl Iterator<Item = &'a str>) -> Vec<String> {
    let saved: Vec<&str> = saved.collect();
    let linears = model.linears().filter_map(|l| model.module(Naming::HuggingFace, l.role, l.layer));
    let names = linears.map(|(_, name)| name).chain(model.family.name(Naming::HuggingFace, Role::Embedding, 0));
    let own: HashSet<&str> = saved.iter().copied().collect();
    let others: HashSet<String> = names.filter(|name| !own.contains(name.as_str())).collect();
    let mut told: Vec<String> = Vec::new();
    for name in saved {
        let end = name.rsplit('.').next().unwrap_or(name);
        let end = if others.iter().any(|other| other.ends_with(end)) { name } else { end };
        if !told.iter().any(|t| t == end) {
            told.push(end.to_owned());
        }
    }
    told
}

/// The two files of a PEFT adapter. The configuration goes first: an adapter that was there keeps its numbers until the
/// new ones are whole.
fn write(dir: &Path, config: &Json, tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let path = dir.join("adapter_config.json");
    let text = serde_json::to_string_pretty(config).map_err(|e| Error::file(&path, e.to_string()))?;
    let mut file = AtomicFile::create(&path)?;
    file.write_all(text.as_bytes()).map_err(|e| Error::io(&path, e))?;
    file.commit()?;
    let entry = |(name, shape, _): &(String, Vec<usize>, Vec<f32>)| Entry {
        name: name.clone(),
        dtype: "F32".into(),
        shape: shape.clone(),
    };
    let entries: Vec<Entry> = tensors.iter().map(entry).collect();
    let mut writer = safetensors::Writer::create(&dir.join("adapter_model.safetensors"), &entries)?;
    for (name, _, values) in &tensors {
        writer.write(name, &bytes(values))?;
    }
    writer.finish()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
