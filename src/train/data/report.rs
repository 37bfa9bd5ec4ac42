//! What became of the records of each file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// A record that was not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Where it stands, in the file's [`FileReport::unit`], from 1.
    pub line: u64,
    /// Why.
    pub why: Arc<str>,
}

/// What became of the records of one file.
#[derive(Clone, Debug, Default)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// What its records are counted by: `line`, `record`, `row` or `part`.
    pub unit: &'static str,
    /// Records that are used, by what they are (`conversations`, `texts`, ...).
    pub kinds: BTreeMap<&'static str, usize>,
    /// Tokens of those.
    pub tokens: usize,
    /// Tokens of those that the loss falls on.
    pub learned: usize,
    /// Records of which only the beginning is used, by line, with all the tokens they had.
    pub cut: Vec<(u64, usize)>,
    /// Records that are not used.
    pub skipped: Vec<Skipped>,
    /// What a person should know about used records, and how many it concerns.
    pub notes: BTreeMap<&'static str, usize>,
    /// Columns of used records that have no part in what is learned; the first that were met.
    pub unused: BTreeSet<String>,
}

/// What became of the records of all files.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order given.
    pub files: Vec<FileReport>,
    /// Most tokens of a sequence: what longer records were cut to.
    pub max_seq_len: usize,
}

impl Report {
    /// Number of records that are not used.
    pub fn skipped(&self) -> usize {
        self.files.iter().map(|f| f.skipped.len()).sum()
    }

    /// Number of records of which only the beginning is used.
    pub fn cut(&self) -> usize {
        self.files.iter().map(|f| f.cut.len()).sum()
    }
}

/// Lines that are listed for one reason.
const LISTED: usize = 8;
/// Columns without a part that are remembered of one file.
pub(super) const UNUSED: usize = 12;
/// Reasons that are listed for one file.
const REASONS: usize = 12;

impl FileReport {
    /// Number of records that are used.
    pub fn used(&self) -> usize {
        self.kinds.values().sum()
    }

    /// The reasons for leaving out records, the most frequent first, each with its lines.
    pub fn reasons(&self) -> Vec<String> {
        let mut by_reason: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for s in &self.skipped {
            by_reason.entry(&s.why).or_default().push(s.line);
        }
        let mut reasons: Vec<_> = by_reason.into_iter().collect();
        reasons.sort_by_key(|(_, lines)| std::cmp::Reverse(lines.len()));
        let more = reasons.len().saturating_sub(REASONS);
        let mut told: Vec<_> =
            reasons.iter().take(REASONS).map(|(why, lines)| format!("{}: {why}", self.places(lines))).collect();
        if more > 0 {
            told.push(format!("and {more} more reasons"));
        }
        told
    }

    /// `lines 3, 9 and 4 more`.
    fn places(&self, lines: &[u64]) -> String {
        let first: Vec<String> = lines.iter().take(LISTED).map(u64::to_string).collect();
        let more = lines.len() - first.len();
        let s = if lines.len() == 1 { "" } else { "s" };
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{s} {}{rest}", self.unit, first.join(", "))
    }
}

/// A line for each file, and below it what was cut or left out, with the lines.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            let kinds: Vec<String> = file.kinds.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
            let (tokens, learned) = (file.tokens, file.learned);
            writeln!(f, "{}: {}, {tokens} tokens, {learned} of them learned", file.path.display(), kinds.join(", "))?;
            if !file.cut.is_empty() {
                let lines: Vec<u64> = file.cut.iter().map(|c| c.0).collect();
                writeln!(f, "  {} cut to {} tokens ({})", lines.len(), self.max_seq_len, file.places(&lines))?;
            }
            if !file.skipped.is_empty() {
                writeln!(f, "  {} left out", file.skipped.len())?;
                file.reasons().iter().try_for_each(|reason| writeln!(f, "    {reason}"))?;
            }
            file.notes.iter().try_for_each(|(note, n)| writeln!(f, "  {n} {note}"))?;
            if !file.unused.is_empty() {
                let names: Vec<&str> = file.unused.iter().map(String::as_str).collect();
                let s = if names.len() == 1 { "" } else { "s" };
                writeln!(f, "  nothing is learned from its column{s} {}", names.join(", "))?;
            }
        }
        Ok(())
    }
}
