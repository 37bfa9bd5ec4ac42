//! Chat templates: Jinja programs that models bring along to lay out a conversation. One module for chat, training
//! and serving, so that a model always sees the layout that it was trained on.

mod builtin;
mod encode;
mod environment;
mod python;
mod turns;

pub use environment::RenderOptions;

use super::{Tokenizer, dir};
use crate::checkpoint::Metadata;
use crate::{Error, Result};
use minijinja::Environment;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Longest template source that is read: the longest published are some 30 kB.
const LONGEST: usize = 1 << 20;

/// A model's chat template, compiled.
pub struct ChatTemplate {
    name: String,
    environment: Environment<'static>,
    /// Whether there is a second template for conversations with tools.
    for_tools: bool,
}

/// The sources of a directory's templates.
pub(crate) struct Sources {
    /// The file that holds them.
    file: PathBuf,
    /// For most conversations.
    pub default: String,
    /// For conversations with tools, where there is one of its own.
    pub for_tools: Option<String>,
}

impl ChatTemplate {
    /// The template that the model at `path` (a `.gguf` file or a directory) brings along.
    pub fn open(path: &Path) -> Result<Option<ChatTemplate>> {
        if path.is_dir() {
            return ChatTemplate::from_dir(path);
        }
        ChatTemplate::from_gguf(&crate::checkpoint::gguf::read_metadata(path)?, path)
    }

    /// The template in the metadata of the GGUF file `path`.
    pub fn from_gguf(metadata: &Metadata, path: &Path) -> Result<Option<ChatTemplate>> {
        let Some(source) = metadata.str("tokenizer.chat_template") else { return Ok(None) };
        let tools = metadata.str("tokenizer.chat_template.tool_use");
        ChatTemplate::compile(&path.display().to_string(), source, tools).map(Some)
    }

    /// The template in the directory `dir`: `chat_template.jinja`, or the entry of `tokenizer_config.json` (one
    /// template, or several with names, of which `default` and `tool_use` count), or `chat_template.json`.
    pub fn from_dir(dir: &Path) -> Result<Option<ChatTemplate>> {
        let Some(Sources { file, default, for_tools }) = ChatTemplate::sources(dir)? else { return Ok(None) };
        ChatTemplate::compile(&file.display().to_string(), &default, for_tools.as_deref()).map(Some)
    }

    /// What [`ChatTemplate::from_dir`] compiles.
    pub(crate) fn sources(dir: &Path) -> Result<Option<Sources>> {
        if let Some(bytes) = dir::optional(dir, "chat_template.jinja")? {
            let file = dir.join("chat_template.jinja");
            let default = String::from_utf8(bytes).map_err(|_| Error::file(&file, "not UTF-8"))?;
            return Ok(Some(Sources { file, default, for_tools: None }));
        }
        for name in ["tokenizer_config.json", "chat_template.json"] {
            let config = dir::optional_json(dir, name)?;
            let (default, for_tools) = match &config["chat_template"] {
                Value::String(source) => (Some(source.as_str()), None),
                Value::Array(list) => {
                    let named =
                        |wanted: &str| list.iter().find(|t| t["name"] == wanted).and_then(|t| t["template"].as_str());
                    let first = list.first().and_then(|t| t["template"].as_str());
                    (named("default").or(first), named("tool_use"))
                }
                _ => (None, None),
            };
            if let Some(default) = default {
                let (default, for_tools) = (default.to_owned(), for_tools.map(str::to_owned));
                return Ok(Some(Sources { file: dir.join(name), default, for_tools }));
            }
        }
        Ok(None)
    }

    /// The template `source`; messages call it `name`.
    pub fn from_source(source: &str, name: &str) -> Result<ChatTemplate> {
        ChatTemplate::compile(name, source, None)
    }

    /// The template that comes with Rushlight under `name` (see [`ChatTemplate::builtin_names`]).
    pub fn builtin(name: &str) -> Option<ChatTemplate> {
        let source = builtin::source(name)?;
        ChatTemplate::compile(name, source, None).ok()
    }

    /// Names for [`ChatTemplate::builtin`].
    pub fn builtin_names() -> impl Iterator<Item = &'static str> {
        builtin::names()
    }

    /// The template to use for a model that brings `own`: that one, or the built-in one whose marks `tokenizer` has.
    ///
    /// # Errors
    /// When there is neither; the message lists the built-in names.
    pub fn choose(own: Option<ChatTemplate>, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        let guess = || builtin::guess(tokenizer).and_then(ChatTemplate::builtin);
        own.or_else(guess).ok_or_else(|| {
            let names = builtin::names().collect::<Vec<_>>().join(", ");
            Error::model(format!(
                "this model brings no chat template and its tokens do not tell which it knows; \
                 name one of {names}, or give a template file, or continue plain text instead"
            ))
        })
    }

    /// What messages call it: a file, or the name of a built-in one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the template for conversations with (or without) tools speaks of `word`: `tool_calls`, say.
    pub fn mentions(&self, word: &str, with_tools: bool) -> bool {
        let name = if self.for_tools && with_tools { "tool_use" } else { "default" };
        self.environment.get_template(name).is_ok_and(|t| t.source().contains(word))
    }

    fn compile(name: &str, source: &str, for_tools: Option<&str>) -> Result<ChatTemplate> {
        let mut environment = environment::new();
        for (key, source) in [("default", Some(source)), ("tool_use", for_tools)] {
            let Some(source) = source else { continue };
            if source.len() > LONGEST {
                return Err(Error::model(format!("{name}: a chat template of {} bytes cannot be right", source.len())));
            }
            environment.add_template_owned(key, environment::adapt(source)).map_err(|e| {
                Error::model(format!("{name}: the chat template does not compile: {}", environment::tell(&e)))
            })?;
        }
        Ok(ChatTemplate { name: name.into(), environment, for_tools: for_tools.is_some() })
    }
}

#[cfg(test)]
pub use builtin::source as builtin_source;
#[cfg(test)]
mod tests;
