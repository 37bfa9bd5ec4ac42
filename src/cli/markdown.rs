//! Markdown on a terminal: nothing is hidden or moved, headings and `**bold**` text become bold, code dim.

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Styles a stream of Markdown.
#[derive(Debug, Default)]
pub struct Markdown {
    /// Off: text passes unchanged.
    on: bool,
    /// Marks that wait for what follows them: a run of one of `*`, `` ` `` or `#`.
    pending: String,
    in_line: bool,
    fence: bool,
    bold: bool,
    code: bool,
    heading: bool,
}

impl Markdown {
    /// A styler; `on` where the output is a terminal.
    pub fn new(on: bool) -> Markdown {
        Markdown { on, ..Markdown::default() }
    }

    /// `text` with styles, but for marks whose meaning the next text decides.
    pub fn push(&mut self, text: &str) -> String {
        if !self.on {
            return text.to_string();
        }
        let mut out = String::new();
        for c in text.chars() {
            let mark = matches!(c, '*' | '`' | '#');
            if mark && (self.pending.is_empty() || self.pending.starts_with(c)) {
                self.pending.push(c);
                continue;
            }
            self.flush(Some(c), &mut out);
            if mark {
                self.pending.push(c);
                continue;
            }
            if c == '\n' {
                // Styles end with their line, so that a forgotten mark does no harm; only a fence goes on.
                if self.bold || self.code || self.heading {
                    (self.bold, self.code, self.heading) = (false, false, false);
                    out += PLAIN;
                }
                self.in_line = false;
            } else if c != ' ' {
                self.in_line = true;
            }
            out.push(c);
        }
        out
    }

    /// The end: marks that waited, and plain style again.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        if self.on {
            self.flush(None, &mut out);
            if self.bold || self.code || self.heading || self.fence {
                out += PLAIN;
            }
        }
        *self = Markdown::new(self.on);
        out
    }

    /// Decides what the pending marks mean before `next`.
    fn flush(&mut self, next: Option<char>, out: &mut String) {
        let marks = std::mem::take(&mut self.pending);
        if marks.is_empty() {
            return;
        }
        if marks.starts_with("```") && !self.in_line {
            self.fence = !self.fence;
            let (before, after) = if self.fence { (DIM, "") } else { ("", PLAIN) };
            *out += &format!("{before}{marks}{after}");
        } else if self.fence {
            *out += &marks;
        } else if marks.starts_with('#') && !self.in_line && marks.len() <= 6 && next == Some(' ') {
            self.heading = true;
            *out += &format!("{BOLD}{marks}");
        } else if marks == "`" {
            self.toggle(false, &marks, out);
        } else if marks == "**" && !self.code {
            self.toggle(true, &marks, out);
        } else {
            *out += &marks;
        }
        self.in_line = true;
    }

    fn toggle(&mut self, bold: bool, marks: &str, out: &mut String) {
        let state = if bold { &mut self.bold } else { &mut self.code };
        *state = !*state;
        if *state {
            *out += if bold { BOLD } else { DIM };
            *out += marks;
        } else {
            *out += marks;
            *out += PLAIN;
            if self.bold || self.heading {
                *out += BOLD;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn styled(text: &str) -> String {
        let mut m = Markdown::new(true);
        let out = m.push(text) + &m.finish();
        out.replace(BOLD, "<b>").replace(DIM, "<d>").replace(PLAIN, "</>")
    }

    #[test]
    fn styles() {
        assert_eq!(styled("a **b** c"), "a <b>**b**</> c");
        assert_eq!(styled("use `x*y` now"), "use <d>`x*y`</> now");
        assert_eq!(styled("# Head\nbody"), "<b># Head</>\nbody");
        assert_eq!(styled("```rust\nlet **a** = `b`;\n```\nend"), "<d>```rust\nlet **a** = `b`;\n```</>\nend");
        assert_eq!(styled("* item\n2 * 3 #4"), "* item\n2 * 3 #4");
        assert_eq!(styled("**open\nnext"), "<b>**open</>\nnext");
        assert_eq!(Markdown::new(false).push("**b**"), "**b**");
    }

    proptest! {
        #[test]
        fn no_text_is_lost(text in "[a*`# \n]{0,60}", cut in 1usize..6) {
            let mut m = Markdown::new(true);
            let mut out = String::new();
            for piece in text.as_bytes().chunks(cut) {
                out += &m.push(std::str::from_utf8(piece).unwrap());
            }
            out += &m.finish();
            prop_assert_eq!(out.replace(BOLD, "").replace(DIM, "").replace(PLAIN, ""), text);
        }
    }
}
