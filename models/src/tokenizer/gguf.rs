//! Tokenizers from the metadata of GGUF files.

use super::added::{Added, Matcher};
use super::bpe::{self, Bpe, Merges, Order};
use super::charsmap::Charsmap;
use super::pre;
use super::sentencepiece::Whitespace;
use super::unigram::Unigram;
use super::vocabulary::{Kind, Vocabulary, byte_of};
use super::words::Words;
use super::{Model, Pipeline, Specials, Spelling, Tokenizer};
use crate::checkpoint::Metadata;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// Reads the tokenizer of the file `path` from its `metadata`.
pub fn read(metadata: &Metadata, path: &Path) -> Result<Tokenizer> {
    let bad = |what: String| Error::file(path, what);
    // `none` is what conversions without a vocabulary write.
    let Some(model) = metadata.str("tokenizer.ggml.model").filter(|m| !matches!(*m, "none" | "no_vocab")) else {
        return Err(bad(
            "holds no tokenizer (tokenizer.ggml.model); convert the model again with its vocabulary".into()
        ));
    };
    if !matches!(model, "gpt2" | "llama" | "t5" | "gemma4") {
        let kind = if model == "bert" {
            "'bert' (WordPiece, for models that embed text)".into()
        } else {
            format!("{model:?}")
        };
        return Err(bad(format!("tokenizer.ggml.model is {kind}; only gpt2, llama and t5 are supported")));
    }
    let vocabulary = vocabulary(metadata, path)?;
    let id = |key: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{key}_token_id");
        match metadata.u64(&key) {
            // All ones: "none" in files of some converters.
            None | Some(0xFFFF_FFFF) => Ok(None),
            Some(id) if id < vocabulary.len() as u64 => Ok(Some(id as u32)),
            Some(id) => Err(bad(format!("{key} is {id}, but the vocabulary has {} tokens", vocabulary.len()))),
        }
    };
    let (mut bos, mut eos, unknown) = (id("bos")?, id("eos")?, id("unknown")?);
    let mut ends: BTreeSet<u32> = BTreeSet::new();
    for key in ["eot", "eom"] {
        ends.extend(id(key)?);
    }
    let flag = |key: &str| metadata.bool(&format!("tokenizer.ggml.{key}"));

    let pre_name = metadata.str("tokenizer.ggml.pre").unwrap_or("default");
    let (pipeline, spelling, default_bos, prefix_space);
    match model {
        "gpt2" if !matches!(pre_name, "gemma4") => {
            let pre = pre::find(pre_name).ok_or_else(|| {
                bad(format!(
                    "unknown tokenizer.ggml.pre {pre_name:?}; known are {}; a newer version may know it",
                    pre::names()
                ))
            })?;
            let words =
                Words::new(pre.patterns, pre.compose).map_err(|e| bad(format!("pattern of {pre_name:?}: {e}")))?;
            let bpe = Bpe {
                order: Order::Merges(merges(metadata, &vocabulary).map_err(&bad)?),
                bytes: None,
                unknown: None,
                fuse_unknown: false,
                whole_words: pre.whole_words,
            };
            pipeline = Pipeline::Words { words, bpe };
            (spelling, default_bos, prefix_space) = (Spelling::Bytes, pre.add_bos, false);
        }
        "gpt2" | "gemma4" => {
            let whitespace =
                Whitespace { charsmap: None, add_prefix: false, remove_extra: false, escape: true, blanks: false };
            let bpe = Bpe {
                order: Order::Merges(merges(metadata, &vocabulary).map_err(&bad)?),
                bytes: vocabulary.bytes(),
                unknown,
                fuse_unknown: true,
                whole_words: false,
            };
            pipeline = Pipeline::SentencePiece { whitespace, user: user(&vocabulary), model: Model::Bpe(bpe) };
            (spelling, default_bos, prefix_space) = (Spelling::Metaspace, true, false);
        }
        _ => {
            let unigram = model == "t5";
            (bos, eos) = (
                bos.or((!unigram && vocabulary.len() > 2).then_some(1)),
                eos.or((vocabulary.len() > 2).then_some(if unigram { 1 } else { 2 })),
            );
            let scores = metadata.array("tokenizer.ggml.scores").map(|a| a.floats()).unwrap_or_default();
            if scores.len() != vocabulary.len() {
                let what = format!("{} scores for {} tokens (tokenizer.ggml.scores)", scores.len(), vocabulary.len());
                return Err(bad(format!("{what}; convert the model again")));
            }
            let whitespace = Whitespace {
                charsmap: charsmap(metadata).map_err(&bad)?,
                add_prefix: flag("add_space_prefix").unwrap_or(true),
                remove_extra: flag("remove_extra_whitespaces").unwrap_or(false),
                escape: true,
                blanks: false,
            };
            prefix_space = whitespace.add_prefix;
            let unknown =
                unknown.or_else(|| (0..vocabulary.len() as u32).find(|&id| vocabulary.kind(id) == Kind::Unknown));
            let model = if unigram {
                let scores = scores.into_iter().map(f64::from).collect();
                Model::Unigram(Unigram::new(&vocabulary, scores, unknown, true))
            } else {
                let bytes = vocabulary.bytes();
                Model::Bpe(Bpe { order: Order::Scores(scores), bytes, unknown, fuse_unknown: true, whole_words: false })
            };
            pipeline = Pipeline::SentencePiece { whitespace, user: user(&vocabulary), model };
            (spelling, default_bos) = (Spelling::Metaspace, !unigram);
        }
    }

    let phi3 = metadata.str("general.architecture") == Some("phi3") && model == "llama";
    let marks = Matcher::new((0..vocabulary.len() as u32).filter_map(|id| {
        let piece = vocabulary.piece(id)?;
        let special = match vocabulary.kind(id) {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => false,
            _ => return None,
        };
        // Phi-3's marks swallow the line break that its template puts after them; GGUF has no field for that.
        let rstrip = phi3 && !matches!(piece, "<unk>" | "<s>" | "<|endoftext|>");
        Some(Added { rstrip, ..Added::new(id, piece, special) })
    }));
    let mut tokenizer = Tokenizer {
        marks,
        pipeline,
        spelling,
        prefix_space,
        bos,
        eos,
        add_bos: flag("add_bos_token").unwrap_or(default_bos),
        start: Vec::new(),
        add_eos: flag("add_eos_token").unwrap_or(model == "t5"),
        ends,
        native: Specials::Native,
        vocabulary,
    };
    tokenizer.find_ends();
    Ok(tokenizer)
}

