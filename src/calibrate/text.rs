//! What models are calibrated on: the built-in text or one that was given, and texts that the model writes itself.
//!
//! A model's own samples are what its makers' data looked like to it, which no text of ours can match; but they hold
//! little of what it is rarely asked for. Both together do best (docs/decisions.md), but for what is strange to it.

use crate::engine::cpu::CpuBackend;
use crate::engine::kv::{KvCache, KvFormat, KvShape};
use crate::engine::sampler::Sampler;
use crate::engine::settings::Sampling;
use anyhow::{Result, anyhow, bail};
use rushlight_models::backend::{Batch, Sequence};
use rushlight_models::decoder;
use rushlight_models::model::Model;
use rushlight_models::tokenizer::{Specials, Tokenizer};
use rushlight_quant::{Cpu, Isa, Phase, physical_cores};

/// The text that is read unless another is given: written for this purpose, in several languages and kinds.
pub const BUILT_IN: &str = include_str!("calibration.txt");

/// A text of our own on which models are compared: nothing is calibrated on it.
pub const HELD_OUT: &str = include_str!("held_out.txt");
/// Tokens of a sequence.
pub const LENGTH: usize = 512;
/// Fewest tokens that say enough about a model's activations.
pub const FEWEST: usize = 4096;
/// How much more a text may surprise a model than its own texts do, in nats for a token.
const STRANGE: f64 = 2.5;
/// Most tokens of a text that are read.
pub const MOST: usize = 128 * LENGTH;

/// Tokens of a sequence for `model`.
pub fn length(model: &Model) -> usize {
    LENGTH.min(model.spec.context_length)
}

/// Cuts `text` into sequences of at most `length` tokens, each beginning with the marks that the model wants there:
/// [`MOST`] tokens at most, from all over the text. `name` stands for the text in errors.
pub fn sequences(tokenizer: &Tokenizer, text: &str, name: &str, length: usize) -> Result<Vec<Vec<u32>>> {
    let ids = tokenizer.encode(text, Specials::AsText)?;
    if ids.len() < FEWEST {
        bail!(
            "{name} has {} tokens, too few to calibrate on: give a text of at least {FEWEST}, or leave --calib out for \
             the built-in one",
            ids.len()
        );
    }
    let prefix = tokenizer.prefix();
    let windows: Vec<&[u32]> = ids.chunks(length.saturating_sub(prefix.len()).max(1)).collect();
    let count = windows.len().min(MOST / length.max(1));
    // Evenly from the whole text where it is longer.
    Ok((0..count).map(|i| [&prefix, windows[i * windows.len() / count]].concat()).collect())
}

/// How much a model is to write itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// Texts written side by side.
    pub lanes: usize,
    /// Tokens written in each.
    pub steps: usize,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Own {
    /// As much as is worth its time: writing takes longer than reading, and grows with the model.
    pub fn for_model(model: &Model) -> Own {
        let weights: usize = model.linears().map(|l| l.weight.rows() * l.weight.cols()).sum();
        let steps = if weights > 600_000_000 { LENGTH / 2 } else { LENGTH };
        Own { lanes: 32, steps, seed: 1 }
    }
}

/// Has `model` write texts from nothing, at temperature 1: what it finds likely, as often as it finds it likely. Where
/// a text ends, the next one begins. Nothing is written by a model that has no token to begin with. As many texts are
/// written side by side as `memory` bytes hold the keys and values of, which changes nothing in them. `progress` hears how
/// many of the steps are done.
pub fn own(
    model: &Model,
    tokenizer: &Tokenizer,
    threads: Option<usize>,
    memory: u64,
    own: Own,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>> {
    let Some(first) = tokenizer.bos().or(tokenizer.eos()).filter(|&id| (id as usize) < model.spec.vocab_size) else {
        return Ok(Vec::new());
    };
    let (spec, length) = (&model.spec, length(model));
    let cache = 4 * spec.layers.len() * spec.kv_heads * (spec.head_dim + spec.value_dim) * length;
    let lane = cache + 16 * spec.vocab_size;
    let together = (memory as usize / lane.max(1)).clamp(1, own.lanes);
    let mut backend = backend(model, threads, together, length, spec.layers.len())?;
    // A token that the tokenizer cannot write would not come from any text.
    let known = tokenizer.vocab_size().min(spec.vocab_size);
    let mut written = Vec::new();
    for from in (0..own.lanes).step_by(together) {
        let numbers = from as u64..own.lanes.min(from + together) as u64;
        let sampler = |lane| Sampler::new(Sampling { seed: Some((own.seed << 32) + lane), ..Sampling::off() });
        let mut samplers: Vec<Sampler> = numbers.clone().map(sampler).collect();
        let mut lanes = vec![vec![first]; samplers.len()];
        let mut finished = vec![Vec::new(); samplers.len()];
        for step in 0..own.steps {
            let ids: Vec<u32> = lanes.iter().map(|lane| lane[lane.len() - 1]).collect();
            let place = |(slot, lane): (usize, &Vec<u32>)| Sequence {
                slot,
                start: lane.len() - 1,
                len: 1,
                outline: model.outline(lane),
            };
            let sequences: Vec<Sequence> = lanes.iter().enumerate().map(place).collect();
            let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Prompt };
            let hidden = decoder::hidden(model, &mut backend, &batch)?;
            let logits = decoder::logits(model, &mut backend, &hidden)?;
            for (i, lane) in lanes.iter_mut().enumerate() {
                let next = samplers[i].sample(&logits.row(i)[..known], None)?;
                let ended = next == first || tokenizer.eos() == Some(next) || tokenizer.is_end_of_turn(next);
                if !ended {
                    lane.push(next);
                }
                if ended || lane.len() == length {
                    finished[i].push(std::mem::replace(lane, vec![first]));
                }
            }
            progress((from * own.steps + (step + 1) * lanes.len()) / own.lanes);
        }
        for (finished, last) in finished.into_iter().zip(lanes) {
            written.extend(finished);
            written.push(last);
        }
    }
    // A lone BOS says nothing.
    written.retain(|text| text.len() > 1);
    Ok(written)
}

