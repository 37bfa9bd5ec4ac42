//! How well a model predicts a text, and how far another model's predictions are from its own.

use crate::engine::Engine;
use anyhow::{Result, bail};
use rushlight_models::tokenizer::{Specials, Tokenizer};
use serde::Serialize;

/// A text as tokens, cut into chunks as llama.cpp's perplexity tool does: each begins with the BOS token where the
/// model wants one, its first half is context only, and its second half is scored.
#[derive(Clone, Debug)]
pub struct Chunks {
    ids: Vec<u32>,
    prefix: Vec<u32>,
    ctx: usize,
    count: usize,
}

impl Chunks {
    /// The first `most` whole chunks of `ctx` tokens of `text`, which `name` stands for in errors.
    pub fn new(tokenizer: &Tokenizer, text: &str, name: &str, ctx: usize, most: Option<usize>) -> Result<Chunks> {
        let prefix = tokenizer.prefix();
        let mut ids = prefix.clone();
        ids.extend(tokenizer.encode(text, Specials::AsText)?);
        if ids.len() < ctx {
            let n = ids.len();
            bail!("{name} has {n} tokens, fewer than the {ctx} of one chunk: give a longer text or a smaller --ctx");
        }
        let count = (ids.len() / ctx).min(most.unwrap_or(usize::MAX));
        Ok(Chunks { ids, prefix, ctx, count })
    }

    /// Number of chunks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tokens of a chunk.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// The tokens of chunk `i` as a model reads them, and as it is to predict them.
    pub fn chunk(&self, i: usize) -> (Vec<u32>, &[u32]) {
        let targets = &self.ids[i * self.ctx..(i + 1) * self.ctx];
        let mut input = targets.to_vec();
        input.iter_mut().zip(&self.prefix).for_each(|(id, mark)| *id = *mark);
        (input, targets)
    }

    /// The first position of a chunk that is scored; the last has nothing to predict.
    fn first(&self) -> usize {
        self.ctx / 2
    }
}

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Score {
    /// exp of the mean negative log likelihood of a token.
    pub perplexity: f64,
    /// Its standard error.
    pub error: f64,
    /// Chunks read.
    pub chunks: usize,
    /// Tokens scored.
    pub tokens: usize,
}

/// Sums over scored tokens.
#[derive(Default)]
struct Losses {
    sum: f64,
    squares: f64,
    count: usize,
}

impl Losses {
    fn add(&mut self, loss: f64) {
        self.sum += loss;
        self.squares += loss * loss;
        self.count += 1;
    }

    fn score(&self, chunks: usize) -> Score {
        let mean = self.sum / self.count.max(1) as f64;
        let variance = (self.squares / self.count.max(1) as f64 - mean * mean).max(0.0);
        let error = (variance / (self.count.max(2) - 1) as f64).sqrt() * mean.exp();
        Score { perplexity: mean.exp(), error, chunks, tokens: self.count }
    }
}

/// Scores `chunks`; `progress` hears how many of their tokens were read, and what has come out so far.
pub fn perplexity(engine: &mut Engine, chunks: &Chunks, progress: &mut dyn FnMut(usize, &Score)) -> Result<Score> {
    let (ctx, first) = (chunks.ctx, chunks.first());
    let mut losses = Losses::default();
    for i in 0..chunks.count {
        let (input, targets) = chunks.chunk(i);
        engine.truncate(0, 0);
        engine.prompt(0, &input[..first], &mut |read| {
            progress(i * ctx + read, &losses.score(i));
            true
        })?;
        engine.prompt_all(0, &input[first..], &mut |position, logits| {
            if position < ctx - 1 {
                losses.add(negative_log_likelihood(logits, targets[position + 1]));
                progress(i * ctx + position, &losses.score(i));
            }
        })?;
        check(&losses, i)?;
        progress((i + 1) * ctx, &losses.score(i + 1));
    }
    Ok(losses.score(chunks.count))
}

fn check(losses: &Losses, chunk: usize) -> Result<()> {
    if !losses.sum.is_finite() {
        bail!("the model gave logits that are not numbers in chunk {}: its weights are damaged", chunk + 1);
    }
    Ok(())
}

/// A model beside the original it was made from, on the same text.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// How well the model predicts the text.
    #[serde(flatten)]
    pub score: Score,
    /// How well the original does.
    pub original: Score,
    /// Mean over the scored positions of KL(original || model), in nats.
    pub kl: f64,
    /// Its standard error.
    pub kl_error: f64,
    /// Its 99 % quantile.
    pub kl_99: f64,
    /// Share of positions at which both find the same token likeliest.
    pub same_top: f64,
}

