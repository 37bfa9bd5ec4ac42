use super::vocabulary::{Kind, Vocabulary};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// The rank of each pair of ids, and the id that they become.
pub type Merges = HashMap<(u32, u32), (u32, u32)>;

/// Which neighbours are joined first.
pub enum Order {
    /// Pairs of ids, each with its rank (lowest first) and the id they become: byte-level BPE as in tokenizer.json.
    Merges(Merges),
    /// Any two neighbours whose joint spelling is a piece, the highest score first: SentencePiece.
    Scores(Vec<f32>),
    /// Any two neighbours whose joint spelling is a piece, the lowest id first: tiktoken.
    Ids,
}

/// Byte pair encoding of one word (or, for SentencePiece, of a whole text).
pub struct Bpe {
    /// Which neighbours are joined first.
    pub order: Order,
    /// The tokens of the 256 bytes, for characters that no token spells.
    pub bytes: Option<Box<[u32; 256]>>,
    /// The token for characters that neither tokens nor bytes spell; without one they are dropped.
    pub unknown: Option<u32>,
    /// Whether a run of unknown characters becomes one unknown token.
    pub fuse_unknown: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub whole_words: bool,
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    len: u32,
    prev: u32,
    next: u32,
    /// The token, or `NONE` where the characters have none yet.
    id: u32,
}

/// A possible merge: (priority, position of the left symbol, joint length, id). The heap pops the smallest.
type Candidate = Reverse<(i64, u32, u32, u32)>;

/// Space that [`Bpe::encode`] reuses from word to word.
#[derive(Default)]
pub struct Scratch {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Candidate>,
    /// The two halves of pieces that are unused, by (start, len): SentencePiece takes such merges back at the end.
    halves: HashMap<(u32, u32), u32>,
}

impl Bpe {
    /// Appends the ids of `word` (shorter than 4 GiB) to `out`.
    pub fn encode(&self, vocabulary: &Vocabulary, word: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        if self.whole_words
            && let Some(id) = vocabulary.text_id(word)
        {
            return out.push(id);
        }
        let Scratch { symbols, heap, halves } = scratch;
        symbols.clear();
        heap.clear();
        halves.clear();
        self.split(vocabulary, word, symbols);
        for left in 1..symbols.len() as u32 {
            heap.extend(self.candidate(vocabulary, word, symbols, left - 1, left));
        }
        while let Some(Reverse((_, left, len, id))) = heap.pop() {
            let (l, r) = (symbols[left as usize], symbols[left as usize].next);
            // Symbols only grow, so a candidate is stale exactly when the joint length is no longer its own.
            if l.len == 0 || r == NONE || l.len + symbols[r as usize].len != len {
                continue;
            }
            if matches!(self.order, Order::Scores(_)) && vocabulary.kind(id) == Kind::Unused {
                halves.insert((l.start, len), l.len);
            }
            let after = symbols[r as usize].next;
            symbols[r as usize].len = 0;
            symbols[left as usize] = Symbol { len, id, next: after, ..l };
            if after != NONE {
                symbols[after as usize].prev = left;
                heap.extend(self.candidate(vocabulary, word, symbols, left, after));
            }
            if l.prev != NONE {
                heap.extend(self.candidate(vocabulary, word, symbols, l.prev, left));
            }
        }
        let mut unknown_before = false;
        for s in symbols.iter().filter(|s| s.len > 0) {
            if s.id != NONE && vocabulary.kind(s.id) != Kind::Unused {
                out.push(s.id);
                unknown_before = false;
            } else {
                self.spell(vocabulary, word, s.start, s.len, halves, &mut unknown_before, out);
            }
        }
    }

    /// The piece that spells `text`. SentencePiece never finds one that holds a NUL, even where it has one.
    fn piece(&self, vocabulary: &Vocabulary, text: &str) -> Option<u32> {
        let hidden = matches!(self.order, Order::Scores(_)) && text.contains('\0');
        if hidden { None } else { vocabulary.text_id(text) }
    }

