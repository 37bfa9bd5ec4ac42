//! The examples of a run, as compactly as they can be kept: tokens in one piece, and what is learned as ranges.

use super::encode::{Encoded, Learned, Refusal};
use super::report::{FileReport, Report, Skipped, UNUSED};
use super::{DataSettings, Source};
use crate::engine::random::Random;
use crate::train::batch::Example;
use anyhow::{Result, bail};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// One record.
#[derive(Debug)]
struct Kept {
    /// Its tokens in [`Records::ids`].
    ids: Range<usize>,
    /// Its learned rows in [`Records::learned`].
    learned: Range<usize>,
    file: u32,
    line: u64,
    text: bool,
}

#[derive(Debug, Default)]
struct Records {
    ids: Vec<u32>,
    /// Rows, counted in [`Records::ids`], that are asked for the token of the next row.
    learned: Vec<Range<usize>>,
    /// For the few records whose labels are other tokens than follow: what each row is asked for.
    targets: HashMap<u32, Box<[Option<u32>]>>,
    list: Vec<Kept>,
}

/// A piece of a record that is a sequence of its own.
#[derive(Clone, Debug)]
struct Piece {
    record: u32,
    /// In [`Records::ids`].
    rows: Range<usize>,
}

/// Examples in the order of their files; shuffling is up to [`Batches`](super::Batches).
///
/// What a batch counts is an item: a conversation, or a window of `max_seq_len` tokens of texts, which may hold several
/// texts as sequences that do not see each other.
#[derive(Clone, Debug)]
pub struct Dataset {
    records: Arc<Records>,
    /// Records, as often as their weights say.
    order: Vec<u32>,
    pieces: Vec<Piece>,
    /// Where each item's pieces begin, and the end of the last.
    items: Vec<usize>,
    max_seq_len: usize,
    /// What became of each file's records.
    pub report: Arc<Report>,
}

impl Dataset {
    fn new(records: Arc<Records>, order: Vec<u32>, max_seq_len: usize, report: Arc<Report>) -> Dataset {
        let (mut pieces, mut items, mut room) = (Vec::new(), Vec::new(), 0);
        for &record in &order {
            let Kept { ids, text, .. } = &records.list[record as usize];
            let Range { mut start, end } = ids.clone();
            while start < end {
                let rows = start..end.min(start + max_seq_len);
                start = rows.end;
                // The row before a text's cut is asked for the token behind it, so a last token has nothing to add.
                if rows.len() == 1 && *text && rows.start > ids.start {
                    continue;
                }
                if !text || rows.len() > room {
                    items.push(pieces.len());
                    room = if *text { max_seq_len } else { 0 };
                }
                room -= rows.len().min(room);
                pieces.push(Piece { record, rows });
            }
        }
        items.push(pieces.len());
        Dataset { records, order, pieces, items, max_seq_len, report }
    }

    /// Number of items: what a batch size and an epoch count.
    pub fn len(&self) -> usize {
        self.items.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sequences of item `item`: one, or the texts in a window.
    pub fn examples(&self, item: usize) -> Vec<Example> {
        self.pieces(item).iter().map(|p| self.example(p)).collect()
    }

    /// The sequences of several items, one after the other.
    pub fn batch(&self, items: &[usize]) -> Vec<Example> {
        items.iter().flat_map(|&item| self.examples(item)).collect()
    }

    /// Number of tokens of item `item`.
    pub fn item_tokens(&self, item: usize) -> usize {
        self.pieces(item).iter().map(|p| p.rows.len()).sum()
    }

    /// Number of tokens of an epoch.
    pub fn tokens(&self) -> usize {
        self.pieces.iter().map(|p| p.rows.len()).sum()
    }

    /// Number of tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.pieces.iter().map(|p| p.rows.len()).max().unwrap_or(0)
    }

    /// The file and the line (see [`FileReport::unit`]) where item `item` begins.
    pub fn origin(&self, item: usize) -> (&Path, u64) {
        let record = &self.records.list[self.pieces(item)[0].record as usize];
        (&self.report.files[record.file as usize].path, record.line)
    }

    /// Sets `fraction` of the records aside: what is left to train on, and those, each once. The same records for the
    /// same `seed`.
    ///
    /// # Errors
    /// When the fraction is not between 0 and 1, or there is only one record.
    pub fn split(&self, fraction: f64, seed: u64) -> Result<(Dataset, Dataset)> {
        if !(fraction > 0.0 && fraction < 1.0) {
            bail!("--val-split {fraction}: the share of the examples to validate on is between 0 and 1");
        }
        let mut seen = HashSet::new();
        let mut distinct: Vec<u32> = self.order.iter().copied().filter(|&r| seen.insert(r)).collect();
        if distinct.len() < 2 {
            bail!("--val-split {fraction}: there is only one record, and none to spare for validation");
        }
        let count = ((distinct.len() as f64 * fraction).round() as usize).clamp(1, distinct.len() - 1);
        let chosen: HashSet<u32> = choose(distinct.len(), count, seed).into_iter().map(|at| distinct[at]).collect();
        let rest: Vec<u32> = self.order.iter().copied().filter(|r| !chosen.contains(r)).collect();
        distinct.retain(|r| chosen.contains(r));
        let part = |order| Dataset::new(self.records.clone(), order, self.max_seq_len, self.report.clone());
        Ok((part(rest), part(distinct)))
    }

