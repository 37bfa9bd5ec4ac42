//! Log-likelihoods of choices. What the choices of a question share is computed once, and so is what it shares with the
//! question before; then all choices go through the model together.

use super::Subject;
use super::result::Answer;
use crate::engine::Engine;
use anyhow::{Result, bail};
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::decoder;
use rushlight_models::spec::Outline;
use rushlight_models::tokenizer::{Specials, Tokenizer};
use rushlight_quant::Phase;

/// Rows of a prompt that go through the model together.
const CHUNK: usize = 512;
/// Choices that go through the model together.
pub const TOGETHER: usize = 4;

/// A choice as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The context and the choice.
    pub ids: Vec<u32>,
    /// How many of them, at the end, are the choice's.
    pub own: usize,
}

/// A question as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Which subject and which of its items.
    pub subject: usize,
    /// The item's number.
    pub item: usize,
    /// The choices.
    pub choices: Vec<Choice>,
}

/// The tokens of every question, with the marks that the model wants before a text. Context and choice are encoded as one text,
/// spaces at the context's end with the choice, and come apart where the context alone would have ended.
pub fn encode(subjects: &[Subject], tokenizer: &Tokenizer) -> Result<Vec<Asked>> {
    let prefix = tokenizer.prefix();
    let mut all = Vec::new();
    for (subject, s) in subjects.iter().enumerate() {
        for (item, question) in s.items.iter().enumerate() {
            let whole = s.context(question);
            let context = whole.trim_end();
            let start = tokenizer.encode(context, Specials::Native)?.len();
            let mut choices = Vec::with_capacity(question.choices.len());
            for choice in &question.choices {
                let text = tokenizer.encode(&format!("{whole} {choice}"), Specials::Native)?;
                let own = text.len().saturating_sub(start);
                let ids = [&prefix[..], &text].concat();
                if own == 0 || ids.len() == own {
                    bail!(
                        "{}: the choice '{}' cannot be told from the question: no token is its own",
                        question.place,
                        choice.escape_debug()
                    );
                }
                choices.push(Choice { ids, own });
            }
            all.push(Asked { subject, item, choices });
        }
    }
    Ok(all)
}

/// The longest input among `asked`: the last token of a choice is only predicted.
pub fn longest(asked: &[Asked]) -> usize {
    asked.iter().flat_map(|a| a.choices.iter().map(|c| c.ids.len() - 1)).max().unwrap_or(0)
}

/// Shortens inputs from the left so that they fit `context` tokens, and says in how many questions.
pub fn fit(asked: &mut [Asked], context: usize) -> usize {
    let mut cut = 0;
    for question in asked {
        let mut any = false;
        for choice in &mut question.choices {
            let over = choice.ids.len().saturating_sub(context + 1);
            choice.ids.drain(..over);
            choice.own = choice.own.min(choice.ids.len() - 1);
            any |= over > 0;
        }
        cut += usize::from(any);
    }
    cut
}

/// Asks questions of a model.
pub struct Scorer<'a> {
    engine: &'a mut Engine,
    /// What slot 0 holds, and the outline it was computed with.
    held: Vec<u32>,
    outline: Outline,
    /// Tokens that went through the model.
    pub tokens: u64,
}

