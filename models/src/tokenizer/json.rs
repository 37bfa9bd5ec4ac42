//! Tokenizers from `tokenizer.json`, the format of the `tokenizers` library.

use super::added::{Added, Matcher};
use super::bpe::{self, Bpe, Order};
use super::charsmap::Charsmap;
use super::unigram::Unigram;
use super::vocabulary::{Kind, MAX_IDS, Vocabulary};
use super::words::Words;
use super::{Model, Pipeline, Specials, Spelling, Tokenizer, pre};
use crate::{Error, Result};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper, PreTokenizerWrapper};

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: JsonModel,
}

/// An entry of `added_tokens`, or of `added_tokens_decoder` in `tokenizer_config.json` (where the id is the key).
#[derive(Deserialize)]
pub struct AddedToken {
    #[serde(default)]
    pub id: u32,
    pub content: String,
    #[serde(default)]
    pub single_word: bool,
    #[serde(default)]
    pub lstrip: bool,
    #[serde(default)]
    pub rstrip: bool,
    #[serde(default)]
    pub normalized: bool,
    #[serde(default)]
    pub special: bool,
}

#[derive(Deserialize)]
struct JsonModel {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Pieces,
    #[serde(default)]
    merges: Pairs,
    unk_token: Option<String>,
    unk_id: Option<u32>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// A vocabulary as it stands in the file: spellings back to back, each with its id and, for unigram, its score.
#[derive(Default)]
struct Pieces {
    text: String,
    /// (end in `text`, id, score)
    entries: Vec<(usize, u32, f64)>,
    scored: bool,
}

/// Merges as they stand in the file: both halves back to back, (end of the first, end of the second).
#[derive(Default)]
struct Pairs {
    text: String,
    ends: Vec<(usize, usize)>,
    bad: Option<String>,
}

/// Appends a string to another without a copy in between.
struct Append<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a token")
    }
    fn visit_str<E>(self, s: &str) -> Result<(), E> {
        self.0.push_str(s);
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Pieces {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Pieces;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map from tokens to ids, or a list of tokens with scores")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pieces, A::Error> {
                let mut pieces = Pieces::default();
                while map.next_key_seed(Append(&mut pieces.text))?.is_some() {
                    let id = map.next_value()?;
                    pieces.entries.push((pieces.text.len(), id, 0.0));
                }
                Ok(pieces)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Pieces, A::Error> {
                let mut pieces = Pieces { scored: true, ..Pieces::default() };
                while let Some((piece, score)) = seq.next_element::<(String, f64)>()? {
                    pieces.text.push_str(&piece);
                    let id = u32::try_from(pieces.entries.len()).unwrap_or(u32::MAX);
                    pieces.entries.push((pieces.text.len(), id, score));
                }
                Ok(pieces)
            }
        }
        d.deserialize_any(Visit)
    }
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        /// One merge: `"a b"` or `["a", "b"]`.
        struct Pair<'a>(&'a mut Pairs);
        impl<'de> DeserializeSeed<'de> for Pair<'_> {
            type Value = ();
            fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
                d.deserialize_any(self)
            }
        }
        impl<'de> Visitor<'de> for Pair<'_> {
            type Value = ();
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a pair of tokens")
            }
            fn visit_str<E>(self, s: &str) -> Result<(), E> {
                match s.split_once(' ') {
                    Some((a, b)) if !b.contains(' ') => {
                        self.0.text.push_str(a);
                        let middle = self.0.text.len();
                        self.0.text.push_str(b);
                        self.0.ends.push((middle, self.0.text.len()));
                    }
                    _ if s.starts_with("#version") => {}
                    _ => self.0.bad = self.0.bad.take().or_else(|| Some(s.to_string())),
                }
                Ok(())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
                let both = seq.next_element_seed(Append(&mut self.0.text))?;
                let middle = self.0.text.len();
                let both = both.and(seq.next_element_seed(Append(&mut self.0.text))?);
                if both.is_none() || seq.next_element::<IgnoredAny>()?.is_some() {
                    return Err(serde::de::Error::custom("a merge needs two tokens"));
                }
                self.0.ends.push((middle, self.0.text.len()));
                Ok(())
            }
        }
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of merges")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Pairs, A::Error> {
                let mut pairs = Pairs::default();
                while seq.next_element_seed(Pair(&mut pairs))?.is_some() {}
                Ok(pairs)
            }
        }
        d.deserialize_seq(Visit)
    }
}

