use std::path::PathBuf;

/// What can go wrong with a model's files. Each message names the file or tensor, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file's contents are not what they should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        what: String,
    },
    /// A model, tokenizer or template that cannot be used as asked.
    #[error("{0}")]
    Model(String),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whether the disk, or the part of it that is allowed, had no room for what was to be written.
pub fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// Longest message, in bytes.
const MAX_MESSAGE: usize = 1000;

/// `text` as one line of bounded length that does nothing to a terminal.
fn one_line(mut text: String) -> String {
    if text.contains(char::is_control) {
        let mut escaped = String::with_capacity(text.len());
        for c in text.chars() {
            match c.is_control() {
                true => escaped.extend(c.escape_default()),
                false => escaped.push(c),
            }
        }
        text = escaped;
    }
    if text.len() > MAX_MESSAGE {
        text = text
            .chars()
            .scan(0, |len, c| {
                *len += c.len_utf8();
                (*len <= MAX_MESSAGE).then_some(c)
            })
            .collect();
        text.push('…');
    }
    text
}

impl Error {
    /// The operating system refused `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    /// The contents of `path` are wrong: `what` says how and what to do. It may quote the file: control characters are
    /// escaped, and what is too long to read is cut.
    pub fn file(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Error::File { path: path.into(), what: one_line(what.into()) }
    }

    /// The model cannot be used as asked: `what` says why and what to do.
    pub fn model(what: impl Into<String>) -> Self {
        Error::Model(what.into())
    }
}