impl<'a> Scorer<'a> {
    /// A scorer on `engine`, which was opened with [`TOGETHER`] slots (or fewer).
    pub fn new(engine: &'a mut Engine) -> Scorer<'a> {
        Scorer { engine, held: Vec::new(), outline: Outline::default(), tokens: 0 }
    }

    /// The answer of the model to `asked`, a question of `subject`.
    pub fn answer(&mut self, subject: &Subject, asked: &Asked) -> Result<Answer> {
        let item = &subject.items[asked.item];
        let likelihoods = self.log_likelihoods(&asked.choices)?;
        let lengths: Vec<usize> = item.choices.iter().map(|choice| choice.chars().count()).collect();
        Ok(Answer::new(&subject.name, &item.place, item.answer, likelihoods, &lengths))
    }

    /// The natural logarithm of each choice's probability.
    pub fn log_likelihoods(&mut self, choices: &[Choice]) -> Result<Vec<f64>> {
        let [first, rest @ ..] = choices else { return Ok(Vec::new()) };
        if let Some(id) = choices.iter().flat_map(|c| &c.ids).find(|&&id| id as usize >= self.engine.vocab_size()) {
            bail!("token {id} is not in the model's vocabulary of {}", self.engine.vocab_size());
        }
        // What all choices share and none scores; its last row scores the first tokens of choices that begin there.
        let input = |c: &'_ Choice| c.ids.len() - 1;
        let same = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let shared = rest.iter().map(|c| same(&c.ids, &first.ids)).min().unwrap_or(usize::MAX);
        let shared = choices.iter().map(|c| c.ids.len() - c.own).fold(shared, usize::min);
        if shared == 0 {
            // Inputs that were cut off at different places.
            return choices.iter().map(|choice| self.alone(choice)).collect();
        }
        let row = self.share(&first.ids[..shared])?;
        let mut sums = vec![0.0; choices.len()];
        for (sum, choice) in sums.iter_mut().zip(choices) {
            if choice.ids.len() - choice.own == shared {
                *sum += row.of(choice.ids[shared]);
            }
        }
        let outline = self.outline;
        let longer: Vec<usize> = (0..choices.len()).filter(|&i| input(&choices[i]) > shared).collect();
        // A rest that changes what the shared rows know of the sequence goes through the model whole.
        let (whole, parts): (Vec<usize>, Vec<usize>) =
            longer.into_iter().partition(|&i| self.outline_of(&choices[i].ids[..input(&choices[i])]) != outline);
        for group in parts.chunks(self.engine.slots().min(TOGETHER)) {
            let rests: Vec<&[u32]> = group.iter().map(|&i| &choices[i].ids[shared..input(&choices[i])]).collect();
            let scores = self.continue_all(shared, &rests, &|g, row| {
                let choice = &choices[group[g]];
                // The row that stands at `shared + row` predicts the token behind it.
                let next = shared + row + 1;
                (next >= choice.ids.len() - choice.own).then(|| choice.ids[next])
            })?;
            group.iter().zip(scores).for_each(|(&i, score)| sums[i] += score);
        }
        for i in whole {
            sums[i] = self.alone(&choices[i])?;
        }
        Ok(sums)
    }

    /// Makes slot 0 hold `ids` and nothing else; the prediction behind the last of them.
    fn share(&mut self, ids: &[u32]) -> Result<Prediction> {
        let outline = self.outline_of(ids);
        let same = self.held.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = if outline == self.outline { same.min(ids.len() - 1) } else { 0 };
        self.outline = outline;
        self.run(ids, kept)
    }

    /// Runs `ids[kept..]` behind the `kept` tokens that slot 0 keeps.
    fn run(&mut self, ids: &[u32], kept: usize) -> Result<Prediction> {
        let (outline, prefix) = (self.outline, self.prefix());
        self.held.truncate(kept);
        let (model, backend) = self.engine.parts();
        backend.kv.set_len(0, prefix + kept);
        let mut done = kept;
        let mut prediction = Prediction(Vec::new());
        while done < ids.len() {
            // A context that is seen whole stays in one piece.
            let n = (ids.len() - done).min(CHUNK.max(outline.context.saturating_sub(done)));
            let sequence = Sequence { slot: 0, start: prefix + done, len: n, outline };
            let batch = Batch { ids: &ids[done..done + n], sequences: &[sequence], phase: Phase::Prompt };
            let hidden = decoder::hidden(model, backend, &batch)?;
            done += n;
            backend.kv.set_len(0, prefix + done);
            if done == ids.len() {
                let last = backend.rows(&hidden, &[n - 1])?;
                prediction = Prediction(decoder::logits(model, backend, &last)?.to_vec());
            }
        }
        self.tokens += (ids.len() - kept) as u64;
        self.held = ids.to_vec();
        prediction.checked()
    }

    /// Puts each of `rests` behind the first `shared` tokens of slot 0, in a slot of its own, and adds up the logarithms
    /// of the tokens that `next` names for rows (of a rest, by its number and the row's).
    fn continue_all(
        &mut self,
        shared: usize,
        rests: &[&[u32]],
        next: &dyn Fn(usize, usize) -> Option<u32>,
    ) -> Result<Vec<f64>> {
        let (outline, prefix) = (self.outline, self.prefix());
        let (model, backend) = self.engine.parts();
        let start = prefix + shared;
        let ids: Vec<u32> = rests.concat();
        let mut sequences = Vec::with_capacity(rests.len());
        for (slot, rest) in rests.iter().enumerate() {
            if slot > 0 {
                backend.kv.copy(0, slot, start);
            }
            sequences.push(Sequence { slot, start, len: rest.len(), outline });
        }
        let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Prompt };
        let hidden = decoder::hidden(model, backend, &batch)?;
        let places = rests.iter().enumerate().flat_map(|(i, rest)| (0..rest.len()).map(move |row| (i, row)));
        let scored: Vec<(usize, usize, u32)> =
            places.enumerate().filter_map(|(at, (i, row))| Some((at, i, next(i, row)?))).collect();
        let mut sums = vec![0.0; rests.len()];
        // A large vocabulary's logits are made for few rows at a time.
        for part in scored.chunks(((16 << 20) / model.spec.vocab_size.max(1)).clamp(1, CHUNK)) {
            let rows: Vec<usize> = part.iter().map(|(at, ..)| *at).collect();
            let hidden = backend.rows(&hidden, &rows)?;
            let logits = decoder::logits(model, backend, &hidden)?;
            for (row, (_, i, id)) in part.iter().enumerate() {
                sums[*i] += Prediction(logits.row(row).to_vec()).checked()?.of(*id);
            }
        }
        drop(hidden);
        backend.kv.set_len(0, start);
        self.tokens += ids.len() as u64;
        self.held.truncate(shared);
        Ok(sums)
    }

