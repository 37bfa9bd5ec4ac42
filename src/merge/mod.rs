//! Merging: adapters folded into the weights of a model, which is written as a GGUF file or a Hugging Face directory.

use crate::quantize::plan::{GivenImatrix, Plan, Planned};
use crate::quantize::types::{Keep, Target, Wishes};
use crate::quantize::write::{Change, Options, stream};
use anyhow::{Context, Result, bail};
use rushlight_models::adapter;
use rushlight_models::checkpoint::export::FloatWriter;
use rushlight_models::checkpoint::{Checkpoint, Kind, Metadata, TensorInfo};
use rushlight_models::convert::{Converted, Source};
use rushlight_models::families::{Naming, Role};
use rushlight_models::fold::Folding;
use rushlight_models::model::Model;
use rushlight_quant::formats::Format;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The model of `checkpoint` with `adapters` in force, each with its strength.
///
/// # Errors
/// When an adapter does not fit, or is a prefix, which is no change of weights.
pub fn attached(checkpoint: &Checkpoint, adapters: &[(PathBuf, f32)]) -> Result<Model> {
    let mut model = Model::load(checkpoint)?;
    adapter::attach(&mut model, adapters)?;
    if let Err(e) = Folding::new(&model) {
        let is_prefix = |dir: &PathBuf| {
            let config = std::fs::read(dir.join("adapter_config.json")).unwrap_or_default();
            let config: Value = serde_json::from_slice(&config).unwrap_or_default();
            config["peft_type"] == "PREFIX_TUNING"
        };
        let named = adapters.iter().map(|(path, _)| path).find(|path| is_prefix(path));
        bail!("{}: {e}", named.map_or_else(String::new, |path| path.display().to_string()));
    }
    Ok(model)
}

/// Plans a GGUF file of `target` in which the adapters of `model`, loaded from `checkpoint`, are part of the weights.
/// Where that is the type the file already has, every tensor keeps its format, and what no adapter changes its bytes.
pub fn plan_gguf(
    checkpoint: &Checkpoint,
    model: &Model,
    target: Target,
    wishes: &Wishes,
    imatrix: Option<&GivenImatrix>,
) -> Result<Plan> {
    let folding = Folding::new(model)?;
    let mut plan = Plan::new(checkpoint, target, wishes, imatrix)?;
    let same = checkpoint.metadata().and_then(|m| m.u64("general.file_type")) == Some(target.file_type.into());
    if same && imatrix.is_none() && wishes.keep.is_empty() {
        for tensor in &mut plan.tensors {
            (tensor.format, tensor.instead_of) = (tensor.source.format, None);
        }
        plan.notes.clear();
    }
    if folding.unties() {
        let name = model.family.name(Naming::Gguf, Role::Head, 0).context("its GGUF form has no place for a head")?;
        let table = plan.tensors.iter().find(|t| t.source.role == Some((Role::Embedding, 0)));
        let table = table.context("it has no table of embeddings")?;
        let source = Converted {
            name: format!("{name}.weight"),
            role: Some((Role::Head, 0)),
            source: table.source.source.clone(),
            shape: table.source.shape.clone(),
            format: table.source.format,
        };
        plan.tensors.push(Planned::new(checkpoint, source, table.format));
        plan.notes.push("the head is no longer the embedding: it is written as a tensor of its own".into());
    }
    for tensor in &mut plan.tensors {
        tensor.fold = folding.converted(&tensor.source)?;
    }
    folding.check_complete(plan.tensors.iter().filter_map(|t| t.fold.as_ref()))?;
    plan.notes.extend(lossy(&plan.tensors));
    Ok(plan)
}

/// A directory to be written: what [`plan_directory`] gives and [`write_directory`] takes.
pub struct Directory {
    /// The tensors, as a plan without metadata.
    pub plan: Plan,
    config: Value,
}

