use super::{Kind, Tokenizer};

impl Tokenizer {
    /// Where in `text` each of its tokens begins, and the end of the last: byte offsets, as many as `ids` and one more.
    /// Tokens that stand for nothing in the text (a beginning mark, a space put before it) begin where the next does.
    ///
    /// `None` where the tokens do not spell the text, since the tokenizer rewrites it (Unicode, case).
    pub(crate) fn places(&self, text: &str, ids: &[u32]) -> Option<Vec<usize>> {
        let mut places = Vec::with_capacity(ids.len() + 1);
        let mut at = 0;
        for (k, &id) in ids.iter().enumerate() {
            let rest = &text.as_bytes()[at..];
            let spelled = self.spelled(id);
            if self.vocabulary.kind(id) == Kind::Unknown && !rest.starts_with(&spelled) {
                return None;
            }
            let blank = rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
            let (begin, len) = if rest.starts_with(&spelled) {
                (at, spelled.len())
            } else if let Some(unspaced) = spelled.strip_prefix(b" ")
                && rest.starts_with(unspaced)
            {
                (at, unspaced.len())
            } else if rest[blank..].starts_with(&spelled) {
                // A mark swallowed the white space around it.
                (at + blank, spelled.len())
            } else if k == 0 && self.bos == Some(id) {
                (at, 0)
            } else {
                return None;
            };
            places.push(begin);
            at = begin + len;
        }
        places.push(at);
        text.as_bytes()[at..].trim_ascii().is_empty().then_some(places)
    }
}