/// How surprised `model` is by the beginning of each sequence: the mean of `-ln p` over its tokens but the first.
pub fn surprise(model: &Model, threads: Option<usize>, sequences: &[Vec<u32>]) -> Result<Vec<f64>> {
    /// Tokens of a sequence that are looked at.
    const BEGINNING: usize = 64;
    /// Sequences that go together: logits of a large vocabulary take much memory.
    const TOGETHER: usize = 2;
    let mut backend = backend(model, threads, TOGETHER, BEGINNING, model.spec.layers.len())?;
    let mut means = Vec::new();
    for part in sequences.chunks(TOGETHER) {
        let parts: Vec<&[u32]> = part.iter().map(|s| &s[..s.len().min(BEGINNING)]).collect();
        let place = |(slot, s): (usize, &&[u32])| Sequence { slot, start: 0, len: s.len(), outline: model.outline(s) };
        let places: Vec<Sequence> = parts.iter().enumerate().map(place).collect();
        let ids = parts.concat();
        let batch = Batch { ids: &ids, sequences: &places, phase: Phase::Prompt };
        let hidden = decoder::hidden(model, &mut backend, &batch)?;
        let logits = decoder::logits(model, &mut backend, &hidden)?;
        let mut row = 0;
        for s in parts {
            let surprises = s.windows(2).enumerate().map(|(i, pair)| {
                let logits = logits.row(row + i);
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = logits.iter().map(|l| f64::from((l - top).exp())).sum();
                sum.ln() + f64::from(top - logits[pair[1] as usize])
            });
            means.push(surprises.sum::<f64>() / (s.len() - 1).max(1) as f64);
            row += s.len();
        }
    }
    Ok(means)
}

/// Those of `theirs` that surprise `model` by no more than [`STRANGE`] above what its own texts do. What is strange to a
/// model (another language than its own, say) goes through it unlike anything that it is used for.
pub fn familiar(
    model: &Model,
    threads: Option<usize>,
    theirs: Vec<Vec<u32>>,
    ours: &[Vec<u32>],
) -> Result<Vec<Vec<u32>>> {
    /// Own texts that are looked at.
    const SAMPLE: usize = 8;
    let own = surprise(model, threads, &ours[..ours.len().min(SAMPLE)])?;
    if own.is_empty() {
        return Ok(theirs);
    }
    let usual = own.iter().sum::<f64>() / own.len() as f64;
    let all = surprise(model, threads, &theirs)?;
    tracing::info!("surprise: {usual:.2} by its own texts; {all:.2?} by the built-in");
    Ok(theirs.into_iter().zip(all).filter(|(_, s)| *s <= usual + STRANGE).map(|(s, _)| s).collect())
}

/// `theirs` and `ours` in turn, so that every part holds of both.
pub fn interleave(theirs: Vec<Vec<u32>>, ours: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    let (n, m) = (theirs.len(), ours.len());
    let place = |i: usize, of: usize| (2 * i + 1) as f64 / (2 * of) as f64;
    let mut all: Vec<(f64, Vec<u32>)> = theirs.into_iter().enumerate().map(|(i, s)| (place(i, n), s)).collect();
    all.extend(ours.into_iter().enumerate().map(|(i, s)| (place(i, m), s)));
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all.into_iter().map(|(_, s)| s).collect()
}

/// A backend for `model` with `slots` sequences of `capacity` positions, and caches for `layers` layers. Weights of any
/// format are rounded to bf16 where that is faster: far less than what is measured with it.
pub fn backend(
    model: &Model,
    threads: Option<usize>,
    slots: usize,
    capacity: usize,
    layers: usize,
) -> Result<CpuBackend> {
    let spec = &model.spec;
    let shape = KvShape {
        slots,
        layers,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        value_dim: spec.value_dim,
        capacity,
        format: KvFormat::F32,
    };
    let isa = Isa::from_env().map_err(|e| anyhow!(e))?;
    let cpu = Cpu::new(threads.unwrap_or_else(physical_cores).max(1), isa).with_coarse_floats(true);
    Ok(CpuBackend::new(cpu, KvCache::new(shape)?))
}
