//! tiktoken files: a line for each token, its bytes in base64 and its rank. They hold neither pattern nor special
//! tokens, so the models in use are told apart by the number of their tokens.

use super::added::{Added, Matcher};
use super::bpe::{Bpe, Order};
use super::vocabulary::{Kind, MAX_IDS, Vocabulary};
use super::words::{self, Words};
use super::{Pipeline, Specials, Spelling, Tokenizer, pre};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// Whether `bytes` look like a tiktoken file: base64, a space, a number.
pub fn is_one(bytes: &[u8]) -> bool {
    let line = bytes.split(|&b| b == b'\n').next().unwrap_or_default();
    std::str::from_utf8(line).is_ok_and(|l| parse_line(l).is_some())
}

fn parse_line(line: &str) -> Option<(Vec<u8>, usize)> {
    let (text, rank) = line.trim_end().split_once(' ')?;
    Some((base64(text)?, rank.parse().ok()?))
}

/// Reads the file `path` from its `bytes`.
pub fn read(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let bad = |what: String| Error::file(path, what);
    let text = std::str::from_utf8(bytes).map_err(|_| bad("not a tiktoken file (not UTF-8)".into()))?;
    let mut vocabulary = Vocabulary::with_capacity((bytes.len() / 12).min(MAX_IDS), bytes.len());
    for (n, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty()) {
        let (token, rank) =
            parse_line(line).ok_or_else(|| bad(format!("line {} is not a token in base64 and its rank", n + 1)))?;
        if rank != vocabulary.len() {
            return Err(bad(format!("line {} has the rank {rank} where {} was expected", n + 1, vocabulary.len())));
        }
        vocabulary.push(&words::spell(&token), Kind::Normal).map_err(|e| bad(e.to_string()))?;
    }
    let (pattern, compose, specials, bos, eos): (_, _, Vec<String>, _, _) = match vocabulary.len() {
        128_000 => (pre::LLAMA3, false, llama3_specials(), Some("<|begin_of_text|>"), "<|end_of_text|>"),
        151_643 => {
            let named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
            let extra = (0..205).map(|i| format!("<|extra_{i}|>"));
            (pre::QWEN2, true, named.into_iter().chain(extra).collect(), None, "<|endoftext|>")
        }
        n => {
            let known = "known are Llama 3's (128000) and Qwen's (151643)";
            return Err(bad(format!("a tiktoken vocabulary of {n} tokens is unknown ({known}); add a tokenizer.json")));
        }
    };
    let mut added = Vec::new();
    for name in specials {
        let id = vocabulary.push(&name, Kind::Control).map_err(|e| bad(e.to_string()))?;
        added.push(Added::new(id, name, true));
    }
    let words = Words::new(&[pattern], compose).map_err(bad)?;
    let bpe = Bpe { order: Order::Ids, bytes: None, unknown: None, fuse_unknown: false, whole_words: true };
    let bos = bos.and_then(|name| vocabulary.id(name));
    let eos = vocabulary.id(eos);
    let mut tokenizer = Tokenizer {
        marks: Matcher::new(added),
        pipeline: Pipeline::Words { words, bpe },
        spelling: Spelling::Bytes,
        prefix_space: false,
        bos,
        eos,
        add_bos: bos.is_some(),
        start: Vec::new(),
        add_eos: false,
        ends: BTreeSet::new(),
        native: Specials::Native,
        vocabulary,
    };
    tokenizer.find_ends();
    Ok(tokenizer)
}

/// Llama 3's special tokens in the order of their ids: eleven with names (as of 3.1), the rest reserved.
fn llama3_specials() -> Vec<String> {
    let named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ];
    let reserved = (2..247).map(|i| format!("<|reserved_special_token_{i}|>"));
    named.map(String::from).into_iter().chain(reserved).collect()
}

/// The bytes that `text` encodes in base64 (padding optional).
pub fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    if text.is_empty() || text.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut n) = (0u32, 0);
    for b in text.bytes() {
        let digit = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(digit);
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
            bits &= (1 << n) - 1;
        }
    }
    Some(out)
}
