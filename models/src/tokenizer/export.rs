//! Tokenizers of directories as GGUF metadata (`tokenizer.*`), as llama.cpp reads them.

use super::bpe::{Bpe, Merges, Order, Scratch};
use super::charsmap::Charsmap;
use super::sentencepiece::{self, Whitespace};
use super::template::ChatTemplate;
use super::vocabulary::{Kind, Vocabulary};
use super::words::Words;
use super::{END_MARKS, Model, Pipeline, Tokenizer, dir, pre, tiktoken};
use crate::checkpoint::{Array, Bytes, Metadata, Value, ValueType};
use crate::{Error, Result};
use serde_json::Value as Json;
use std::collections::BTreeSet;
use std::path::Path;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

/// A tokenizer in GGUF's terms.
#[derive(Default)]
pub(crate) struct Exported {
    /// The keys `tokenizer.*`.
    pub metadata: Metadata,
    /// What could not be said, a sentence each.
    pub notes: Vec<String>,
}

impl Exported {
    fn set(&mut self, key: &str, value: Value) {
        self.metadata.0.insert(format!("tokenizer.{key}"), value);
    }

    fn id(&mut self, key: &str, id: Option<u32>) {
        if let Some(id) = id {
            self.set(&format!("ggml.{key}_token_id"), Value::Unsigned(u64::from(id)));
        }
    }
}

/// The tokenizer and chat template of the directory `dir`, whose embedding has `rows` rows. Without a tokenizer the
/// metadata say so.
///
/// # Errors
/// When the tokenizer does something for which GGUF has no word.
pub(crate) fn export(dir: &Path, rows: usize) -> Result<Exported> {
    let mut out = Exported::default();
    if let Some(template) = ChatTemplate::sources(dir)? {
        out.set("chat_template", Value::String(template.default));
        if let Some(tools) = template.for_tools {
            out.set("chat_templates", Value::Array(Array::of_strings(["tool_use"])));
            out.set("chat_template.tool_use", Value::String(tools));
        }
    }
    if dir::find(dir)?.is_none() {
        out.set("ggml.model", Value::String("none".into()));
        out.notes.push("the directory has no tokenizer, so the GGUF file has none: it takes ids, not text".into());
        return Ok(out);
    }
    let tokenizer = Tokenizer::from_dir(dir)?;
    let cannot = |what: String| Error::file(dir, format!("its tokenizer cannot be said in GGUF: {what}"));
    tokenizer.export(dir, rows, &mut out).map_err(cannot)?;
    special_ids(&tokenizer, dir, rows, &mut out)?;
    Ok(out)
}

impl Tokenizer {
    fn export(&self, dir: &Path, rows: usize, out: &mut Exported) -> Result<(), String> {
        let text = |s: &str| Value::String(s.into());
        let unknown = match &self.pipeline {
            Pipeline::Words { words, bpe } => {
                let merges = match &bpe.order {
                    Order::Merges(merges) => spelled(&self.vocabulary, merges, rows),
                    Order::Ids => merges_of_ranks(&self.vocabulary, rows),
                    Order::Scores(_) => return Err("a byte-level vocabulary with scores".into()),
                };
                out.set("ggml.model", text("gpt2"));
                let pre = self.pre(words, bpe, &mut out.notes)?;
                out.set("ggml.pre", text(pre));
                out.set("ggml.merges", Value::Array(Array::of_strings(merges)));
                None
            }
            Pipeline::SentencePiece { whitespace, model, .. } => {
                if !whitespace.escape {
                    return Err("its SentencePiece model leaves spaces as they are".into());
                }
                self.pieces(model, whitespace, dir, rows, out)?
            }
            Pipeline::Library { normalizers, pre_tokenizer, model, .. } => {
                let whitespace = self.whitespace(normalizers, pre_tokenizer.as_deref(), &mut out.notes)?;
                self.pieces(model, &whitespace, dir, rows, out)?
            }
        };
        let known = self.vocabulary.len();
        if known > rows {
            let more = known - rows;
            out.notes
                .push(format!("the last {more} of the tokenizer's {known} tokens have no embedding and are left out"));
        }
        let whims = |t: &&super::Added| t.lstrip || t.rstrip || t.single_word;
        if let Some(mark) = self.marks.tokens().iter().find(whims) {
            out.notes.push(format!(
                "tokens such as {:?} take in the space beside them or stand alone, for which GGUF has no word",
                mark.content
            ));
        }
        let ids = 0..rows as u32;
        let piece = |id| self.vocabulary.piece(id).filter(|piece| !piece.is_empty());
        let listed = self.marks.tokens().iter().filter(|t| !t.native).map(|t| t.id).collect();
        let kinds: Vec<i32> = ids.clone().map(|id| self.kind(id, unknown, &listed) as i32).collect();
        let tokens = ids.map(|id| piece(id).map_or_else(|| format!("[PAD{id}]"), String::from));
        out.set("ggml.tokens", Value::Array(Array::of_strings(tokens)));
        out.set("ggml.token_type", Value::Array(Array::of_i32(&kinds)));
        out.id("unknown", unknown);
        Ok(())
    }