    /// What item `item` asks and what it answers, where it is one conversation with one answer: tokens up to where the
    /// answer begins, and those of the answer with its end mark.
    pub fn question(&self, item: usize) -> Option<(&[u32], &[u32])> {
        let [piece] = self.pieces(item) else { return None };
        let record = &self.records.list[piece.record as usize];
        let [rows] = &self.records.learned[record.learned.clone()] else { return None };
        let answer = rows.start + 1..rows.end + 1;
        (!record.text).then(|| (&self.records.ids[record.ids.start..answer.start], &self.records.ids[answer]))
    }

    fn pieces(&self, item: usize) -> &[Piece] {
        &self.pieces[self.items[item]..self.items[item + 1]]
    }

    fn example(&self, piece: &Piece) -> Example {
        let Records { ids, learned, targets, list } = &*self.records;
        let (rows, record) = (piece.rows.clone(), &list[piece.record as usize]);
        let targets = match targets.get(&piece.record) {
            Some(targets) => targets[rows.start - record.ids.start..rows.end - record.ids.start].to_vec(),
            None => {
                let mut targets = vec![None; rows.len()];
                for asked in &learned[record.learned.clone()] {
                    for row in asked.start.max(rows.start)..asked.end.min(rows.end) {
                        targets[row - rows.start] = Some(ids[row + 1]);
                    }
                }
                targets
            }
        };
        Example { ids: ids[rows].to_vec(), targets }
    }
}

/// `count` of the numbers below `len`, ascending; each choice is equally likely.
fn choose(len: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut random = Random::new(seed);
    let mut all: Vec<usize> = (0..len).collect();
    for at in 0..count {
        let other = at + random.below(len - at);
        all.swap(at, other);
    }
    all.truncate(count);
    all.sort_unstable();
    all
}

/// Takes in the records of file after file.
#[derive(Default)]
pub(super) struct Builder {
    records: Records,
    report: Report,
    /// Records before each file's.
    begins: Vec<usize>,
    /// Reasons already told, so that a million alike are kept once.
    reasons: HashSet<Arc<str>>,
}

impl Builder {
    pub fn begin(&mut self, source: &Source) {
        self.begins.push(self.records.list.len());
        self.report.files.push(FileReport { path: source.path.clone(), ..FileReport::default() });
    }

    /// Adds the record of line `line`.
    pub fn add(&mut self, line: u64, encoded: Result<Encoded, Refusal>) -> Result<()> {
        let file = (self.report.files.len() - 1) as u32;
        let Some(report) = self.report.files.last_mut() else { return Ok(()) };
        let encoded = match encoded {
            Ok(encoded) => encoded,
            Err(Refusal::Stop(why)) => bail!("record {line}: {why}"),
            Err(Refusal::Skip(why)) => {
                let why: Arc<str> = why.into();
                let why = self.reasons.get(&why).cloned().unwrap_or(why);
                self.reasons.insert(why.clone());
                report.skipped.push(Skipped { line, why });
                return Ok(());
            }
        };
        let Records { ids, learned, targets, list } = &mut self.records;
        let (at, first) = (ids.len(), learned.len());
        ids.extend_from_slice(&encoded.ids);
        report.learned += match encoded.learned {
            Learned::Rows(rows) => {
                learned.extend(rows.iter().map(|r| at + r.start..at + r.end));
                rows.iter().map(ExactSizeIterator::len).sum::<usize>()
            }
            Learned::Targets(list_of) => {
                let count = list_of.iter().flatten().count();
                targets.insert(list.len() as u32, list_of.into_boxed_slice());
                count
            }
        };
        report.tokens += encoded.ids.len();
        *report.kinds.entry(encoded.kind).or_default() += 1;
        report.cut.extend(encoded.cut.map(|tokens| (line, tokens)));
        if let Some(note) = encoded.note {
            *report.notes.entry(note).or_default() += 1;
        }
        let room = UNUSED - report.unused.len();
        report.unused.extend(encoded.unused.into_iter().take(room));
        list.push(Kept { ids: at..ids.len(), learned: first..learned.len(), file, line, text: encoded.text });
        Ok(())
    }

    /// Ends a file, whose records are counted by `unit`.
    pub fn end(&mut self, unit: &'static str) -> Result<()> {
        let Some(report) = self.report.files.last_mut() else { return Ok(()) };
        report.unit = unit;
        if report.used() == 0 {
            let reasons = report.reasons().join("; ");
            let why = if reasons.is_empty() { "it has no records".into() } else { reasons };
            bail!("{}: nothing in it can be used: {why}", report.path.display());
        }
        Ok(())
    }

    pub fn finish(mut self, sources: &[Source], settings: &DataSettings) -> Dataset {
        self.records.ids.shrink_to_fit();
        self.report.max_seq_len = settings.max_seq_len;
        self.begins.push(self.records.list.len());
        let mut order = Vec::new();
        for (k, (source, bounds)) in sources.iter().zip(self.begins.windows(2)).enumerate() {
            let all = bounds[0] as u32..bounds[1] as u32;
            for _ in 0..source.weight as usize {
                order.extend(all.clone());
            }
            let more = (all.len() as f64 * source.weight.fract()).round() as usize;
            let seed = settings.seed.wrapping_add(k as u64);
            // However small its weight, a file is not left out.
            let more = if source.weight < 1.0 { more.max(1) } else { more };
            order.extend(choose(all.len(), more, seed).into_iter().map(|at| all.start + at as u32));
        }
        Dataset::new(Arc::new(self.records), order, settings.max_seq_len, Arc::new(self.report))
    }
}
