//! From what a person asks for to a run that can begin: everything that can be wrong is found here, before any work.

use super::Settings;
use super::base::Base;
use super::classify::Classification;
use super::folder::{Arguments, Folder, base_hash, short};
use super::optimizer::Rule;
use super::plan::{Plan, Wish, grouped};
use super::schedule::{Schedule, Shape};
use crate::engine::loaded::given_template;
use crate::train::data::{DataSettings, Dataset, Source, TooLong, auto_batch_size, load};
use crate::train::tape::{Method, check_lora};
use anyhow::{Context, Result, bail, ensure};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::model::Model;
use rushlight_models::tokenizer::{ChatTemplate, Tokenizer};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Longest sequence where none is asked for.
const LONGEST: usize = 2048;
/// Epochs where no number of steps or epochs is asked for, as OpenAI's fine-tuning has it.
const EPOCHS: f64 = 4.0;
/// The share of the steps in which the learning rate grows.
const WARMUP: f64 = 0.03;

/// What a person asks for. `None`: what is best for the method, the model and the data.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Request {
    pub model: PathBuf,
    pub data: Vec<Source>,
    pub validation: Vec<Source>,
    pub val_split: Option<f64>,
    pub columns: Option<(String, String)>,
    pub too_long: TooLong,
    pub train_on_inputs: bool,
    /// A built-in template, a file, or `none`.
    pub template: Option<String>,
    pub max_seq_len: Option<usize>,
    pub method: Method,
    pub base: Base,
    pub epochs: Option<f64>,
    pub max_steps: Option<u64>,
    pub batch: Option<usize>,
    pub accumulate: usize,
    pub rate: Option<f64>,
    pub rate_multiplier: f64,
    pub shape: Shape,
    pub warmup_steps: Option<u64>,
    pub warmup_ratio: Option<f64>,
    pub decay: f64,
    /// 0: no clipping.
    pub clip: f64,
    pub rule: Rule,
    pub neftune: Option<f32>,
    pub seed: u64,
    pub shuffle: bool,
    pub eval_steps: Option<u64>,
    pub patience: Option<u64>,
    pub prompts: Vec<String>,
    pub classify: bool,
    pub memory: u64,
    pub save_every: Duration,
    pub threads: usize,
}

/// A run that can begin.
pub struct Prepared {
    /// The base model, mapped.
    pub checkpoint: Checkpoint,
    /// The same, found and checked.
    pub model: Model,
    /// Where there is one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The chat template in use.
    pub template: Option<Arc<ChatTemplate>>,
    /// What is learned from.
    pub data: Dataset,
    /// What is measured on.
    pub validation: Option<Dataset>,
    /// How it goes, but for [`Settings::rows`].
    pub settings: Settings,
    /// Steps in an epoch.
    pub per_epoch: u64,
    /// What decides the result.
    pub arguments: Arguments,
    wish: Wish,
    method: Method,
}