    /// What GGUF counts `id` as; `listed` are the tokens that only tokenizer_config.json lists.
    fn kind(&self, id: u32, unknown: Option<u32>, listed: &BTreeSet<u32>) -> Kind {
        let piece = self.vocabulary.piece(id).unwrap_or_default();
        match self.vocabulary.kind(id) {
            _ if piece.is_empty() => Kind::Unused,
            Kind::Control if unknown == Some(id) => Kind::Unknown,
            // What a person types must not become a mark, whatever the file that lists it calls it.
            Kind::UserDefined if looks_special(piece) || listed.contains(&id) => Kind::Control,
            kind => kind,
        }
    }

    /// The name of the pre-tokenizer that cuts words as `words` does.
    fn pre(&self, words: &Words, bpe: &Bpe, notes: &mut Vec<String>) -> Result<&'static str, String> {
        let alike = pre::recognise(words);
        if alike.is_empty() {
            return Err(format!(
                "llama.cpp has no tokenizer.ggml.pre that cuts words by the patterns {:?}",
                words.patterns()
            ));
        }
        // Where every token is what merges make of its spelling, it does not matter whether words that are tokens are
        // taken whole.
        let same_whole = |p: &pre::Pre| p.whole_words == bpe.whole_words;
        let usable = match alike.iter().any(|p| same_whole(p)) {
            true => alike.iter().copied().filter(|p| same_whole(p)).collect(),
            false if self.merges_reach_all(bpe) => alike,
            false => return Err("llama.cpp has its patterns, but takes words that are tokens otherwise".into()),
        };
        let pre = usable.iter().find(|p| p.compose == words.composes()).or(usable.first());
        let pre = pre.ok_or("no pre-tokenizer is left")?;
        if words.composes() && !pre.compose {
            notes.push("readers of the GGUF file do not compose texts (Unicode NFC) as this tokenizer does".into());
        }
        Ok(pre.name())
    }

    fn merges_reach_all(&self, bpe: &Bpe) -> bool {
        let derived;
        let order = match &bpe.order {
            Order::Merges(merges) => Order::Merges(merges.clone()),
            _ => {
                let lines = merges_of_ranks(&self.vocabulary, self.vocabulary.len());
                let pairs = lines.iter().map(|l| l.split_once(' ').ok_or_else(|| l.clone()));
                derived = super::bpe::merges(&self.vocabulary, pairs);
                match derived {
                    Ok(merges) => Order::Merges(merges),
                    Err(_) => return false,
                }
            }
        };
        let plain = Bpe { order, bytes: None, unknown: None, fuse_unknown: false, whole_words: false };
        let (mut scratch, mut ids) = (Scratch::default(), Vec::new());
        (0..self.vocabulary.len() as u32).filter(|&id| self.vocabulary.kind(id) == Kind::Normal).all(|id| {
            ids.clear();
            let piece = self.vocabulary.piece(id).unwrap_or_default();
            plain.encode(&self.vocabulary, piece, &mut scratch, &mut ids);
            ids == [id]
        })
    }

    /// Writes what SentencePiece vocabularies have and byte-level ones have not. Gives the unknown token.
    fn pieces(
        &self,
        model: &Model,
        whitespace: &Whitespace,
        dir: &Path,
        rows: usize,
        out: &mut Exported,
    ) -> Result<Option<u32>, String> {
        let (name, mut scores, unknown) = match model {
            Model::Bpe(bpe) => {
                if self.vocabulary.bytes().is_none() {
                    return Err("it has no tokens for single bytes, which its readers fall back to".into());
                }
                let scores = match &bpe.order {
                    Order::Scores(scores) => scores.clone(),
                    Order::Merges(merges) => {
                        published_scores(&self.vocabulary, dir).unwrap_or_else(|| ranked(&self.vocabulary, merges))
                    }
                    Order::Ids => return Err("pieces in order of their ids".into()),
                };
                ("llama", scores, bpe.unknown)
            }
            Model::Unigram(unigram) => ("t5", unigram.scores().iter().map(|&s| s as f32).collect(), unigram.unknown),
        };
        // What was added to the vocabulary later, and what fills it up to the embedding's rows.
        scores.resize(self.vocabulary.len(), -1000.0);
        scores.resize(rows, -10000.0);
        out.set("ggml.model", Value::String(name.into()));
        out.set("ggml.pre", Value::String("default".into()));
        out.set("ggml.scores", Value::Array(Array::of_f32(&scores)));
        out.set("ggml.add_space_prefix", Value::Bool(whitespace.add_prefix));
        out.set("ggml.remove_extra_whitespaces", Value::Bool(whitespace.remove_extra));
        if let Some(map) = &whitespace.charsmap {
            let bytes = map.bytes();
            let map = Array { kind: ValueType::U8, count: bytes.len(), data: Bytes::new(bytes) };
            out.set("ggml.precompiled_charsmap", Value::Array(map));
        }
        Ok(unknown.filter(|&id| (id as usize) < rows))
    }

    /// SentencePiece's rules that say what these steps of the `tokenizers` library do.
    fn whitespace(
        &self,
        normalizers: &[NormalizerWrapper],
        pre_tokenizer: Option<&PreTokenizerWrapper>,
        notes: &mut Vec<String>,
    ) -> Result<Whitespace, String> {
        let json = |step: Result<Json, serde_json::Error>| step.map_err(|e| e.to_string());
        let mut rules =
            Whitespace { charsmap: None, add_prefix: false, remove_extra: false, escape: false, blanks: false };
        for step in normalizers {
            let step = json(serde_json::to_value(step))?;
            match step["type"].as_str().unwrap_or_default() {
                "Prepend" if step["prepend"] == "▁" => rules.add_prefix = true,
                "Replace" if step["pattern"]["String"] == " " && step["content"] == "▁" => rules.escape = true,
                "Precompiled" if rules.charsmap.is_none() && !rules.escape && !rules.add_prefix => {
                    let text = step["precompiled_charsmap"].as_str().unwrap_or_default();
                    rules.charsmap = tiktoken::base64(text).and_then(|bytes| Charsmap::parse(&bytes));
                }
                _ => return Err(format!("the normaliser {step}")),
            }
        }
        if let Some(step) = pre_tokenizer {
            let step = json(serde_json::to_value(step))?;
            // Such a cut can only be left out where no piece reaches across it.
            let inner = |id| self.vocabulary.piece(id).is_some_and(|p| p.chars().skip(1).any(|c| c == '▁'));
            let pieces_cross = || {
                let all = 0..self.vocabulary.len() as u32;
                all.filter(|&id| self.vocabulary.kind(id) == Kind::Normal).any(inner)
            };
            match step["type"].as_str().unwrap_or_default() {
                "Metaspace" if step["replacement"] == "▁" && (step["split"] == false || !pieces_cross()) => {
                    rules.escape = true;
                    rules.add_prefix = step["prepend_scheme"] != "never";
                    if rules.add_prefix {
                        let marks = if step["prepend_scheme"] == "first" { ", and behind each mark" } else { "" };
                        let text = "readers of the GGUF file put a space before a text even where it begins with one";
                        notes.push(format!("{text}{marks}"));
                    }
                }
                // There are no spaces any more where this step looks for them.
                "Split" if step["pattern"]["String"] == " " && step["invert"] == false && rules.escape => {}
                _ => return Err(format!("the pre-tokenizer {step}")),
            }
        }
        match rules.escape {
            true => Ok(rules),
            false => Err("spaces stay as they are".into()),
        }
    }
}

