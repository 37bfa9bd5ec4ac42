//! From logits to a token.
//!
//! The order is transformers': logit bias, penalties (repetition, frequency, presence, DRY), the constraint's mask,
//! temperature, then the truncations top-k, top-p, min-p and typical-p, each on what the one before it left. Models
//! publish their settings for that order in `generation_config.json`.

use super::random::{Random, fresh_seed};
use super::settings::Sampling;
use anyhow::{Result, bail};
use std::collections::{HashMap, HashSet};

/// Chooses tokens; remembers the sequence so far, which the penalties look at.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    seed: u64,
    random: Random,
    history: Vec<u32>,
    breakers: HashSet<u32>,
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// A token that may be chosen, with its weight: its probability times a constant shared by all candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// exp((logit - greatest logit) / temperature), in [0, 1].
    pub weight: f32,
}

impl Sampler {
    /// A sampler with `settings`; a missing seed is drawn here ([`Sampler::seed`] tells it).
    pub fn new(settings: Sampling) -> Sampler {
        let seed = settings.seed.unwrap_or_else(fresh_seed);
        Sampler {
            settings,
            seed,
            random: Random::new(seed),
            history: Vec::new(),
            breakers: HashSet::new(),
            logits: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// The seed in use.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The settings in use.
    pub fn settings(&self) -> &Sampling {
        &self.settings
    }

    /// Tokens that end a repeated sequence for DRY: those whose text contains one of its breakers.
    pub fn set_breakers(&mut self, breakers: HashSet<u32>) {
        self.breakers = breakers;
    }

    /// Takes note of tokens of the sequence: those of the prompt, and each chosen token once.
    pub fn accept(&mut self, ids: &[u32]) {
        self.history.extend_from_slice(ids);
    }

    /// Chooses the next token. `mask` is a constraint's set of allowed tokens, a bit for each (absent bits: not
    /// allowed). Fails when a logit is NaN or infinite upwards, and when nothing is allowed.
    pub fn sample(&mut self, logits: &[f32], mask: Option<&[u32]>) -> Result<u32> {
        self.adjust(logits, mask)?;
        if self.settings.temperature <= 0.0 {
            return Ok(greatest(&self.logits).0);
        }
        self.truncate();
        let total = mass(&self.candidates);
        let mut left = self.random.unit() * total;
        for c in &self.candidates {
            left -= f64::from(c.weight);
            if left < 0.0 {
                return Ok(c.id);
            }
        }
        // Rounding may leave a crumb: it belongs to the last candidate that can be drawn at all.
        Ok(self.candidates.iter().rev().find(|c| c.weight > 0.0).map_or(greatest(&self.logits).0, |c| c.id))
    }

    /// The candidates that [`Sampler::sample`] would draw from at a temperature above zero.
    pub fn distribution(&mut self, logits: &[f32], mask: Option<&[u32]>) -> Result<&[Candidate]> {
        self.adjust(logits, mask)?;
        self.truncate();
        Ok(&self.candidates)
    }

    /// `self.logits`: the logits after bias, penalties and mask.
    fn adjust(&mut self, logits: &[f32], mask: Option<&[u32]>) -> Result<()> {
        // -inf is a token that cannot come; NaN and +inf are nonsense.
        let odd = logits.iter().map(|x| u32::from(x.is_nan() || *x == f32::INFINITY)).sum::<u32>();
        if odd > 0 {
            bail!(
                "the model gave {odd} logits that are not numbers: its weights are damaged (NaN or infinite) or were \
                 quantized badly; check the file, or fetch it again"
            );
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for &(id, bias) in &self.settings.logit_bias {
            if let Some(x) = self.logits.get_mut(id as usize) {
                *x += bias;
            }
        }
        self.penalize();
        self.penalize_repeated_sequences();
        if let Some(mask) = mask {
            for (block, allowed) in self.logits.chunks_mut(32).zip(mask.iter().copied().chain(std::iter::repeat(0))) {
                if allowed != u32::MAX {
                    for (i, x) in block.iter_mut().enumerate() {
                        if allowed >> i & 1 == 0 {
                            *x = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        if greatest(&self.logits).1 == f32::NEG_INFINITY {
            bail!("no token can follow: the constraint or the logit biases exclude every one");
        }
        Ok(())
    }

    fn penalize(&mut self) {
        let s = &self.settings;
        if s.repeat_penalty == 1.0 && s.frequency_penalty == 0.0 && s.presence_penalty == 0.0 {
            return;
        }
        let mut counts = HashMap::<u32, u32>::new();
        for &id in last(&self.history, s.penalty_last_n) {
            *counts.entry(id).or_default() += 1;
        }
        for (id, count) in counts {
            if let Some(x) = self.logits.get_mut(id as usize) {
                *x = if *x > 0.0 { *x / s.repeat_penalty } else { *x * s.repeat_penalty };
                *x -= count as f32 * s.frequency_penalty + s.presence_penalty;
            }
        }
    }

    /// DRY ("don't repeat yourself"): a token that would continue a sequence already seen is made less likely the
    /// longer the match, by multiplier * base^(length - allowed length).
    fn penalize_repeated_sequences(&mut self) {
        let dry = &self.settings.dry;
        if dry.multiplier == 0.0 {
            return;
        }
        let text: Vec<u32> = last(&self.history, dry.last_n).iter().rev().copied().collect();
        // Matches cannot reach back beyond the nearest breaker.
        let limit = text.iter().position(|id| self.breakers.contains(id)).unwrap_or(text.len());
        let matches = prefix_matches(&text);
        let mut longest = HashMap::<u32, usize>::new();
        for i in 1..text.len() {
            let next = text[i - 1];
            let len = matches[i].min(limit);
            if len >= dry.allowed_length.max(1) && !self.breakers.contains(&next) {
                let entry = longest.entry(next).or_default();
                *entry = len.max(*entry);
            }
        }
        for (id, len) in longest {
            let grown = dry.base.powi(i32::try_from(len - dry.allowed_length.min(len)).unwrap_or(i32::MAX));
            if let Some(x) = self.logits.get_mut(id as usize) {
                // A penalty beyond every logit keeps the order of what else there is, and infinity minus it defined.
                *x -= (dry.multiplier * grown).min(1e30);
            }
        }
    }

    /// `self.candidates`: what temperature and the truncations leave of `self.logits`.
    fn truncate(&mut self) {
        let s = &self.settings;
        // Greedy is the limit of small temperatures.
        let scale = 1.0 / s.temperature.max(1e-6);
        let (_, max) = greatest(&self.logits);
        let candidates = &mut self.candidates;
        if s.top_k > 0 && s.top_k < self.logits.len() {
            most_likely(&self.logits, s.top_k, candidates);
            candidates.iter_mut().for_each(|c| c.weight = exp_negative((c.weight - max) * scale));
        } else {
            candidates.clear();
            candidates.extend(
                self.logits
                    .iter()
                    .enumerate()
                    .map(|(i, &x)| Candidate { id: i as u32, weight: exp_negative((x - max) * scale) }),
            );
        }
        if s.top_p < 1.0 {
            keep_top_p(candidates, f64::from(s.top_p));
        }
        if s.min_p > 0.0 {
            // The greatest weight is 1.
            candidates.retain(|c| c.weight >= s.min_p.min(1.0));
        }
        if s.typical_p < 1.0 {
            keep_typical(candidates, f64::from(s.typical_p));
        }
    }
}

/// The last `n` tokens; all of them for `None`.
fn last(history: &[u32], n: Option<usize>) -> &[u32] {
    &history[history.len() - n.unwrap_or(usize::MAX).min(history.len())..]
}

/// The first of the greatest values, and that value; (0, -inf) for none.
fn greatest(values: &[f32]) -> (u32, f32) {
    // First the value in lanes that vectorize, then its place.
    let (blocks, rest) = values.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let max = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    (values.iter().position(|&x| x == max).unwrap_or(0) as u32, max)
}

/// e^x for x <= 0, within 2 units in the last place; 0 below -87. Plain arithmetic, so that a whole vocabulary
/// vectorizes, and the same on every machine, which the system's `expf` is not.
fn exp_negative(x: f32) -> f32 {
    // 2^n * e^r with n = round(x / ln 2); adding and subtracting 1.5 * 2^23 rounds.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, the first exact in few bits, so that r keeps its low bits (Cody and Waite).
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let series = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r / 720.0)))));
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x > -87.0 { series * power } else { 0.0 }
}

/// By weight downwards; equal weights by id, so that the result never depends on the method of selection.
fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// The `k` greatest logits (as weights) in one pass: a buffer of 2k above a threshold that rises when it is full.
fn most_likely(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let room = k.saturating_mul(2).max(64).min(logits.len());
    let mut threshold = f32::NEG_INFINITY;
    for (i, &x) in logits.iter().enumerate() {
        // An equal logit with a later id never displaces the earlier one.
        if x > threshold || out.len() < k {
            out.push(Candidate { id: i as u32, weight: x });
            if out.len() >= room && out.len() > k {
                out.select_nth_unstable_by(k - 1, likelier);
                out.truncate(k);
                threshold = out[k - 1].weight;
            }
        }
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, likelier);
        out.truncate(k);
    }
    out.sort_unstable_by(likelier);
}

/// The sum of the weights from `floor` on, in lanes of fixed order: one chain of additions would wait for itself.
fn mass_from(candidates: &[Candidate], floor: f32) -> f64 {
    let (blocks, rest) = candidates.as_chunks::<8>();
    let mut lanes = [0f64; 8];
    let add = |lane: &mut f64, c: &Candidate| *lane += if c.weight >= floor { f64::from(c.weight) } else { 0.0 };
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, c)| add(lane, c));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, c)| add(lane, c));
    lanes.iter().sum()
}

