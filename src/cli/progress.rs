//! Progress on standard error: a bar on a terminal, now and then a line elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How far some work has come.
pub enum Progress {
    /// Nothing is shown.
    Silent,
    /// A bar that is redrawn.
    Bar(ProgressBar),
    /// A line every few seconds.
    Lines {
        /// What is being done.
        what: String,
        /// The whole, in `bytes` or pieces.
        total: u64,
        /// The unit is bytes.
        bytes: bool,
        /// Where this run began.
        from: u64,
        /// When this run began.
        start: Instant,
        /// The time of the last line.
        last: Instant,
    },
}

const PAUSE: Duration = Duration::from_secs(5);

impl Progress {
    /// Bytes of a file: `from` of `total` are there already.
    pub fn bytes(quiet: bool, what: &str, total: u64, from: u64) -> Progress {
        let style = "{msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        Progress::new(quiet, what, total, from, true, style)
    }

    /// `total` pieces of work.
    pub fn count(quiet: bool, what: &str, total: u64) -> Progress {
        Progress::new(quiet, what, total, 0, false, "{msg} {bar:24} {pos}/{len} {per_sec} {eta}")
    }

    /// Steps of a run that began this time after `from` of `total`; what is told of each stands behind the bar.
    pub fn steps(quiet: bool, what: &str, total: u64, from: u64) -> Progress {
        Progress::new(quiet, what, total, from, false, "{bar:24} {pos}/{len} {eta} {msg}")
    }

    /// Parts of a whole that began at `from` of `total`.
    pub fn share(quiet: bool, what: &str, total: u64, from: u64) -> Progress {
        Progress::new(quiet, what, total, from, false, "{msg} {bar:24} {percent} % {eta}")
    }

    fn new(quiet: bool, what: &str, total: u64, from: u64, bytes: bool, style: &str) -> Progress {
        if quiet {
            return Progress::Silent;
        }
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(what.to_string());
            // The rate counts what this run does, not what was there.
            bar.set_position(from);
            bar.reset_eta();
            return Progress::Bar(bar);
        }
        let now = Instant::now();
        Progress::Lines { what: what.into(), total, bytes, from, start: now, last: now }
    }

    /// It has come to `position`; `detail` is shown beside it.
    pub fn at(&mut self, position: u64, detail: &str) {
        match self {
            Progress::Silent => {}
            Progress::Bar(bar) => {
                bar.set_position(position);
                if !detail.is_empty() {
                    bar.set_message(detail.to_string());
                }
            }
            Progress::Lines { what, total, bytes, from, start, last } => {
                if last.elapsed() < PAUSE {
                    return;
                }
                *last = Instant::now();
                let rate = position.saturating_sub(*from) as f64 / start.elapsed().as_secs_f64().max(1e-9);
                let left = (total.saturating_sub(position) as f64 / rate.max(1e-9)).min(1e7);
                let (done, all, rate) = if *bytes {
                    (super::size(position), super::size(*total), format!("{}/s", super::size(rate as u64)))
                } else {
                    (position.to_string(), total.to_string(), format!("{rate:.2}/s"))
                };
                let gap = if detail.is_empty() { "" } else { ", " };
                writeln!(std::io::stderr(), "{what}: {done} of {all}, {rate}, {left:.0} s left{gap}{detail}").ok();
            }
        }
    }

    /// Says something without disturbing the bar.
    pub fn note(&self, text: &str) {
        match self {
            Progress::Silent => {}
            Progress::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Progress::Lines { .. } => {
                writeln!(std::io::stderr(), "{text}").ok();
            }
        }
    }

    /// The work is done: the bar goes away.
    pub fn finish(&mut self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
        *self = Progress::Silent;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
