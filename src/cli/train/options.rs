//! What `rushlight train` can be told.

use crate::cli::Usage;
use crate::quantize::memory::{parse_size, total};
use crate::store::Store;
use crate::train::data::{Source, TooLong};
use crate::train::run::base::Base;
use crate::train::run::optimizer::Rule;
use crate::train::run::prepare::Request;
use crate::train::run::schedule::Shape;
use crate::train::tape::{LoraConfig, Method};
use anyhow::Result;
use rushlight_quant::physical_cores;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

/// Train an adapter (or all weights) on examples
///
/// FILE is JSONL, JSON, CSV, TSV, Parquet, XLSX or text with conversations (OpenAI's messages, ShareGPT), instructions (Alpaca,
/// prompt and completion, two columns of questions and answers), plain texts, or tokens; --show-data 3 shows what will be
/// learned. DIR gets the adapter in DIR/adapter, curves (report.html, metrics.jsonl, TensorBoard events) and checkpoints:
/// the same command goes on where an interrupted run stopped, and ends with the same bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A .gguf file, a Hugging Face directory, or a name in the store
    pub(super) model: String,
    /// Examples, with how often each comes in an epoch if that is not 1; may be repeated
    #[arg(long, value_name = "FILE[=WEIGHT]", required = true)]
    data: Vec<Source>,
    /// The folder of the run
    #[arg(short, long, value_name = "DIR", required_unless_present_any = ["plan", "show_data"])]
    pub(super) output: Option<PathBuf>,
    /// Show what the run will take, measure a step, and end
    #[arg(long)]
    pub(super) plan: bool,
    /// Show the first N examples, what is learned in green, and end
    #[arg(long, value_name = "N")]
    pub(super) show_data: Option<usize>,
    /// Memory that may be used, such as 6GB (default: half of the machine's)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Threads (default: the physical cores)
    #[arg(short, long, value_name = "N", value_parser = crate::cli::options::threads)]
    threads: Option<NonZeroUsize>,
    /// Minutes between checkpoints
    #[arg(long, value_name = "N", default_value_t = 10.0, value_parser = minutes)]
    save_minutes: f64,
    /// Go on with a run although arguments have changed
    #[arg(long)]
    pub(super) force: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    data_options: DataOptions,
    #[command(flatten)]
    pub(super) method: MethodOptions,
    #[command(flatten)]
    steps: StepOptions,
    #[command(flatten)]
    evaluation: EvaluationOptions,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Data")]
struct DataOptions {
    /// Chat template: a built-in one's name or a file, instead of the model's own; none for data of tokens or texts
    #[arg(long, value_name = "NAME|FILE|none")]
    template: Option<String>,
    /// Most tokens of a sequence (default: the model's, at most 2048)
    #[arg(long, value_name = "N")]
    max_seq_len: Option<usize>,
    /// Leave out conversations that are longer, instead of learning from their beginning
    #[arg(long)]
    skip_long: bool,
    /// Learn what the user and the system say, too
    #[arg(long)]
    train_on_inputs: bool,
    /// The columns that hold questions and answers
    #[arg(long, value_name = "QUESTION,ANSWER", value_parser = columns)]
    columns: Option<(String, String)>,
    /// Keep the order of the examples
    #[arg(long)]
    no_shuffle: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Method")]
pub(super) struct MethodOptions {
    /// lora: low-rank adapters on frozen weights. full: all weights, in f32. prefix: keys and values before every sequence
    #[arg(long, value_enum, default_value = "lora")]
    pub(super) method: Kind,
    /// Rank of the adapters
    #[arg(long, value_name = "N", default_value_t = 8)]
    lora_r: usize,
    /// Their change is multiplied by this over the rank (default: twice the rank)
    #[arg(long, value_name = "X")]
    lora_alpha: Option<f32>,
    /// Share of an adapter's inputs that is left out at each step
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    lora_dropout: f32,
    /// Divide alpha by the root of the rank (rsLoRA)
    #[arg(long)]
    rslora: bool,
    /// Train the rows' magnitudes apart from their directions (DoRA)
    #[arg(long)]
    dora: bool,
    /// How many times faster than A B learns (LoRA+; 16 is usual)
    #[arg(long, value_name = "X")]
    lora_plus: Option<f32>,
    /// Which modules get adapters, as the model's family calls them (q_proj,v_proj), or all-linear
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "all-linear")]
    targets: Vec<String>,
    /// Train modules whose name ends like this (a regular expression) as a whole: lm_head, embed_tokens; may be repeated
    #[arg(long, value_name = "PATTERN")]
    train_full: Vec<String>,
    /// How the frozen weights are held: as their file has them, or nf4: floats are put into 4 bits in memory (QLoRA)
    #[arg(long, value_enum, default_value = "as-is")]
    base: Base,
    /// Begin with this adapter
    #[arg(long, value_name = "DIR")]
    init_adapter: Option<PathBuf>,
    /// Positions of the prefix
    #[arg(long, value_name = "N", default_value_t = 20)]
    prefix_tokens: usize,
    /// Write the adapter in llama.cpp's form, too: DIR/adapter.gguf
    #[arg(long)]
    pub(super) gguf: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    Lora,
    Full,
    Prefix,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Steps")]
