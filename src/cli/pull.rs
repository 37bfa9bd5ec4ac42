//! `rushlight pull`: a model from the hub into the local store.

use super::{Global, Progress, Usage, print_json, size};
use crate::pull::{Event, Hub, Request, pull};
use crate::store::Store;
use anyhow::Result;
use std::io::Write;

/// Download a model into the local store
///
/// Without FILE it takes the repository's GGUF file (Q4_K_M if there is one), or else its configuration, tokenizer and
/// safetensors. An interrupted download goes on where it stopped; contents are checked against the hub's sha256.
/// Pulling what is there already does nothing.
///
/// HF_ENDPOINT is the hub (default https://huggingface.co). HF_TOKEN, or the file $HF_HOME/token, gives access to
/// private and gated models; it is never sent to another host. Files that Hugging Face's own tools have already
/// downloaded into $HF_HOME/hub (default ~/.cache/huggingface/hub) are taken from there; everything else goes into
/// the store, $RUSHLIGHT_HOME/models.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// OWNER/REPO, or OWNER/REPO:FILE with a file's name or a part of it, such as Q8_0
    #[arg(value_name = "REPO[:FILE]")]
    repo: String,
    /// Name in the store (default: the repository's, in lower case)
    #[arg(long)]
    name: Option<String>,
    /// Branch, tag or commit
    #[arg(long, default_value = "main")]
    revision: String,
    /// Download again, and replace a model that has the name
    #[arg(long)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    let request = Request::parse(&args.repo).map_err(|e| Usage(e.to_string()))?;
    let name = args.name.clone();
    let request = Request { name, revision: args.revision.clone(), force: args.force, ..request };
    let (store, hub) = (Store::open()?, Hub::from_env()?);
    let mut progress = Progress::Silent;
    let pulled = pull(&hub, &store, &request, &mut |event| match event {
        Event::Note(note) if matches!(progress, Progress::Silent) => {
            if !global.quiet {
                writeln!(std::io::stderr(), "{note}").ok();
            }
        }
        Event::Note(note) => progress.note(note),
        Event::File { name, size, have } => progress = Progress::bytes(global.quiet, name, size, have),
        Event::Bytes(position) => progress.at(position, ""),
    })?;
    progress.finish();
    if args.json {
        return print_json(&serde_json::json!({
            "name": pulled.name, "path": pulled.path, "bytes": pulled.bytes, "present": pulled.present,
        }));
    }
    let what = if pulled.present { "was there already" } else { "is ready" };
    let (name, bytes) = (&pulled.name, size(pulled.bytes));
    Ok(writeln!(std::io::stdout(), "{name} {what} ({bytes}): rushlight chat {name}")?)
}