fn vocabulary(metadata: &Metadata, path: &Path) -> Result<Vocabulary> {
    let bad = |what: String| Error::file(path, what);
    let tokens = metadata.array("tokenizer.ggml.tokens").filter(|a| a.count > 0 && a.strings().next().is_some());
    let tokens = tokens.ok_or_else(|| bad("the vocabulary (tokenizer.ggml.tokens) is missing or empty".into()))?;
    let types = metadata.array("tokenizer.ggml.token_type");
    if let Some(types) = types.filter(|t| t.ints().count() != tokens.count) {
        let what = format!("{} token types for {} tokens", types.ints().count(), tokens.count);
        return Err(bad(format!("{what} (tokenizer.ggml.token_type); convert the model again")));
    }
    let mut types = types.map(|t| t.ints());
    let mut vocabulary = Vocabulary::with_capacity(tokens.count, tokens.data.len().saturating_sub(8 * tokens.count));
    for (id, piece) in tokens.strings().enumerate() {
        let kind = match types.as_mut().and_then(|t| t.next()) {
            // 0 is "undefined" in GGUF.
            None | Some(0) => Kind::Normal,
            Some(n) => {
                Kind::from_number(n).ok_or_else(|| bad(format!("token {id} {piece:?} has the unknown type {n}")))?
            }
        };
        if kind == Kind::Byte && byte_of(piece).is_none() {
            let what = format!("token {id} is a byte token but spelled {piece:?}");
            return Err(bad(format!("{what}; expected <0x00> to <0xFF>; the file is damaged or was made wrongly")));
        }
        vocabulary.push(piece, kind).map_err(|e| bad(e.to_string()))?;
    }
    Ok(vocabulary)
}

fn merges(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Merges, String> {
    let merges = metadata.array("tokenizer.ggml.merges");
    let merges = merges.ok_or("the merges (tokenizer.ggml.merges) are missing; convert the model again")?;
    let pairs = merges.strings().map(|text| {
        // From the second character on: a token may itself begin with a space.
        let first = text.chars().next().map_or(0, char::len_utf8);
        let space = text[first..].find(' ').ok_or_else(|| text.to_string())? + first;
        Ok((&text[..space], &text[space + 1..]))
    });
    bpe::merges(vocabulary, pairs)
}

fn charsmap(metadata: &Metadata) -> Result<Option<Charsmap>, String> {
    let Some(array) = metadata.array("tokenizer.ggml.precompiled_charsmap") else { return Ok(None) };
    let bytes: Vec<u8> = array.ints().map(|b| b as u8).collect();
    if bytes.is_empty() {
        return Ok(None);
    }
    Charsmap::parse(&bytes).map(Some).ok_or_else(|| "tokenizer.ggml.precompiled_charsmap is broken".into())
}

/// Finds the user-defined pieces in prepared text.
fn user(vocabulary: &Vocabulary) -> Matcher {
    let ids = (0..vocabulary.len() as u32).filter(|&id| vocabulary.kind(id) == Kind::UserDefined);
    Matcher::new(ids.filter_map(|id| Some(Added::new(id, vocabulary.piece(id)?, false))))
}