impl Request {
    /// Loads the data and settles everything that was left open. `watch` is told how many bytes of the data, or then of the
    /// validation data, have been read, of how many.
    ///
    /// # Errors
    /// For anything that would go wrong later.
    pub fn prepare(&self, watch: &mut dyn FnMut(u64, u64)) -> Result<Prepared> {
        self.check()?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let mut model = Model::load(&checkpoint)?;
        let context = model.spec.context_length;
        let max_seq_len = self.max_seq_len.unwrap_or(LONGEST.min(context));
        ensure!(
            max_seq_len <= context,
            "--max-seq-len {max_seq_len}: the model was made for {context} tokens; ask for at most that"
        );
        let (tokenizer, without) = match Tokenizer::of(&checkpoint) {
            Ok(tokenizer) => (Some(Arc::new(tokenizer)), None),
            Err(e) => (None, Some(e)),
        };
        let template = self.template(&checkpoint, tokenizer.as_deref())?;
        let settings = DataSettings {
            max_seq_len,
            too_long: self.too_long,
            train_on_inputs: self.train_on_inputs,
            vocab_size: model.spec.vocab_size,
            columns: self.columns.clone(),
            seed: self.seed,
        };
        let mut read = |sources: &[Source]| {
            load(sources, tokenizer.as_deref(), template.as_deref(), &settings, watch).map_err(|e| match &without {
                // Why there is no tokenizer says more than that there is none.
                Some(why) if format!("{e:#}").contains("tokenizer") => e.context(why.to_string()),
                _ => e,
            })
        };
        let data = read(&self.data)?;
        let (data, validation) = match (self.val_split, self.validation.is_empty()) {
            (Some(_), false) => bail!("--val-split and --validation: give one of them"),
            (Some(share), true) => data.split(share, self.seed).map(|(data, validation)| (data, Some(validation)))?,
            (None, false) => (data, Some(read(&self.validation)?)),
            (None, true) => (data, None),
        };
        ensure!(!data.is_empty(), "there is nothing to learn from: no record of the data can be used");
        ensure!(
            validation.is_some() || (self.patience.is_none() && !self.classify),
            "--patience and --compute-classification-metrics need a validation set: give --validation FILE or --val-split"
        );
        ensure!(
            self.prompts.is_empty() || tokenizer.is_some(),
            "--sample-prompt needs a tokenizer, which the model lacks"
        );
        let batch = self.batch.unwrap_or_else(|| auto_batch_size(data.len())).min(data.len().max(1)) * self.accumulate;
        let per_epoch = data.len().div_ceil(batch).max(1) as u64;
        let epochs = |epochs: f64| ((per_epoch as f64 * epochs).round() as u64).max(1);
        let steps = match (self.max_steps, self.epochs) {
            (Some(most), None) => most,
            (Some(most), Some(n)) => most.min(epochs(n)),
            (None, n) => epochs(n.unwrap_or(EPOCHS)),
        };
        let classes = match (&validation, self.classify) {
            (Some(validation), true) => {
                let name = |ids: &[u32]| match &tokenizer {
                    Some(tokenizer) => tokenizer.decode(ids, true).trim().to_owned(),
                    None => ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
                };
                Some(Classification::new(&data, validation, name)?)
            }
            _ => None,
        };
        let evaluates = validation.is_some() || !self.prompts.is_empty();
        let settings = Settings {
            seed: self.seed,
            shuffle: self.shuffle,
            batch,
            rows: 0,
            schedule: self.schedule(steps),
            rule: self.rule,
            decay: self.decay,
            clip: Some(self.clip).filter(|clip| *clip > 0.0),
            eval_steps: if evaluates { self.eval_steps.unwrap_or(per_epoch) } else { 0 },
            patience: self.patience,
            prompts: self.prompts.clone(),
            classes,
            save_every: self.save_every,
            threads: self.threads,
        };
        let longest = data.longest().max(validation.as_ref().map_or(0, Dataset::longest));
        let wish = Wish {
            rule: self.rule,
            limit: self.memory,
            longest,
            step: largest(&data, batch),
            rows: None,
            weights: self.base.apply(&mut model, checkpoint.bytes())?,
        };
        let arguments = self.arguments(&checkpoint, &data, validation.as_ref(), &settings)?;
        let method = self.method.clone();
        Ok(Prepared {
            checkpoint,
            model,
            tokenizer,
            template,
            data,
            validation,
            settings,
            per_epoch,
            arguments,
            wish,
            method,
        })
    }