    /// The score of a choice whose sequence is to be known whole from its first row on.
    fn alone(&mut self, choice: &Choice) -> Result<f64> {
        let (input, context) = (choice.ids.len() - 1, choice.ids.len() - choice.own);
        self.outline = self.outline_of(&choice.ids[..input]);
        let first = self.run(&choice.ids[..context], 0)?;
        let mut sum = first.of(choice.ids[context]);
        if input > context {
            let rest = &choice.ids[context..input];
            sum += self.continue_all(context, &[rest], &|_, row| Some(choice.ids[context + row + 1]))?[0];
        }
        // What comes next begins anew.
        self.held.clear();
        Ok(sum)
    }

    fn outline_of(&self, ids: &[u32]) -> Outline {
        self.engine.model().outline(ids)
    }

    fn prefix(&self) -> usize {
        self.engine.model().prefix.as_ref().map_or(0, |p| p.len)
    }
}

/// The logits of one row.
struct Prediction(Vec<f32>);

impl Prediction {
    fn checked(self) -> Result<Prediction> {
        if !self.0.iter().fold(true, |all, x| all & x.is_finite()) {
            bail!("the model's predictions are not numbers: its weights are damaged, or activations overflow");
        }
        Ok(self)
    }

    /// The natural logarithm of the probability of `id`.
    fn of(&self, id: u32) -> f64 {
        let most = self.0.iter().fold(f32::NEG_INFINITY, |most, &x| most.max(x));
        let sum: f64 = self.0.iter().map(|&x| f64::from(x - most).exp()).sum();
        f64::from(self.0[id as usize] - most) - sum.ln()
    }
}
