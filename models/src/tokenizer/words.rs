use std::borrow::Cow;
use std::sync::LazyLock;
use tokenizers::NormalizedString;
use tokenizers::utils::SysRegex;

/// Cuts text into words by patterns and writes each with the byte alphabet of GPT-2: the quick way for the many
/// tokenizers that do just this, without the bookkeeping of offsets that the `tokenizers` pipeline carries.
pub struct Words {
    patterns: Vec<SysRegex>,
    /// What they were compiled from.
    sources: Vec<String>,
    compose: bool,
}

impl Words {
    /// A cutter that applies `patterns` one after another to text that is composed (Unicode NFC) first if `compose`.
    pub fn new<P: AsRef<str>>(patterns: &[P], compose: bool) -> Result<Words, String> {
        let sources = patterns.iter().map(|p| p.as_ref().to_owned()).collect();
        let patterns = patterns.iter().map(|p| SysRegex::new(p.as_ref()).map_err(|e| e.to_string()));
        Ok(Words { patterns: patterns.collect::<Result<_, _>>()?, sources, compose })
    }

    /// The patterns, as they are written.
    pub fn patterns(&self) -> &[String] {
        &self.sources
    }

    /// Whether text is composed first.
    pub fn composes(&self) -> bool {
        self.compose
    }

    /// Where the words of `text` end, by the patterns alone.
    pub fn ends(&self, text: &str) -> Vec<usize> {
        let (mut ends, mut end) = (Vec::new(), 0);
        self.cut(text, &self.patterns, &mut |piece| {
            end += piece.len();
            ends.push(end);
        });
        ends
    }

    /// Calls `each` with every word of `text`, in the byte alphabet.
    pub fn each(&self, text: &str, each: &mut dyn FnMut(&str)) {
        let mut composed = Cow::Borrowed(text);
        if self.compose && !text.is_ascii() {
            let mut n = NormalizedString::from(text);
            composed = Cow::Owned(n.nfc().get().to_string());
        }
        let mut word = String::new();
        self.cut(&composed, &self.patterns, &mut |piece| {
            word.clear();
            word.extend(piece.bytes().map(|b| ALPHABET.chars[usize::from(b)]));
            each(&word);
        });
    }

    fn cut(&self, text: &str, patterns: &[SysRegex], each: &mut dyn FnMut(&str)) {
        let Some((pattern, rest)) = patterns.split_first() else {
            if !text.is_empty() {
                each(text);
            }
            return;
        };
        let mut done = 0;
        for (start, end) in pattern.find_iter(text) {
            self.cut(&text[done..start], rest, each);
            self.cut(&text[start..end], rest, each);
            done = end;
        }
        self.cut(&text[done..], rest, each);
    }
}

struct Alphabet {
    chars: [char; 256],
}

/// GPT-2's alphabet: printable Latin-1 bytes are themselves, the others take the characters from U+0100 on in order.
static ALPHABET: LazyLock<Alphabet> = LazyLock::new(|| {
    let mut next = 0x100u32;
    let chars = std::array::from_fn(|b| {
        let c = b as u8 as char;
        if matches!(c, '!'..='~' | '\u{A1}'..='\u{AC}' | '\u{AE}'..='\u{FF}') {
            return c;
        }
        next += 1;
        char::from_u32(next - 1).unwrap_or(c)
    });
    Alphabet { chars }
});

/// The bytes that `piece` stands for in the byte alphabet; `None` where it has other characters.
pub fn bytes_of(piece: &str) -> Option<Vec<u8>> {
    piece.chars().map(byte_of).collect()
}

fn byte_of(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '\u{A1}'..='\u{AC}' | '\u{AE}'..='\u{FF}' => Some(c as u8),
        // The 68 others, in order: 0..=32, 127..=160, 173.
        _ => match (c as u32).checked_sub(0x100)? {
            n @ 0..=32 => Some(n as u8),
            n @ 33..=66 => Some((n - 33 + 127) as u8),
            67 => Some(173),
            _ => None,
        },
    }
}

/// `bytes` in the byte alphabet.
pub fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| ALPHABET.chars[usize::from(b)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_goes_both_ways() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(bytes_of(&spell(&all)).unwrap(), all);
        assert_eq!(spell(b" a\n"), "ĠaĊ");
        assert_eq!(bytes_of("▁"), None);
    }
}