    /// What can be told wrong without looking at any file.
    pub fn check(&self) -> Result<()> {
        let positive = |name: &str, x: f64| -> Result<()> {
            ensure!(x.is_finite() && x > 0.0, "{name} {x}: it is to be a number above 0");
            Ok(())
        };
        let share = |name: &str, x: f64| -> Result<()> {
            ensure!(x.is_finite() && (0.0..=1.0).contains(&x), "{name} {x}: it is to be between 0 and 1");
            Ok(())
        };
        if let Method::Lora(config) = &self.method {
            check_lora(config)?;
        }
        self.rate.map_or(Ok(()), |x| positive("--lr", x))?;
        positive("--learning-rate-multiplier", self.rate_multiplier)?;
        self.epochs.map_or(Ok(()), |x| positive("--epochs", x))?;
        self.warmup_ratio.map_or(Ok(()), |x| share("--warmup-ratio", x))?;
        ensure!(self.decay.is_finite() && self.decay >= 0.0, "--weight-decay {}: it is to be 0 or more", self.decay);
        ensure!(self.clip.is_finite() && self.clip >= 0.0, "--clip {}: it is to be above 0, or 0 for none", self.clip);
        self.neftune.map_or(Ok(()), |x| positive("--neftune", f64::from(x)))
    }

    /// The template asked for, or the model's own; none where there is none, which data of texts do without.
    fn template(&self, checkpoint: &Checkpoint, tokenizer: Option<&Tokenizer>) -> Result<Option<Arc<ChatTemplate>>> {
        let own = || match checkpoint.metadata() {
            Some(metadata) => ChatTemplate::from_gguf(metadata, &self.model),
            None => ChatTemplate::from_dir(&self.model),
        };
        Ok(match (self.template.as_deref(), tokenizer) {
            (Some("none"), _) | (None, None) => None,
            (Some(given), _) => Some(Arc::new(given_template(given)?)),
            (None, Some(tokenizer)) => ChatTemplate::choose(own()?, tokenizer).ok().map(Arc::new),
        })
    }

    fn schedule(&self, steps: u64) -> Schedule {
        let rate = self.rate.unwrap_or(match self.method {
            Method::Lora(_) => 2e-4,
            Method::Full => 1e-5,
            Method::Prefix { .. } => 1e-2,
        });
        let usual = if self.shape == Shape::Constant { 0.0 } else { WARMUP };
        let ratio = self.warmup_ratio.unwrap_or(usual);
        // The first step of a warm-up learns nothing, so that of a run of one step has to be asked for.
        let default = ((steps as f64 * ratio).ceil() as u64).min(steps.saturating_sub(1));
        let warmup = self.warmup_steps.unwrap_or(default);
        Schedule { shape: self.shape, rate: rate * self.rate_multiplier, warmup, steps }
    }

    /// Names and values of what decides the result.
    fn arguments(
        &self,
        checkpoint: &Checkpoint,
        data: &Dataset,
        validation: Option<&Dataset>,
        settings: &Settings,
    ) -> Result<Arguments> {
        let mut arguments = Arguments::new();
        let mut put = |name: &str, value: String| drop(arguments.insert(name.into(), value));
        put("program", env!("CARGO_PKG_VERSION").into());
        put("base model", base_hash(checkpoint)?);
        if self.base == Base::Nf4 {
            put("base format", "nf4".into());
        }
        put("data", data_hash(data));
        put("validation data", validation.map_or("none".into(), data_hash));
        match &self.method {
            Method::Full => put("method", "full".into()),
            Method::Prefix { tokens } => put("method", format!("prefix of {tokens}")),
            Method::Lora(lora) => {
                put("method", "lora".into());
                put("lora-r", lora.rank.to_string());
                put("lora-alpha", lora.alpha.to_string());
                put("lora-dropout", lora.dropout.to_string());
                put("rslora", lora.rslora.to_string());
                put("dora", lora.dora.to_string());
                put("lora-plus", lora.lora_plus.map_or("none".into(), |x| x.to_string()));
                put("targets", lora.targets.join(","));
                put("train-full", lora.train_full.join(","));
                put("init-adapter", lora.init.as_deref().map_or(Ok("none".into()), adapter_hash)?);
            }
        }
        let Schedule { shape, rate, warmup, steps } = settings.schedule;
        put("schedule", format!("{shape:?}").to_lowercase());
        put("lr", rate.to_string());
        put("warmup-steps", warmup.to_string());
        put("steps", steps.to_string());
        put("examples of a step", settings.batch.to_string());
        put("optimizer", format!("{:?}", self.rule).to_lowercase());
        put("weight-decay", self.decay.to_string());
        put("clip", settings.clip.map_or("none".into(), |x| x.to_string()));
        put("neftune", self.neftune.map_or("none".into(), |x| x.to_string()));
        put("seed", self.seed.to_string());
        put("shuffle", self.shuffle.to_string());
        if validation.is_some() {
            put("eval-steps", settings.eval_steps.to_string());
            put("patience", self.patience.map_or("none".into(), |x| x.to_string()));
        }
        Ok(arguments)
    }
}