/// Plans a Hugging Face directory of floats like `checkpoint`, in which the adapters of `model` are part of the weights:
/// as the tensors are stored there (f16 for those that are quantized), or matrices in `format`.
pub fn plan_directory(
    checkpoint: &Checkpoint,
    model: &Model,
    format: Option<Format>,
    keep: &[Keep],
) -> Result<Directory> {
    let Kind::HuggingFace { config, .. } = checkpoint.kind() else {
        bail!(
            "{}: a directory can only be made from a directory: end the output with .gguf",
            checkpoint.path().display()
        );
    };
    let fits = |keep: &&Keep| checkpoint.tensors().iter().any(|info| keep.pattern.is_match(&info.name));
    if let Some(other) = keep.iter().find(|keep| !fits(keep)) {
        bail!("--keep '{}' fits no tensor of {}", other.pattern, checkpoint.path().display());
    }
    let folding = Folding::new(model)?;
    let mut tensors: Vec<Planned> = Vec::with_capacity(checkpoint.tensors().len() + 1);
    for info in checkpoint.tensors() {
        // A head that is stored although it is the embedding would be out of date; its bias, which is not, stays.
        if model.spec.tied_head && folding.role(info) == Some(Role::Head) && info.shape.len() > 1 {
            continue;
        }
        let own = if info.format.is_float() { info.format } else { Format::F16 };
        let kept = keep.iter().find(|k| k.pattern.is_match(&info.name)).map(|k| k.format);
        let format = kept.or(format.filter(|_| info.shape.len() > 1)).unwrap_or(own);
        let mut planned = Planned::new(checkpoint, converted(info), format);
        planned.fold = folding.stored(info)?;
        tensors.push(planned);
    }
    let mut config = config.clone();
    let mut notes = Vec::new();
    if folding.unties() {
        let table = tensors.iter().position(|t| folding.role(&t.source.info()) == Some(Role::Embedding));
        let table = table.context("it has no table of embeddings")?;
        let name =
            model.family.name(Naming::HuggingFace, Role::Head, 0).context("the family has no name for a head")?;
        let (source, format) = (tensors[table].source.clone(), tensors[table].format);
        let head = Converted { name: format!("{name}.weight"), ..source };
        let fold = folding.stored(&head.info())?;
        tensors.push(Planned { fold, ..Planned::new(checkpoint, head, format) });
        config["tie_word_embeddings"] = json!(false);
        notes.push("the head is no longer the embedding: it is written as a tensor of its own".into());
    }
    folding.check_complete(tensors.iter().filter_map(|t| t.fold.as_ref()))?;
    let greatest = tensors.iter().filter(|t| t.source.shape.len() > 1).max_by_key(|t| t.elements());
    let dtype = match greatest.map(|t| t.format) {
        Some(Format::F16) => "float16",
        Some(Format::BF16) => "bfloat16",
        _ => "float32",
    };
    let field = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    config[field] = json!(dtype);
    if let Some(fields) = config.as_object_mut() {
        fields.remove("quantization_config");
    }
    notes.extend(lossy(&tensors));
    // Wide elements first, so that each tensor lies at a multiple of its elements' size.
    tensors.sort_by_key(|t| std::cmp::Reverse(t.format.block_bytes()));
    let target = match dtype {
        "float16" => "F16",
        "bfloat16" => "BF16",
        _ => "F32",
    };
    let target = Target::parse(target).map_err(anyhow::Error::msg)?;
    Ok(Directory { plan: Plan { target, metadata: Metadata::default(), tensors, notes }, config })
}

/// Writes `directory`, planned for `checkpoint`, as `output`, which appears when it is whole. `progress` is told how many
/// bytes of the source are done.
pub fn write_directory(
    directory: &Directory,
    checkpoint: &Checkpoint,
    output: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Change> {
    let Directory { plan, config } = directory;
    let infos = plan.tensors.iter().map(|t| TensorInfo { format: t.format, ..t.source.info() });
    let infos: Vec<TensorInfo> = infos.collect();
    let mut writer = FloatWriter::create(checkpoint, output, &infos, config.clone())?;
    let change = stream(plan, checkpoint, output, options, progress, &mut |name, bytes| writer.write(name, bytes))?;
    writer.finish()?;
    Ok(change)
}

/// The tensor as it stands.
fn converted(info: &TensorInfo) -> Converted {
    Converted {
        name: info.name.clone(),
        format: info.format,
        shape: info.shape.clone(),
        role: None,
        source: Source::Tensor { name: info.name.clone(), rows: None, offset: 0.0 },
    }
}

/// What becomes of the errors that a quantized base has.
fn lossy(tensors: &[Planned]) -> Option<String> {
    let quantized = |t: &&Planned| t.fold.is_some() && !t.source.format.is_float();
    let count = tensors.iter().filter(quantized).count();
    let first = tensors.iter().find(quantized)?;
    Some(format!(
        "{count} of the tensors that the adapters change are quantized in the source ({} is {}), and its errors are merged \
         with them: merge into the F16 or BF16 model where there is one",
        first.source.name, first.source.format
    ))
}