/// Ids of marks, and which of them stand before and after a text.
fn special_ids(tokenizer: &Tokenizer, dir: &Path, rows: usize, out: &mut Exported) -> Result<()> {
    let within = |id: &u32| (*id as usize) < rows;
    let (bos, eos) = (tokenizer.bos.filter(within), tokenizer.eos.filter(within));
    out.id("bos", bos);
    out.id("eos", eos);
    out.set("ggml.add_bos_token", Value::Bool(tokenizer.add_bos() && bos.is_some()));
    out.set("ggml.add_eos_token", Value::Bool(tokenizer.add_eos() && eos.is_some()));
    let files =
        [dir::optional_json(dir, "tokenizer_config.json")?, dir::optional_json(dir, "special_tokens_map.json")?];
    let named = |key: &str| {
        let name = files.iter().find_map(|f| f[key].as_str().or_else(|| f[key]["content"].as_str()))?;
        tokenizer.id(name).filter(within)
    };
    let config = dir::optional_json(dir, "config.json")?;
    let padding = config["pad_token_id"].as_u64().and_then(|id| u32::try_from(id).ok()).filter(within);
    out.id("padding", named("pad_token").or(padding));
    if !out.metadata.0.contains_key("tokenizer.ggml.unknown_token_id") {
        out.id("unknown", named("unk_token"));
    }
    // Readers find the well-known ones by their names.
    let known: BTreeSet<u32> = END_MARKS.iter().filter_map(|mark| tokenizer.id(mark)).chain(eos).collect();
    let mut others = tokenizer.end_of_turn().filter(within).filter(|id| !known.contains(id));
    out.id("eot", others.next());
    out.id("eom", others.next());
    let left: Vec<String> = others.map(|id| id.to_string()).collect();
    if !left.is_empty() {
        out.notes.push(format!("GGUF has no room to say that an answer also ends at the tokens {}", left.join(", ")));
    }
    Ok(())
}

