//! Adapters: PEFT directories and llama.cpp's GGUF adapters, read and attached to the linear layers they change, and
//! written.

pub mod write;

use crate::checkpoint::{Bytes, Checkpoint, Tensor, TensorInfo, huggingface, pytorch, safetensors};
use crate::families::{self, Config, Naming, Role};
use crate::model::{Linear, LowRank, Model, Prefix, Vector, Weight};
use crate::packing::{self, Rows};
use crate::rope::reorder;
use crate::{Error, Result};
use regex::Regex;
use rushlight_quant::formats::Format;
use rushlight_quant::ops::RopeLayout;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Puts `adapters` in force on `model` instead of those it has, each with its strength (1 as trained; they add up).
/// On an error the model keeps those it has.
pub fn attach(model: &mut Model, adapters: &[(PathBuf, f32)]) -> Result<()> {
    let (mut changes, mut prefix) = (Vec::new(), None);
    for (path, strength) in adapters {
        if !strength.is_finite() {
            return Err(Error::file(path, format!("the adapter's scale is {strength}, not a number")));
        }
        let read = match read(path, *strength, model)? {
            Adapter::Changes(changes) => changes,
            Adapter::Prefix(_) if prefix.is_some() => {
                return Err(Error::file(
                    path,
                    "only one prefix can stand before a sequence, and another adapter has one",
                ));
            }
            Adapter::Prefix(_) if *strength != 1.0 => {
                return Err(Error::file(path, "a prefix cannot be scaled; leave its scale out"));
            }
            Adapter::Prefix(p) => {
                prefix = Some(p);
                continue;
            }
        };
        for change in read {
            let same = |c: &Change| (c.role, c.layer) == (change.role, change.layer);
            if matches!(change.what, What::Replacement(_))
                && changes.iter().any(|c| same(c) && matches!(c.what, What::Replacement(_)))
            {
                return Err(Error::file(
                    path,
                    format!("it replaces {:?}, which another adapter already does; use one of them", change.role),
                ));
            }
            changes.push(change);
        }
    }
    model.embedding.replacement = None;
    model.prefix = prefix.or_else(|| model.own_prefix.clone());
    for linear in model.linears_mut() {
        linear.adapters.clear();
        linear.replacement = None;
        if let Some(own) = linear.own_bias.take() {
            linear.bias = Some(own);
        }
    }
    for Change { role, layer, what } in changes {
        let linear = model.linears_mut().find(|l| (l.role, l.layer) == (role, layer));
        match (what, linear) {
            (What::LowRank(low_rank), Some(linear)) => linear.adapters.push(low_rank),
            (What::Replacement(weight), Some(linear)) => linear.replacement = Some(weight),
            (What::Bias(values), Some(linear)) => {
                if let Some(own) = &linear.bias {
                    let bias = Vector { id: own.id, values };
                    linear.own_bias = linear.bias.replace(bias);
                }
            }
            (What::Replacement(weight), None) => model.embedding.replacement = Some(weight),
            (What::LowRank(_) | What::Bias(_), None) => {}
        }
    }
    Ok(())
}

/// What was read from an adapter's files.
enum Adapter {
    Changes(Vec<Change>),
    Prefix(Prefix),
}

/// What an adapter does to one weight of the model.
struct Change {
    role: Role,
    layer: usize,
    what: What,
}

enum What {
    LowRank(LowRank),
    Replacement(Weight),
    /// Of a layer that is replaced.
    Bias(Vec<f32>),
}

/// The tensors an adapter has for one module.
#[derive(Default)]
struct Parts {
    a: Option<Tensor>,
    b: Option<Tensor>,
    magnitude: Option<Tensor>,
    replacement: Option<Tensor>,
    bias: Option<Tensor>,
}

fn read(path: &Path, strength: f32, model: &Model) -> Result<Adapter> {
    let about = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    match about.is_dir() {
        true => read_peft(path, strength, model),
        false => Ok(Adapter::Changes(read_gguf(path, strength, model)?)),
    }
}

