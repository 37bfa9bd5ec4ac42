use super::Tokenizer;

/// Turns a stream of ids into text, a whole character at a time: the bytes of a character that several tokens share
/// wait until it is whole, and bytes that can no longer become a character come out as U+FFFD.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> DecodeStream<'a> {
        DecodeStream { tokenizer, pending: Vec::new() }
    }

    /// The text that is certain once `id` has come; often the token's own, sometimes none, sometimes more.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend(self.tokenizer.token_bytes(id));
        take_certain(&mut self.pending)
    }

    /// What is left when no more ids come: U+FFFD for the beginning of a character, or nothing.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

/// Takes from `pending` all that later bytes cannot change.
fn take_certain(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest: &[u8] = pending;
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(e) => {
                let (valid, after) = rest.split_at(e.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                rest = after;
                // No length: the bytes may be the beginning of a character.
                let Some(bad) = e.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[bad..];
            }
        }
    }
    let kept = rest.len();
    pending.drain(..pending.len() - kept);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_add_up_to_the_whole(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..20)) {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for part in &parts {
                pending.extend(part);
                text += &take_certain(&mut pending);
                prop_assert!(pending.len() < 4);
            }
            text += &String::from_utf8_lossy(&pending);
            let whole = parts.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }

        #[test]
        fn no_replacement_in_valid_text(text in "\\PC*", cut in 1usize..4) {
            let (mut pending, mut out) = (Vec::new(), String::new());
            for part in text.as_bytes().chunks(cut) {
                pending.extend(part);
                out += &take_certain(&mut pending);
            }
            prop_assert_eq!(out, text);
            prop_assert!(pending.is_empty());
        }
    }
}
