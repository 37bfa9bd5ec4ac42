//! What begins with a slash.

use super::Talk;
use crate::cli::options::adapter;
use crate::cli::run::guesses;
use crate::cli::size;
use crate::engine::session::Message;
use crate::engine::settings::Sampling;
use crate::replace;
use anyhow::{Context, Result, bail, ensure};
use rushlight_models::checkpoint::AtomicFile;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Write;
use std::path::Path;

/// Name, arguments and meaning of each command.
pub const COMMANDS: [(&str, &str, &str); 11] = [
    ("/help", "", "this list"),
    ("/system", "[TEXT]", "show or replace the system prompt"),
    ("/retry", "", "answer the last message again"),
    ("/reset", "", "forget the conversation (the system prompt stays)"),
    ("/save", "FILE", "write the conversation as JSON"),
    ("/load", "FILE", "go on with a saved conversation"),
    ("/set", "[NAME VALUE]", "show or change sampling, such as /set temperature 0.5"),
    ("/adapter", "[A[=SCALE] | off [A]]", "show, add, rescale or remove adapters"),
    ("/stats", "", "speed, context and memory"),
    ("/quit", "", "leave (or Ctrl-D)"),
    ("/exit", "", "leave"),
];

/// What to do after a command.
pub enum Next {
    /// Read on.
    Read,
    /// Answer the last message.
    Answer,
    /// Leave.
    Leave,
}

/// A conversation on disk.
#[derive(Serialize, Deserialize)]
struct Saved {
    #[serde(default)]
    model: String,
    messages: Vec<Message>,
}

/// Names that `/set` knows.
pub fn settings() -> Vec<String> {
    let mut names = vec!["max_tokens".to_string()];
    if let Ok(Value::Object(map)) = serde_json::to_value(Sampling::default()) {
        names.extend(map.into_iter().filter(|(_, v)| v.is_number() || v.is_null()).map(|(name, _)| name));
    }
    names
}

/// Runs the command in `line`.
pub fn command(talk: &mut Talk, line: &str) -> Result<Next> {
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let none = || -> Result<()> {
        ensure!(rest.is_empty(), "{name} takes no argument");
        Ok(())
    };
    match name {
        "/help" | "/?" => {
            for (name, arguments, meaning) in COMMANDS {
                let usage = format!("{name} {arguments}");
                talk.say(&format!("{usage:30}{meaning}"))?;
            }
            talk.say(
                "End a line with \\ to go on in the next, or put a message of several lines between \"\"\" marks.",
            )?;
            talk.say("Ctrl-C stops an answer. A message that begins with / goes after a space.")?;
        }
        "/quit" | "/exit" | "/bye" => return Ok(Next::Leave),
        "/system" => system(talk, rest)?,
        "/reset" => {
            none()?;
            let system = talk.session.messages().iter().filter(|m| m.role == "system").cloned().collect();
            talk.session.restart(system);
            talk.last = None;
            talk.say("The conversation is forgotten.")?;
        }
        "/retry" => {
            none()?;
            while talk.session.messages().last().is_some_and(|m| m.role == "assistant") {
                talk.session.messages().pop();
            }
            ensure!(
                talk.session.messages().last().is_some_and(|m| m.role == "user"),
                "there is no message to answer yet"
            );
            // The same seed would only say the same again.
            if let Some(seed) = &mut talk.ask.sampling.seed {
                *seed = seed.wrapping_add(1);
            }
            return Ok(Next::Answer);
        }
        "/save" => {
            ensure!(!rest.is_empty(), "/save needs the name of a file");
            save(talk, Path::new(rest))?;
            talk.remember(Path::new(rest));
            talk.say(&format!("Saved to {rest}."))?;
        }
        "/load" => {
            ensure!(!rest.is_empty(), "/load needs the name of a file");
            let messages = load(Path::new(rest))?;
            talk.say(&format!("{} messages loaded.", messages.len()))?;
            talk.session.restart(messages);
            talk.remember(Path::new(rest));
        }
        "/set" => set(talk, rest)?,
        "/adapter" => adapters(talk, rest)?,
        "/stats" => {
            none()?;
            stats(talk)?;
        }
        _ => bail!("there is no command {name}: /help lists them"),
    }
    Ok(Next::Read)
}

fn system(talk: &mut Talk, text: &str) -> Result<()> {
    let messages = talk.session.messages();
    if text.is_empty() {
        let now = messages.iter().find(|m| m.role == "system").map(|m| m.content.clone());
        return talk.say(&now.unwrap_or_else(|| "There is no system prompt.".into()));
    }
    messages.retain(|m| m.role != "system");
    if ["\"\"", "''", "off"].contains(&text) {
        return talk.say("There is no system prompt now.");
    }
    messages.insert(0, Message::new("system", text));
    talk.say("The system prompt is set.")
}

fn save(talk: &mut Talk, path: &Path) -> Result<()> {
    // Another talk's file is not this one's to write over, nor is what somebody else calls messages.
    replace::check(path, "of this talk (saved or loaded in it)", |path| talk.remembers(path))?;
    let saved = Saved { model: talk.name.clone(), messages: talk.session.transcript() };
    let mut file = AtomicFile::create(path)?;
    serde_json::to_writer_pretty(&mut file, &saved).with_context(|| path.display().to_string())?;
    file.write_all(b"\n").with_context(|| path.display().to_string())?;
    Ok(file.commit()?)
}

