//! Tokenizers from Hugging Face directories.

use super::added::{Added, Matcher};
use super::bpe::{Bpe, Order};
use super::unigram::Unigram;
use super::vocabulary::Kind;
use super::{Model, Pipeline, Specials, Spelling, Tokenizer, glm, json, sentencepiece};
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The contents of `dir/name`; `None` where there is no such file.
pub fn optional(dir: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

/// The JSON in `dir/name`; null where there is no such file.
pub fn optional_json(dir: &Path, name: &str) -> Result<Value> {
    let Some(bytes) = optional(dir, name)? else { return Ok(Value::Null) };
    serde_json::from_slice(&bytes).map_err(|e| Error::file(dir.join(name), format!("not JSON: {e}")))
}

/// Reads the tokenizer in `dir`, and what the files around it say about its special tokens.
pub fn read(dir: &Path) -> Result<Tokenizer> {
    let (bytes, path) = find(dir)?.ok_or_else(|| {
        Error::file(
            dir,
            "no tokenizer (tokenizer.json, tokenizer.model, ice_text.model or *.tiktoken) in this directory",
        )
    })?;
    let mut tokenizer = Tokenizer::from_bytes(&bytes, &path)?;
    drop(bytes);
    let config = optional_json(dir, "tokenizer_config.json")?;
    glm::complete(&mut tokenizer, &path, &config, &optional_json(dir, "config.json")?)?;
    add_tokens(&mut tokenizer, &config, &dir.join("tokenizer_config.json"))?;
    let map = optional_json(dir, "special_tokens_map.json")?;
    for (source, weak) in [(&map, true), (&config, false)] {
        for (key, slot) in [("bos_token", &mut tokenizer.bos), ("eos_token", &mut tokenizer.eos)] {
            let name = source[key].as_str().or_else(|| source[key]["content"].as_str());
            if let Some(id) = name.and_then(|n| tokenizer.vocabulary.id(n))
                && !(weak && slot.is_some())
            {
                *slot = Some(id);
            }
        }
    }
    if let Some(add) = config["add_bos_token"].as_bool() {
        tokenizer.add_bos = add;
    }
    if let Some(add) = config["add_eos_token"].as_bool() {
        tokenizer.add_eos = add;
    }
    let known = tokenizer.vocab_size() as u64;
    for name in ["generation_config.json", "config.json"] {
        let config = optional_json(dir, name)?;
        let ids = |key: &str| -> Vec<u32> {
            let value = &config[key];
            let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            list.iter().filter_map(|v| v.as_u64().filter(|&id| id < known).map(|id| id as u32)).collect()
        };
        let ends = ids("eos_token_id");
        tokenizer.eos = tokenizer.eos.or(ends.first().copied());
        tokenizer.bos = tokenizer.bos.or(ids("bos_token_id").first().copied());
        tokenizer.ends.extend(ends);
    }
    tokenizer.find_ends();
    Ok(tokenizer)
}

/// The contents and the path of the tokenizer's file; `None` where there is none.
pub fn find(dir: &Path) -> Result<Option<(Vec<u8>, PathBuf)>> {
    for name in ["tokenizer.json", "tokenizer.model", glm::FIRST] {
        if let Some(bytes) = optional(dir, name)? {
            return Ok(Some((bytes, dir.join(name))));
        }
    }
    let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut files = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "tiktoken"));
    let Some(path) = files.next() else { return Ok(None) };
    Ok(Some((fs::read(&path).map_err(|e| Error::io(&path, e))?, path)))
}

/// Adds the tokens of `added_tokens_decoder` that the tokenizer's own file does not list. Its library does not parse
/// them in plain text, so neither do we, except where a template asks for them.
fn add_tokens(tokenizer: &mut Tokenizer, config: &Value, path: &Path) -> Result<()> {
    let Some(tokens) = config["added_tokens_decoder"].as_object() else { return Ok(()) };
    let mut marks: Vec<Added> = tokenizer.marks.tokens().to_vec();
    let listed: BTreeSet<u32> = marks.iter().map(|m| m.id).collect();
    for (id, token) in tokens {
        let bad = |what: String| Error::file(path, format!("added_tokens_decoder: {what}"));
        let mut token: json::AddedToken = serde_json::from_value(token.clone()).map_err(|e| bad(e.to_string()))?;
        token.id = id.parse().map_err(|_| bad(format!("{id:?} is not a token id")))?;
        token.normalized = false;
        if !listed.contains(&token.id) && !token.content.is_empty() {
            let id = token.id;
            tokenizer.vocabulary.rename(id, &token.content, token.kind()).map_err(|e| bad(e.to_string()))?;
            marks.push(Added { native: false, ..token.at(id) });
        }
    }
    tokenizer.marks = Matcher::new(marks);
    Ok(())
}

/// A tokenizer from the `bytes` of the SentencePiece model `path`.
pub fn from_sentencepiece(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let m = sentencepiece::read(bytes, path)?;
    let vocabulary = m.vocabulary;
    let of_kind = |wanted: Kind, special: bool| {
        let ids = (0..vocabulary.len() as u32).filter(|&id| vocabulary.kind(id) == wanted);
        Matcher::new(ids.filter_map(|id| Some(Added::new(id, vocabulary.piece(id)?, special))))
    };
    let (marks, user) = (of_kind(Kind::Control, true), of_kind(Kind::UserDefined, false));
    let model = if m.unigram {
        let scores = m.scores.into_iter().map(f64::from).collect();
        Model::Unigram(Unigram::new(&vocabulary, scores, m.unknown, m.byte_fallback))
    } else {
        let bytes = if m.byte_fallback { vocabulary.bytes() } else { None };
        let order = Order::Scores(m.scores);
        Model::Bpe(Bpe { order, bytes, unknown: m.unknown, fuse_unknown: true, whole_words: false })
    };
    Ok(Tokenizer {
        marks,
        prefix_space: m.whitespace.add_prefix,
        pipeline: Pipeline::SentencePiece { whitespace: m.whitespace, user, model },
        spelling: Spelling::Metaspace,
        bos: m.bos,
        eos: m.eos,
        add_bos: true,
        start: Vec::new(),
        add_eos: false,
        ends: BTreeSet::new(),
        native: Specials::AsText,
        vocabulary,
    })
}
