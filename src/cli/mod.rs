//! The commands: arguments in, words and progress out. One file per command.

mod bench;
mod chat;
mod eval;
mod imatrix;
mod info;
mod interrupt;
mod list;
mod logits;
mod markdown;
mod merge;
mod options;
mod perplexity;
mod progress;
#[cfg(feature = "hub")]
mod pull;
mod quantize;
mod run;
mod tokenize;
mod train;

pub use options::{DraftOptions, Global, ModelOptions, SamplingOptions};
pub use progress::Progress;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::Serialize;
use std::io::Write;
use std::process::ExitCode;

/// Quantize, chat with and train language models on an ordinary computer.
#[derive(Debug, Parser)]
#[command(name = "rushlight", version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "MODEL is a .gguf file (or the first of a split set), a Hugging Face directory, or the name of a \
    model in the local store, which `rushlight pull` fills (`rushlight list` shows it).\n\nThe store is \
    $RUSHLIGHT_HOME/models; without RUSHLIGHT_HOME it is in the system's place for application data \
    (~/.local/share/rushlight on Linux). RUSHLIGHT_ISA=scalar|avx2|avxvnni|avx512|amx|neon forces a set of kernels.\n\nExit \
    status: 0 done, 1 the work failed, 2 the arguments are wrong."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[cfg(feature = "hub")]
    Pull(pull::Args),
    List(list::Args),
    Info(info::Args),
    Chat(Box<chat::Args>),
    Run(Box<run::Args>),
    Quantize(quantize::Args),
    Merge(merge::Args),
    Perplexity(perplexity::Args),
    Eval(eval::Args),
    Imatrix(imatrix::Args),
    Train(Box<train::Args>),
    Tokenize(tokenize::TokenizeArgs),
    Logits(logits::Args),
    Bench(bench::Args),
}

/// The arguments are wrong in a way that only looking further could show: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Ended by Ctrl-C: exit status 130, and nothing to say.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Runs the command line.
pub fn main() -> ExitCode {
    // So that `--seed -1` is told what it may be, and not that there is no argument -1.
    let command = Cli::command().mut_subcommands(|command| command.allow_negative_numbers(true));
    let parsed = command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) => {
            let asked =
                matches!(e.kind(), clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion);
            // A closed pipe is the only thing that can go wrong here.
            e.print().ok();
            return ExitCode::from(if asked { 0 } else { 2 });
        }
    };
    cli.global.start_logging();
    let global = &cli.global;
    let result = match &cli.command {
        #[cfg(feature = "hub")]
        Command::Pull(args) => pull::run(args, global),
        Command::List(args) => list::run(args),
        Command::Info(args) => info::run(args, global),
        Command::Chat(args) => chat::run(args, global),
        Command::Run(args) => run::run(args, global),
        Command::Quantize(args) => quantize::run(args, global),
        Command::Merge(args) => merge::run(args, global),
        Command::Perplexity(args) => perplexity::run(args, global),
        Command::Eval(args) => eval::run(args, global),
        Command::Imatrix(args) => imatrix::run(args, global),
        Command::Train(args) => train::run(args, global),
        Command::Tokenize(args) => with_path(args).and_then(|args| tokenize::run(&args)),
        Command::Logits(args) => logits::run(args, global),
        Command::Bench(args) => bench::run(args, global),
    };
    match result.and_then(|()| Ok(std::io::stdout().flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => report(&e),
    }
}

/// `args` with its MODEL looked up in the store.
fn with_path(args: &tokenize::TokenizeArgs) -> anyhow::Result<tokenize::TokenizeArgs> {
    let mut args = args.clone();
    if let Some(model) = &mut args.model {
        *model = crate::store::Store::open()?.resolve(model)?.to_string_lossy().into_owned();
    }
    Ok(args)
}

/// One line on standard error, and the exit status.
fn report(error: &anyhow::Error) -> ExitCode {
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(closed) {
        // Whoever reads has seen enough.
        return ExitCode::SUCCESS;
    }
    if error.is::<Interrupted>() {
        return ExitCode::from(130);
    }
    writeln!(std::io::stderr(), "error: {}", one_line(error)).ok();
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

/// An error with its causes in one line; what a message already says of its cause is not said again. Of a full disk it
/// says what to do.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    let full = error.chain().any(|cause| cause.downcast_ref().is_some_and(rushlight_models::is_full));
    if full && !line.contains("make room") && !line.contains("free some space") {
        line += ": free some space and give the same command again, or write elsewhere";
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Prints `value` as one line of JSON.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    serde_json::to_writer(&mut out, value).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// `word` as a shell takes it for one word.
pub fn shell(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// A number of bytes as people say it.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.5 { 0 } else { 1 };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn errors_are_one_line_that_repeats_nothing() {
        use anyhow::Context;
        let io = || std::io::Error::other("disk on fire");
        let e = anyhow::Error::from(rushlight_models::Error::io("a\nb", io()));
        assert_eq!(one_line(&e), "a b: disk on fire");
        let e = Err::<(), _>(io()).context("saving").context("leaving").unwrap_err();
        assert_eq!(one_line(&e), "leaving: saving: disk on fire");
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let e = anyhow::Error::from(rushlight_models::Error::io("a", full()));
        assert!(one_line(&e).ends_with("write elsewhere"));
        let e = Err::<(), _>(full()).context("make room").unwrap_err();
        assert!(!one_line(&e).contains("free some"));
    }

    #[test]
    fn words_for_a_shell() {
        assert_eq!(["a/b-1.gguf", "my model", "it's", ""].map(shell), ["a/b-1.gguf", "'my model'", r"'it'\''s'", "''"]);
    }

    #[test]
    fn sizes() {
        assert_eq!(
            [0, 999, 1000, 98_700_000, 1_120_000_000].map(size),
            ["0 B", "999 B", "1.0 kB", "98.7 MB", "1.1 GB"]
        );
        assert_eq!(size(999_900), "1.0 MB");
    }
}