struct StepOptions {
    /// How often each example is seen (default 4)
    #[arg(long, value_name = "N", visible_alias = "n-epochs")]
    epochs: Option<f64>,
    /// Most steps; without --epochs, exactly so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_steps: Option<u64>,
    /// Examples of a step; auto: 0.2 % of them, at most 256
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = batch)]
    batch_size: Batch,
    /// Make a step of so many batches
    #[arg(long, value_name = "N", default_value = "1")]
    grad_accum: NonZeroUsize,
    /// Learning rate (default: lora 2e-4, full 1e-5, prefix 1e-2)
    #[arg(long, value_name = "X", visible_alias = "learning-rate", allow_negative_numbers = true)]
    lr: Option<f64>,
    /// The learning rate times this
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    learning_rate_multiplier: f64,
    /// How the learning rate falls
    #[arg(long, value_enum, default_value = "cosine")]
    schedule: Shape,
    /// Steps in which the learning rate grows from 0 (default: 3 % of them; constant: none)
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u64>,
    /// The same as a share of all steps
    #[arg(long, value_name = "P", conflicts_with = "warmup_steps")]
    warmup_ratio: Option<f64>,
    /// The optimizer
    #[arg(long, value_enum, default_value = "adamw")]
    optimizer: Rule,
    /// Weight decay, decoupled from the gradient
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    weight_decay: f64,
    /// Longest gradient of a step; 0 leaves them as they are
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    clip: f64,
    /// Noise on the embeddings (NEFTune; 5 is usual)
    #[arg(long, value_name = "ALPHA")]
    neftune: Option<f32>,
    /// Start of the random numbers: the same seed gives the same adapter
    #[arg(long, value_name = "S", default_value_t = 42)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Evaluation")]
struct EvaluationOptions {
    /// Examples to measure on; the best parameters by their loss are kept; may be repeated
    #[arg(long, value_name = "FILE")]
    validation: Vec<Source>,
    /// Set this share of the examples aside for that
    #[arg(long, value_name = "P", conflicts_with = "validation")]
    val_split: Option<f64>,
    /// Steps between evaluations (default: an epoch)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    eval_steps: Option<u64>,
    /// Stop after so many evaluations without a lower loss
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    patience: Option<u64>,
    /// Ask the model this at each evaluation; may be repeated
    #[arg(long = "sample-prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// Accuracy, precision, recall, F1 and confusion table of examples whose answers are classes
    #[arg(long)]
    compute_classification_metrics: bool,
}

/// Examples of a step.
#[derive(Clone, Copy, Debug)]
struct Batch(Option<usize>);

fn batch(text: &str) -> Result<Batch, String> {
    match text {
        "auto" => Ok(Batch(None)),
        n => match n.parse() {
            Ok(n) if (1..=1 << 20).contains(&n) => Ok(Batch(Some(n))),
            _ => Err("not a number of examples, nor auto".into()),
        },
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.0..=1e6).contains(&minutes) => Ok(minutes),
        _ => Err("not a number of minutes".into()),
    }
}

fn columns(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once(',').filter(|(q, a)| !q.is_empty() && !a.is_empty());
    pair.map(|(q, a)| (q.into(), a.into())).ok_or("not two names with a comma between them".into())
}

impl Args {
    /// The template that was asked for, as a chat has to be.
    pub(super) fn template(&self) -> Option<&str> {
        self.data_options.template.as_deref().filter(|name| *name != "none")
    }

    fn method(&self) -> Result<Method> {
        let o = &self.method;
        let lora = [
            (o.rslora, "--rslora"),
            (o.dora, "--dora"),
            (o.lora_plus.is_some(), "--lora-plus"),
            (!o.train_full.is_empty(), "--train-full"),
            (o.init_adapter.is_some(), "--init-adapter"),
            (o.gguf, "--gguf"),
            (o.base == Base::Nf4, "--base nf4"),
        ];
        if let Some((_, name)) = lora.iter().find(|(given, _)| *given && o.method != Kind::Lora) {
            return Err(Usage(format!("{name} belongs to --method lora")).into());
        }
        Ok(match o.method {
            Kind::Full => Method::Full,
            Kind::Prefix => Method::Prefix { tokens: o.prefix_tokens },
            Kind::Lora => Method::Lora(LoraConfig {
                rank: o.lora_r,
                alpha: o.lora_alpha.unwrap_or(2.0 * o.lora_r as f32),
                dropout: o.lora_dropout,
                rslora: o.rslora,
                dora: o.dora,
                lora_plus: o.lora_plus,
                targets: o.targets.clone(),
                train_full: o.train_full.clone(),
                init: o.init_adapter.clone(),
            }),
        })
    }

    /// What is asked for.
    pub(super) fn request(&self) -> Result<Request> {
        let (data, steps, evaluation) = (&self.data_options, &self.steps, &self.evaluation);
        Ok(Request {
            model: Store::open()?.resolve(&self.model)?,
            data: self.data.clone(),
            validation: evaluation.validation.clone(),
            val_split: evaluation.val_split,
            columns: data.columns.clone(),
            too_long: if data.skip_long { TooLong::Skip } else { TooLong::Cut },
            train_on_inputs: data.train_on_inputs,
            template: data.template.clone(),
            max_seq_len: data.max_seq_len,
            method: self.method()?,
            base: self.method.base,
            epochs: steps.epochs,
            max_steps: steps.max_steps,
            batch: steps.batch_size.0,
            accumulate: steps.grad_accum.get(),
            rate: steps.lr,
            rate_multiplier: steps.learning_rate_multiplier,
            shape: steps.schedule,
            warmup_steps: steps.warmup_steps,
            warmup_ratio: steps.warmup_ratio,
            decay: steps.weight_decay,
            clip: steps.clip,
            rule: steps.optimizer,
            neftune: steps.neftune,
            seed: steps.seed,
            shuffle: !data.no_shuffle,
            eval_steps: evaluation.eval_steps,
            patience: evaluation.patience,
            prompts: evaluation.prompts.clone(),
            classify: evaluation.compute_classification_metrics,
            memory: self.memory.unwrap_or_else(|| total() / 2),
            save_every: Duration::from_secs_f64(self.save_minutes * 60.0),
            threads: self.threads.map_or_else(physical_cores, NonZeroUsize::get),
        })
    }
}
