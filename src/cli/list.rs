//! `rushlight list`: what is in the local store.

use super::{print_json, size};
use crate::store::Store;
use anyhow::Result;
use std::io::Write;

/// List the models in the local store
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let store = Store::open()?;
    let models = store.list()?;
    if args.json {
        let rows: Vec<_> =
            models.iter().map(|m| serde_json::json!({"name": m.name, "path": m.path, "bytes": m.bytes})).collect();
        return print_json(&serde_json::json!({"store": store.models(), "models": rows}));
    }
    let mut out = std::io::stdout().lock();
    if models.is_empty() {
        let dir = store.models();
        return Ok(writeln!(out, "no models in {}: `rushlight pull OWNER/REPO` downloads one", dir.display())?);
    }
    let width = models.iter().map(|m| m.name.len()).max().unwrap_or_default();
    for m in &models {
        writeln!(out, "{:width$}  {:>8}  {}", m.name, size(m.bytes), m.path.display())?;
    }
    Ok(())
}
