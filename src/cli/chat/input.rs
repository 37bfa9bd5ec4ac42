//! What the person types: an edited line with history on a terminal, plain lines elsewhere.

use anyhow::{Context as _, Result};
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Editor, Helper};
use std::io::BufRead;
use std::path::PathBuf;

/// What came.
pub enum Line {
    /// A message or command, lines joined.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of the input.
    End,
}

/// Where lines come from.
pub enum Input {
    /// A terminal.
    Terminal(Box<Editor<Words, DefaultHistory>>, PathBuf),
    /// A file or pipe.
    Plain,
}

impl Input {
    /// An editor whose history is in `history`, with `commands` and `settings` to complete.
    pub fn terminal(history: PathBuf, commands: Vec<String>, settings: Vec<String>) -> Result<Input> {
        let config = Config::builder().history_ignore_space(true).build();
        let mut editor = Editor::with_config(config).context("the terminal cannot be used")?;
        editor.set_helper(Some(Words { commands, settings, files: FilenameCompleter::new() }));
        // The first time there is no history.
        editor.load_history(&history).ok();
        Ok(Input::Terminal(Box::new(editor), history))
    }

    /// The next message.
    pub fn next(&mut self) -> Result<Line> {
        match self {
            Input::Terminal(editor, history) => match editor.readline("> ") {
                Ok(text) => {
                    editor.add_history_entry(text.as_str()).ok();
                    if let Some(dir) = history.parent() {
                        std::fs::create_dir_all(dir).ok();
                    }
                    // A history that cannot be kept is no reason to stop talking.
                    editor.append_history(history).ok();
                    Ok(Line::Text(join(&text)))
                }
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(e) => Err(e).context("the terminal"),
            },
            Input::Plain => {
                let (mut text, mut line, mut stdin) = (String::new(), Vec::new(), std::io::stdin().lock());
                loop {
                    line.clear();
                    if stdin.read_until(b'\n', &mut line).context("standard input")? == 0 {
                        return Ok(if text.is_empty() { Line::End } else { Line::Text(join(&text)) });
                    }
                    let line = std::str::from_utf8(&line).context("standard input is not UTF-8 text")?;
                    text.push_str(line);
                    let whole = text.trim_end_matches(['\n', '\r']);
                    if !is_open(whole) {
                        return Ok(Line::Text(join(whole)));
                    }
                }
            }
        }
    }
}

/// Whether more lines belong to `text`: it ends in a backslash, or a block of """ is open.
fn is_open(text: &str) -> bool {
    match text.trim_start().strip_prefix("\"\"\"") {
        Some(block) => !block.trim_end().ends_with("\"\"\""),
        None => text.ends_with('\\'),
    }
}

/// The message in `text`: block marks and backslashes at line ends taken away.
fn join(text: &str) -> String {
    match text.trim().strip_prefix("\"\"\"") {
        Some(block) => block.strip_suffix("\"\"\"").unwrap_or(block).trim_matches('\n').to_string(),
        None => text.replace("\\\r\n", "\n").replace("\\\n", "\n").trim_end_matches('\\').to_string(),
    }
}

/// Completes commands, settings and files.
pub struct Words {
    commands: Vec<String>,
    settings: Vec<String>,
    files: FilenameCompleter,
}

impl Completer for Words {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, context: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = &line[..pos];
        let starting = |words: &[String], part: &str| -> Vec<Pair> {
            let fits = words.iter().filter(|w| w.starts_with(part));
            fits.map(|w| Pair { display: w.clone(), replacement: format!("{w} ") }).collect()
        };
        match before.split_once(' ') {
            None if before.starts_with('/') => Ok((0, starting(&self.commands, before))),
            Some(("/set", part)) if !part.contains(' ') => Ok((5, starting(&self.settings, part))),
            Some(("/save" | "/load" | "/adapter", _)) => self.files.complete(line, pos, context),
            _ => Ok((pos, Vec::new())),
        }
    }
}

impl Validator for Words {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        let open = is_open(context.input());
        Ok(if open { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Hinter for Words {
    type Hint = String;
}

impl Highlighter for Words {}

impl Helper for Words {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_lines() {
        for (text, open) in
            [("a", false), ("a\\", true), ("a\\\nb", false), ("\"\"\"a", true), ("\"\"\"a\nb\"\"\"", false)]
        {
            assert_eq!(is_open(text), open, "{text:?}");
        }
        assert!(is_open("\"\"\""), "an opening mark does not close itself");
        assert_eq!(join("a\\\nb"), "a\nb");
        assert_eq!(join("\"\"\"\na\n\nb\n\"\"\""), "a\n\nb");
        assert_eq!(join("end\\"), "end");
    }
}
