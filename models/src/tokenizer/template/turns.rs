use super::encode::{encode_rendered, unused};
use super::{ChatTemplate, RenderOptions};
use crate::tokenizer::{Specials, Tokenizer};
use crate::{Error, Result};
use serde_json::Value;
use std::ops::Range;

/// A place of the rendered text that the assistant wrote.
struct Turn {
    /// Bytes of the text.
    span: Range<usize>,
    known: Known,
}

/// What is known of a turn's span.
#[derive(Clone, Copy, PartialEq)]
enum Known {
    /// It has all that the template adds to the turn.
    Whole,
    /// It ends where the message's content does; a mark may follow.
    Content,
    /// Only where it begins.
    Begin,
}

impl ChatTemplate {
    /// The tokens of a whole conversation, and which of them the assistant wrote, a range for each of its messages:
    /// what training learns from. A range runs from where the model would have begun its answer to the mark that ends
    /// the turn. Where a template ends the last answer without a mark, the end-of-text token is added.
    ///
    /// # Errors
    /// When the template fails, or rewrites earlier turns as the conversation goes on so that they cannot be found.
    pub fn encode_turns(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Value],
        options: &RenderOptions,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let options = RenderOptions { add_generation_prompt: false, ..self.with_marks(tokenizer, options) };
        let (text, blocked) = self.render_safely(tokenizer.marks(), messages, &options)?;
        let turns = self.turns(&text, messages, &options)?;
        let mut ids = encode_rendered(tokenizer, &text, &blocked)?;
        let mut ranges = token_ranges(tokenizer, &text, &blocked, &ids, &turns)?;
        for (range, turn) in ranges.iter_mut().zip(&turns) {
            let ends = |k: &usize| tokenizer.is_end_of_turn(ids[*k]);
            range.end = match turn.known {
                // What templates write behind the mark is not for the model to say.
                Known::Whole => range.clone().rfind(ends).map_or(range.end, |k| k + 1),
                Known::Content => {
                    let blank = |k: usize| tokenizer.token_bytes(ids[k]).trim_ascii().is_empty() && !ends(&k);
                    let next = (range.end..ids.len()).find(|&k| !blank(k));
                    next.filter(ends).map_or(range.end, |k| k + 1)
                }
                Known::Begin => (range.start..ids.len()).find(ends).map_or(range.start, |k| k + 1),
            };
        }
        // Words make no marks, so the first mark behind a beginning ends that turn, unless turns have none.
        let overlap = ranges.windows(2).any(|w| w[0].end > w[1].start);
        if overlap || ranges.iter().any(|r| r.is_empty()) {
            let what = "the chat template rewrites earlier turns and marks no ends; they cannot be told apart";
            return Err(Error::model(format!("{}: {what}", self.name())));
        }
        if let (Some(last), Some(eos)) = (ranges.last_mut(), tokenizer.eos())
            && last.end == ids.len()
            && !ids[last.clone()].iter().any(|&id| tokenizer.is_end_of_turn(id))
        {
            ids.push(eos);
            last.end += 1;
        }
        Ok((ids, ranges))
    }

    /// Where in `text`, the rendering of `messages`, the assistant's turns are.
    fn turns(&self, text: &str, messages: &[Value], options: &RenderOptions) -> Result<Vec<Turn>> {
        let prefix = |messages: &[Value], add_generation_prompt| {
            let part = self.render(messages, &RenderOptions { add_generation_prompt, ..options.clone() }).ok()?;
            text.starts_with(&part).then_some(part.len())
        };
        let said: Vec<usize> = (0..messages.len()).filter(|&i| messages[i]["role"] == "assistant").collect();
        let (mut turns, mut marked, mut done) = (Vec::with_capacity(said.len()), None, 0);
        for (nth, &i) in said.iter().enumerate() {
            let before = prefix(&messages[..i], true).filter(|&at| at >= done);
            let after = if i + 1 == messages.len() { Some(text.len()) } else { prefix(&messages[..=i], false) };
            let turn = match (before, after) {
                (Some(start), Some(end)) if start < end => Turn { span: start..end, known: Known::Whole },
                _ => {
                    let found = marked.get_or_insert_with(|| self.marked(text, messages, &said, options));
                    // Calls of tools follow the content.
                    let content = found[nth].clone().filter(|_| !messages[i]["tool_calls"].is_array());
                    match (before, content) {
                        (Some(start), None) => Turn { span: start..start, known: Known::Begin },
                        (before, Some(content)) => {
                            let start = before.map_or(content.start, |b| b.min(content.start));
                            Turn { span: start..content.end, known: Known::Content }
                        }
                        (None, None) => {
                            let what = format!("the chat template rewrites earlier turns; message {}", i + 1);
                            return Err(Error::model(format!("{}: {what} cannot be found again", self.name())));
                        }
                    }
                }
            };
            done = turn.span.end;
            turns.push(turn);
        }
        Ok(turns)
    }

    /// Where in `text` the contents of the messages `said` are, if they have any and can be found: they are rendered
    /// with a private character before and behind, which must be all that changes. Templates strip white space and
    /// earlier thoughts, so that the places around those are tried as well.
    fn marked(
        &self,
        text: &str,
        messages: &[Value],
        said: &[usize],
        options: &RenderOptions,
    ) -> Vec<Option<Range<usize>>> {
        let visible: [fn(&str) -> &str; 3] = [
            |content| content,
            |content| content.trim(),
            |content| content.rsplit_once("</think>").map_or(content, |(_, answer)| answer).trim(),
        ];
        let found = visible.into_iter().find_map(|visible| self.marked_around(visible, text, messages, said, options));
        found.unwrap_or_else(|| vec![None; said.len()])
    }

    fn marked_around(
        &self,
        visible: fn(&str) -> &str,
        text: &str,
        messages: &[Value],
        said: &[usize],
        options: &RenderOptions,
    ) -> Option<Vec<Option<Range<usize>>>> {
        let open = unused(text, messages, None)?;
        let close = unused(text, messages, Some(open))?;
        let (mut messages, mut places) = (messages.to_vec(), Vec::with_capacity(said.len()));
        for &i in said {
            let content = messages[i]["content"].as_str().filter(|c| !visible(c).is_empty());
            places.push(content.is_some());
            let Some(content) = content else { continue };
            let part = visible(content);
            let at = part.as_ptr() as usize - content.as_ptr() as usize;
            let (head, tail) = (&content[..at], &content[at + part.len()..]);
            messages[i]["content"] = format!("{head}{open}{part}{close}{tail}").into();
        }
        let (mut plain, mut spans, mut begun) = (String::with_capacity(text.len()), Vec::new(), None);
        for c in self.render(&messages, options).ok()?.chars() {
            if c == open && begun.is_none() {
                begun = Some(plain.len());
            } else if c == close && begun.is_some() {
                spans.push(begun.take()?..plain.len());
            } else {
                plain.push(c);
            }
        }
        let all = plain == text && spans.len() == places.iter().filter(|p| **p).count();
        let mut spans = spans.into_iter();
        all.then(|| places.iter().map(|&there| if there { spans.next() } else { None }).collect())
    }
}

