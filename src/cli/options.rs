//! Options that several commands share.

use super::Usage;
use crate::engine::constraint::{Constraint, Rule};
use crate::engine::kv::KvFormat;
use crate::engine::settings::Sampling;
use crate::engine::speculate::{DEFAULT_MOST, Speculator};
use crate::engine::{Engine, Options};
use crate::store::Store;
use anyhow::{Context, Result, bail};
use clap::Args;
use rushlight_models::tokenizer::Tokenizer;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// No progress, only results and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Tell more of what happens (-vv: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Global {
    /// Sends log lines to standard error.
    pub fn start_logging(&self) {
        use tracing::Level;
        let level = match (self.quiet, self.verbose) {
            (true, _) => Level::ERROR,
            (false, 0) => Level::WARN,
            (false, 1) => Level::INFO,
            (false, _) => Level::DEBUG,
        };
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(std::io::stderr)
            .with_ansi(terminal)
            .with_target(false)
            .without_time()
            .init();
    }
}

/// How to open a model.
#[derive(Clone, Debug, Args)]
pub struct ModelOptions {
    /// A .gguf file, a Hugging Face directory, or a name in the store
    pub model: String,
    /// Threads (default: the physical cores)
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub threads: Option<NonZeroUsize>,
    /// An adapter, with its strength if that is not 1; may be repeated
    #[arg(long = "adapter", value_name = "A[=SCALE]", value_parser = adapter)]
    pub adapters: Vec<(PathBuf, f32)>,
    /// How keys and values are kept: f32, f16, or q8_0, which has room for almost twice the context of f16 (default:
    /// f16, for models of floats f32)
    #[arg(long, value_name = "FORMAT", value_parser = kv_format)]
    pub kv: Option<KvFormat>,
}

/// As many threads as a machine may have.
pub fn threads(text: &str) -> Result<NonZeroUsize, String> {
    const MOST: usize = 1024;
    match text.trim().parse::<NonZeroUsize>() {
        Ok(n) if n.get() <= MOST => Ok(n),
        _ => Err(format!("a number from 1 to {MOST} is needed")),
    }
}

fn kv_format(text: &str) -> Result<KvFormat, String> {
    match text {
        "f32" => Ok(KvFormat::F32),
        "f16" => Ok(KvFormat::F16),
        "q8_0" | "q8" => Ok(KvFormat::Q8),
        _ => Err("one of f32, f16, q8_0 is needed".into()),
    }
}

impl ModelOptions {
    /// Where the model is.
    pub fn path(&self) -> Result<PathBuf> {
        Store::open()?.resolve(&self.model)
    }

    /// Options for the engine.
    pub fn engine(&self, context: Option<usize>) -> Options {
        let adapters = self.adapters.clone();
        let threads = self.threads.map(NonZeroUsize::get);
        Options { threads, context, slots: 1, adapters, kv: self.kv, ..Options::default() }
    }
}

/// Guessing ahead.
#[derive(Clone, Debug, Args)]
pub struct DraftOptions {
    /// Guess ahead, for the same answer sooner: by a smaller model with the same tokens, or `ngram`, by what the text
    /// said before (for summaries, code and other answers that repeat)
    #[arg(long = "draft", value_name = "MODEL|ngram")]
    pub source: Option<String>,
    /// Most tokens guessed at a time
    #[arg(long = "draft-max", value_name = "N", default_value_t = DEFAULT_MOST, requires = "source",
        value_parser = most_guesses)]
    pub most: usize,
}

impl DraftOptions {
    /// Whoever guesses for `engine`.
    pub fn speculator(&self, tokenizer: &Tokenizer, engine: &Engine) -> Result<Option<Speculator>> {
        let Some(source) = &self.source else { return Ok(None) };
        if source == "ngram" {
            return Ok(Some(Speculator::ngram(self.most)));
        }
        let path = Store::open()?.resolve(source).context("--draft")?;
        let options = Options { threads: Some(engine.threads()), context: None, slots: 1, ..Options::default() };
        Speculator::model(&path, tokenizer, &options, self.most).map(Some)
    }
}

fn most_guesses(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "a number from 1 to 64 is needed".into())
}

/// `A[=SCALE]`. A file of just that name comes first, so that any path can be given.
pub fn adapter(text: &str) -> Result<(PathBuf, f32), String> {
    if !Path::new(text).exists()
        && let Some((path, scale)) = text.rsplit_once('=')
    {
        let scale: f32 = scale.parse().map_err(|_| format!("'{scale}' is not a number"))?;
        if !scale.is_finite() {
            return Err(format!("'{scale}' is not a finite number"));
        }
        return Ok((path.into(), scale));
    }
    Ok((text.into(), 1.0))
}

