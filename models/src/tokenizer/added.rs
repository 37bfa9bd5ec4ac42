use std::collections::HashMap;
use std::ops::Range;

/// A token that is looked for in the text before anything else is done to it.
#[derive(Clone, Debug)]
pub struct Added {
    /// Its id.
    pub id: u32,
    /// How it is written.
    pub content: String,
    /// A mark for the model, not text: only looked for where the caller says so.
    pub special: bool,
    /// Whether the vocabulary's own library looks for it in plain text.
    pub native: bool,
    /// Only where no letter or digit touches it.
    pub single_word: bool,
    /// Swallows white space before it.
    pub lstrip: bool,
    /// Swallows white space after it.
    pub rstrip: bool,
    /// Looked for after normalisation.
    pub normalized: bool,
}

impl Added {
    /// A token without whims.
    pub fn new(id: u32, content: impl Into<String>, special: bool) -> Added {
        Added {
            id,
            content: content.into(),
            special,
            native: true,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
        }
    }
}

/// Longest spelling that is looked for in text: marks are short, and a hostile file's endless one would make every
/// search slow.
const LONGEST: usize = 512;

/// Finds added tokens in text: the leftmost, and of those the longest.
#[derive(Default)]
pub struct Matcher {
    tokens: Vec<Added>,
    /// Nodes of a byte trie: (node, byte) -> node. Node 0 is the root.
    edges: HashMap<(u32, u8), u32>,
    /// Which bytes begin a token.
    first: Vec<bool>,
    /// The token that ends at each node, as its place in `tokens` + 1.
    ends: Vec<u32>,
}

/// A piece of text as [`Matcher::cut`] sees it.
#[derive(Debug, PartialEq)]
pub enum Cut {
    /// Text between tokens.
    Text(Range<usize>),
    /// A token by its id, and what it covers.
    Token(u32, Range<usize>),
}

impl Matcher {
    /// A matcher for `tokens`; of two spelled alike the first counts; empty and very long ones are
    /// left out.
    pub fn new(tokens: impl IntoIterator<Item = Added>) -> Matcher {
        let mut m = Matcher { tokens: Vec::new(), edges: HashMap::new(), first: vec![false; 256], ends: vec![0] };
        for token in tokens {
            if token.content.len() > LONGEST {
                continue;
            }
            let mut node = 0;
            for (k, &byte) in token.content.as_bytes().iter().enumerate() {
                m.first[usize::from(byte)] |= k == 0;
                let fresh = m.ends.len() as u32;
                node = *m.edges.entry((node, byte)).or_insert(fresh);
                if node == fresh {
                    m.ends.push(0);
                }
            }
            if node != 0 && m.ends[node as usize] == 0 {
                m.tokens.push(token);
                m.ends[node as usize] = m.tokens.len() as u32;
            }
        }
        m
    }

    /// Whether there is nothing to find.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The tokens, in the order given.
    pub fn tokens(&self) -> &[Added] {
        &self.tokens
    }

    /// The longest token that `text` begins with and `want` accepts, given its length there.
    fn longest(&self, text: &[u8], want: &dyn Fn(&Added) -> bool) -> Option<&Added> {
        let (mut node, mut best) = (0, None);
        for &byte in text {
            let Some(&next) = self.edges.get(&(node, byte)) else { break };
            node = next;
            if let Some(at) = self.ends[node as usize].checked_sub(1) {
                let token = &self.tokens[at as usize];
                if want(token) {
                    best = Some(token);
                }
            }
        }
        best
    }

    /// Where the first special token in `text` begins.
    pub fn find_special(&self, text: &str) -> Option<usize> {
        let bytes = text.as_bytes();
        (0..bytes.len()).find(|&at| {
            self.first.get(usize::from(bytes[at])) == Some(&true)
                && self.longest(&bytes[at..], &|t| t.special).is_some()
        })
    }

    /// Whether `text` ends with a beginning of a special token, which text after it could complete.
    pub fn ends_open(&self, text: &str) -> bool {
        let bytes = text.as_bytes();
        let longest = self.tokens.iter().filter(|t| t.special).map(|t| t.content.len()).max().unwrap_or(0);
        (bytes.len().saturating_sub(longest.saturating_sub(1))..bytes.len()).any(|start| {
            let mut node = 0;
            for &byte in &bytes[start..] {
                match self.edges.get(&(node, byte)) {
                    Some(&next) => node = next,
                    None => return false,
                }
            }
            true
        })
    }

    /// `text` cut at the tokens that `want` accepts at the place where they stand.
    pub fn cut(&self, text: &str, want: &dyn Fn(&Added, Range<usize>) -> bool) -> Vec<Cut> {
        let mut cuts = Vec::new();
        let (mut done, mut at) = (0, 0);
        let bytes = text.as_bytes();
        while at < bytes.len() {
            if self.first.is_empty() || !self.first[usize::from(bytes[at])] {
                at += 1;
                continue;
            }
            let fits = |t: &Added| {
                let range = at..at + t.content.len();
                want(t, range.clone()) && (!t.single_word || stands_alone(text, range))
            };
            let Some(token) = self.longest(&bytes[at..], &fits) else {
                at += 1;
                continue;
            };
            let (mut start, mut end) = (at, at + token.content.len());
            if token.lstrip {
                start = done + text[done..start].trim_end().len();
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start {
                cuts.push(Cut::Text(done..start));
            }
            cuts.push(Cut::Token(token.id, start..end));
            (done, at) = (end, end);
        }
        if done < text.len() {
            cuts.push(Cut::Text(done..text.len()));
        }
        cuts
    }
}

fn stands_alone(text: &str, range: Range<usize>) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    !text[..range.start].chars().next_back().is_some_and(word) && !text[range.end..].chars().next().is_some_and(word)
}