/// The tokens that hold the bytes of each turn.
fn token_ranges(
    tokenizer: &Tokenizer,
    text: &str,
    blocked: &[usize],
    ids: &[u32],
    turns: &[Turn],
) -> Result<Vec<Range<usize>>> {
    if let Some(places) = tokenizer.places(text, ids) {
        let range = |turn: &Turn| {
            let Range { start, end } = turn.span;
            let from = (0..ids.len()).find(|&k| places[k] >= start || places[k + 1] > start).unwrap_or(ids.len());
            from..places[..ids.len()].partition_point(|&p| p < end).max(from)
        };
        return Ok(turns.iter().map(range).collect());
    }
    // Where tokens do not spell the text, count those of the text up to the place.
    let count = |at: usize| -> Result<(usize, bool)> {
        let known = blocked.partition_point(|&b| b < at);
        let mut part = tokenizer.encode_except(&text[..at], Specials::Parse, &blocked[..known])?;
        let added = ids.first().filter(|&&id| Some(id) == tokenizer.bos() && part.first() != Some(&id));
        part.splice(..0, added.copied());
        let same = part.iter().zip(ids).take_while(|(a, b)| a == b).count();
        Ok((same, same < part.len()))
    };
    let range = |turn: &Turn| {
        let (start, _) = count(turn.span.start)?;
        // A token that reaches across the end holds something of the turn.
        let (end, across) = count(turn.span.end)?;
        Ok(start..if turn.span.end == text.len() {
            ids.len()
        } else {
            (end + usize::from(across)).clamp(start, ids.len())
        })
    };
    turns.iter().map(range).collect()
}

#[cfg(test)]
#[path = "turns_tests.rs"]
mod tests;
