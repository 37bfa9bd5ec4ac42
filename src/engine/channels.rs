//! Answers in channels (OpenAI's harmony format, of gpt-oss): a model writes its thoughts and its answer as messages of
//! one turn, `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`, and
//! only the last is for the person.

use rushlight_models::tokenizer::Tokenizer;

/// Tells what is which.
pub struct Channels {
    start: u32,
    channel: u32,
    message: u32,
    end: u32,
    place: Place,
}

enum Place {
    /// In what comes before a message; the name of its channel so far, once that has begun.
    Head(Option<Vec<u8>>),
    /// In a message: whether it is the answer.
    Body(bool),
}

/// What a token belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The answer.
    Answer,
    /// What the model thinks, or says to its tools.
    Thought,
    /// What tells messages apart.
    Mark,
}

impl Channels {
    /// For an answer to the prompt `ids`; `None` where nothing says that it will be in channels.
    pub fn new(tokenizer: &Tokenizer, ids: &[u32]) -> Option<Channels> {
        let mark = |name: &str| tokenizer.id(name).filter(|&id| tokenizer.is_special(id));
        let [start, channel] = [mark("<|start|>")?, mark("<|channel|>")?];
        let [message, end] = [mark("<|message|>")?, mark("<|end|>")?];
        let mut channels = Channels { start, channel, message, end, place: Place::Head(None) };
        // Where the prompt leaves off: behind the beginning of a message, or in one that it has begun.
        let begun = ids.iter().rposition(|&id| id == start)?;
        for &id in &ids[begun..] {
            channels.part(tokenizer, id);
        }
        Some(channels)
    }

    /// What `id`, which comes next, belongs to.
    pub fn part(&mut self, tokenizer: &Tokenizer, id: u32) -> Part {
        match &mut self.place {
            _ if id == self.start || id == self.end => self.place = Place::Head(None),
            Place::Head(_) if id == self.channel => self.place = Place::Head(Some(Vec::new())),
            Place::Head(name) if id == self.message => {
                let answer = name.as_ref().is_none_or(|name| name.trim_ascii().starts_with(b"final"));
                self.place = Place::Body(answer);
            }
            Place::Head(name) => name.iter_mut().for_each(|name| name.extend(tokenizer.token_bytes(id))),
            Place::Body(true) => return Part::Answer,
            Place::Body(false) => return Part::Thought,
        }
        Part::Mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Part::{Answer, Mark, Thought};

    fn tokenizer() -> Tokenizer {
        let marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"];
        let added: Vec<_> = (0..6)
            .map(|i| {
                serde_json::json!({"id": 10 + i, "content": marks[i], "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect();
        let file = serde_json::json!({
            "version": "1.0", "added_tokens": added, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": null, "model": {"type": "BPE", "vocab": {"analysis": 0, "final": 1, "x": 2, "y": 3, "assistant": 4,
                " to=a": 5}, "merges": []},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    }

    fn parts(prompt: &[u32], ids: &[u32]) -> Option<Vec<Part>> {
        let t = tokenizer();
        let mut channels = Channels::new(&t, prompt)?;
        Some(ids.iter().map(|&id| channels.part(&t, id)).collect())
    }

    #[test]
    fn thoughts_and_answers() {
        let said = [11, 0, 12, 2, 3, 13, 10, 4, 11, 1, 12, 3, 3];
        let want = [Mark, Mark, Mark, Thought, Thought, Mark, Mark, Mark, Mark, Mark, Mark, Answer, Answer];
        assert_eq!(parts(&[10, 4, 12, 2, 13, 10, 4], &said).unwrap(), want);
        // A prompt that begins the answer itself, and a message without a channel.
        assert_eq!(
            parts(&[10, 4, 11, 1, 12], &[2, 13, 10, 4, 12, 3]).unwrap(),
            [Answer, Mark, Mark, Mark, Mark, Answer]
        );
        // To a tool.
        assert_eq!(parts(&[10, 4], &[11, 0, 5, 12, 2]).unwrap(), [Mark, Mark, Mark, Mark, Thought]);
        // Plain text is no conversation.
        assert!(parts(&[2, 3], &[2]).is_none());
    }

    #[test]
    fn a_thought_does_not_end_the_turn() {
        let t = tokenizer();
        assert_eq!(t.end_of_turn().collect::<Vec<_>>(), [14, 15]);
    }
}