/// Reads the tokenizer of the file `path` from its `bytes`.
pub fn read(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    let bad = |what: String| Error::file(path, format!("{what}; the file may be damaged: download it again"));
    let file: File = serde_json::from_slice(bytes).map_err(|e| bad(format!("not a tokenizer: {e}")))?;
    let kind = file.model.kind.as_deref().unwrap_or(if file.model.vocab.scored { "Unigram" } else { "BPE" });
    if !matches!(kind, "BPE" | "Unigram") {
        let what = format!(
            "its model is {kind:?}; only BPE and Unigram are supported (WordPiece is for models that embed text)"
        );
        return Err(Error::file(path, what));
    }
    let affixes = [&file.model.continuing_subword_prefix, &file.model.end_of_word_suffix];
    if affixes.iter().any(|a| a.as_deref().is_some_and(|a| !a.is_empty())) {
        return Err(Error::file(path, "subword prefixes and suffixes are not supported (no chat model uses them)"));
    }
    let decoding = decoding(&file.decoder).map_err(|what| Error::file(path, what))?;
    let byte_fallback = file.model.byte_fallback.unwrap_or(false);

    let (mut vocabulary, scores) = vocabulary(&file.model.vocab).map_err(&bad)?;
    if byte_fallback || decoding.byte_fallback {
        for byte in 0..=255u8 {
            if let Some(id) = vocabulary.id(&format!("<0x{byte:02X}>")) {
                vocabulary.set_kind(id, Kind::Byte);
            }
        }
    }
    let model = if kind == "Unigram" {
        if scores.is_empty() {
            return Err(bad("a Unigram model needs a list of tokens with scores".into()));
        }
        let unknown = file.model.unk_id.filter(|&id| (id as usize) < vocabulary.len());
        if let Some(id) = unknown {
            vocabulary.set_kind(id, Kind::Unknown);
        }
        Model::Unigram(Unigram::new(&vocabulary, scores, unknown, byte_fallback))
    } else {
        if let Some(text) = file.model.merges.bad {
            return Err(bad(format!("the merge {text:?} is not two tokens with a space between")));
        }
        let Pairs { text, ends, .. } = &file.model.merges;
        let mut start = 0;
        let pairs = ends.iter().map(|&(middle, end)| {
            let pair = (&text[start..middle], &text[middle..end]);
            start = end;
            Ok(pair)
        });
        let merges = bpe::merges(&vocabulary, pairs).map_err(&bad)?;
        let unknown = file.model.unk_token.as_deref().and_then(|t| vocabulary.id(t));
        Model::Bpe(Bpe {
            order: Order::Merges(merges),
            bytes: if byte_fallback { vocabulary.bytes() } else { None },
            unknown,
            fuse_unknown: file.model.fuse_unk.unwrap_or(false),
            whole_words: file.model.ignore_merges.unwrap_or(false),
        })
    };

    let mut added = Vec::new();
    for token in file.added_tokens {
        added.extend(add(&mut vocabulary, token).map_err(|e| bad(e.to_string()))?);
    }
    let (pipeline, marks) = pipeline(&file.normalizer, &file.pre_tokenizer, model, added).map_err(|e| {
        Error::file(path, format!("{e}; the `tokenizers` library refuses this file too, or it is damaged"))
    })?;
    let (bos, eos) = template_marks(&file.post_processor);
    let (bos, eos) = (bos.and_then(|t| vocabulary.id(t)), eos.and_then(|t| vocabulary.id(t)));
    Ok(Tokenizer {
        marks,
        pipeline,
        spelling: decoding.spelling,
        prefix_space: decoding.prefix_space,
        bos,
        eos,
        add_bos: bos.is_some(),
        start: Vec::new(),
        add_eos: eos.is_some(),
        ends: BTreeSet::new(),
        native: Specials::Native,
        vocabulary,
    })
}