/// How tokens are chosen, where that differs from the model's own settings.
#[derive(Clone, Debug, Args)]
#[command(
    next_help_heading = "Sampling (default: what the model's makers published, or else temp 0.7, top-k 40, top-p 0.95, min-p 0.05)"
)]
pub struct SamplingOptions {
    /// Temperature; 0 takes the likeliest token always
    #[arg(long, value_name = "T")]
    pub temp: Option<f32>,
    /// Only the K likeliest tokens (0: off)
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that hold P of the probability (1: off)
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Only tokens at least P times as likely as the likeliest (0: off)
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Only the most typical tokens that hold P of the probability (1: off)
    #[arg(long, value_name = "P")]
    pub typical_p: Option<f32>,
    /// Make recent tokens less likely by this factor (1: off)
    #[arg(long, value_name = "X")]
    pub repeat_penalty: Option<f32>,
    /// Take X off a recent token's logit for each time it occurred
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Take X off a recent token's logit once
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// How many tokens count as recent (default 64; -1: all)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    pub repeat_last_n: Option<i64>,
    /// Strength of DRY, the penalty on repeated sequences (0: off)
    #[arg(long, value_name = "X")]
    pub dry_multiplier: Option<f32>,
    /// Growth of DRY's penalty with each token repeated (default 1.75)
    #[arg(long, value_name = "X")]
    pub dry_base: Option<f32>,
    /// Repetitions of fewer tokens are free (default 2)
    #[arg(long, value_name = "N")]
    pub dry_allowed_length: Option<usize>,
    /// How many tokens DRY looks back (-1: all, the default)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub dry_last_n: Option<i64>,
    /// Text that ends a sequence for DRY; may be repeated (default: line end : " *)
    #[arg(long = "dry-breaker", value_name = "S")]
    pub dry_breakers: Vec<String>,
    /// Add BIAS to the logit of the token ID; may be repeated
    #[arg(long, value_name = "ID=BIAS", value_parser = bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Start of the random numbers: the same seed gives the same answer
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// End the answer at this text; may be repeated
    #[arg(long, value_name = "S")]
    pub stop: Vec<String>,
    /// The answer must be JSON that fits this schema
    #[arg(long, value_name = "FILE|JSON", conflicts_with = "regex")]
    pub json_schema: Option<String>,
    /// The answer must match this regular expression
    #[arg(long, value_name = "RE")]
    pub regex: Option<String>,
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("not of the form ID=BIAS")?;
    let id = id.parse().map_err(|_| format!("'{id}' is not a token id"))?;
    Ok((id, bias.parse().map_err(|_| format!("'{bias}' is not a number"))?))
}

impl SamplingOptions {
    /// The settings: `published`, changed by what was given.
    pub fn settings(&self, published: Sampling) -> Result<Sampling> {
        let mut s = published;
        let window = |n: i64| usize::try_from(n).ok();
        s.temperature = self.temp.unwrap_or(s.temperature);
        s.top_k = self.top_k.unwrap_or(s.top_k);
        s.top_p = self.top_p.unwrap_or(s.top_p);
        s.min_p = self.min_p.unwrap_or(s.min_p);
        s.typical_p = self.typical_p.unwrap_or(s.typical_p);
        s.repeat_penalty = self.repeat_penalty.unwrap_or(s.repeat_penalty);
        s.frequency_penalty = self.frequency_penalty.unwrap_or(s.frequency_penalty);
        s.presence_penalty = self.presence_penalty.unwrap_or(s.presence_penalty);
        s.penalty_last_n = self.repeat_last_n.map_or(s.penalty_last_n, window);
        s.dry.multiplier = self.dry_multiplier.unwrap_or(s.dry.multiplier);
        s.dry.base = self.dry_base.unwrap_or(s.dry.base);
        s.dry.allowed_length = self.dry_allowed_length.unwrap_or(s.dry.allowed_length);
        s.dry.last_n = self.dry_last_n.map_or(s.dry.last_n, window);
        if !self.dry_breakers.is_empty() {
            s.dry.breakers = self.dry_breakers.clone();
        }
        s.logit_bias.extend(&self.logit_bias);
        s.seed = self.seed.or(s.seed);
        s.check().map_err(|e| Usage(e.to_string()))?;
        Ok(s)
    }

    /// Fails early on values out of range: before a model is loaded.
    pub fn check(&self) -> Result<()> {
        self.settings(Sampling::default()).map(|_| ())
    }

    /// What the output must fit.
    pub fn rule(&self) -> Result<Option<Rule>> {
        if let Some(regex) = &self.regex {
            return Ok(Some(Rule::Regex(regex.clone())));
        }
        let Some(given) = &self.json_schema else { return Ok(None) };
        let (name, text) = if given.trim_start().starts_with(['{', '[']) || matches!(given.trim(), "true" | "false") {
            ("--json-schema".to_string(), given.clone())
        } else {
            (given.clone(), read_text(Path::new(given))?)
        };
        match serde_json::from_str(&text) {
            Ok(schema) => Ok(Some(Rule::JsonSchema(schema))),
            Err(e) => bail!("{name}: not JSON: {e}"),
        }
    }

    /// The compiled rule.
    pub fn constraint(&self, tokenizer: &Tokenizer) -> Result<Option<Constraint>> {
        let rule = self.rule()?;
        rule.map(|rule| Constraint::new(tokenizer, &rule).map_err(|e| Usage(format!("{e:#}")).into())).transpose()
    }
}

/// A text file whole; `-` is standard input. It must be UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let (name, bytes) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes).context("standard input")?;
        ("standard input".to_string(), bytes)
    } else {
        (path.display().to_string(), std::fs::read(path).with_context(|| path.display().to_string())?)
    };
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow::anyhow!("{name}: not UTF-8 text (byte {at}): convert it to UTF-8 first")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_and_biases() {
        assert_eq!(adapter("a/b=0.5").unwrap(), ("a/b".into(), 0.5));
        assert_eq!(adapter("a/b").unwrap(), ("a/b".into(), 1.0));
        assert!(adapter("a=x").is_err() && adapter("a=inf").is_err());
        assert_eq!(bias("7=-2.5").unwrap(), (7, -2.5));
        assert!(bias("7").is_err() && bias("x=1").is_err() && bias("-1=1").is_err());
    }
}
