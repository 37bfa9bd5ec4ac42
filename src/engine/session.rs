//! A conversation: messages become tokens, what the KV cache already holds is used again, the answer streams out, and
//! a talk longer than the context goes on without its oldest turns.

use super::Engine;
use super::answer::{Answer, Finish};
use super::constraint::Constraint;
use super::cpu::Activations;
use super::sampler::Sampler;
use super::settings::Sampling;
use super::speculate::{Acceptance, Speculator};
use anyhow::{Result, bail, ensure};
use rushlight_models::tokenizer::{ChatTemplate, RenderOptions, Tokenizer};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A kept piece of the cache is worth moving from this many tokens on.
const WORTH_MOVING: usize = 16;

/// Something said in a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// What `role` says.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// How an answer is to be made.
#[derive(Clone, Default)]
pub struct Ask {
    /// Sampling.
    pub sampling: Sampling,
    /// Most tokens; `None`: as many as fit.
    pub max_tokens: Option<usize>,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// What it must fit.
    pub constraint: Option<Constraint>,
}

/// What happens while an answer is made.
pub enum Event<'a> {
    /// So many of the prompt's new tokens are read.
    Prompt {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        total: usize,
    },
    /// Text of the answer.
    Text(&'a str),
    /// What the model thinks before it answers, where its answers tell the two apart.
    Thought(&'a str),
    /// Something the person should know.
    Note(&'a str),
}

/// What an answer came to.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt, and how many of them the cache held already.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that the cache held already.
    pub reused: usize,
    /// Time to read the rest.
    pub prompt_time: Duration,
    /// Tokens made.
    pub tokens: usize,
    /// Time to make them.
    pub time: Duration,
    /// Tokens guessed ahead on the way, and how many rightly.
    pub guesses: Acceptance,
    /// The seed behind them.
    pub seed: u64,
}

/// A conversation in one slot of an engine.
pub struct Session {
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    slot: usize,
    /// The tokens whose keys and values the slot holds.
    cache: Vec<u32>,
    messages: Vec<Message>,
    /// What was said before, and no longer fits.
    earlier: Vec<Message>,
    speculator: Option<Speculator>,
}

impl Session {
    /// An empty conversation in `slot`.
    pub fn new(tokenizer: Arc<Tokenizer>, template: Option<Arc<ChatTemplate>>, slot: usize) -> Session {
        Session {
            tokenizer,
            template,
            slot,
            cache: Vec::new(),
            messages: Vec::new(),
            earlier: Vec::new(),
            speculator: None,
        }
    }

    /// Has `speculator` guess ahead: the same answers, sooner where it guesses well.
    pub fn speculate(&mut self, speculator: Speculator) {
        self.speculator = Some(speculator);
    }

    /// What was said; it may be changed at will between answers.
    pub fn messages(&mut self) -> &mut Vec<Message> {
        &mut self.messages
    }

    /// Begins anew with `messages`.
    pub fn restart(&mut self, messages: Vec<Message>) {
        self.earlier.clear();
        self.messages = messages;
    }

    /// All that was said, with what no longer fits into the context.
    pub fn transcript(&self) -> Vec<Message> {
        let start = self.beginning();
        let (system, rest) = self.messages.split_at(start);
        [system, &self.earlier, rest].concat()
    }

    /// Where the talk begins, behind what the system says.
    fn beginning(&self) -> usize {
        self.messages.iter().position(|m| m.role != "system").unwrap_or(self.messages.len())
    }

    /// Tokens in the cache.
    pub fn held(&self) -> usize {
        self.cache.len()
    }

    /// Forgets the cache: needed when the engine's weights or adapters change.
    pub fn clear_cache(&mut self, engine: &mut Engine) {
        engine.truncate(self.slot, 0);
        self.cache.clear();
    }

    /// Answers the last message. The answer, also an interrupted one, joins the messages.
    pub fn reply(
        &mut self,
        engine: &mut Engine,
        ask: &Ask,
        interrupt: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<Reply> {
        // Room for an answer of some length, where the conversation can spare it.
        let room = (engine.context() / 4).min(ask.max_tokens.unwrap_or(usize::MAX)).max(1);
        let (ids, dropped) = self.fit(engine.context(), room)?;
        if dropped > 0 {
            event(Event::Note(&dropped_note(dropped)));
        }
        let reply = self.generate(engine, ids, true, dropped > 0, ask, interrupt, event)?;
        self.messages.push(Message::new("assistant", reply.text.clone()));
        Ok(reply)
    }

    /// Continues the prompt `ids` as it is, without a template.
    pub fn complete(
        &mut self,
        engine: &mut Engine,
        ids: Vec<u32>,
        ask: &Ask,
        interrupt: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<Reply> {
        ensure!(!ids.is_empty(), "the prompt is empty: there is nothing to continue");
        if ids.len() >= engine.context() {
            bail!("{}", too_long(ids.len(), engine.context()));
        }
        self.generate(engine, ids, false, false, ask, interrupt, event)
    }

    fn encode(&self) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            bail!("the model has no chat template: choose one with --template, or continue plain text with --raw");
        };
        let messages = self.messages.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        Ok(template.encode_chat(&self.tokenizer, &messages, &options)?)
    }

    /// The messages as tokens, after dropping the oldest turns until `room` tokens are free; and how many messages
    /// that took.
    fn fit(&mut self, context: usize, room: usize) -> Result<(Vec<u32>, usize)> {
        let mut dropped = 0;
        loop {
            let ids = self.encode()?;
            if ids.len() + room <= context {
                return Ok((ids, dropped));
            }
            match self.drop_oldest_turn() {
                0 if ids.len() < context => return Ok((ids, dropped)),
                0 => bail!("{}", too_long(ids.len(), context)),
                n => dropped += n,
            }
        }
    }

    /// Removes the oldest question with its answer: never the system's words nor the last question. Returns the
    /// number of messages.
    fn drop_oldest_turn(&mut self) -> usize {
        let is_user = |m: &Message| m.role == "user";
        let start = self.beginning();
        let Some(next) = self.messages.iter().skip(start + 1).position(is_user) else { return 0 };
        self.earlier.extend(self.messages.drain(start..start + 1 + next));
        1 + next
    }

    /// Makes the cache hold a beginning of `ids`, as long as it can; `moved`: look also for a later piece of the
    /// cache that follows once the dropped turns are cut out. Leaves `spare` tokens to be read at least.
    fn align(&mut self, engine: &mut Engine, ids: &[u32], moved: bool, spare: usize) {
        let most = ids.len().saturating_sub(spare);
        let mut keep = common(&self.cache, ids);
        if moved && keep < self.cache.len() {
            let matches = |start: usize| common(&self.cache[start..], &ids[keep..]);
            let best = (keep + 1..self.cache.len()).max_by_key(|&start| (matches(start), std::cmp::Reverse(start)));
            if let Some(start) = best
                && matches(start) >= WORTH_MOVING
                // Where the cache cannot be cut, the tokens are simply read again.
                && engine.forget(self.slot, keep..start).is_ok()
            {
                self.cache.drain(keep..start);
                keep = common(&self.cache, ids);
            }
        }
        let keep = keep.min(most);
        engine.truncate(self.slot, keep);
        self.cache.truncate(keep);
    }

    /// Reads the part of `ids` that the cache lacks; the logits of the last. `None`: interrupted.
    fn read(
        &mut self,
        engine: &mut Engine,
        ids: &[u32],
        interrupt: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<Option<Vec<f32>>> {
        let rest = &ids[self.cache.len()..];
        let total = rest.len();
        let logits = engine.prompt(self.slot, rest, &mut |done| {
            event(Event::Prompt { done, total });
            !interrupt.load(Ordering::Relaxed)
        });
        let logits = logits.map(<[f32]>::to_vec);
        // Also after an error the cache is what the engine holds.
        self.cache = ids[..engine.len(self.slot).min(ids.len())].to_vec();
        let logits = logits?;
        Ok((self.cache.len() == ids.len()).then_some(logits))
    }

    fn generate(
        &mut self,
        engine: &mut Engine,
        ids: Vec<u32>,
        chat: bool,
        moved: bool,
        ask: &Ask,
        interrupt: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<Reply> {
        let vocab = engine.vocab_size();
        if let Some((id, _)) = ask.sampling.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
            bail!("a logit bias is given for token {id}, but the model's tokens end with {}", vocab - 1);
        }
        let tokenizer = self.tokenizer.clone();
        let sampler = Sampler::new(ask.sampling.clone());
        let mut answer = Answer::new(&tokenizer, sampler, ask.constraint.clone(), &ask.stop, ask.max_tokens, &ids);
        let start = Instant::now();
        self.align(engine, &ids, moved, 1);
        let reused = self.cache.len();
        let first = self.read(engine, &ids, interrupt, event)?;
        let prompt_time = start.elapsed();
        let start = Instant::now();
        let outcome = match first {
            Some(logits) => self.continue_with(engine, &mut answer, &logits, chat, interrupt, event),
            None => Ok(()),
        };
        // Whatever ended it, the text that was shown is part of the conversation.
        answer.end(Finish::Interrupted, &mut |text| event(Event::Text(text)));
        outcome?;
        Ok(Reply {
            text: answer.text().to_string(),
            finish: answer.finish().unwrap_or(Finish::Interrupted),
            prompt_tokens: ids.len(),
            reused,
            prompt_time,
            tokens: answer.ids().len(),
            time: start.elapsed(),
            guesses: self.speculator.as_mut().map(Speculator::take).unwrap_or_default(),
            seed: answer.seed(),
        })
    }

    fn continue_with(
        &mut self,
        engine: &mut Engine,
        answer: &mut Answer,
        first: &[f32],
        chat: bool,
        interrupt: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<()> {
        let mut next = say(answer, first, event)?;
        while let Some(id) = next {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(());
            }
            if self.cache.len() >= engine.context() && !(chat && self.make_room(engine, answer, interrupt, event)?) {
                if !interrupt.load(Ordering::Relaxed) {
                    answer.end(Finish::Context, &mut |text| event(Event::Text(text)));
                }
                return Ok(());
            }
            let guesses = self.guess(engine, id)?;
            if guesses.is_empty() {
                let logits = engine.step(&[(self.slot, id)])?;
                self.cache.push(id);
                next = say(answer, logits, event)?;
            } else {
                let logits = engine.step_ahead(self.slot, id, &guesses)?;
                self.cache.push(id);
                let outcome = self.check(answer, logits, &guesses, event);
                // What was guessed wrongly must not stay, whatever happens.
                engine.truncate(self.slot, self.cache.len());
                next = outcome?;
            }
        }
        Ok(())
    }

    /// Tokens that may follow once `id` is read.
    fn guess(&mut self, engine: &Engine, id: u32) -> Result<Vec<u32>> {
        let Some(speculator) = &mut self.speculator else { return Ok(Vec::new()) };
        let room = engine.context().saturating_sub(self.cache.len() + 1);
        self.cache.push(id);
        let guesses = speculator.guess(&self.cache, room);
        self.cache.pop();
        guesses
    }

    /// Goes on with the answer as long as it says what was guessed; the first token that is not yet read.
    fn check(
        &mut self,
        answer: &mut Answer,
        logits: &Activations,
        guesses: &[u32],
        event: &mut dyn FnMut(Event),
    ) -> Result<Option<u32>> {
        let guesses = &guesses[..logits.rows() - 1];
        let mut accepted = 0;
        let next = loop {
            let next = say(answer, logits.row(accepted), event)?;
            match guesses.get(accepted) {
                Some(&guess) if next == Some(guess) => self.cache.push(guess),
                _ => break next,
            }
            accepted += 1;
        };
        if let Some(speculator) = &mut self.speculator {
            speculator.learn(guesses.len(), accepted);
        }
        Ok(next)
    }

    /// In the middle of an answer: drops the oldest turns and keeps the rest of the cache. False: nothing to drop.
    fn make_room(
        &mut self,
        engine: &mut Engine,
        answer: &Answer,
        interrupt: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<bool> {
        // All but the token that is about to be read.
        let said = &answer.ids()[..answer.ids().len() - 1];
        let wanted = engine.context() - engine.context() / 4;
        let mut dropped = 0;
        let ids = loop {
            match self.drop_oldest_turn() {
                0 if dropped == 0 => return Ok(false),
                0 => break [&self.encode()?, said].concat(),
                n => dropped += n,
            }
            let ids = [&self.encode()?, said].concat();
            if ids.len() <= wanted {
                break ids;
            }
        };
        if ids.len() >= engine.context() {
            return Ok(false);
        }
        event(Event::Note(&dropped_note(dropped)));
        self.align(engine, &ids, true, 0);
        Ok(self.cache.len() == ids.len() || self.read(engine, &ids, interrupt, event)?.is_some())
    }
}

/// The next token of `answer`; tells what it says.
fn say(answer: &mut Answer, logits: &[f32], event: &mut dyn FnMut(Event)) -> Result<Option<u32>> {
    let next = answer.next(logits, &mut |text| event(Event::Text(text)))?;
    let thoughts = answer.take_thoughts();
    if !thoughts.is_empty() {
        event(Event::Thought(&thoughts));
    }
    Ok(next)
}

/// Length of the common beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn dropped_note(messages: usize) -> String {
    format!("the context is full: the oldest {messages} messages are forgotten, the rest goes on")
}

fn too_long(tokens: usize, context: usize) -> String {
    format!(
        "the prompt has {tokens} tokens, but the context holds {context} and the answer needs some too: shorten the \
         prompt, or ask for a longer context with --ctx"
    )
}