/// Gives an added token its place in the vocabulary. `None` for an empty one.
fn add(vocabulary: &mut Vocabulary, token: AddedToken) -> Result<Option<Added>> {
    if token.content.is_empty() {
        return Ok(None);
    }
    let id = vocabulary.id(&token.content).unwrap_or(token.id);
    if !vocabulary.set(id, &token.content, token.kind())? {
        let other = vocabulary.piece(id).unwrap_or_default();
        return Err(Error::model(format!(
            "the added token {:?} has the id {id} of the token {other:?}",
            token.content
        )));
    }
    Ok(Some(token.at(id)))
}

impl AddedToken {
    /// What the vocabulary counts it as.
    pub fn kind(&self) -> Kind {
        if self.special { Kind::Control } else { Kind::UserDefined }
    }

    /// The same as the matcher takes it.
    pub fn at(self, id: u32) -> Added {
        Added {
            id,
            content: self.content,
            special: self.special,
            native: true,
            single_word: self.single_word,
            lstrip: self.lstrip,
            rstrip: self.rstrip,
            normalized: self.normalized,
        }
    }
}

fn vocabulary(pieces: &Pieces) -> Result<(Vocabulary, Vec<f64>), String> {
    let mut order: Vec<(u32, u32)> = pieces.entries.iter().zip(0..).map(|(&(_, id, _), k)| (id, k)).collect();
    order.sort_unstable();
    let mut vocabulary = Vocabulary::with_capacity(order.len().min(MAX_IDS), pieces.text.len());
    for &(id, k) in &order {
        let start = if k == 0 { 0 } else { pieces.entries[k as usize - 1].0 };
        let piece = &pieces.text[start..pieces.entries[k as usize].0];
        if !vocabulary.set(id, piece, Kind::Normal).map_err(|e| e.to_string())? {
            let other = vocabulary.piece(id).unwrap_or_default();
            return Err(format!("the tokens {other:?} and {piece:?} both have the id {id}"));
        }
    }
    let scores = if pieces.scored { pieces.entries.iter().map(|e| e.2).collect() } else { Vec::new() };
    Ok((vocabulary, scores))
}

struct Decoding {
    spelling: Spelling,
    prefix_space: bool,
    byte_fallback: bool,
}

fn decoding(decoder: &Value) -> Result<Decoding, String> {
    let mut d = Decoding { spelling: Spelling::Plain, prefix_space: false, byte_fallback: false };
    for step in steps(decoder, "decoders") {
        match step["type"].as_str().unwrap_or_default() {
            "ByteLevel" => d.spelling = Spelling::Bytes,
            "Metaspace" => {
                d.spelling = Spelling::Metaspace;
                d.prefix_space = step["prepend_scheme"] != "never" && step["add_prefix_space"] != false;
            }
            "Replace" if step["pattern"]["String"] == "▁" => d.spelling = Spelling::Metaspace,
            "Strip" => d.prefix_space = step["content"] == " " && step["start"].as_u64().unwrap_or(0) > 0,
            "ByteFallback" => d.byte_fallback = true,
            "Fuse" => {}
            other => return Err(format!("the decoder {other:?} is not supported (no chat model uses it)")),
        }
    }
    Ok(d)
}

/// The steps of a pipeline stage: those of a `Sequence` (at any depth), or the one there is.
fn steps<'a>(value: &'a Value, list: &str) -> Vec<&'a Value> {
    match value {
        Value::Null => Vec::new(),
        _ if value["type"] == "Sequence" => {
            value[list].as_array().into_iter().flatten().flat_map(|v| steps(v, list)).collect()
        }
        _ => vec![value],
    }
}

