//! Stop strings in a stream of text.

/// Lets text through up to the first stop string; holds back what may become the beginning of one.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// A filter for `stops`; empty ones are ignored.
    pub fn new(stops: &[String]) -> StopStrings {
        StopStrings { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// The text that may be shown after `text` has come, and whether a stop string was met (nothing follows it).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        // The earliest stop string counts; of those that begin together, any, since none is shown.
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let starts = |at: usize| self.stops.iter().any(|s| s.starts_with(&self.held[at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(|&at| starts(at)).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when the text ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_of_a_stop_string_is_shown() {
        let mut s = StopStrings::new(&["END".into(), String::new(), "\n\n".into()]);
        assert_eq!(s.push("one E"), ("one ".into(), false));
        assert_eq!(s.push("N"), (String::new(), false));
        assert_eq!(s.push("X E"), ("ENX ".into(), false));
        assert_eq!(s.push("ND tail"), (String::new(), true));
        let mut s = StopStrings::new(&["\n\n".into()]);
        assert_eq!(s.push("a\n"), ("a".into(), false));
        assert_eq!(s.finish(), "\n");
    }

    proptest! {
        #[test]
        fn streaming_equals_cutting(text in "[abc]{0,40}", stops in prop::collection::vec("[abc]{1,4}", 0..3), cut in 1usize..5) {
            let mut filter = StopStrings::new(&stops);
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in text.as_bytes().chunks(cut) {
                let (visible, stop) = filter.push(std::str::from_utf8(piece).unwrap());
                shown += &visible;
                stopped = stop;
                if stop { break }
            }
            if !stopped {
                shown += &filter.finish();
            }
            // Streaming stops at the first piece that completes a stop string: some stop string ends no later than it.
            let first_end = stops.iter().filter_map(|s| text.find(s).map(|at| at + s.len())).min();
            prop_assert_eq!(stopped, first_end.is_some());
            prop_assert!(text.starts_with(&shown));
            prop_assert!(!stops.iter().any(|s| shown.contains(s)));
            if !stopped {
                prop_assert_eq!(shown, text);
            }
        }
    }
}
