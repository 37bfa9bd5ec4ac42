//! What the tokenizers of ChatGLM have in their code instead of their files.

use super::added::{Added, Matcher};
use super::vocabulary::Kind;
use super::{Pipeline, Tokenizer};
use crate::{Error, Result};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::Path;

/// The file of the first ChatGLM's pieces.
pub const FIRST: &str = "ice_text.model";
/// Its marks, which are among the pieces.
const FIRST_MARKS: [&str; 6] = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>"];
/// The longest run of spaces that has a piece.
const LONGEST_BLANK: usize = 80;
/// ChatGLM2's marks, behind the pieces in this order, and those that ChatGLM3 has besides.
const MARKS: [&str; 5] = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"];
const ROLES: [&str; 4] = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"];

/// White space as the first ChatGLM's pieces spell it: what is written there, and the text that it stands for. The longest
/// run of spaces comes first.
pub fn blanks() -> impl Iterator<Item = (String, String)> {
    let runs = (2..=LONGEST_BLANK).rev().map(|n| (format!("<|blank_{n}|>"), " ".repeat(n)));
    [("<n>".into(), "\n".into()), ("<|tab|>".into(), "\t".into())].into_iter().chain(runs)
}

/// Gives the tokenizer of a ChatGLM, read from the SentencePiece model `file`, what its own code would; `config` is its
/// tokenizer_config.json and `description` its config.json. Other tokenizers stay what they are.
///
/// # Errors
/// When the pieces are numbered otherwise than config.json says.
pub fn complete(tokenizer: &mut Tokenizer, file: &Path, config: &Value, description: &Value) -> Result<()> {
    let Pipeline::SentencePiece { whitespace, .. } = &mut tokenizer.pipeline else { return Ok(()) };
    let mut marks: Vec<Added> = tokenizer.marks.tokens().to_vec();
    let mut mark = |id: u32, name: &str| marks.push(Added { native: false, ..Added::new(id, name, true) });
    if file.file_name().is_some_and(|name| name == FIRST) {
        whitespace.blanks = true;
        for (piece, text) in blanks() {
            if let Some(id) = tokenizer.vocabulary.id(&piece) {
                tokenizer.vocabulary.rename(id, &text, Kind::UserDefined)?;
            }
        }
        for name in FIRST_MARKS {
            let Some(id) = tokenizer.vocabulary.id(name) else { continue };
            tokenizer.vocabulary.set_kind(id, Kind::Control);
            mark(id, name);
        }
        // The first release counted pictures before text.
        let (is, meant) = (tokenizer.vocabulary.id("[gMASK]"), description["gmask_token_id"].as_u64());
        if let Some(meant) = meant.filter(|&meant| is.map(u64::from) != Some(meant)) {
            return Err(Error::file(
                file,
                format!(
                    "[gMASK] is not token {meant}, as config.json has it: they are of two releases, download both again"
                ),
            ));
        }
        tokenizer.bos = tokenizer.vocabulary.id("<sop>");
        tokenizer.eos = tokenizer.vocabulary.id("<eop>");
        tokenizer.add_bos = false;
    } else if config["tokenizer_class"] == "ChatGLMTokenizer" {
        let names = [&config["name_or_path"], &description["_name_or_path"]];
        let names = names
            .into_iter()
            .filter_map(Value::as_str)
            .chain(file.parent().and_then(Path::file_name).and_then(OsStr::to_str));
        let listed = config["added_tokens_decoder"].as_object();
        let third = listed.is_some_and(|tokens| tokens.values().any(|t| t["content"] == "<|user|>"))
            || names.map(str::to_lowercase).any(|name| name.contains("chatglm3"));
        let roles: &[&str] = if third { &ROLES } else { &[] };
        for name in MARKS.iter().chain(roles) {
            let id = tokenizer.vocabulary.len() as u32;
            tokenizer.vocabulary.rename(id, name, Kind::Control)?;
            mark(id, name);
        }
        (tokenizer.bos, tokenizer.add_bos) = (None, false);
        let id = |name: &str| tokenizer.vocabulary.id(name);
        tokenizer.start = ["[gMASK]", "sop"].into_iter().filter_map(id).collect();
        // An answer ends where another would speak.
        let others = ["<|user|>", "<|observation|>"];
        tokenizer.ends.extend(others.into_iter().filter(|name| roles.contains(name)).filter_map(id));
    } else {
        return Ok(());
    }
    tokenizer.marks = Matcher::new(marks);
    Ok(())
}