/// The tokens that a `TemplateProcessing` puts before and after a single text.
fn template_marks(processor: &Value) -> (Option<&str>, Option<&str>) {
    let template = steps(processor, "processors").into_iter().find(|p| p["type"] == "TemplateProcessing");
    let Some(single) = template.and_then(|t| t["single"].as_array()) else { return (None, None) };
    let text = single.iter().position(|v| v.get("Sequence").is_some()).unwrap_or(0);
    let mark = |v: &'_ Value| v["SpecialToken"]["id"].is_string();
    let before = single[..text].first().filter(|v| mark(v));
    let after = single.get(text + 1..).and_then(|rest| rest.last()).filter(|v| mark(v));
    (before.and_then(|v| v["SpecialToken"]["id"].as_str()), after.and_then(|v| v["SpecialToken"]["id"].as_str()))
}

/// The pipeline, and the tokens that are looked for in raw text.
fn pipeline(
    normalizer: &Value,
    pre_tokenizer: &Value,
    model: Model,
    added: Vec<Added>,
) -> Result<(Pipeline, Matcher), String> {
    let model = match (patterns(normalizer, pre_tokenizer), model) {
        (Some((patterns, compose)), Model::Bpe(bpe)) if bpe.bytes.is_none() => {
            let words = Words::new(&patterns, compose)?;
            return Ok((Pipeline::Words { words, bpe }, Matcher::new(added)));
        }
        (_, model) => model,
    };
    let mut normalizers = Vec::new();
    for step in steps(normalizer, "normalizers") {
        if step["type"] == "Precompiled" {
            check_charsmap(step)?;
        }
        let long = |key: &str| step[key].as_str().is_some_and(|s| s.len() > 64);
        if long("content") || long("prepend") {
            return Err("a normaliser puts in more than 64 bytes at a time".into());
        }
        let n: NormalizerWrapper = serde_json::from_value(step.clone()).map_err(|e| format!("normalizer: {e}"))?;
        normalizers.push(n);
    }
    let pre_tokenizer = match pre_tokenizer {
        Value::Null => None,
        value => {
            if steps(value, "pretokenizers").iter().any(|s| s["type"] == "FixedLength" && s["length"] == 0) {
                return Err("pre_tokenizer: words of length 0".into());
            }
            let p: PreTokenizerWrapper =
                serde_json::from_value(value.clone()).map_err(|e| format!("pre_tokenizer: {e}"))?;
            Some(Box::new(p))
        }
    };
    let (mut after, before): (Vec<Added>, Vec<Added>) = added.into_iter().partition(|a| a.normalized);
    for token in &mut after {
        let mut content = NormalizedString::from(token.content.as_str());
        for n in &normalizers {
            n.normalize(&mut content).map_err(|e| format!("normalizer: {e}"))?;
            if content.len() > 4096 {
                return Err("the normaliser blows texts up".into());
            }
        }
        token.content = content.get().to_string();
    }
    Ok((Pipeline::Library { normalizers, pre_tokenizer, normalized: Matcher::new(after), model }, Matcher::new(before)))
}

/// The patterns of a byte-level pre-tokenizer that [`Words`] can do as it is, and whether text is composed first.
fn patterns(normalizer: &Value, pre_tokenizer: &Value) -> Option<(Vec<String>, bool)> {
    let compose = match steps(normalizer, "normalizers")[..] {
        [] => false,
        [one] if one["type"] == "NFC" => true,
        _ => return None,
    };
    let steps = steps(pre_tokenizer, "pretokenizers");
    let (last, rest) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    let mut patterns = Vec::new();
    for step in rest {
        patterns.push(match step["type"].as_str()? {
            "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
                step["pattern"]["Regex"].as_str()?.to_string()
            }
            "Digits" if step["individual_digits"] == true => r"\p{N}".into(),
            "Digits" => r"\p{N}+".into(),
            _ => return None,
        });
    }
    if last["use_regex"] != false {
        patterns.push(pre::GPT2.into());
    }
    Some((patterns, compose))
}

fn check_charsmap(step: &Value) -> Result<(), String> {
    let text = step["precompiled_charsmap"].as_str().unwrap_or_default();
    let sound = super::tiktoken::base64(text).and_then(|b| Charsmap::parse(&b)).is_some_and(|m| m.is_sound());
    if sound { Ok(()) } else { Err("normalizer: precompiled_charsmap is broken".into()) }
}
