//! Output that must fit a JSON schema or a regular expression: the set of tokens allowed next, from `llguidance`.

use anyhow::{Result, anyhow, bail};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use rushlight_models::tokenizer::Tokenizer;
use serde_json::Value;
use std::sync::Arc;

/// What the output must fit.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// A JSON schema.
    JsonSchema(Value),
    /// A regular expression, for the whole output.
    Regex(String),
}

/// A rule compiled for a vocabulary, and how far an output has come in it.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    mask: SimpleVob,
}

impl Constraint {
    /// Compiles `rule` for the vocabulary of `tokenizer`.
    pub fn new(tokenizer: &Tokenizer, rule: &Rule) -> Result<Constraint> {
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
            .map(|id| {
                if tokenizer.is_special(id) || tokenizer.is_end_of_turn(id) {
                    // The mark that sets a special token apart from a text of the same letters.
                    let piece = tokenizer.piece(id).unwrap_or_default();
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], piece.as_bytes()].concat()
                } else {
                    tokenizer.token_bytes(id)
                }
            })
            .collect();
        let ends: Vec<u32> = tokenizer.end_of_turn().collect();
        let Some(&first) = ends.first() else {
            bail!("the tokenizer has no token that ends an answer, which constrained output needs");
        };
        Constraint::with_words(&words, first, &ends, rule)
    }

    fn with_words(words: &[Vec<u8>], end: u32, ends: &[u32], rule: &Rule) -> Result<Constraint> {
        let info = TokRxInfo::new(words.len() as u32, end);
        let trie = TokTrie::from(&info, words).with_eos_tokens(ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| anyhow!("constrained output: {e}"))?;
        factory.limits_mut().verbose_errors = false;
        factory.quiet();
        let (what, grammar) = match rule {
            Rule::JsonSchema(schema) => ("JSON schema", TopLevelGrammar::from_json_schema(spaced(schema)?)),
            Rule::Regex(regex) => ("regular expression", TopLevelGrammar::from_regex(&plain_digits(regex))),
        };
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            bail!("the {what} cannot be used: {}", first_line(&error));
        }
        // A rule that nothing fits shows at the first mask: better now than after the prompt.
        let mask =
            matcher.compute_mask().map_err(|e| anyhow!("the {what} cannot be used: {}", first_line(&e.to_string())))?;
        if mask.is_zero() {
            bail!("the {what} cannot be used: no text fits it");
        }
        Ok(Constraint { matcher, mask })
    }

    /// The tokens that may come next, a bit for each.
    pub fn mask(&mut self) -> Result<&[u32]> {
        self.mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|e| anyhow!("constrained output: {}", first_line(&e.to_string())))?;
        Ok(self.mask.as_slice())
    }

    /// Takes note of the token that came.
    pub fn accept(&mut self, id: u32) -> Result<()> {
        self.matcher.consume_token(id).map_err(|e| anyhow!("constrained output: {}", first_line(&e.to_string())))
    }

    /// Nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

/// The schema with fixed white space, unless it says otherwise: left free, a small model may write blanks for ever.
fn spaced(schema: &Value) -> Result<Value> {
    let mut schema = match schema {
        Value::Bool(true) => serde_json::json!({}),
        Value::Object(_) => schema.clone(),
        _ => bail!("the JSON schema cannot be used: a schema is an object, such as {{\"type\": \"object\"}}"),
    };
    if let Some(object) = schema.as_object_mut()
        && !object.contains_key("x-guidance")
    {
        let style = serde_json::json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        object.insert("x-guidance".into(), style);
    }
    Ok(schema)
}

/// The reason that a library gives: what it calls an error, or else its first line.
fn first_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    if text.contains("coerce_one_of") {
        return "oneOf has choices of which several may fit the same text: say anyOf".into();
    }
    let reason = lines.clone().find_map(|l| l.strip_prefix("error: "));
    reason.or_else(|| lines.next()).unwrap_or("unknown error").chars().take(300).collect()
}

