//! Text to token ids and back, and chat templates.
//!
//! A text passes these stations: marks such as `<|im_end|>` are cut out of it ([`Specials`] says which count), what
//! lies between is prepared (Unicode, white space), cut into words, and each word becomes tokens by byte pair
//! encoding or a unigram model. Three pipelines do the middle part: byte-level vocabularies go through patterns alone,
//! SentencePiece vocabularies through its own rules, and any other tokenizer.json through the `tokenizers` crate.

mod added;
mod bpe;
mod charsmap;
mod dir;
mod export;
mod gguf;
mod glm;
mod huggingface;
mod json;
mod places;
mod pre;
mod sentencepiece;
mod stream;
pub mod template;
mod tiktoken;
mod unigram;
mod vocabulary;
mod words;

pub(crate) use export::export;
pub(crate) use huggingface::files;
pub use stream::DecodeStream;
pub use template::{ChatTemplate, RenderOptions};

use crate::checkpoint::{Checkpoint, Metadata};
use crate::{Error, Result, families};
use added::{Added, Cut, Matcher};
use bpe::{Bpe, Scratch};
use sentencepiece::Whitespace;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use tokenizers::normalizer::Range as Span;
use tokenizers::{
    NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper,
};
use unigram::Unigram;
use vocabulary::{Kind, Vocabulary};
use words::Words;

/// What marks such as `<|im_end|>` mean where they stand in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Letters like any others: for text that somebody typed.
    AsText,
    /// The tokens they name: for text that a template made.
    Parse,
    /// What the vocabulary's own library makes of them in a plain text: SentencePiece takes them as letters, the
    /// others parse those that the tokenizer itself lists.
    Native,
}

/// Turns text into token ids and back.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    /// Finds marks and user-defined tokens in raw text.
    marks: Matcher,
    pipeline: Pipeline,
    spelling: Spelling,
    /// Whether encoding puts a space before a text, which decoding takes away again.
    prefix_space: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    /// What stands before a text instead of `bos`, where that is more than one mark.
    start: Vec<u32>,
    add_eos: bool,
    ends: BTreeSet<u32>,
    native: Specials,
}

/// How the text between marks becomes tokens.
enum Pipeline {
    /// Patterns and byte-level merges.
    Words { words: Words, bpe: Bpe },
    /// SentencePiece's rules; `user` finds user-defined pieces in prepared text.
    SentencePiece { whitespace: Whitespace, user: Matcher, model: Model },
    /// The normalisers and pre-tokenizers of the `tokenizers` crate; `normalized` finds tokens in prepared text.
    Library {
        normalizers: Vec<NormalizerWrapper>,
        pre_tokenizer: Option<Box<PreTokenizerWrapper>>,
        normalized: Matcher,
        model: Model,
    },
}

enum Model {
    Bpe(Bpe),
    Unigram(Unigram),
}

impl Model {
    fn encode(&self, vocabulary: &Vocabulary, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        match self {
            Model::Bpe(bpe) => bpe.encode(vocabulary, text, scratch, out),
            Model::Unigram(unigram) => unigram.encode(vocabulary, text, out),
        }
    }
}

/// How tokens spell text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// In the byte alphabet of GPT-2.
    Bytes,
    /// With `▁` for a space.
    Metaspace,
    /// As it is.
    Plain,
}

/// Marks that end an answer in the chat formats in use. They count where a vocabulary has them as special tokens.
const END_MARKS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<eoa>",
    "<|call|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
    "<EOT>",
    "_<EOT>",
    "<eos>",
    "</s>",
];

/// Longest text that is encoded in one go, so that positions fit 32 bits.
const LONGEST_TEXT: usize = 1 << 31;

