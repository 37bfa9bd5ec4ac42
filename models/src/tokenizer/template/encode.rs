use super::{ChatTemplate, RenderOptions};
use crate::Result;
use crate::tokenizer::added::Matcher;
use crate::tokenizer::{Specials, Tokenizer};
use serde_json::Value;

/// Characters that stand inside a broken mark while the template runs: private use, so rarely in anyone's text.
const SPLINTERS: [char; 4] = ['\u{E5A1}', '\u{F3C7}', '\u{10F29B}', '\u{10DE5D}'];

impl ChatTemplate {
    /// The tokens of a conversation: the template's marks become special tokens, but nothing that somebody wrote in a
    /// message does, whatever it looks like.
    ///
    /// Where a message spells a mark, the template is run on messages in which each such spelling is broken by a
    /// private character; the template's own marks are then the whole ones. The private characters are taken out
    /// before the text is tokenized, and no mark may reach across a place where one was.
    pub fn encode_chat(&self, tokenizer: &Tokenizer, messages: &[Value], options: &RenderOptions) -> Result<Vec<u32>> {
        let options = self.with_marks(tokenizer, options);
        let (text, blocked) = self.render_safely(tokenizer.marks(), messages, &options)?;
        encode_rendered(tokenizer, &text, &blocked)
    }

    /// `options` with the spellings of the beginning and end marks from `tokenizer`, where they are not given.
    pub fn with_marks(&self, tokenizer: &Tokenizer, options: &RenderOptions) -> RenderOptions {
        let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.piece(id)).map(str::to_string);
        let mut options = options.clone();
        options.bos_token = options.bos_token.or_else(|| spelled(tokenizer.bos()));
        options.eos_token = options.eos_token.or_else(|| spelled(tokenizer.eos()));
        options
    }

    /// The rendered text, and the places (byte offsets) that no mark may reach across.
    pub(super) fn render_safely(
        &self,
        marks: &Matcher,
        messages: &[Value],
        options: &RenderOptions,
    ) -> Result<(String, Vec<usize>)> {
        let plain = self.render(messages, options)?;
        let splinter = unused(&plain, messages, None).unwrap_or(SPLINTERS[0]);
        let mut broken = Breaker { marks, splinter, broke: false };
        let mut tools = options.clone();
        tools.tools = options.tools.as_ref().map(|t| broken.value(t));
        tools.extra = options.extra.iter().map(|(k, v)| (k.clone(), broken.value(v))).collect();
        let safe: Vec<Value> = messages.iter().map(|m| broken.value(m)).collect();
        if !broken.broke {
            return Ok((plain, Vec::new()));
        }
        let (text, blocked) = split_out(&self.render(&safe, &tools)?, splinter);
        if text == plain {
            return Ok((text, blocked));
        }
        // The template looks for a mark in what the assistant said (to drop its thoughts, say): leave those whole.
        let trusting: Vec<Value> = messages
            .iter()
            .zip(&safe)
            .map(|(m, s)| if m["role"] == "assistant" { m.clone() } else { s.clone() })
            .collect();
        let (second, places) = split_out(&self.render(&trusting, &tools)?, splinter);
        if second == plain { Ok((second, places)) } else { Ok((text, blocked)) }
    }
}

/// The tokens of the rendered `text`, after the marks before a text where the model expects any.
pub(super) fn encode_rendered(tokenizer: &Tokenizer, text: &str, blocked: &[usize]) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode_except(text, Specials::Parse, blocked)?;
    let prefix = tokenizer.prefix();
    if !ids.starts_with(&prefix) {
        ids.splice(0..0, prefix);
    }
    Ok(ids)
}

/// A private character that `text` and `messages` lack, if there is one.
pub(super) fn unused(text: &str, messages: &[Value], but: Option<char>) -> Option<char> {
    let taken = |c: char| Some(c) == but || text.contains(c) || messages.iter().any(|m| contains(m, c));
    SPLINTERS.into_iter().find(|&c| !taken(c))
}

/// `text` without the splinters, and where they were.
fn split_out(text: &str, splinter: char) -> (String, Vec<usize>) {
    let mut out = String::with_capacity(text.len());
    let mut places = Vec::new();
    for (k, part) in text.split(splinter).enumerate() {
        if k > 0 {
            places.push(out.len());
        }
        out.push_str(part);
    }
    (out, places)
}

fn contains(value: &Value, c: char) -> bool {
    match value {
        Value::String(s) => s.contains(c),
        Value::Array(list) => list.iter().any(|v| contains(v, c)),
        Value::Object(map) => map.iter().any(|(k, v)| k.contains(c) || contains(v, c)),
        _ => false,
    }
}

/// Breaks the marks in strings.
struct Breaker<'a> {
    marks: &'a Matcher,
    splinter: char,
    broke: bool,
}

impl Breaker<'_> {
    fn value(&mut self, value: &Value) -> Value {
        match value {
            Value::String(s) => Value::String(self.text(s)),
            Value::Array(list) => Value::Array(list.iter().map(|v| self.value(v)).collect()),
            Value::Object(map) => map.iter().map(|(k, v)| (self.name(k), self.named(k, v))).collect(),
            other => other.clone(),
        }
    }

    fn named(&mut self, key: &str, value: &Value) -> Value {
        match value {
            Value::String(role) if key == "role" => Value::String(self.name(role)),
            other => self.value(other),
        }
    }

    /// The same for what templates compare with words of their own: only whole marks are broken, so that `role` stays what
    /// it is where `eop` is a mark.
    fn name(&mut self, text: &str) -> String {
        if self.marks.find_special(text).is_some() { self.text(text) } else { text.to_owned() }
    }

    /// `text` with a splinter after the first character of each mark, wherever marks overlap too, and at the end if a
    /// mark could be completed by what follows.
    fn text(&mut self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, first, after)) = self.next_mark(rest) {
            out.push_str(before);
            out.push(first);
            out.push(self.splinter);
            self.broke = true;
            rest = after;
        }
        out.push_str(rest);
        if self.marks.ends_open(text) {
            out.push(self.splinter);
            self.broke = true;
        }
        out
    }

    /// What comes before the next mark, its first character, and what follows that.
    fn next_mark<'t>(&self, text: &'t str) -> Option<(&'t str, char, &'t str)> {
        let (before, mark) = text.split_at(self.marks.find_special(text)?);
        let first = mark.chars().next()?;
        Some((before, first, &mark[first.len_utf8()..]))
    }
}