/// A directory that PEFT wrote: adapter_config.json and adapter_model.safetensors; or a run of `rushlight train`, which has one in
/// it.
fn read_peft(dir: &Path, strength: f32, model: &Model) -> Result<Adapter> {
    let (dir, name) = (&mut dir.to_owned(), "adapter_config.json");
    if !dir.join(name).exists() && dir.join("adapter").join(name).exists() {
        dir.push("adapter");
    }
    let config_path = dir.join(name);
    let config = huggingface::read_config(&config_path)?;
    let config = Config::new(&config, &config_path);
    let (safe, old) = (dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin"));
    let (weights, (tensors, raw)) = match !safe.exists() && old.exists() {
        true => pytorch::open(&old).map(|file| (old, (file.tensors, file.raw)))?,
        false => safetensors::open(&safe).map(|file| (safe, (file.tensors, file.raw)))?,
    };
    let peft = match config.str("peft_type") {
        Some("LORA") => Peft::read(&config)?,
        Some("PREFIX_TUNING") => return Ok(Adapter::Prefix(read_prefix(&config, &weights, &tensors, model)?)),
        Some(other) => {
            return Err(config.error(format!(
                "adapters of type {other} are not supported; LORA (DoRA and rsLoRA too) and PREFIX_TUNING are"
            )));
        }
        None => return Err(config.error("the field peft_type is missing: not an adapter that PEFT wrote")),
    };
    let mut odd: Vec<String> = raw.into_iter().map(|t| t.name).collect();
    let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
    for tensor in tensors {
        let name = tensor.info.name.clone();
        // Some versions keep the adapter's own name, `default`, inside.
        let plain = name.strip_prefix("base_model.model.").unwrap_or(&name).replace(".default.", ".");
        let plain = plain.strip_suffix(".default").unwrap_or(&plain);
        let part = |end| plain.strip_suffix(end).map(str::to_owned);
        if plain.ends_with(".base_layer.weight") || plain.ends_with(".base_layer.bias") {
            // PEFT saves the frozen head beside an adapter on it.
        } else if let Some(module) = part(".lora_A.weight") {
            modules.entry(module).or_default().a = Some(tensor);
        } else if let Some(module) = part(".lora_B.weight") {
            modules.entry(module).or_default().b = Some(tensor);
        } else if let Some(module) = part(".lora_magnitude_vector").or(part(".lora_magnitude_vector.weight")) {
            modules.entry(module).or_default().magnitude = Some(tensor);
        } else if let Some(module) = part(".modules_to_save.weight").or(part(".weight")) {
            modules.entry(module).or_default().replacement = Some(tensor);
        } else if let Some(module) = part(".modules_to_save.bias").or(part(".bias")) {
            modules.entry(module).or_default().bias = Some(tensor);
        } else {
            odd.push(name);
        }
    }
    if !odd.is_empty() {
        return Err(Error::file(&weights, format!("it holds tensors that are not understood: {}", odd.join(", "))));
    }
    let fit = Fit { path: dir, model, strength, reorder: Reorder::of(model, Naming::HuggingFace) };
    Ok(Adapter::Changes(fit.changes(modules, Naming::HuggingFace, |module, rank| peft.scale(module, rank))?))
}

/// Prefix-tuning: `prompt_embeddings`, `[tokens, layers * 2 * kv_width]`, keys before values in each layer.
fn read_prefix(config: &Config<'_>, path: &Path, tensors: &[Tensor], model: &Model) -> Result<Prefix> {
    let spec = &model.spec;
    let (layers, width) = (spec.layers.len(), spec.kv_width());
    let len = config.usize("num_virtual_tokens")?;
    let [tensor] = tensors else {
        return Err(Error::file(
            path,
            "a prefix should be one tensor, prompt_embeddings; save it without prefix_projection",
        ));
    };
    let (info, columns) = (&tensor.info, layers * 2 * width);
    let values = families::floats(info.format, &tensor.data).filter(|_| info.name == "prompt_embeddings" && len > 0);
    let values = values.filter(|_| info.shape == [len, columns]).ok_or_else(|| {
        Error::file(
            path,
            format!(
                "{} is {:?} but this model needs prompt_embeddings of [{len}, {columns}]: the adapter belongs to another base",
                info.name, info.shape
            ),
        )
    })?;
    let order = Reorder::of(model, Naming::HuggingFace).rows(Role::K, width, spec.head_dim);
    Ok(Prefix::new(len, true, spec, &values, order.as_deref()))
}

/// What adapter_config.json says about scales.
struct Peft<'a> {
    config: &'a Config<'a>,
    rank: usize,
    alpha: f32,
    ranks: Vec<(Regex, f32)>,
    alphas: Vec<(Regex, f32)>,
    rslora: bool,
}

