//! How tokens are chosen: the settings, their defaults, and where a model publishes its own.

use anyhow::{Result, bail};
use rushlight_models::checkpoint::Metadata;
use serde::{Deserialize, Serialize};

/// Settings of the sampler. Each has a value that switches it off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token always (greedy).
    pub temperature: f32,
    /// Only the K likeliest tokens; 0: off.
    pub top_k: usize,
    /// Only the fewest tokens that hold this share of the probability; 1: off.
    pub top_p: f32,
    /// Only tokens at least this share as likely as the likeliest; 0: off.
    pub min_p: f32,
    /// Only the tokens nearest to the expected information that hold this share of the probability; 1: off.
    pub typical_p: f32,
    /// Divides the positive logits of recent tokens and multiplies the negative ones; 1: off.
    pub repeat_penalty: f32,
    /// Taken off a recent token's logit for each time it occurred; 0: off.
    pub frequency_penalty: f32,
    /// Taken off a recent token's logit once; 0: off.
    pub presence_penalty: f32,
    /// How many tokens count as recent; `None`: all.
    pub penalty_last_n: Option<usize>,
    /// Penalty on repeated sequences.
    pub dry: Dry,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Start of the random numbers; `None`: another each time.
    pub seed: Option<u64>,
}

/// DRY, the penalty on repeating whole sequences of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dry {
    /// Strength; 0: off.
    pub multiplier: f32,
    /// Growth of the penalty with each further token repeated.
    pub base: f32,
    /// Repetitions shorter than this are free, in tokens.
    pub allowed_length: usize,
    /// How many tokens to look back; `None`: all.
    pub last_n: Option<usize>,
    /// A repeated sequence ends at a token that contains one of these.
    pub breakers: Vec<String>,
}

impl Default for Dry {
    fn default() -> Self {
        let breakers = ["\n", ":", "\"", "*"].map(String::from).to_vec();
        Dry { multiplier: 0.0, base: 1.75, allowed_length: 2, last_n: None, breakers }
    }
}

impl Default for Sampling {
    /// What a chat does with a model that publishes no settings.
    fn default() -> Self {
        Sampling { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, ..Sampling::off() }
    }
}

impl Sampling {
    /// Everything off: the model's own distribution.
    pub fn off() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_last_n: Some(64),
            dry: Dry::default(),
            logit_bias: Vec::new(),
            seed: None,
        }
    }

    /// The likeliest token always.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::off() }
    }

    /// The settings of a model's `generation_config.json`; what it leaves out is as in [`Sampling::default`], except
    /// that a model which names its truncations gets only those.
    pub fn from_generation_config(config: &serde_json::Value) -> Sampling {
        let number = |key: &str| config.get(key).and_then(serde_json::Value::as_f64).map(|x| x as f32);
        Sampling::published(number, "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    }

    /// The settings in a GGUF file's metadata (`general.sampling.*`), in the same way.
    pub fn from_gguf(metadata: &Metadata) -> Sampling {
        let number = |key: &str| metadata.f32(&format!("general.sampling.{key}"));
        let mut s = Sampling::published(number, "temp", "top_k", "top_p", "min_p", "typical_p", "penalty_repeat");
        if let Some(n) = metadata.get("general.sampling.penalty_last_n") {
            s.penalty_last_n = match n {
                rushlight_models::checkpoint::Value::Signed(n) => usize::try_from(*n).ok(),
                _ => metadata.u64("general.sampling.penalty_last_n").and_then(|n| usize::try_from(n).ok()),
            };
        }
        s
    }

    fn published(
        number: impl Fn(&str) -> Option<f32>,
        temperature: &str,
        top_k: &str,
        top_p: &str,
        min_p: &str,
        typical_p: &str,
        repeat: &str,
    ) -> Sampling {
        let names = [top_k, top_p, min_p, typical_p];
        let fallback = Sampling::default();
        let mut s = if names.iter().any(|name| number(name).is_some()) {
            Sampling { temperature: fallback.temperature, ..Sampling::off() }
        } else {
            fallback
        };
        // A published value out of its range is passed over: it is advice, not an instruction.
        let within = |name: &str, low: f32, high: f32| number(name).filter(|x| (low..=high).contains(x));
        s.temperature = within(temperature, 0.0, 10.0).unwrap_or(s.temperature);
        s.top_k = within(top_k, 0.0, 1e9).map_or(s.top_k, |k| k as usize);
        s.top_p = within(top_p, f32::MIN_POSITIVE, 1.0).unwrap_or(s.top_p);
        s.min_p = within(min_p, 0.0, 1.0).unwrap_or(s.min_p);
        s.typical_p = within(typical_p, f32::MIN_POSITIVE, 1.0).unwrap_or(s.typical_p);
        s.repeat_penalty = within(repeat, 0.01, 100.0).unwrap_or(s.repeat_penalty);
        s
    }

    /// Fails, with a line that says why, when a setting is out of its range.
    pub fn check(&self) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("typical_p", self.typical_p, f32::MIN_POSITIVE, 1.0),
            ("repeat_penalty", self.repeat_penalty, 0.01, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
            ("dry multiplier", self.dry.multiplier, 0.0, 100.0),
            ("dry base", self.dry.base, 1.0, 100.0),
        ];
        for (name, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                let low = if low == f32::MIN_POSITIVE { "above 0".into() } else { format!("at least {low}") };
                bail!("{name} must be {low} and at most {high}, not {value}");
            }
        }
        if let Some((id, bias)) = self.logit_bias.iter().find(|(_, bias)| !bias.is_finite() || bias.abs() > 1e6) {
            bail!("the logit bias of token {id} must be between -1000000 and 1000000, not {bias}");
        }
        Ok(())
    }
}