/// Compares `other` with `original` on `chunks`; `progress` hears how many of their tokens both have read, and after each
/// chunk what has come out so far. Both read a stretch of tokens in turn, so that no more than 64 MB of logits are kept.
pub fn compare(
    original: &mut Engine,
    other: &mut Engine,
    chunks: &Chunks,
    progress: &mut dyn FnMut(usize, Option<&Comparison>),
) -> Result<Comparison> {
    let vocab = original.vocab_size();
    if vocab != other.vocab_size() {
        bail!(
            "the models cannot be compared: one has {} tokens in its vocabulary, the original {vocab}",
            other.vocab_size()
        );
    }
    let (ctx, first) = (chunks.ctx, chunks.first());
    let stretch = ((16 << 20) / vocab).clamp(1, ctx);
    let (mut before, mut after) = (Losses::default(), Losses::default());
    let (mut divergences, mut same) = (Vec::new(), 0usize);
    let mut kept = vec![0f32; stretch.min(ctx - first) * vocab];
    for i in 0..chunks.count {
        let (input, targets) = chunks.chunk(i);
        for (turn, engine) in [&mut *original, other].into_iter().enumerate() {
            engine.truncate(0, 0);
            engine.prompt(0, &input[..first], &mut |read| {
                progress(i * ctx + (turn * first + read) / 2, None);
                true
            })?;
        }
        for start in (first..ctx).step_by(stretch) {
            let part = &input[start..ctx.min(start + stretch)];
            original.prompt_all(0, part, &mut |position, logits| {
                kept[(position - start) * vocab..][..vocab].copy_from_slice(logits);
            })?;
            other.prompt_all(0, part, &mut |position, logits| {
                if position == ctx - 1 {
                    return;
                }
                let reference = &kept[(position - start) * vocab..][..vocab];
                before.add(negative_log_likelihood(reference, targets[position + 1]));
                after.add(negative_log_likelihood(logits, targets[position + 1]));
                divergences.push(divergence(reference, logits));
                same += usize::from(likeliest(reference) == likeliest(logits));
            })?;
            progress(i * ctx + start + part.len(), None);
        }
        check(&before, i)?;
        check(&after, i)?;
        progress((i + 1) * ctx, Some(&comparison(&before, &after, &divergences, same, i + 1)));
    }
    Ok(comparison(&before, &after, &divergences, same, chunks.count))
}

fn comparison(before: &Losses, after: &Losses, divergences: &[f64], same: usize, chunks: usize) -> Comparison {
    let n = divergences.len().max(1) as f64;
    let kl = divergences.iter().sum::<f64>() / n;
    let variance = divergences.iter().map(|d| (d - kl) * (d - kl)).sum::<f64>() / n;
    let mut sorted = divergences.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let kl_99 = sorted.get((sorted.len() * 99 / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0);
    Comparison {
        score: after.score(chunks),
        original: before.score(chunks),
        kl,
        kl_error: (variance / (n - 1.0).max(1.0)).sqrt(),
        kl_99,
        same_top: same as f64 / n,
    }
}

/// ln of the sum of exp of `logits`, and the greatest of them, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    sum.ln() + f64::from(max)
}

/// -ln of the probability that `logits` give to `target`, in f64. NaN where the logits are not numbers.
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let Some(&own) = logits.get(target as usize) else { return f64::NAN };
    log_sum_exp(logits) - f64::from(own)
}

/// KL(p || q) in nats of the distributions that the logits stand for.
pub fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p_sum, q_sum) = (log_sum_exp(p), log_sum_exp(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let log = f64::from(p) - p_sum;
        log.exp() * (log - (f64::from(q) - q_sum))
    };
    // Rounding may take a divergence of nothing below it.
    p.iter().zip(q).map(term).sum::<f64>().max(0.0)
}

/// The index of the greatest logit, the first of equals.
fn likeliest(logits: &[f32]) -> usize {
    let better = |best: (usize, f32), x: (usize, f32)| if x.1 > best.1 { x } else { best };
    logits.iter().copied().enumerate().fold((0, f32::NEG_INFINITY), better).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods() {
        let logits = [1.0f32, 2.0, 3.0];
        let p: f64 = 2f64.exp() / (1f64.exp() + 2f64.exp() + 3f64.exp());
        assert!((negative_log_likelihood(&logits, 1) + p.ln()).abs() < 1e-12);
        assert!((negative_log_likelihood(&[1000.0, 1000.0], 0) - 2f64.ln()).abs() < 1e-12);
        assert!(negative_log_likelihood(&[f32::NAN, 1.0], 0).is_nan());
        assert!(negative_log_likelihood(&logits, 3).is_nan());
    }

    #[test]
    fn divergences() {
        // p = (1/4, 3/4), q = (1/2, 1/2).
        let p = [0.0, 3f32.ln()];
        let want = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((divergence(&p, &[7.0, 7.0]) - want).abs() < 1e-7);
        assert_eq!(divergence(&p, &p), 0.0);
        assert_eq!(likeliest(&[1.0, 5.0, 5.0]), 1);
    }

    #[test]
    fn figures_over_many_positions() {
        let mut losses = Losses::default();
        [1.0, 2.0, 3.0].into_iter().for_each(|l| losses.add(l));
        let divergences: Vec<f64> = (0..200).map(f64::from).collect();
        let c = comparison(&losses, &losses, &divergences, 150, 2);
        assert!((c.score.perplexity - 2f64.exp()).abs() < 1e-9);
        // The standard error of the mean of 1, 2, 3 with the population's variance 2/3, times the perplexity.
        assert!((c.score.error - (2.0f64 / 3.0 / 2.0).sqrt() * 2f64.exp()).abs() < 1e-9);
        assert_eq!((c.kl, c.kl_99, c.same_top), (99.5, 198.0, 0.75));
    }
}