impl Tokenizer {
    /// The tokenizer of `path`: a `.gguf` file (a vocabulary is enough) or a directory with `tokenizer.json`,
    /// `tokenizer.model` or a `.tiktoken` file.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        if path.is_dir() {
            return Tokenizer::from_dir(path);
        }
        Tokenizer::from_gguf(&crate::checkpoint::gguf::read_metadata(path)?, path)
    }

    /// The tokenizer of the model `checkpoint`: what it makes of any text has a place in the model's embedding.
    ///
    /// # Errors
    /// When there is none, or it belongs to another model.
    pub fn of(checkpoint: &Checkpoint) -> Result<Tokenizer> {
        checkpoint.expect_model()?;
        let path = checkpoint.path();
        let tokenizer = match checkpoint.metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata, path)?,
            None => Tokenizer::from_dir(path)?,
        };
        let (_, spec) = families::recognise(checkpoint)?;
        tokenizer.check_rows(spec.vocab_size).map_err(|what| Error::file(path, what))?;
        Ok(tokenizer)
    }

    /// The tokenizer in the metadata of the GGUF file `path` (which is only used to name it).
    pub fn from_gguf(metadata: &Metadata, path: &Path) -> Result<Tokenizer> {
        gguf::read(metadata, path)
    }

    /// The tokenizer in the directory `dir`.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        dir::read(dir)
    }

    /// The tokenizer whose file, called `path` in messages, holds `bytes`: a tokenizer.json, a SentencePiece model or
    /// a tiktoken file, told apart by their contents.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
        if bytes.trim_ascii_start().starts_with(b"{") {
            json::read(bytes, path)
        } else if tiktoken::is_one(bytes) {
            tiktoken::read(bytes, path)
        } else {
            dir::from_sentencepiece(bytes, path)
        }
    }

    /// The tokens of `text`. No beginning or end mark is added: [`Tokenizer::add_bos`] says whether the model wants
    /// one.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        self.encode_except(text, specials, &[])
    }

    /// The tokens of `text`, in which no mark reaches across any of the places `blocked` (byte offsets, ascending).
    pub(crate) fn encode_except(&self, text: &str, specials: Specials, blocked: &[usize]) -> Result<Vec<u32>> {
        if text.len() >= LONGEST_TEXT {
            return Err(Error::model("a text of 2 GiB or more cannot be tokenized in one go; split it"));
        }
        let specials = if specials == Specials::Native { self.native } else { specials };
        let want = |t: &Added, range: Range<usize>| {
            let asked = match specials {
                Specials::Parse => true,
                Specials::Native => t.native,
                Specials::AsText => t.native && !t.special,
            };
            let next = blocked.partition_point(|&b| b <= range.start);
            asked && blocked.get(next).is_none_or(|&b| b >= range.end)
        };
        let mut ids = Vec::with_capacity(text.len() / 4);
        let mut scratch = Scratch::default();
        let mut whole = None;
        for cut in self.marks.cut(text, &want) {
            let range = match cut {
                Cut::Token(id, _) => {
                    ids.push(id);
                    continue;
                }
                Cut::Text(range) => range,
            };
            match &self.pipeline {
                Pipeline::Words { words, bpe } => words.each(&text[range], &mut |word| {
                    bpe.encode(&self.vocabulary, word, &mut scratch, &mut ids);
                }),
                Pipeline::SentencePiece { whitespace, user, model } => {
                    let prepared = whitespace.apply(&text[range]);
                    for cut in user.cut(&prepared, &|_, _| true) {
                        match cut {
                            Cut::Token(id, _) => ids.push(id),
                            Cut::Text(r) => model.encode(&self.vocabulary, &prepared[r], &mut scratch, &mut ids),
                        }
                    }
                }
                Pipeline::Library { .. } => {
                    // Slices of one string, since some pre-tokenizers ask whether they stand at the text's beginning.
                    let whole = whole.get_or_insert_with(|| NormalizedString::from(text));
                    if let Some(piece) = whole.slice(Span::Original(range)) {
                        self.encode_by_library(piece, &want, &mut scratch, &mut ids)?;
                    }
                }
            }
        }
        Ok(ids)
    }

    fn encode_by_library(
        &self,
        mut piece: NormalizedString,
        want: &dyn Fn(&Added, Range<usize>) -> bool,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let Pipeline::Library { normalizers, pre_tokenizer, normalized, model } = &self.pipeline else {
            return Ok(());
        };
        let library = |e: tokenizers::Error| Error::model(format!("tokenizing: {e}"));
        let most = piece.len() * 64 + 65536;
        for n in normalizers {
            n.normalize(&mut piece).map_err(library)?;
            if piece.len() > most {
                return Err(Error::model(
                    "tokenizing: the normaliser blows the text up; tokenizer.json must be broken",
                ));
            }
        }
        let mut pre = PreTokenizedString::from(piece);
        if !normalized.is_empty() {
            pre.split(|_, s| {
                let at = |r: Range<usize>| {
                    let start = s.offsets_original().0;
                    s.convert_offsets(Span::Normalized(r)).map_or(0..0, |r| start + r.start..start + r.end)
                };
                let cuts = normalized.cut(s.get(), &|t, r| want(t, at(r)));
                Ok(cuts
                    .into_iter()
                    .filter_map(|cut| {
                        let (id, range) = match cut {
                            Cut::Token(id, range) => (Some(id), range),
                            Cut::Text(range) => (None, range),
                        };
                        let token = id.map(|id| vec![tokenizers::Token::new(id, String::new(), (0, range.len()))]);
                        s.slice(Span::Normalized(range)).map(|s| (s, token))
                    })
                    .collect::<Vec<_>>())
            })
            .map_err(library)?;
        }
        if let Some(p) = pre_tokenizer {
            p.pre_tokenize(&mut pre).map_err(library)?;
        }
        for (text, _, tokens) in pre.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|t| t.id)),
                None => model.encode(&self.vocabulary, text, scratch, ids),
            }
        }
        Ok(())
    }

    /// The mark before a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The mark after a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether the model expects [`Tokenizer::bos`] before a text.
    pub fn add_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// The marks that the model expects before a text: [`Tokenizer::bos`] or nothing, but for ChatGLM's two.
    pub fn prefix(&self) -> Vec<u32> {
        match self.start[..] {
            [] => self.bos.filter(|_| self.add_bos).into_iter().collect(),
            _ => self.start.clone(),
        }
    }

    /// Whether the model expects [`Tokenizer::eos`] after a text.
    pub fn add_eos(&self) -> bool {
        self.add_eos && self.eos.is_some()
    }

    /// Whether generation stops at `id`.
    pub fn is_end_of_turn(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// All ids at which generation stops, ascending.
    pub fn end_of_turn(&self) -> impl Iterator<Item = u32> {
        self.ends.iter().copied()
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// Whether a model whose embedding has `rows` rows can take what becomes of any text. Marks may have ids beyond them, such
    /// as an image's where a model reads text alone: no text becomes one.
    ///
    /// # Errors
    /// What is wrong, when a piece of text has no row.
    pub fn check_rows(&self, rows: usize) -> Result<(), String> {
        let beyond = rows.min(self.vocab_size()) as u32..self.vocab_size() as u32;
        let ordinary = |id: &u32| !self.is_special(*id) && self.piece(*id).is_some_and(|piece| !piece.is_empty());
        match beyond.clone().find(ordinary) {
            None => Ok(()),
            Some(id) => Err(format!(
                "the tokenizer has {} tokens but the model {rows}, so that token {id} ({:?}) has no embedding: they do not \
                 belong together",
                self.vocab_size(),
                self.piece(id).unwrap_or_default(),
            )),
        }
    }

    /// Whether `id` is a mark for the model rather than a piece of text.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.vocabulary.kind(id), Kind::Control | Kind::Unknown)
    }

    /// The id that the vocabulary spells `piece`.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.vocabulary.id(piece)
    }

    /// The vocabulary's own spelling of `id`.
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.vocabulary.piece(id)
    }

    /// The bytes that `id` stands for in a text: none for special tokens, and not always whole characters.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if self.is_special(id) { Vec::new() } else { self.spelled(id) }
    }

    /// The bytes that `id` stands for, with special tokens as they are written.
    fn spelled(&self, id: u32) -> Vec<u8> {
        let Some(piece) = self.vocabulary.piece(id) else { return Vec::new() };
        match (self.vocabulary.kind(id), self.spelling) {
            (Kind::Byte, _) => vocabulary::byte_of(piece).into_iter().collect(),
            // What converters call rows of the embedding that have no token.
            (Kind::Unused, _) if piece.strip_prefix("[PAD").is_some_and(|rest| rest == format!("{id}]")) => Vec::new(),
            (Kind::Control | Kind::Unknown, _) | (_, Spelling::Plain) => piece.into(),
            (Kind::UserDefined, Spelling::Bytes) => piece.into(),
            (_, Spelling::Bytes) => words::bytes_of(piece).unwrap_or_else(|| piece.into()),
            (_, Spelling::Metaspace) => piece.replace('▁', " ").into(),
        }
    }

    /// The text of `ids` as a whole text: without the space that encoding puts before it. Bytes that are no
    /// character become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut text = self.decode_continued(ids, skip_special);
        if self.prefix_space && text.starts_with(' ') {
            text.remove(0);
        }
        text
    }

    /// The text of `ids` where it follows other text, as an answer follows its prompt.
    pub fn decode_continued(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend(if skip_special { self.token_bytes(id) } else { self.spelled(id) });
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Decodes an answer token by token, whole characters at a time and without special tokens.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// The special tokens, to look for in text.
    pub(crate) fn marks(&self) -> &Matcher {
        &self.marks
    }

    /// Adds to the ids that end a turn the end-of-text mark and the well-known marks of chat formats, and to the marks
    /// those by which Baichuan's models tell who speaks: pieces to their tokenizers, numbers to their code.
    fn find_ends(&mut self) {
        let roles =
            [("<reserved_106>", 195), ("<reserved_107>", 196), ("<reserved_102>", 195), ("<reserved_103>", 196)];
        let speakers = roles.into_iter().filter(|(name, id)| self.vocabulary.id(name) == Some(*id));
        let speakers: Vec<Added> =
            speakers.map(|(name, id)| Added { native: false, ..Added::new(id, name, true) }).collect();
        if let [first, ..] = &speakers[..] {
            self.ends.insert(first.id);
            self.marks = Matcher::new(self.marks.tokens().iter().cloned().chain(speakers));
        }
        self.ends.extend(self.eos);
        let mark = |name: &str| {
            let kind = |id: &u32| matches!(self.vocabulary.kind(*id), Kind::Control | Kind::UserDefined);
            self.vocabulary.id(name).filter(kind)
        };
        // gpt-oss ends each of its thoughts with what ends others' turns.
        let thinks = mark("<|return|>").is_some() && mark("<|call|>").is_some();
        let ends = END_MARKS.iter().filter(|name| !(thinks && **name == "<|end|>"));
        self.ends.extend(ends.filter_map(|name| mark(name)));
    }
}

#[cfg(test)]
mod export_tests;
#[cfg(test)]
mod tests;
