use super::charsmap::Charsmap;
use super::glm;
use super::vocabulary::{Kind, MAX_IDS, Vocabulary, byte_of};
use crate::{Error, Result};
use std::path::Path;

/// How SentencePiece prepares a text: replacements, white space, and the `▁` that stands for a space.
pub struct Whitespace {
    /// Replacements made before anything else.
    pub charsmap: Option<Charsmap>,
    /// Whether every text gets a space before it.
    pub add_prefix: bool,
    /// Whether spaces at both ends go and runs of spaces become one.
    pub remove_extra: bool,
    /// Whether spaces become `▁`.
    pub escape: bool,
    /// Whether line breaks, tabs and runs of spaces are spelled as pieces of their own before anything else.
    pub blanks: bool,
}

impl Whitespace {
    /// `text` as the pieces spell it.
    pub fn apply(&self, text: &str) -> String {
        let spelled;
        let text = match self.blanks {
            true => {
                spelled = glm::blanks().fold(text.to_owned(), |text, (piece, blank)| text.replace(&blank, &piece));
                &spelled[..]
            }
            false => text,
        };
        let mapped;
        let text = match &self.charsmap {
            Some(map) => {
                mapped = map.apply(text);
                mapped.as_str()
            }
            None => text,
        };
        let text = if self.remove_extra { text.trim_matches(' ') } else { text };
        if text.is_empty() {
            return String::new();
        }
        let space = if self.escape { '▁' } else { ' ' };
        let mut out = String::with_capacity(text.len() + text.len() / 4 + 3);
        if self.add_prefix {
            out.push(space);
        }
        let mut after_space = false;
        for c in text.chars() {
            if c == ' ' {
                if !(self.remove_extra && after_space) {
                    out.push(space);
                }
            } else {
                out.push(c);
            }
            after_space = c == ' ';
        }
        out
    }
}

/// A `tokenizer.model` file.
pub struct Model {
    /// The pieces.
    pub vocabulary: Vocabulary,
    /// A score for each piece.
    pub scores: Vec<f32>,
    /// Whether the pieces are joined by score (BPE) or chosen for the best sum (unigram).
    pub unigram: bool,
    /// How texts are prepared.
    pub whitespace: Whitespace,
    /// The mark before a text.
    pub bos: Option<u32>,
    /// The mark after a text.
    pub eos: Option<u32>,
    /// The piece for what no other spells.
    pub unknown: Option<u32>,
    /// Whether characters without a piece become bytes.
    pub byte_fallback: bool,
}

/// Reads the protobuf `ModelProto` of SentencePiece from `bytes` of the file `path`: field 1 pieces (1 piece, 2
/// score, 3 type), field 2 trainer (3 model type, 35 byte fallback, 40-42 unk/bos/eos), field 3 normaliser (2
/// charsmap, 3 add dummy prefix, 4 remove extra white space, 5 escape white space).
pub fn read(bytes: &[u8], path: &Path) -> Result<Model> {
    let bad = |what: String| Error::file(path, format!("{what}; is this a SentencePiece model? download it again"));
    let broken = || bad("broken protobuf".into());
    let mut vocabulary = Vocabulary::with_capacity((bytes.len() / 12).min(MAX_IDS), bytes.len() / 2);
    let mut scores = Vec::new();
    let mut model_type = 1;
    let mut byte_fallback = false;
    let (mut unknown, mut bos, mut eos) = (0i32, 1i32, 2i32);
    let mut whitespace =
        Whitespace { charsmap: None, add_prefix: true, remove_extra: true, escape: true, blanks: false };
    let mut fields = Fields(bytes);
    while let Some((field, value)) = fields.next().map_err(|()| broken())? {
        match (field, value) {
            (1, Field::Bytes(piece)) => {
                let (mut text, mut score, mut kind) = ("", 0.0, Kind::Normal);
                let mut inner = Fields(piece);
                while let Some((field, value)) = inner.next().map_err(|()| broken())? {
                    match (field, value) {
                        (1, Field::Bytes(b)) => {
                            text = std::str::from_utf8(b)
                                .map_err(|_| bad(format!("piece {} is not UTF-8", vocabulary.len())))?;
                        }
                        (2, Field::Four(b)) => score = f32::from_le_bytes(b),
                        (3, Field::Varint(v)) => {
                            kind = i64::try_from(v)
                                .ok()
                                .and_then(Kind::from_number)
                                .ok_or_else(|| bad(format!("piece {} has the unknown type {v}", vocabulary.len())))?;
                        }
                        _ => {}
                    }
                }
                if kind == Kind::Byte && byte_of(text).is_none() {
                    return Err(bad(format!("piece {} is a byte but spelled {text:?}", vocabulary.len())));
                }
                vocabulary.push(text, kind).map_err(|e| bad(e.to_string()))?;
                scores.push(score);
            }
            (2, Field::Bytes(trainer)) => {
                let mut inner = Fields(trainer);
                while let Some((field, value)) = inner.next().map_err(|()| broken())? {
                    match (field, value) {
                        (3, Field::Varint(v)) => model_type = v,
                        (35, Field::Varint(v)) => byte_fallback = v != 0,
                        // Negative numbers (no such piece) are sign-extended to 64 bits.
                        (40, Field::Varint(v)) => unknown = v as i32,
                        (41, Field::Varint(v)) => bos = v as i32,
                        (42, Field::Varint(v)) => eos = v as i32,
                        _ => {}
                    }
                }
            }
            (3, Field::Bytes(normalizer)) => {
                let mut inner = Fields(normalizer);
                while let Some((field, value)) = inner.next().map_err(|()| broken())? {
                    match (field, value) {
                        (2, Field::Bytes(b)) if !b.is_empty() => {
                            let map = Charsmap::parse(b).ok_or_else(|| bad("broken normaliser table".into()))?;
                            whitespace.charsmap = Some(map);
                        }
                        (3, Field::Varint(v)) => whitespace.add_prefix = v != 0,
                        (4, Field::Varint(v)) => whitespace.remove_extra = v != 0,
                        (5, Field::Varint(v)) => whitespace.escape = v != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if vocabulary.len() == 0 {
        return Err(bad("it holds no pieces".into()));
    }
    let unigram = match model_type {
        1 => true,
        2 => false,
        other => {
            let name = if other == 3 { "word" } else { "character" };
            return Err(Error::file(
                path,
                format!("SentencePiece {name} models are not supported, only BPE and unigram"),
            ));
        }
    };
    let within = |id: i32| u32::try_from(id).ok().filter(|&id| (id as usize) < vocabulary.len());
    let (unknown, bos, eos) = (within(unknown), within(bos), within(eos));
    Ok(Model { vocabulary, scores, unigram, whitespace, bos, eos, unknown, byte_fallback })
}

enum Field<'a> {
    Varint(u64),
    Four([u8; 4]),
    Eight,
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message, one after another.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, ()> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(())?;
            self.0 = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(())
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], ()> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(n).map_err(|_| ())?).ok_or(())?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, ()> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Eight)?,
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(n)?)
            }
            5 => Field::Four(self.take(4)?.try_into().map_err(|_| ())?),
            _ => return Err(()),
        };
        Ok(Some((key >> 3, value)))
    }
}
