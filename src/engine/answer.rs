//! One answer as it is made: logits in, text out, until something ends it.

use super::channels::{Channels, Part};
use super::constraint::Constraint;
use super::sampler::Sampler;
use super::stop::StopStrings;
use anyhow::Result;
use rushlight_models::tokenizer::{DecodeStream, Tokenizer};
use std::collections::HashSet;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    End,
    /// A stop string came.
    StopString,
    /// The constraint allows nothing more.
    Complete,
    /// It reached the number of tokens asked for.
    Length,
    /// The context is full.
    Context,
    /// It was interrupted.
    Interrupted,
}

/// An answer in the making. Knows nothing of the engine, so that many can share a batch.
pub struct Answer<'t> {
    tokenizer: &'t Tokenizer,
    sampler: Sampler,
    constraint: Option<Constraint>,
    stream: DecodeStream<'t>,
    stops: StopStrings,
    channels: Option<Channels>,
    /// What the model thought and nobody has taken yet.
    thoughts: String,
    max_tokens: usize,
    ids: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

impl<'t> Answer<'t> {
    /// An answer to the prompt `ids`.
    pub fn new(
        tokenizer: &'t Tokenizer,
        mut sampler: Sampler,
        constraint: Option<Constraint>,
        stops: &[String],
        max_tokens: Option<usize>,
        prompt: &[u32],
    ) -> Answer<'t> {
        if sampler.settings().dry.multiplier > 0.0 {
            let breakers = &sampler.settings().dry.breakers;
            let breaks = |id: &u32| {
                let text = tokenizer.token_bytes(*id);
                breakers.iter().any(|b| !b.is_empty() && text.windows(b.len()).any(|w| w == b.as_bytes()))
            };
            let found: HashSet<u32> = (0..tokenizer.vocab_size() as u32).filter(breaks).collect();
            sampler.set_breakers(found);
        }
        sampler.accept(prompt);
        // What has to keep to rules is an answer from its first token on.
        let channels = if constraint.is_some() { None } else { Channels::new(tokenizer, prompt) };
        Answer {
            tokenizer,
            sampler,
            constraint,
            channels,
            thoughts: String::new(),
            stream: tokenizer.stream(),
            stops: StopStrings::new(stops),
            max_tokens: max_tokens.unwrap_or(usize::MAX),
            ids: Vec::new(),
            text: String::new(),
            finish: None,
        }
    }

    /// Chooses the next token from `logits` and hands its text to `show`. `None`: the answer has ended.
    pub fn next(&mut self, logits: &[f32], show: &mut dyn FnMut(&str)) -> Result<Option<u32>> {
        if self.ids.len() >= self.max_tokens {
            return Ok(self.end(Finish::Length, show));
        }
        let mask = self.constraint.as_mut().map(Constraint::mask).transpose()?;
        let id = self.sampler.sample(logits, mask)?;
        if self.tokenizer.is_end_of_turn(id) {
            return Ok(self.end(Finish::End, show));
        }
        self.sampler.accept(&[id]);
        self.ids.push(id);
        let piece = self.stream.push(id);
        match self.channels.as_mut().map_or(Part::Answer, |channels| channels.part(self.tokenizer, id)) {
            Part::Answer => {
                let (visible, stopped) = self.stops.push(&piece);
                self.show(&visible, show);
                if stopped {
                    self.finish = Some(Finish::StopString);
                    return Ok(None);
                }
            }
            Part::Thought => self.thoughts.push_str(&piece),
            Part::Mark => {}
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(id)?;
            if constraint.is_complete() {
                return Ok(self.end(Finish::Complete, show));
            }
        }
        if self.ids.len() >= self.max_tokens {
            return Ok(self.end(Finish::Length, show));
        }
        Ok(Some(id))
    }

    /// Ends the answer: what was held back is shown, but for the beginning of a character where the answer was cut off.
    pub fn end(&mut self, why: Finish, show: &mut dyn FnMut(&str)) -> Option<u32> {
        if self.finish.is_none() {
            let rest = self.stream.finish();
            let cut = matches!(why, Finish::Length | Finish::Context | Finish::Interrupted);
            let rest = if cut { String::new() } else { rest };
            let (visible, stopped) = self.stops.push(&rest);
            self.show(&visible, show);
            if !stopped {
                let held = self.stops.finish();
                self.show(&held, show);
            }
            self.finish = Some(why);
        }
        None
    }

    fn show(&mut self, text: &str, show: &mut dyn FnMut(&str)) {
        if !text.is_empty() {
            self.text.push_str(text);
            show(text);
        }
    }

    /// What the model thought since this was last asked: no part of the answer.
    pub fn take_thoughts(&mut self) -> String {
        std::mem::take(&mut self.thoughts)
    }

    /// Its tokens so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Its text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Why it ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The seed behind it.
    pub fn seed(&self) -> u64 {
        self.sampler.seed()
    }
}