impl<'a> Peft<'a> {
    fn read(config: &'a Config<'a>) -> Result<Peft<'a>> {
        if let Some(bias) = config.str("bias").filter(|&b| b != "none") {
            return Err(
                config.error(format!("bias = '{bias}' is not supported: only adapters that leave biases alone are"))
            );
        }
        for switch in ["use_qalora", "use_bdlora", "lora_bias"] {
            if config.bool_or(switch, false)? {
                return Err(config.error(format!("{switch} is not supported")));
            }
        }
        for field in ["layer_replication", "alora_invocation_tokens", "target_parameters", "trainable_token_indices"] {
            if config.get(field).is_some_and(|v| v.as_array().is_none_or(|list| !list.is_empty())) {
                return Err(config.error(format!("{field} is not supported")));
            }
        }
        // These start by changing the base's weights, so the adapter alone does not fit the base it names.
        if let Some(init) = config.str("init_lora_weights")
            && ["pissa", "olora", "corda"].iter().any(|other| init.starts_with(other))
        {
            return Err(config.error(format!(
                "it was trained on weights that init_lora_weights = '{init}' had changed; save it from PEFT as an \
                 ordinary LoRA (path_initial_model_for_weight_conversion)"
            )));
        }
        Ok(Peft {
            config,
            rank: config.usize("r")?,
            alpha: config.f32("lora_alpha")?,
            ranks: patterns(config, "rank_pattern")?,
            alphas: patterns(config, "alpha_pattern")?,
            rslora: config.bool_or("use_rslora", false)?,
        })
    }

    /// The scale of `module`, whose matrices have `rank`.
    fn scale(&self, module: &str, rank: usize) -> Result<f32> {
        let named = |patterns: &[(Regex, f32)]| patterns.iter().find(|(p, _)| p.is_match(module)).map(|(_, x)| *x);
        let said = named(&self.ranks).unwrap_or(self.rank as f32);
        if said != rank as f32 {
            return Err(self.config.error(format!("it gives {module} the rank {said}, but its matrices have {rank}")));
        }
        let alpha = named(&self.alphas).unwrap_or(self.alpha);
        Ok(alpha / if self.rslora { said.sqrt() } else { said })
    }
}

/// The patterns of a field such as `rank_pattern`: each is a regular expression for the end of a module's name.
fn patterns(config: &Config<'_>, field: &str) -> Result<Vec<(Regex, f32)>> {
    let Some(map) = config.get(field).and_then(|v| v.as_object()) else { return Ok(Vec::new()) };
    let each = map.iter().map(|(key, value)| {
        let pattern = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).ok();
        let value = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite() && *x > 0.0);
        pattern.zip(value).ok_or_else(|| config.error(format!("the entry '{key}' of {field} is not understood")))
    });
    each.collect()
}

