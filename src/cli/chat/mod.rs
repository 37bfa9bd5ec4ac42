//! `rushlight chat`: a conversation.

mod commands;
mod input;

use super::markdown::Markdown;
use super::run::LONG_PROMPT;
use super::{DraftOptions, Global, Interrupted, ModelOptions, Progress, SamplingOptions, interrupt, one_line};
use crate::engine::Engine;
use crate::engine::answer::Finish;
use crate::engine::loaded::Loaded;
use crate::engine::session::{Ask, Event, Message, Reply, Session};
use crate::store::Store;
use anyhow::Result;
use commands::{COMMANDS, Next, command};
use input::{Input, Line};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Talk with a model
///
/// Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. Without a terminal each line of standard input is
/// a message, and only the answers go to standard output.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// System prompt
    #[arg(long, value_name = "S")]
    system: Option<String>,
    /// Most tokens of an answer (default: until it ends)
    #[arg(short = 'n', long, value_name = "N")]
    max_tokens: Option<std::num::NonZeroUsize>,
    /// Chat template: a built-in one's name or a file, instead of the model's own
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    /// Context in tokens (default: the model's, at most 8192)
    #[arg(short, long, value_name = "N")]
    ctx: Option<std::num::NonZeroUsize>,
    #[command(flatten)]
    draft: DraftOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
}

/// A conversation and all around it.
struct Talk {
    name: String,
    engine: Engine,
    session: Session,
    ask: Ask,
    adapters: Vec<(PathBuf, f32)>,
    last: Option<Reply>,
    /// Files that this talk was saved to or loaded from.
    files: Vec<PathBuf>,
    interrupt: Arc<AtomicBool>,
    /// An answer is being made.
    busy: Arc<AtomicBool>,
    /// Standard output is a terminal.
    terminal: bool,
    /// A person types.
    typed: bool,
    quiet: bool,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    args.sampling.check()?;
    args.sampling.rule()?;
    let path = args.model.path()?;
    let (typed, terminal) = (std::io::stdin().is_terminal(), std::io::stdout().is_terminal());
    let loaded = Loaded::open(&path, &args.model.engine(args.ctx.map(|n| n.get())))?;
    let template = loaded.template(args.template.as_deref())?;
    let ask = Ask {
        sampling: args.sampling.settings(loaded.sampling.clone())?,
        max_tokens: args.max_tokens.map(|n| n.get()),
        stop: args.sampling.stop.clone(),
        constraint: args.sampling.constraint(&loaded.tokenizer)?,
    };
    let mut session = Session::new(loaded.tokenizer.clone(), Some(template), 0);
    if let Some(speculator) = args.draft.speculator(&loaded.tokenizer, &loaded.engine)? {
        session.speculate(speculator);
    }
    session.messages().extend(args.system.iter().map(|s| Message::new("system", s.clone())));
    let busy = Arc::new(AtomicBool::new(false));
    let mut talk = Talk {
        name: args.model.model.clone(),
        engine: loaded.engine,
        session,
        ask,
        adapters: args.model.adapters.clone(),
        last: None,
        files: Vec::new(),
        interrupt: if typed { interrupt::flag_while(busy.clone()) } else { interrupt::flag(true) },
        busy,
        terminal,
        typed,
        quiet: global.quiet,
    };
    let mut input = if typed {
        let names = COMMANDS.map(|(name, ..)| name.to_string()).to_vec();
        Input::terminal(Store::open()?.home().join("history"), names, commands::settings())?
    } else {
        Input::Plain
    };
    if typed && !talk.quiet {
        talk.say(&format!("{}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.", talk.name))?;
    }
    talk.hold(&mut input)
}

impl Talk {
    /// The file `path` is this talk's.
    fn remember(&mut self, path: &Path) {
        self.files.extend(std::fs::canonicalize(path));
    }

    fn remembers(&self, path: &Path) -> bool {
        std::fs::canonicalize(path).is_ok_and(|path| self.files.contains(&path))
    }