    /// One symbol for each character, or for each byte of a character that falls back to bytes.
    fn split(&self, vocabulary: &Vocabulary, word: &str, symbols: &mut Vec<Symbol>) {
        let by_pairs = matches!(self.order, Order::Merges(_));
        let mut push = |start: usize, len: usize, id: u32| {
            let at = symbols.len() as u32;
            if let Some(last) = symbols.last_mut() {
                last.next = at;
            }
            let prev = at.checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { start: start as u32, len: len as u32, prev, next: NONE, id });
        };
        for (start, c) in word.char_indices() {
            let len = c.len_utf8();
            if let Some(id) = self.piece(vocabulary, &word[start..start + len]) {
                push(start, len, id);
            } else if !by_pairs {
                push(start, len, NONE);
            } else if let Some(bytes) = &self.bytes {
                for (k, b) in word.as_bytes()[start..start + len].iter().enumerate() {
                    push(start + k, 1, bytes[usize::from(*b)]);
                }
            } else {
                push(start, len, NONE);
            }
        }
    }

    fn candidate(&self, vocabulary: &Vocabulary, word: &str, symbols: &[Symbol], l: u32, r: u32) -> Option<Candidate> {
        let (left, right) = (symbols[l as usize], symbols[r as usize]);
        let (priority, id) = match &self.order {
            Order::Merges(merges) => {
                let &(rank, id) = merges.get(&(left.id, right.id))?;
                (i64::from(rank), id)
            }
            Order::Scores(scores) => {
                let id = self.piece(vocabulary, &word[left.start as usize..(right.start + right.len) as usize])?;
                (-order_of(scores.get(id as usize).copied().unwrap_or(0.0)), id)
            }
            Order::Ids => {
                let id = self.piece(vocabulary, &word[left.start as usize..(right.start + right.len) as usize])?;
                (i64::from(id), id)
            }
        };
        // Merges can spell a control token's name; text must not become one.
        if vocabulary.kind(id) == Kind::Control {
            return None;
        }
        Some(Reverse((priority, l, left.len + right.len, id)))
    }

    /// Spells what no token (or only an unused one) spells: its two halves, bytes, or the unknown token.
    fn spell(
        &self,
        vocabulary: &Vocabulary,
        word: &str,
        start: u32,
        len: u32,
        halves: &HashMap<(u32, u32), u32>,
        unknown_before: &mut bool,
        out: &mut Vec<u32>,
    ) {
        let mut todo = vec![(start, len)];
        while let Some((start, len)) = todo.pop() {
            if let Some(&left) = halves.get(&(start, len)) {
                todo.push((start + left, len - left));
                todo.push((start, left));
                continue;
            }
            let text = word.get(start as usize..(start + len) as usize).unwrap_or_default();
            if let Some(id) = self.piece(vocabulary, text) {
                out.push(id);
                *unknown_before = false;
            } else if let Some(bytes) = &self.bytes {
                out.extend(text.bytes().map(|b| bytes[usize::from(b)]));
                *unknown_before = false;
            } else if let Some(id) = self.unknown {
                if !(*unknown_before && self.fuse_unknown) {
                    out.push(id);
                }
                *unknown_before = true;
            }
        }
    }
}

/// A number that orders as `score` does.
fn order_of(score: f32) -> i64 {
    let bits = score.to_bits() as i32;
    i64::from(if bits < 0 { bits ^ i32::MAX } else { bits })
}

/// The merges of a byte-level or character BPE, from `pairs` of spellings in order of rank.
///
/// # Errors
/// The number and spelling of a merge that names a token that is not there.
pub fn merges<'a>(
    vocabulary: &Vocabulary,
    pairs: impl Iterator<Item = Result<(&'a str, &'a str), String>>,
) -> Result<Merges, String> {
    let mut map = HashMap::with_capacity(pairs.size_hint().0);
    let mut joint = String::new();
    for (rank, pair) in pairs.enumerate() {
        let (a, b) = pair.map_err(|text| format!("merge {rank} is {text:?}, not two tokens with a space between"))?;
        joint.clear();
        joint.push_str(a);
        joint.push_str(b);
        let find = |piece: &str| {
            vocabulary.id(piece).ok_or_else(|| {
                format!("merge {rank} ({a:?} {b:?}) needs the token {piece:?}, which is not in the vocabulary")
            })
        };
        let key = (find(a)?, find(b)?);
        // A pair listed twice keeps its last rank, as in the `tokenizers` library.
        map.insert(key, (rank as u32, find(&joint)?));
    }
    Ok(map)
}
