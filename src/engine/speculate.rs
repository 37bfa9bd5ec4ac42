//! Speculative decoding: cheap guesses of the next tokens, which the model checks all at once. Memory is read once for
//! several tokens.
//!
//! Each guess is compared with the token that the sampler draws from the model's own logits in its place, with the
//! same random numbers. So the answer is, token by token, the one that there would have been without guesses, at every
//! temperature and under every constraint; only its speed depends on them. (Leviathan et al. 2023 accept more guesses
//! when sampling, for an answer that is equal in distribution alone.)

use super::{Engine, Options};
use anyhow::{Context, Result, ensure};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::tokenizer::Tokenizer;
use std::path::Path;

/// Guesses made at most when nothing else is asked for.
pub const DEFAULT_MOST: usize = 8;
/// The longest end of the text that is looked up.
const LONGEST: usize = 4;
/// The shortest: a single token repeats too often to mean anything.
const SHORTEST: usize = 2;
/// A draft model stops guessing when it is less sure than this of its best token.
const SURE: f32 = 0.5;

/// Guesses and how many of them were right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acceptance {
    /// Tokens guessed.
    pub guessed: usize,
    /// Those that the model would have said.
    pub accepted: usize,
}

/// Where guesses come from.
enum Source {
    /// What followed the same few tokens earlier in the text (prompt lookup; Saxena 2023).
    Ngram,
    /// A smaller model with the same tokenizer, and the tokens that it has read.
    Model(Box<Engine>, Vec<u32>),
}

/// Guesses the next tokens of a text.
pub struct Speculator {
    source: Source,
    most: usize,
    /// How many to guess next: more after a success, fewer after a failure.
    next: usize,
    /// Since [`Speculator::take`] was last called.
    acceptance: Acceptance,
}

impl Speculator {
    /// Guesses by what the text said before, at most `most` tokens at a time.
    pub fn ngram(most: usize) -> Speculator {
        Speculator::new(Source::Ngram, most)
    }

    /// Guesses by the model at `path`, whose tokenizer has to be `tokenizer`.
    ///
    /// # Errors
    /// When the model cannot be opened, or its tokens are others.
    pub fn model(path: &Path, tokenizer: &Tokenizer, options: &Options, most: usize) -> Result<Speculator> {
        let checkpoint = Checkpoint::open(path)?;
        let own = Tokenizer::of(&checkpoint).context("the draft model")?;
        // Vocabularies may be padded to different lengths.
        let shared = own.vocab_size().min(tokenizer.vocab_size()) as u32;
        let other = (0..shared).find(|&id| own.token_bytes(id) != tokenizer.token_bytes(id));
        ensure!(
            own.vocab_size().abs_diff(tokenizer.vocab_size()) <= 256 && other.is_none(),
            "{}: it cannot draft for this model, for its tokens are others ({} of them against {}{}): take a smaller \
             model of the same family",
            path.display(),
            own.vocab_size(),
            tokenizer.vocab_size(),
            other.map_or(String::new(), |id| format!("; token {id} is another"))
        );
        let engine = Engine::from_checkpoint(checkpoint, options).context("the draft model")?;
        Ok(Speculator::new(Source::Model(Box::new(engine), Vec::new()), most))
    }

    fn new(source: Source, most: usize) -> Speculator {
        Speculator { source, most, next: most.div_ceil(2), acceptance: Acceptance::default() }
    }

    /// Tokens that may follow `text`, at most `room`; none where there is nothing to go by.
    pub fn guess(&mut self, text: &[u32], room: usize) -> Result<Vec<u32>> {
        let most = self.next.min(room);
        match &mut self.source {
            _ if most == 0 => Ok(Vec::new()),
            Source::Ngram => Ok(look_up(text, most).to_vec()),
            Source::Model(engine, read) => draft(engine, read, text, most),
        }
    }

    /// Takes note that `accepted` of `guessed` tokens were right.
    pub fn learn(&mut self, guessed: usize, accepted: usize) {
        self.acceptance.guessed += guessed;
        self.acceptance.accepted += accepted;
        let next = if accepted == guessed { self.next + 2 } else { accepted + 1 };
        self.next = next.min(self.most);
    }

    /// The acceptance since this was last asked.
    pub fn take(&mut self) -> Acceptance {
        std::mem::take(&mut self.acceptance)
    }
}

/// What followed the latest earlier place of the longest end of `text` that occurs twice.
fn look_up(text: &[u32], most: usize) -> &[u32] {
    for len in (SHORTEST..=LONGEST.min(text.len().saturating_sub(1))).rev() {
        let end = &text[text.len() - len..];
        // The windows before the end itself, the latest first.
        if let Some(at) = text[..text.len() - 1].windows(len).rposition(|window| window == end) {
            let after = at + len;
            return &text[after..text.len().min(after + most)];
        }
    }
    &[]
}

/// The likeliest tokens behind `text` by `engine`, whose first slot holds `read`.
fn draft(engine: &mut Engine, read: &mut Vec<u32>, text: &[u32], most: usize) -> Result<Vec<u32>> {
    if text.len() + most > engine.context() || text.iter().any(|&id| id as usize >= engine.vocab_size()) {
        return Ok(Vec::new());
    }
    // The last token is read in any case: its logits are wanted.
    let keep = read.iter().zip(text).take_while(|(a, b)| a == b).count().min(text.len() - 1);
    engine.truncate(0, keep);
    read.truncate(keep);
    let mut best = match &text[keep..] {
        [next] => likeliest(engine.step(&[(0, *next)])?),
        rest => likeliest(engine.prompt(0, rest, &mut |_| true)?),
    };
    read.extend_from_slice(&text[keep..]);
    let mut guesses = Vec::with_capacity(most);
    while let Some((id, _)) = best.filter(|(_, sure)| *sure >= SURE) {
        guesses.push(id);
        if guesses.len() == most {
            break;
        }
        best = likeliest(engine.step(&[(0, id)])?);
        read.push(id);
    }
    Ok(guesses)
}

/// The likeliest token and its probability.
fn likeliest(logits: &[f32]) -> Option<(u32, f32)> {
    let (id, most) = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
    let total: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    Some((id as u32, 1.0 / total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_place_of_the_longest_end_is_found() {
        let text = [1, 2, 3, 9, 7, 2, 3, 8, 5, 1, 2, 3];
        // [1, 2, 3] occurs once before, [2, 3] later.
        assert_eq!(look_up(&text, 2), [9, 7]);
        assert_eq!(look_up(&text[..11], 8), [3, 9, 7, 2, 3, 8, 5, 1]);
        assert_eq!(look_up(&[4, 4, 4], 3), [4]);
        assert!(look_up(&[1, 2, 3], 3).is_empty() && look_up(&[1], 3).is_empty() && look_up(&[], 3).is_empty());
    }

    #[test]
    fn failures_make_it_guess_less_and_success_more() {
        let mut s = Speculator::ngram(8);
        let text = [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2];
        assert_eq!(s.guess(&text, 100).unwrap().len(), 4);
        s.learn(4, 0);
        assert_eq!(s.guess(&text, 100).unwrap(), [5]);
        s.learn(1, 1);
        assert_eq!(s.guess(&text, 100).unwrap(), [5, 6, 7]);
        assert_eq!(s.guess(&text, 2).unwrap(), [5, 6]);
        assert_eq!(s.take(), Acceptance { guessed: 5, accepted: 1 });
        assert_eq!(s.take(), Acceptance::default());
    }
}