/// A file that `/save` wrote, or any list of messages.
fn load(path: &Path) -> Result<Vec<Message>> {
    let name = || path.display().to_string();
    let text = std::fs::read(path).with_context(name)?;
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{}: not JSON", name()))?;
    let messages = if value.is_array() { value } else { value["messages"].clone() };
    let messages: Vec<Message> = serde_json::from_value(messages).with_context(|| {
        format!("{}: no conversation: expected {{\"messages\": [{{\"role\", \"content\"}}]}}", name())
    })?;
    let known = |m: &Message| matches!(m.role.as_str(), "system" | "user" | "assistant" | "tool");
    if let Some(m) = messages.iter().find(|m| !known(m)) {
        bail!("{}: '{}' is not the role of a message", name(), m.role.escape_debug());
    }
    Ok(messages)
}

fn set(talk: &mut Talk, rest: &str) -> Result<()> {
    let mut map = match serde_json::to_value(&talk.ask.sampling)? {
        Value::Object(map) => map,
        _ => bail!("the settings cannot be shown"),
    };
    let Some((name, value)) = rest.split_once(char::is_whitespace) else {
        ensure!(rest.is_empty(), "/set needs a name and a value, such as /set temperature 0.5");
        for (name, value) in map.iter().filter(|(_, v)| v.is_number() || v.is_null()) {
            let value = match (value.as_u64(), value.as_f64()) {
                (Some(whole), _) => whole.to_string(),
                // Back to f32: 0.95, not the f64 beside it.
                (None, Some(v)) => (v as f32).to_string(),
                (None, None) => "-".into(),
            };
            talk.say(&format!("{name:20}{value}"))?;
        }
        let most = talk.ask.max_tokens.map_or("-".into(), |n| n.to_string());
        return talk.say(&format!("{:20}{most}", "max_tokens"));
    };
    let name = match name {
        // As the options are called.
        "temp" => "temperature".to_string(),
        "repeat-last-n" | "repeat_last_n" => "penalty_last_n".to_string(),
        other => other.replace('-', "_"),
    };
    let value: Value = match value.trim() {
        "-" | "off" | "none" => Value::Null,
        number => serde_json::from_str(number)
            .ok()
            .filter(Value::is_number)
            .with_context(|| format!("'{number}' is not a number"))?,
    };
    if name == "max_tokens" {
        ensure!(value != 0, "max_tokens must be above 0, or - for no limit");
        talk.ask.max_tokens = serde_json::from_value(value).context("max_tokens must be a whole number, or -")?;
        return Ok(());
    }
    ensure!(
        map.get(&name).is_some_and(|v| v.is_number() || v.is_null()),
        "there is no setting {name}: {}",
        settings().join(", ")
    );
    map.insert(name.clone(), value);
    let sampling: Sampling =
        serde_json::from_value(Value::Object(map)).with_context(|| format!("{name} does not take that value"))?;
    sampling.check()?;
    talk.ask.sampling = sampling;
    Ok(())
}

fn adapters(talk: &mut Talk, rest: &str) -> Result<()> {
    if rest.is_empty() {
        if talk.adapters.is_empty() {
            return talk.say("No adapter is in force.");
        }
        for (path, scale) in talk.adapters.clone() {
            talk.say(&format!("{} = {scale}", path.display()))?;
        }
        return Ok(());
    }
    let wanted = if rest == "off" {
        Vec::new()
    } else if let Some(path) = rest.strip_prefix("off ").map(|path| Path::new(path.trim())) {
        ensure!(talk.adapters.iter().any(|(p, _)| p == path), "the adapter {} is not in force", path.display());
        talk.adapters.iter().filter(|(p, _)| p != path).cloned().collect()
    } else {
        let (path, scale) = adapter(rest).map_err(anyhow::Error::msg)?;
        let mut wanted: Vec<_> = talk.adapters.iter().filter(|(p, _)| *p != path).cloned().collect();
        wanted.push((path, scale));
        wanted
    };
    talk.engine.set_adapters(&wanted)?;
    talk.session.clear_cache(&mut talk.engine);
    talk.adapters = wanted;
    match talk.adapters.len() {
        0 => talk.say("No adapter is in force."),
        1 => talk.say("1 adapter is in force."),
        n => talk.say(&format!("{n} adapters are in force.")),
    }
}

fn stats(talk: &mut Talk) -> Result<()> {
    let rate = |tokens: usize, time: std::time::Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    if let Some(r) = talk.last.clone() {
        let new = r.prompt_tokens - r.reused;
        talk.say(&format!(
            "prompt   {} tokens, {} of them kept from before, {new} read at {:.1} tokens/s",
            r.prompt_tokens,
            r.reused,
            rate(new, r.prompt_time)
        ))?;
        let rate = rate(r.tokens.saturating_sub(1), r.time);
        talk.say(&format!("answer   {} tokens at {rate:.1} tokens/s{} (seed {})", r.tokens, guesses(&r), r.seed))?;
    } else {
        talk.say("nothing was answered yet")?;
    }
    let (held, context) = (talk.session.held(), talk.engine.context());
    talk.say(&format!("context  {held} of {context} tokens in use"))?;
    let m = talk.engine.memory();
    let used = m.kv_per_token.saturating_mul(held as u64);
    let resident = resident().map_or(String::new(), |bytes| format!(", {} resident in all", size(bytes)));
    talk.say(&format!("memory   weights {}, cache {} of {}{resident}", size(m.weights), size(used), size(m.kv)))
}

/// Bytes of this process in memory, where the system tells (Linux).
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}
