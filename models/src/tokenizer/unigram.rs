use super::vocabulary::Vocabulary;

/// Longest piece in bytes that is looked for. Trained pieces are a few characters; a hostile file's endless one would
/// make every step slow.
const LONGEST: usize = 256;

/// What an unknown character costs below the worst piece, as in SentencePiece.
const UNKNOWN_PENALTY: f64 = 10.0;

/// The unigram model: of all ways to spell a text, the one whose pieces' scores (log-probabilities) add up highest.
pub struct Unigram {
    /// A score for each token.
    scores: Vec<f64>,
    worst: f64,
    /// Bytes of the longest piece.
    longest: usize,
    /// The tokens of the 256 bytes, for characters without a piece.
    pub bytes: Option<Box<[u32; 256]>>,
    /// The token for a run of characters without a piece.
    pub unknown: Option<u32>,
}

#[derive(Clone, Copy)]
struct Best {
    score: f64,
    start: usize,
    /// `None`: an unknown character.
    id: Option<u32>,
}

impl Unigram {
    /// A model over `vocabulary` with a score for each of its tokens.
    pub fn new(vocabulary: &Vocabulary, scores: Vec<f64>, unknown: Option<u32>, byte_fallback: bool) -> Unigram {
        let worst = scores.iter().copied().filter(|s| s.is_finite()).fold(0.0, f64::min);
        let pieces = (0..vocabulary.len() as u32).filter_map(|id| vocabulary.piece(id));
        let longest = pieces.map(str::len).filter(|&n| n <= LONGEST).max().unwrap_or(0);
        let bytes = if byte_fallback { vocabulary.bytes() } else { None };
        Unigram { scores, worst, longest, bytes, unknown }
    }

    /// A score for each token.
    pub fn scores(&self) -> &[f64] {
        &self.scores
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, vocabulary: &Vocabulary, text: &str, out: &mut Vec<u32>) {
        let mut best: Vec<Option<Best>> = vec![None; text.len() + 1];
        let offer = |slot: &mut Option<Best>, score: f64, start: usize, id: Option<u32>| {
            if slot.is_none_or(|b| score > b.score) {
                *slot = Some(Best { score, start, id });
            }
        };
        for (start, c) in text.char_indices() {
            let before = if start == 0 { 0.0 } else { best[start].map_or(f64::NEG_INFINITY, |b| b.score) };
            let mut alone = false;
            let mut end = start;
            for c in text[start..].chars() {
                end += c.len_utf8();
                if end - start > self.longest {
                    break;
                }
                if let Some(id) = vocabulary.text_id(&text[start..end]) {
                    let score = self.scores.get(id as usize).copied().unwrap_or(self.worst);
                    offer(&mut best[end], before + score, start, Some(id));
                    alone |= end == start + c.len_utf8();
                }
            }
            if !alone {
                offer(&mut best[start + c.len_utf8()], before + self.worst - UNKNOWN_PENALTY, start, None);
            }
        }
        let (from, mut end) = (out.len(), text.len());
        let mut run: Option<usize> = None;
        // Backwards, so a run of unknown characters ends at its first one.
        while end > 0 {
            let Some(b) = best[end] else { break };
            match b.id {
                Some(id) => out.push(id),
                None => match &self.bytes {
                    Some(bytes) => {
                        out.extend(text.as_bytes()[b.start..end].iter().rev().map(|&x| bytes[usize::from(x)]))
                    }
                    None if run == Some(end) => {}
                    None => out.extend(self.unknown),
                },
            }
            run = b.id.is_none().then_some(b.start);
            end = b.start;
        }
        out[from..].reverse();
    }
}