/// `regex` with `\d` for the ten digits that people mean, not for those of all scripts.
fn plain_digits(regex: &str) -> String {
    let (mut out, mut depth, mut first) = (String::with_capacity(regex.len()), 0usize, false);
    let mut chars = regex.chars();
    while let Some(c) = chars.next() {
        let at_start = std::mem::take(&mut first);
        match c {
            '\\' => match (chars.next(), depth) {
                (Some('d'), 0) => out.push_str("[0-9]"),
                (Some('D'), 0) => out.push_str("[^0-9]"),
                (Some('d'), _) => out.push_str("0-9"),
                (other, _) => {
                    out.push(c);
                    out.extend(other);
                }
            },
            _ => {
                match c {
                    '[' => (depth, first) = (depth + 1, true),
                    // Right at the start it is one of the class's characters.
                    ']' if depth > 0 && !at_start => depth -= 1,
                    '^' if at_start => first = true,
                    _ => {}
                }
                out.push(c);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A vocabulary of all bytes, a few longer words, and an end token.
    fn words() -> Vec<Vec<u8>> {
        let mut words: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        words.extend(["true", "{\"", "\": ", "name"].map(|w| w.as_bytes().to_vec()));
        words.push(b"\xFF<|end|>".to_vec());
        words
    }

    const END: u32 = 260;

    fn constraint(rule: Rule) -> Result<Constraint> {
        Constraint::with_words(&words(), END, &[END], &rule)
    }

    fn allowed(c: &mut Constraint, id: u32) -> bool {
        let mask = c.mask().unwrap();
        mask[id as usize / 32] >> (id % 32) & 1 == 1
    }

    #[test]
    fn a_regex_allows_its_language_only() {
        let mut c = constraint(Rule::Regex("[ab]+c".into())).unwrap();
        assert!(allowed(&mut c, b'a'.into()) && !allowed(&mut c, b'c'.into()) && !allowed(&mut c, END));
        for b in b"abba" {
            c.accept((*b).into()).unwrap();
        }
        assert!(allowed(&mut c, b'c'.into()) && !c.is_complete());
        c.accept(b'c'.into()).unwrap();
        assert!(c.is_complete());
        let mut c = constraint(Rule::Regex("a*".into())).unwrap();
        assert!(allowed(&mut c, END), "the empty text fits");
        assert!(!allowed(&mut c, 0xFF));
    }

    #[test]
    fn a_schema_makes_json() {
        let schema = json!({"type": "object", "properties": {"name": {"type": "boolean"}}, "required": ["name"],
            "additionalProperties": false});
        let start = constraint(Rule::JsonSchema(schema)).unwrap();
        // The first allowed token each time makes something that the schema describes.
        for prefer_long in [false, true] {
            let (mut c, mut text) = (start.clone(), Vec::new());
            while !c.is_complete() && text.len() < 100 {
                let order: Vec<u32> = if prefer_long { (0..260).rev().collect() } else { (0..260).collect() };
                let id = order.into_iter().find(|&id| allowed(&mut c, id)).unwrap();
                c.accept(id).unwrap();
                text.extend(&words()[id as usize]);
            }
            let value: Value = serde_json::from_slice(&text).unwrap();
            assert!(value["name"].is_boolean(), "{value}");
        }
    }

    #[test]
    fn bad_rules_are_one_clear_line() {
        for rule in [
            Rule::Regex("(".into()),
            Rule::JsonSchema(json!(3)),
            Rule::JsonSchema(json!({"type": "nothing"})),
            Rule::JsonSchema(json!({"$ref": "#/missing"})),
            Rule::JsonSchema(json!({"$ref": "https://example.com/schema"})),
            Rule::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 1})),
        ] {
            let Err(error) = constraint(rule.clone()) else { panic!("{rule:?} was taken") };
            let error = error.to_string();
            assert!(error.contains("cannot be used: ") && !error.contains('\n'), "{rule:?}: {error}");
        }
    }

    #[test]
    fn digits_are_the_ten_of_them() {
        for (regex, plain) in [
            (r"\d{4}-\D", "[0-9]{4}-[^0-9]"),
            (r"[\d.]+\\d", r"[0-9.]+\\d"),
            (r"[^]\d]\d", "[^]0-9][0-9]"),
            (r"[a[\d]]\d\[\d", r"[a[0-9]][0-9]\[[0-9]"),
            ("é\\", "é\\"),
        ] {
            assert_eq!(plain_digits(regex), plain);
        }
    }
}
