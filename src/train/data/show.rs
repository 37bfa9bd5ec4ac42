//! What training will see, for a person to check.

use crate::train::batch::Example;
use rushlight_models::tokenizer::Tokenizer;
use std::fmt::Write;

/// The tokens of `example` as text, with those that the loss falls on in green, the others dim; without `colour` the
/// first stand between ⟦ and ⟧. Without a tokenizer the ids are shown. A label that is another token than the one that
/// stands there is shown behind it.
pub fn show(example: &Example, tokenizer: Option<&Tokenizer>, colour: bool) -> String {
    let learned = |k: usize| k.checked_sub(1).and_then(|before| example.targets[before]);
    let (mut out, mut k) = (String::new(), 0);
    while k < example.ids.len() {
        let label = learned(k);
        let other = label.filter(|&label| label != example.ids[k]);
        // A run of tokens that are treated alike: characters may take several tokens.
        let end = match other {
            Some(_) => k + 1,
            None => (k + 1..example.ids.len())
                .find(|&n| learned(n).is_some() != label.is_some() || learned(n).is_some_and(|l| l != example.ids[n]))
                .unwrap_or(example.ids.len()),
        };
        let mut text = spelled(&example.ids[k..end], tokenizer);
        if let Some(label) = other {
            let _ = write!(text, "→{}", spelled(&[label], tokenizer));
        }
        let (before, after) = match (label.is_some(), colour) {
            (true, true) => ("\x1b[32m", "\x1b[0m"),
            (false, true) => ("\x1b[2m", "\x1b[0m"),
            (true, false) => ("⟦", "⟧"),
            (false, false) => ("", ""),
        };
        if tokenizer.is_none() && k > 0 {
            out.push(' ');
        }
        let _ = write!(out, "{before}{text}{after}");
        k = end;
    }
    out
}

fn spelled(ids: &[u32], tokenizer: Option<&Tokenizer>) -> String {
    let Some(tokenizer) = tokenizer else {
        return ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    };
    let mut out = String::new();
    for c in tokenizer.decode_continued(ids, false).chars() {
        // Nothing in a file of examples may move the cursor.
        if c.is_control() && c != '\n' && c != '\t' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_learned_stands_out() {
        let e = Example { ids: vec![5, 6, 7, 8], targets: vec![None, Some(7), Some(9), None] };
        assert_eq!(show(&e, None, false), "5 6 ⟦7⟧ ⟦8→9⟧");
        assert_eq!(show(&e, None, true), "\x1b[2m5 6\x1b[0m \x1b[32m7\x1b[0m \x1b[32m8→9\x1b[0m");
    }
}
