use crate::{Error, Result};
use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// What a token is for, with SentencePiece's numbers (GGUF uses them too).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A piece of text.
    Normal = 1,
    /// Stands for text that the vocabulary cannot spell.
    Unknown = 2,
    /// A mark for the model (beginning of text, end of turn, ...), never a piece of somebody's text.
    Control = 3,
    /// A piece of text that is always taken whole.
    UserDefined = 4,
    /// Kept for its number only.
    Unused = 5,
    /// One byte, spelled `<0x0A>`.
    Byte = 6,
}

impl Kind {
    /// The kind with SentencePiece's number `n`.
    pub fn from_number(n: i64) -> Option<Kind> {
        use Kind::*;
        [Normal, Unknown, Control, UserDefined, Unused, Byte].into_iter().find(|&k| k as i64 == n)
    }
}

/// Most ids that a vocabulary may hold: eight times the largest in use, and small enough that a hostile file that
/// numbers a token four billion cannot make us allocate a table of that length.
pub const MAX_IDS: usize = 1 << 21;

/// The tokens of a model: spelling and kind by id, id by spelling. One string holds all spellings and one flat hash
/// table points into it, since two maps of owned strings would cost several times the vocabulary's size.
pub struct Vocabulary {
    text: String,
    /// Where each spelling ends in `text`.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    /// Open addressing: id + 1, or 0 where free.
    table: Vec<u32>,
    hasher: RandomState,
    /// Spellings that replaced the ones in `text`.
    renamed: BTreeMap<u32, String>,
}

impl Vocabulary {
    /// An empty vocabulary with room for `tokens` spellings of `bytes` bytes together.
    pub fn with_capacity(tokens: usize, bytes: usize) -> Vocabulary {
        let slots = (tokens.min(MAX_IDS) * 4 / 3 + 64).next_power_of_two();
        Vocabulary {
            text: String::with_capacity(bytes),
            ends: Vec::with_capacity(tokens.min(MAX_IDS)),
            kinds: Vec::with_capacity(tokens.min(MAX_IDS)),
            table: vec![0; slots],
            hasher: RandomState::new(),
            renamed: BTreeMap::new(),
        }
    }

    /// Gives `piece` the next id. Where a spelling occurs twice the first id keeps it; an empty spelling is never
    /// found by name.
    pub fn push(&mut self, piece: &str, kind: Kind) -> Result<u32> {
        let id = self.ends.len();
        if id >= MAX_IDS || self.text.len() + piece.len() > u32::MAX as usize {
            return Err(Error::model(format!("the vocabulary has more than {MAX_IDS} tokens or 4 GiB of spellings")));
        }
        self.text.push_str(piece);
        self.ends.push(self.text.len() as u32);
        self.kinds.push(kind);
        self.index(id as u32);
        Ok(id as u32)
    }

    /// Makes `id` spell `piece`, where it is beyond the tokens so far (ids between become unused) or has no spelling
    /// yet; `false` when `id` already spells something else.
    pub fn set(&mut self, id: u32, piece: &str, kind: Kind) -> Result<bool> {
        if id as usize >= MAX_IDS {
            return Err(Error::model(format!("token {piece:?} has id {id}; at most {MAX_IDS} ids are possible")));
        }
        while self.len() < id as usize {
            self.push("", Kind::Unused)?;
        }
        if self.len() == id as usize {
            self.push(piece, kind)?;
            return Ok(true);
        }
        match self.piece(id) {
            Some(old) if old == piece => {}
            Some("") => {
                self.renamed.insert(id, piece.to_string());
                self.index(id);
            }
            _ => return Ok(false),
        }
        self.kinds[id as usize] = kind;
        Ok(true)
    }

    /// Spells `id` anew, or gives a further id its spelling.
    pub fn rename(&mut self, id: u32, piece: &str, kind: Kind) -> Result<()> {
        if !self.set(id, piece, kind)? {
            self.renamed.insert(id, piece.to_string());
            self.kinds[id as usize] = kind;
            self.index(id);
        }
        Ok(())
    }

    /// Changes what `id` is for.
    pub fn set_kind(&mut self, id: u32, kind: Kind) {
        if let Some(k) = self.kinds.get_mut(id as usize) {
            *k = kind;
        }
    }

    /// Enters `id` into the table, which grows before it is three quarters full.
    fn index(&mut self, id: u32) {
        if (self.len() + self.renamed.len()) * 4 > self.table.len() * 3 {
            self.table = vec![0; self.table.len() * 2];
            (0..self.len() as u32).for_each(|id| self.insert(id));
        } else {
            self.insert(id);
        }
    }

    fn insert(&mut self, id: u32) {
        let mask = self.table.len() - 1;
        let piece = self.piece(id).unwrap_or_default();
        if piece.is_empty() {
            return;
        }
        let mut slot = self.hasher.hash_one(piece) as usize & mask;
        while self.table[slot] != 0 {
            if self.piece(self.table[slot] - 1) == Some(piece) {
                return;
            }
            slot = (slot + 1) & mask;
        }
        self.table[slot] = id + 1;
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The spelling of `id`.
    pub fn piece(&self, id: u32) -> Option<&str> {
        if !self.renamed.is_empty()
            && let Some(piece) = self.renamed.get(&id)
        {
            return Some(piece);
        }
        let id = id as usize;
        let end = *self.ends.get(id)? as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] as usize };
        Some(&self.text[start..end])
    }

    /// The id that spells `piece`.
    pub fn id(&self, piece: &str) -> Option<u32> {
        let mask = self.table.len() - 1;
        let mut slot = self.hasher.hash_one(piece) as usize & mask;
        loop {
            let id = self.table[slot].checked_sub(1)?;
            if self.piece(id) == Some(piece) {
                return Some(id);
            }
            slot = (slot + 1) & mask;
        }
    }

    /// What `id` is for; unknown ids are unused.
    pub fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Unused)
    }

    /// The id of `piece`, where text may be spelled with it: never a control, byte or unknown token.
    pub fn text_id(&self, piece: &str) -> Option<u32> {
        self.id(piece).filter(|&id| matches!(self.kind(id), Kind::Normal | Kind::UserDefined | Kind::Unused))
    }

    /// The ids of the 256 byte tokens, where the vocabulary has them all.
    pub fn bytes(&self) -> Option<Box<[u32; 256]>> {
        let mut ids = Box::new([0; 256]);
        for (byte, id) in ids.iter_mut().enumerate() {
            *id = self.id(&format!("<0x{byte:02X}>"))?;
        }
        Some(ids)
    }
}

/// The byte that a byte token's spelling (`<0x0A>`) stands for.
pub fn byte_of(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}