impl Prepared {
    /// Chooses what fits into memory. A run that goes on in `folder` keeps what it has chosen.
    ///
    /// # Errors
    /// When nothing fits.
    pub fn plan(&self, folder: Option<&Folder>) -> Result<Plan> {
        let rows = folder.and_then(|folder| folder.known(ROWS)).and_then(|rows| rows.parse().ok());
        Plan::choose(&self.model, &self.method, &Wish { rows, ..self.wish })
    }

    /// Settles the plan.
    pub fn settle(&mut self, plan: &Plan) {
        self.settings.rows = plan.rows;
        self.arguments.insert(ROWS.into(), plan.rows.to_string());
    }

    /// Lines that tell a person what there is to learn and how it will go.
    pub fn lines(&self) -> Vec<String> {
        let tokens = self.data.tokens() as u64;
        let Settings { schedule, batch, .. } = &self.settings;
        let validation = self.validation.as_ref().map_or(String::new(), |v| format!(", {} to validate on", v.len()));
        vec![
            format!("data     {} examples{validation}, {} tokens an epoch", self.data.len(), grouped(tokens)),
            format!(
                "steps    {} ({} an epoch, {batch} examples each), learning rate {:?} {} with {} steps of warm-up",
                grouped(schedule.steps),
                grouped(self.per_epoch),
                schedule.rate,
                format!("{:?}", schedule.shape).to_lowercase(),
                schedule.warmup
            ),
        ]
    }
}

/// The argument by which a run keeps how many tokens go through the model together.
const ROWS: &str = "tokens at a time";

/// Tokens of the `batch` largest items together.
fn largest(data: &Dataset, batch: usize) -> usize {
    let mut tokens: Vec<usize> = (0..data.len()).map(|item| data.item_tokens(item)).collect();
    tokens.sort_unstable_by_key(|&n| std::cmp::Reverse(n));
    tokens.iter().take(batch).sum()
}

/// A short name of all examples, in their order.
fn data_hash(data: &Dataset) -> String {
    let mut hash = Sha256::new();
    let mut bytes = Vec::new();
    for item in 0..data.len() {
        bytes.clear();
        for example in data.examples(item) {
            bytes.extend((example.ids.len() as u64).to_le_bytes());
            example.ids.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
            example.targets.iter().for_each(|t| bytes.extend(t.map_or(u64::MAX, u64::from).to_le_bytes()));
        }
        hash.update(&bytes);
    }
    format!("{} examples {}", data.len(), short(hash))
}

/// A short name of an adapter's numbers.
fn adapter_hash(path: &Path) -> Result<String> {
    let file = if path.is_dir() {
        let names = ["adapter_model.safetensors", "adapter_model.bin"].map(|name| path.join(name));
        names.into_iter().find(|p| p.exists()).with_context(|| format!("{}: not a PEFT adapter", path.display()))?
    } else {
        path.to_owned()
    };
    let bytes = std::fs::read(&file).with_context(|| file.display().to_string())?;
    Ok(short(Sha256::new_with_prefix(&bytes)))
}