/// A GGUF file with `general.type = adapter`.
fn read_gguf(path: &Path, strength: f32, model: &Model) -> Result<Vec<Change>> {
    let file = Checkpoint::open(path)?;
    let wrong = |what: String| Error::file(path, what);
    let metadata = file.metadata().ok_or_else(|| wrong("not a GGUF file".into()))?;
    if metadata.str("general.type") != Some("adapter") || metadata.str("adapter.type") != Some("lora") {
        return Err(wrong("it is not a LoRA adapter (general.type = adapter, adapter.type = lora)".into()));
    }
    let (theirs, ours) = (metadata.str("general.architecture"), model.family.gguf.map(|g| g.architecture));
    if theirs.is_none() || theirs != ours {
        return Err(wrong(format!(
            "the adapter is for the architecture '{}', the model is of the family {}: it belongs to another base",
            theirs.unwrap_or("(none named)"),
            model.family.name
        )));
    }
    let alpha = metadata.f32("adapter.lora.alpha").unwrap_or(0.0);
    let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
    for info in file.tensors() {
        let tensor = file.tensor(&info.name)?;
        let part = |end| info.name.strip_suffix(end).map(str::to_owned);
        if let Some(module) = part(".weight.lora_a") {
            modules.entry(module).or_default().a = Some(tensor);
        } else if let Some(module) = part(".weight.lora_b") {
            modules.entry(module).or_default().b = Some(tensor);
        } else {
            return Err(wrong(format!("it holds a tensor that is not understood: {}", info.name)));
        }
    }
    let fit = Fit { path, model, strength, reorder: Reorder::of(model, Naming::Gguf) };
    fit.changes(modules, Naming::Gguf, |_, rank| Ok(if alpha == 0.0 { 1.0 } else { alpha / rank as f32 }))
}

/// Between two orders of the rows of queries and keys.
#[derive(Clone, Copy)]
struct Reorder(Option<(RopeLayout, RopeLayout)>);

impl Reorder {
    /// From an adapter with names of `naming` to the model as it was loaded.
    fn of(model: &Model, naming: Naming) -> Reorder {
        let reordered = model.family.gguf.is_some_and(|g| g.reordered);
        Reorder(match (naming, model.naming) {
            (Naming::HuggingFace, Naming::Gguf) if reordered => Some((RopeLayout::Half, RopeLayout::Interleaved)),
            (Naming::Gguf, Naming::HuggingFace) if reordered => Some((RopeLayout::Interleaved, RopeLayout::Half)),
            _ => None,
        })
    }

    /// The order that the rows of a weight in `role` are to take; `None` where they stay.
    fn rows(self, role: Role, rows: usize, head_dim: usize) -> Option<Vec<usize>> {
        let (from, to) = self.0.filter(|_| matches!(role, Role::Q | Role::K))?;
        Some(reorder(rows, head_dim, head_dim, from, to))
    }
}

/// One of the model's matrices, and which rows of an adapter's tensors are its own: all of them, or some of `total`.
struct Piece {
    role: Role,
    layer: usize,
    rows: Option<Rows>,
    total: usize,
}

/// Fits what an adapter holds to the model's layers.
struct Fit<'a> {
    path: &'a Path,
    model: &'a Model,
    strength: f32,
    reorder: Reorder,
}

