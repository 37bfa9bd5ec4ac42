//! From lessons to tokens, and which of them the loss falls on.

use super::layout::{self, Asked, Lesson};
use super::read::Record;
use super::{DataSettings, TooLong};
use rushlight_models::tokenizer::{ChatTemplate, RenderOptions, Specials, Tokenizer};
use std::ops::Range;

/// A record as tokens.
#[derive(Debug, Default, PartialEq)]
pub struct Encoded {
    /// What it is, in the plural.
    pub kind: &'static str,
    /// The tokens: of a text all, else `max_seq_len` at most.
    pub ids: Vec<u32>,
    /// Which rows are asked for the token that follows them.
    pub learned: Learned,
    /// Whether it may be cut into several sequences.
    pub text: bool,
    /// How many tokens there were, where not all are used.
    pub cut: Option<usize>,
    /// What a person should know.
    pub note: Option<&'static str>,
    /// Columns that have no part in it.
    pub unused: Vec<String>,
}

/// Which rows are asked for which token.
#[derive(Debug, PartialEq)]
pub enum Learned {
    /// Rows that are asked for the token of the next row.
    Rows(Vec<Range<usize>>),
    /// What each row is asked for, where that is not always the token of the next.
    Targets(Vec<Option<u32>>),
}

impl Default for Learned {
    fn default() -> Self {
        Learned::Rows(Vec::new())
    }
}

/// Why a record becomes no tokens.
#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// It cannot be used.
    Skip(String),
    /// No record like it can: something is missing from the command.
    Stop(String),
}

impl From<String> for Refusal {
    fn from(why: String) -> Refusal {
        Refusal::Skip(why)
    }
}

/// All rows but the last, which nothing follows.
fn every_row(ids: &[u32]) -> Vec<Range<usize>> {
    std::iter::once(0..ids.len().saturating_sub(1)).collect()
}

/// What encoding takes.
pub struct Encoder<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    pub template: Option<&'a ChatTemplate>,
    pub settings: &'a DataSettings,
}

impl Encoder<'_> {
    /// The tokens of `record`.
    pub fn encode(&self, record: &Record) -> Result<Encoded, Refusal> {
        let knows_calls = self.template.is_some_and(|t| t.mentions("tool_calls", true));
        let asked = Asked { knows_calls, columns: self.settings.columns.as_ref() };
        let (lesson, unused) = layout::read(record, &asked)?;
        let encoded = match lesson {
            Lesson::Chat(conversation, kind) => {
                let stop = |what| Err(Refusal::Stop(format!("conversations need {what}")));
                let Some(tokenizer) = self.tokenizer else { return stop("a tokenizer, and this model has none") };
                let Some(template) = self.template else {
                    return stop(
                        "a chat template, and the model has none or none was asked for: name one, such as --template chatml",
                    );
                };
                let options = RenderOptions { tools: conversation.tools, ..RenderOptions::default() };
                let with_tools = options.tools.is_some();
                let note = with_tools && !template.mentions("tools", true);
                let (ids, turns) = template
                    .encode_turns(tokenizer, &conversation.messages, &options)
                    .map_err(|e| Refusal::Skip(e.to_string()))?;
                let learned = turns.into_iter().zip(&conversation.learned).filter(|(_, learned)| **learned);
                // A row is asked for the token behind it.
                let rows = learned.map(|(t, _)| t.start.saturating_sub(1)..t.end.saturating_sub(1)).collect();
                let rows = if self.settings.train_on_inputs { every_row(&ids) } else { rows };
                let note = note.then_some("with tools that the chat template does not show");
                Encoded { kind, ids, learned: Learned::Rows(rows), note, ..Encoded::default() }
            }
            Lesson::Text { text, first, last } => {
                if first && last && text.trim().is_empty() {
                    return Err(Refusal::Skip("the text is empty".into()));
                }
                let Some(tokenizer) = self.tokenizer else {
                    return Err(Refusal::Stop("texts need a tokenizer, and this model has none".into()));
                };
                let mut ids = if first { tokenizer.prefix() } else { Vec::new() };
                ids.extend(tokenizer.encode(&text, Specials::AsText).map_err(|e| Refusal::Skip(e.to_string()))?);
                ids.extend(tokenizer.eos().filter(|_| last));
                let learned = Learned::Rows(every_row(&ids));
                Encoded { kind: "texts", ids, learned, text: true, ..Encoded::default() }
            }
            Lesson::Tokens { ids, labels } => self.tokens(&ids, &labels)?,
        };
        if let Some(id) = encoded.ids.iter().find(|&&id| id as usize >= self.settings.vocab_size) {
            let why = format!("token {id} is outside the model's vocabulary of {}", self.settings.vocab_size);
            return Err(Refusal::Skip(why));
        }
        self.fit(Encoded { unused, ..encoded })
    }

    fn tokens(&self, ids: &[i64], labels: &[i64]) -> Result<Encoded, Refusal> {
        let vocabulary = self.settings.vocab_size;
        let check = |what: &str, id: i64| match u32::try_from(id) {
            Ok(id) if (id as usize) < vocabulary => Ok(id),
            _ => Err(Refusal::Skip(format!("{what} {id} is outside the model's vocabulary of {vocabulary}"))),
        };
        let ids: Vec<u32> = ids.iter().map(|&id| check("token", id)).collect::<Result<_, _>>()?;
        let label = |&label: &i64| if label == -100 { Ok(None) } else { check("label", label).map(Some) };
        let labels: Vec<Option<u32>> = labels.iter().map(label).collect::<Result<_, _>>()?;
        let plain = labels.iter().zip(&ids).all(|(label, id)| label.is_none_or(|label| label == *id));
        let learned = if plain {
            let mut rows: Vec<Range<usize>> = Vec::new();
            for row in (0..ids.len().saturating_sub(1)).filter(|row| labels[row + 1].is_some()) {
                match rows.last_mut() {
                    Some(last) if last.end == row => last.end += 1,
                    _ => rows.push(row..row + 1),
                }
            }
            Learned::Rows(rows)
        } else {
            Learned::Targets(labels.into_iter().skip(1).chain([None]).collect())
        };
        Ok(Encoded { kind: "token sequences", ids, learned, ..Encoded::default() })
    }

    /// `encoded` within the longest sequence, if there is something left to learn.
    fn fit(&self, mut encoded: Encoded) -> Result<Encoded, Refusal> {
        let (tokens, most) = (encoded.ids.len(), self.settings.max_seq_len);
        if tokens > most && !encoded.text {
            if self.settings.too_long == TooLong::Skip {
                return Err(Refusal::Skip(format!("more than the {most} tokens of --max-seq-len")));
            }
            encoded.cut = Some(tokens);
            encoded.ids.truncate(most);
        }
        let rows = encoded.ids.len().saturating_sub(1);
        let any = match &mut encoded.learned {
            Learned::Rows(list) => {
                list.iter_mut().for_each(|r| *r = r.start.min(rows)..r.end.min(rows));
                list.retain(|r| !r.is_empty());
                !list.is_empty()
            }
            Learned::Targets(targets) => {
                targets.truncate(rows + 1);
                targets.iter_mut().skip(rows).for_each(|t| *t = None);
                targets.iter().any(Option::is_some)
            }
        };
        match (any, encoded.cut) {
            (true, _) => Ok(encoded),
            (false, Some(_)) => Err(Refusal::Skip(format!("no assistant turn within {most} tokens (--max-seq-len)"))),
            (false, None) => Err(Refusal::Skip("there is nothing to learn in it".into())),
        }
    }
}