fn mass(candidates: &[Candidate]) -> f64 {
    mass_from(candidates, 0.0)
}

/// Keeps the fewest likeliest candidates that hold `p` of the mass, and at least one.
fn keep_top_p(candidates: &mut Vec<Candidate>, p: f64) {
    let target = mass(candidates) * p;
    // The few likely ones usually hold it: look among those first, and sort nothing else.
    let mut floor = 1.0 / 64.0;
    while candidates.len() > 1024 && floor > 1e-30 {
        if mass_from(candidates, floor) >= target {
            candidates.retain(|c| c.weight >= floor);
            break;
        }
        floor /= 64.0;
    }
    keep_first(candidates, target, mass, likelier);
}

/// Locally typical sampling (Meister et al. 2022): keeps the candidates whose information is nearest to the
/// distribution's entropy, the fewest that hold `p` of the mass.
fn keep_typical(candidates: &mut Vec<Candidate>, p: f64) {
    let total = mass(candidates);
    let information = |c: &Candidate| total.ln() - f64::from(c.weight).ln();
    candidates.retain(|c| c.weight > 0.0);
    let entropy: f64 = candidates.iter().map(|c| f64::from(c.weight) / total * information(c)).sum();
    let mut keyed: Vec<_> = candidates.iter().map(|c| ((information(c) - entropy).abs(), *c)).collect();
    keep_first(
        &mut keyed,
        total * p,
        |part| part.iter().map(|(_, c)| f64::from(c.weight)).sum(),
        |(x, a), (y, b)| x.total_cmp(y).then_with(|| likelier(a, b)),
    );
    candidates.clear();
    candidates.extend(keyed.into_iter().map(|(_, c)| c));
}

/// Keeps the shortest beginning of `items`, in the order given, whose mass reaches `target` (at least one), by
/// halving: linear in their number, where sorting all would not be.
fn keep_first<T>(
    items: &mut Vec<T>,
    target: f64,
    mass: impl Fn(&[T]) -> f64,
    mut order: impl FnMut(&T, &T) -> std::cmp::Ordering,
) {
    let (mut low, mut high, mut held) = (0, items.len(), 0.0);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        items[low..high].select_nth_unstable_by(middle - low, &mut order);
        let left = mass(&items[low..middle]);
        if held + left >= target {
            high = middle;
        } else {
            held += left;
            low = middle;
        }
    }
    items.truncate(high);
}

/// For each i, the length of the longest common beginning of `text` and `text[i..]` (the Z function; linear).
fn prefix_matches(text: &[u32]) -> Vec<usize> {
    let n = text.len();
    let mut z = vec![0; n];
    let (mut left, mut right) = (0, 0);
    for i in 1..n {
        let mut len = if i < right { z[i - left].min(right - i) } else { 0 };
        while i + len < n && text[len] == text[i + len] {
            len += 1;
        }
        z[i] = len;
        if i + len > right {
            (left, right) = (i, i + len);
        }
    }
    z
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