impl Fit<'_> {
    fn error(&self, what: String) -> Error {
        Error::file(self.path, what)
    }

    fn changes(
        &self,
        modules: BTreeMap<String, Parts>,
        naming: Naming,
        scale: impl Fn(&str, usize) -> Result<f32>,
    ) -> Result<Vec<Change>> {
        if modules.is_empty() {
            return Err(self.error("the adapter is empty: it changes no weight".into()));
        }
        let strangers: Vec<&str> = (modules.keys().map(String::as_str))
            .filter(|m| self.model.family.role(naming, m).is_none_or(|(_, layer)| layer >= self.model.layers.len()))
            .collect();
        if !strangers.is_empty() {
            // One for each layer would fill the screen.
            let more = strangers.len().saturating_sub(3);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            return Err(self.error(format!(
                "the adapter belongs to another base: this {} model of {} layers has no {}{more}",
                self.model.family.name,
                self.model.layers.len(),
                strangers[..strangers.len().min(3)].join(", ")
            )));
        }
        let mut changes = Vec::new();
        for (module, mut parts) in modules {
            let Some((role, layer)) = self.model.family.role(naming, &module) else { continue };
            if self.model.family.is_transposed(naming, role) {
                parts.replacement = parts.replacement.map(|tensor| turned(&tensor).unwrap_or(tensor));
            }
            let spec = &self.model.spec;
            // An adapter of a packed matrix is one of each of its parts, with the rows that belong to it.
            let packed = packing::parts(role, self.model.family.packing(naming, role), spec, layer);
            let total: usize = packed.iter().map(|(_, rows)| rows.len()).sum();
            let pieces = match packed.is_empty() {
                true => vec![Piece { role, layer, rows: None, total: 0 }],
                false => {
                    packed.into_iter().map(|(role, rows)| Piece { role, layer, rows: Some(rows), total }).collect()
                }
            };
            for piece in &pieces {
                self.piece(&module, piece, &parts, &scale, &mut changes)?;
            }
        }
        Ok(changes)
    }

    /// What the tensors `parts` of `module` do to one of its matrices.
    fn piece(
        &self,
        module: &str,
        piece: &Piece,
        parts: &Parts,
        scale: &impl Fn(&str, usize) -> Result<f32>,
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        let (role, layer) = (piece.role, piece.layer);
        let linear = self.model.linears().find(|l| (l.role, l.layer) == (role, layer));
        if let Some(tensor) = &parts.replacement {
            let base = match (linear, role) {
                (Some(linear), _) => &linear.weight,
                (None, Role::Embedding) => &self.model.embedding.weight,
                (None, _) => return Err(self.error(format!("replacing {module} is not supported"))),
            };
            let weight = self.part(tensor, piece, base.rows(), base.cols())?;
            changes.push(Change { role, layer, what: What::Replacement(self.in_order(role, weight)) });
        }
        if let Some(tensor) = &parts.bias {
            let own = linear.and_then(|l| l.bias.as_ref()).filter(|_| parts.replacement.is_some());
            let own = own.ok_or_else(|| self.error(format!("{} is of no bias of this model", tensor.info.name)))?;
            let values = self.vector(tensor, role, piece, own.values.len())?;
            if values != own.values {
                changes.push(Change { role, layer, what: What::Bias(values) });
            }
        }
        let low_rank = match (&parts.a, &parts.b) {
            (None, None) if parts.magnitude.is_none() => return Ok(()),
            (Some(a), Some(b)) => {
                let linear = linear.ok_or_else(|| {
                    self.error(format!("an adapter on {module}, which is not a linear layer, is not supported"))
                })?;
                let rank = a.info.shape.first().copied().unwrap_or(0);
                let scale = scale(module, rank)?;
                self.low_rank(linear, piece, a, b, scale, parts.magnitude.as_ref())?
            }
            _ => return Err(self.error(format!("{module} has only a part of its adapter: the file is incomplete"))),
        };
        changes.push(Change { role, layer, what: What::LowRank(low_rank) });
        Ok(())
    }

    /// The rows of `tensor` that belong to a piece of `rows`.
    fn part(&self, tensor: &Tensor, piece: &Piece, rows: usize, cols: usize) -> Result<Weight> {
        let Some(part) = &piece.rows else { return self.matrix(tensor, rows, cols) };
        let whole = self.matrix(tensor, piece.total, cols)?;
        part.of(&whole).ok_or_else(|| self.error(format!("{} has too few rows", tensor.info.name)))
    }

    fn low_rank(
        &self,
        linear: &Linear,
        piece: &Piece,
        a: &Tensor,
        b: &Tensor,
        scale: f32,
        magnitude: Option<&Tensor>,
    ) -> Result<LowRank> {
        let base = &linear.weight;
        let rank = a.info.shape.first().copied().unwrap_or(0);
        if rank == 0 || !scale.is_finite() {
            return Err(self.error(format!("{} has rank {rank} and scale {scale}", a.info.name)));
        }
        let a = self.matrix(a, rank, base.cols())?;
        let b = self.in_order(linear.role, self.part(b, piece, base.rows(), rank)?);
        let gain = match magnitude {
            None => None,
            Some(tensor) => {
                let values = self.vector(tensor, linear.role, piece, base.rows())?;
                Some(gain(base, &a, &b, scale, values))
            }
        };
        Ok(LowRank { a, b, scale, strength: self.strength, gain })
    }

    /// What `tensor` has for each of the `rows` of a piece.
    fn vector(&self, tensor: &Tensor, role: Role, piece: &Piece, rows: usize) -> Result<Vec<f32>> {
        let all = if piece.rows.is_some() { piece.total } else { rows };
        let values = families::floats(tensor.info.format, &tensor.data).filter(|v| v.len() == all);
        let values = values.ok_or_else(|| {
            let (name, shape) = (&tensor.info.name, &tensor.info.shape);
            self.error(format!("{name} is {shape:?}, not [{all}]: it belongs to another base"))
        })?;
        let values = piece.rows.as_ref().map_or(values.clone(), |part| part.of_values(&values));
        Ok(match self.reorder.rows(role, rows, self.model.spec.head_dim) {
            Some(order) => order.iter().map(|&i| values[i]).collect(),
            None => values,
        })
    }

    /// The tensor as a matrix, if it has this shape and is stored in floating point.
    fn matrix(&self, tensor: &Tensor, rows: usize, cols: usize) -> Result<Weight> {
        let info = &tensor.info;
        if info.shape != [rows, cols] {
            return Err(self.error(format!(
                "{} is {:?} but this model needs [{rows}, {cols}]: the adapter belongs to another base",
                info.name, info.shape
            )));
        }
        Weight::new(info.format, rows, cols, tensor.data.clone())
            .ok_or_else(|| self.error(format!("{} cannot be stored as {}", info.name, info.format)))
    }

    fn in_order(&self, role: Role, weight: Weight) -> Weight {
        match self.reorder.rows(role, weight.rows(), self.model.spec.head_dim) {
            Some(order) => weight.with_rows(&order),
            None => weight,
        }
    }
}