    /// Reads and answers until the end.
    fn hold(&mut self, input: &mut Input) -> Result<()> {
        loop {
            let text = match input.next()? {
                Line::Text(text) => text,
                Line::Interrupted => {
                    self.say("(Ctrl-D or /quit leaves)")?;
                    continue;
                }
                Line::End => return Ok(()),
            };
            // A message for the model may begin with a slash after a space.
            let next = if text.starts_with('/') {
                command(self, text.trim())
            } else if text.trim().is_empty() {
                Ok(Next::Read)
            } else {
                self.session.messages().push(Message::new("user", text.trim()));
                Ok(Next::Answer)
            };
            let done = match next {
                Ok(Next::Read) => Ok(()),
                Ok(Next::Leave) => return Ok(()),
                Ok(Next::Answer) => {
                    self.busy.store(true, Ordering::SeqCst);
                    let done = self.answer();
                    self.busy.store(false, Ordering::SeqCst);
                    done
                }
                Err(e) => Err(e),
            };
            match done {
                Ok(()) => {}
                // A person can try something else; a script cannot.
                Err(e) if self.typed && !is_closed_pipe(&e) => {
                    writeln!(std::io::stderr(), "error: {}", one_line(&e))?;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Answers the last message.
    fn answer(&mut self) -> Result<()> {
        self.interrupt.store(false, Ordering::SeqCst);
        let mut out = std::io::stdout().lock();
        let styled = self.terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let (mut markdown, mut thinks) = (Markdown::new(styled), false);
        let (mut failed, mut ends_line) = (None, true);
        let mut progress = Progress::Silent;
        let (terminal, quiet) = (self.terminal, self.quiet);
        let before = self.session.messages().len();
        let result = self.session.reply(&mut self.engine, &self.ask, &self.interrupt, &mut |event| match event {
            Event::Prompt { done, total } => {
                if matches!(progress, Progress::Silent) && total > LONG_PROMPT && done < total {
                    progress = Progress::count(quiet || !terminal, "reading", total as u64);
                }
                progress.at(done as u64, "");
                if done >= total {
                    progress.finish();
                }
            }
            // Faint, and for a person alone.
            Event::Thought(text) if styled => {
                (thinks, ends_line) = (true, text.ends_with('\n'));
                write!(out, "\x1b[2m{text}\x1b[22m").and_then(|()| out.flush()).ok();
            }
            Event::Thought(_) => {}
            Event::Text(text) => {
                if std::mem::take(&mut thinks) {
                    writeln!(out, "\n").ok();
                }
                ends_line = text.ends_with('\n');
                let styled = markdown.push(text);
                if failed.is_none()
                    && let Err(e) = out.write_all(styled.as_bytes()).and_then(|()| out.flush())
                {
                    failed = Some(e);
                    self.interrupt.store(true, Ordering::SeqCst);
                }
            }
            Event::Note(note) => {
                // In the middle of an answer the note gets its own line.
                let gap = if ends_line { "" } else { "\n" };
                writeln!(std::io::stderr(), "{gap}({note})").ok();
            }
        });
        progress.finish();
        if let Some(e) = failed {
            return Err(e.into());
        }
        out.write_all(markdown.finish().as_bytes())?;
        if !ends_line {
            writeln!(out)?;
        }
        out.flush()?;
        let reply = match result {
            Ok(reply) => reply,
            Err(e) => {
                // What could not be answered does not stay in the conversation.
                let messages = self.session.messages();
                if messages.len() == before && messages.last().is_some_and(|m| m.role == "user") {
                    messages.pop();
                }
                return Err(e);
            }
        };
        let finish = reply.finish;
        self.last = Some(reply);
        match finish {
            Finish::Interrupted if !self.typed => return Err(Interrupted.into()),
            Finish::Interrupted => writeln!(std::io::stderr(), "(stopped)")?,
            Finish::Length => writeln!(std::io::stderr(), "(cut at the most tokens asked for)")?,
            Finish::Context => writeln!(std::io::stderr(), "(the context is full)")?,
            Finish::End | Finish::StopString | Finish::Complete => {}
        }
        Ok(())
    }

    /// A line to the person.
    fn say(&self, text: &str) -> Result<()> {
        // Only answers go to a pipe.
        if self.terminal {
            writeln!(std::io::stdout(), "{text}")?
        } else {
            writeln!(std::io::stderr(), "{text}")?
        }
        Ok(())
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|c| c.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
