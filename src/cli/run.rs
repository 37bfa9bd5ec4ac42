//! `rushlight run`: one answer, and nothing else, to standard output.

use super::options::read_text;
use super::{DraftOptions, Global, Interrupted, ModelOptions, Progress, SamplingOptions, interrupt, print_json};
use crate::engine::answer::Finish;
use crate::engine::loaded::Loaded;
use crate::engine::session::{Ask, Event, Message, Reply, Session};
use anyhow::{Result, ensure};
use rushlight_models::tokenizer::Specials;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// A longer prompt than this is worth a progress bar.
pub const LONG_PROMPT: usize = 256;

/// Answer a prompt once, or continue a text
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("text").required(true).args(["prompt", "file"])))]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt from a file (- is standard input)
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Most tokens of the answer (default: until it ends; with --raw 256)
    #[arg(short = 'n', long = "max-tokens", value_name = "N")]
    max_tokens: Option<std::num::NonZeroUsize>,
    /// Continue the text as it is, without a chat template
    #[arg(long, conflicts_with_all = ["system", "template"])]
    raw: bool,
    /// System prompt
    #[arg(long, value_name = "S")]
    system: Option<String>,
    /// Chat template: a built-in one's name or a file, instead of the model's own
    #[arg(long, value_name = "NAME|FILE")]
    template: Option<String>,
    /// Context in tokens (default: the model's, at most 8192)
    #[arg(short, long, value_name = "N")]
    ctx: Option<std::num::NonZeroUsize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    draft: DraftOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    args.sampling.check()?;
    let text = match (&args.prompt, &args.file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => {
            // An editor's mark at the start and its line break at the end are not meant.
            let text = read_text(file)?;
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            let text = text.strip_suffix('\n').unwrap_or(text);
            text.strip_suffix('\r').unwrap_or(text).to_owned()
        }
        (None, None) => String::new(),
    };
    ensure!(!text.trim().is_empty(), "the prompt is empty: there is nothing to answer");
    let path = args.model.path()?;
    args.sampling.rule()?;
    let interrupt = interrupt::flag(true);
    let mut loaded = Loaded::open(&path, &args.model.engine(args.ctx.map(|n| n.get())))?;
    let template = if args.raw { None } else { Some(loaded.template(args.template.as_deref())?) };
    let tokenizer = loaded.tokenizer.clone();
    let ask = Ask {
        sampling: args.sampling.settings(loaded.sampling.clone())?,
        max_tokens: args.max_tokens.map(|n| n.get()).or(args.raw.then_some(256)),
        stop: args.sampling.stop.clone(),
        constraint: args.sampling.constraint(&tokenizer)?,
    };
    let constrained = ask.constraint.is_some();
    let mut session = Session::new(tokenizer.clone(), template, 0);
    if let Some(speculator) = args.draft.speculator(&tokenizer, &loaded.engine)? {
        session.speculate(speculator);
    }

    let mut out = std::io::stdout().lock();
    let mut failed = None;
    let mut progress = Progress::Silent;
    let mut ends_line = true;
    let mut event = |event: Event| match event {
        Event::Prompt { done, total } => {
            if matches!(progress, Progress::Silent) && total > LONG_PROMPT && done < total {
                progress = Progress::count(global.quiet, "reading the prompt", total as u64);
            }
            progress.at(done as u64, "");
            if done >= total {
                progress.finish();
            }
        }
        Event::Text(text) if !args.json && failed.is_none() => {
            ends_line = text.ends_with('\n');
            if let Err(e) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                // Nobody reads: stop.
                failed = Some(e);
                interrupt.store(true, Ordering::SeqCst);
            }
        }
        Event::Text(_) | Event::Thought(_) => {}
        Event::Note(note) => tracing::warn!("{note}"),
    };
    let reply = if args.raw {
        let mut ids = tokenizer.prefix();
        ids.extend(tokenizer.encode(&text, Specials::AsText)?);
        session.complete(&mut loaded.engine, ids, &ask, &interrupt, &mut event)?
    } else {
        session.messages().extend(args.system.iter().map(|s| Message::new("system", s.clone())));
        session.messages().push(Message::new("user", text));
        session.reply(&mut loaded.engine, &ask, &interrupt, &mut event)?
    };
    if let Some(e) = failed {
        return Err(e.into());
    }
    let rate = |tokens: usize, time: std::time::Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let prompt_rate = rate(reply.prompt_tokens - reply.reused, reply.prompt_time);
    // The first token comes with the prompt's logits.
    let token_rate = rate(reply.tokens.saturating_sub(1), reply.time);
    if args.json {
        print_json(&serde_json::json!({
            "text": reply.text,
            "finish": format!("{:?}", reply.finish).to_lowercase(),
            "prompt_tokens": reply.prompt_tokens,
            "tokens": reply.tokens,
            "prompt_tokens_per_second": prompt_rate,
            "tokens_per_second": token_rate,
            "guessed": reply.guesses.guessed,
            "accepted": reply.guesses.accepted,
            "seed": reply.seed,
        }))?;
    } else if !ends_line {
        writeln!(out)?;
    }
    tracing::info!(
        "prompt {} tokens, {prompt_rate:.1}/s; answer {} tokens, {token_rate:.1}/s{}; seed {}",
        reply.prompt_tokens,
        reply.tokens,
        guesses(&reply),
        reply.seed
    );
    match reply.finish {
        Finish::Interrupted => Err(Interrupted.into()),
        Finish::Context => {
            let context = loaded.engine.context();
            tracing::warn!("the answer stopped at the end of the context ({context} tokens); --ctx gives more room");
            Ok(())
        }
        Finish::Length if constrained => {
            tracing::warn!("the answer was cut at {} tokens, before it was whole; -n allows more", reply.tokens);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// What guessing ahead came to, where there was any: `, 12 of 20 guesses right`.
pub fn guesses(reply: &Reply) -> String {
    match reply.guesses.guessed {
        0 => String::new(),
        guessed => format!(", {} of {guessed} guesses right", reply.guesses.accepted),
    }
}