/// A matrix of floats the other way round.
fn turned(tensor: &Tensor) -> Option<Tensor> {
    let &[inputs, outputs] = &tensor.info.shape[..] else { return None };
    let values = families::floats(tensor.info.format, &tensor.data).filter(|v| v.len() == inputs * outputs)?;
    let places = (0..outputs).flat_map(|o| (0..inputs).map(move |i| i * outputs + o));
    let data: Vec<u8> = places.flat_map(|at| values[at].to_le_bytes()).collect();
    let info = TensorInfo { format: Format::F32, shape: vec![outputs, inputs], ..tensor.info.clone() };
    Some(Tensor { info, data: Bytes::new(data) })
}

/// DoRA's factor for each output: magnitude over the norm of `weight + scale * b * a` (Liu et al. 2024).
fn gain(weight: &Weight, a: &Weight, b: &Weight, scale: f32, magnitude: Vec<f32>) -> Vec<f32> {
    let decode = |format: Format, bytes: &[u8], out: &mut [f32]| format.decode(bytes, out);
    let (cols, rank) = (weight.cols(), a.rows());
    let mut a_values = vec![0.0; rank * cols];
    decode(a.format(), a.data(), &mut a_values);
    let (mut row, mut low) = (vec![0.0; cols], vec![0.0; rank]);
    let each = magnitude.into_iter().enumerate().map(|(o, m)| {
        weight.decode_row(o, &mut row);
        decode(b.format(), b.row(o), &mut low);
        for (a, b) in a_values.chunks_exact(cols).zip(&low) {
            for (w, a) in row.iter_mut().zip(a) {
                *w += scale * b * a;
            }
        }
        let square: f64 = row.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        m / square.sqrt() as f32
    });
    each.collect()
}