/// Whether a name is written as marks are, which counts for more than that its file does not call it special.
fn looks_special(piece: &str) -> bool {
    matches!(piece, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || (piece.starts_with("<|") && piece.ends_with("|>"))
        || (piece.starts_with("<｜") && piece.ends_with("｜>"))
        || piece.starts_with("<unused")
}

/// The merges by rank, as two spellings with a space between, as far as all takes place below `rows`.
fn spelled(vocabulary: &Vocabulary, merges: &Merges, rows: usize) -> Vec<String> {
    let fits = |id: u32| (id as usize) < rows;
    let mut ranked: Vec<(u32, u32, u32)> = (merges.iter())
        .filter(|&(&(a, b), &(_, joint))| fits(a) && fits(b) && fits(joint))
        .map(|(&(a, b), &(rank, _))| (rank, a, b))
        .collect();
    ranked.sort_unstable();
    let piece = |id| vocabulary.piece(id).unwrap_or_default();
    ranked.into_iter().map(|(_, a, b)| format!("{} {}", piece(a), piece(b))).collect()
}

/// Longest token that merges are looked for, in bytes of its spelling: the longest in use are some 250, and the work
/// grows with the square.
const LONGEST_MERGED: usize = 1024;

/// The merges that give the tokens of a vocabulary in order of rank: each token's last step, which joins the two parts
/// that come before it when its spelling is encoded. One is enough for each: what happens within a stretch of text that
/// becomes one token does not depend on what is around it.
fn merges_of_ranks(vocabulary: &Vocabulary, rows: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for id in 0..vocabulary.len().min(rows) as u32 {
        let fits = |piece: &&str| vocabulary.kind(id) == Kind::Normal && piece.len() <= LONGEST_MERGED;
        let Some(piece) = vocabulary.piece(id).filter(fits) else { continue };
        // Ends of the parts, at first of single letters.
        let mut ends: Vec<usize> = piece.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
        while ends.len() > 2 {
            let start = |k: usize| if k == 0 { 0 } else { ends[k - 1] };
            let joint = |k: usize| Some((vocabulary.text_id(&piece[start(k)..ends[k + 1]])?, k));
            let joint = (0..ends.len() - 1).filter_map(joint);
            let Some((_, k)) = joint.min() else { break };
            ends.remove(k);
        }
        if ends.len() == 2 {
            lines.push(format!("{} {}", &piece[..ends[0]], &piece[ends[0]..]));
        }
    }
    lines
}

/// The scores in the directory's `tokenizer.model`, where its pieces are those of `vocabulary`.
fn published_scores(vocabulary: &Vocabulary, dir: &Path) -> Option<Vec<f32>> {
    let bytes = dir::optional(dir, "tokenizer.model").ok()??;
    let model = sentencepiece::read(&bytes, dir).ok().filter(|m| !m.unigram)?;
    let same = |id: u32| model.vocabulary.piece(id) == vocabulary.piece(id);
    let all = model.vocabulary.len();
    (all <= vocabulary.len() && (0..all as u32).all(same)).then_some(model.scores)
}

/// Scores in the order in which `merges` make the pieces; those that no merge makes come last.
fn ranked(vocabulary: &Vocabulary, merges: &Merges) -> Vec<f32> {
    let mut scores = vec![f32::NEG_INFINITY; vocabulary.len()];
    for &(rank, joint) in merges.values() {
        let score = &mut scores[joint as usize];
        *score = score.max(-(rank as f32));
    }
    let worst = merges.len() as f32;
    for (id, score) in scores.iter_mut().enumerate() {
        let text = matches!(vocabulary.kind(id as u32), Kind::Normal | Kind::UserDefined);
        if !text || *score == f32::NEG_INFINITY {
            *score = -worst;
        }
    }
    scores
}
