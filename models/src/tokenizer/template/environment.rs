use super::{ChatTemplate, python};
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueOrKwargs};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value, filters};
use serde_json::json;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Steps that a template may take, whatever it does.
const FUEL: u64 = 5_000_000;
/// Further steps for each message.
const FUEL_PER_MESSAGE: u64 = 50_000;
/// Bytes that a template may write beyond a few times its input.
const OUTPUT: usize = 16 << 20;

/// What a template gets beside the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Whether the text ends where the assistant's next answer begins.
    pub add_generation_prompt: bool,
    /// Tools the model may call, as JSON schemas (a list), for templates that know of them.
    pub tools: Option<serde_json::Value>,
    /// How the beginning-of-text token is written; [`ChatTemplate::encode_chat`] fills it in.
    pub bos_token: Option<String>,
    /// How the end-of-text token is written; [`ChatTemplate::encode_chat`] fills it in.
    pub eos_token: Option<String>,
    /// Any other variables (`enable_thinking`, `documents`, ...).
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// An environment that renders as transformers' own (jinja2, sandboxed) does.
pub fn new() -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_debug(false);
    env.set_recursion_limit(100);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, _, value| Ok(out.write_str(&python::escaped(python::text(value)?))?));
    env.add_filter("tojson", |value: Value, args: Kwargs| python::json(&value, &args));
    env.add_filter("string", |value: Value| python::text(&value));
    env.add_filter("indent", python::indent);
    env.add_filter("each_of", each_of);
    env.add_filter("safe", |value: Value| python::text(&value).map(|s| python::safe(&s)));
    env.add_filter("map_list", filters::map);
    env.add_filter("select_list", filters::select);
    env.add_filter("selectattr_list", filters::selectattr);
    env.add_filter("reject_list", filters::reject);
    env.add_filter("rejectattr_list", filters::rejectattr);
    generator(&mut env, "map", "map_list");
    generator(&mut env, "select", "select_list");
    generator(&mut env, "selectattr", "selectattr_list");
    generator(&mut env, "reject", "reject_list");
    generator(&mut env, "rejectattr", "rejectattr_list");
    env.add_function("raise_exception", |message: Value| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    env.add_function("strftime_now", |_: &State, format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        python::strftime(&format, now)
    });
    env
}

/// `source` in minijinja's dialect: `{% generation %}` blocks (transformers' marks for training) become plain blocks,
/// and loops ask [`each_of`] whether there is something to loop over.
pub fn adapt(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag[2..].find("%}") else { break };
        let (inner, after) = tag.split_at(2 + end);
        match inner[2..].trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&inner.replace("generation", "if true")),
            "endgeneration" => out.push_str(&inner.replace("endgeneration", "endif")),
            words if words.starts_with("for ") => out.push_str(&asking(inner)),
            _ => out.push_str(inner),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// The `for` tag `tag` with `each_of` behind the name it loops over, where that is a plain one.
fn asking(tag: &str) -> String {
    let Some(at) = tag.find(" in ").map(|at| at + 4) else { return tag.into() };
    let (head, tail) = tag.split_at(at);
    let name = tail.trim_start();
    let head_len = head.len() + tail.len() - name.len();
    let len = name.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(name.len());
    let plain = len > 0 && name[len..].chars().next().is_none_or(|c| c.is_whitespace() || matches!(c, '|' | '-'));
    if !plain {
        return tag.into();
    }
    format!("{}{}|each_of{}", &tag[..head_len], &name[..len], &name[len..])
}

/// Python does not loop over `None`, as minijinja would; templates for tools rely on that to fail without any.
fn each_of(value: Value) -> Result<Value, minijinja::Error> {
    if value.is_none() {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "None is not iterable"));
    }
    Ok(value)
}

/// The filter `name` with a generator as its result, as in Jinja: good for one loop or `list`, but not for JSON.
fn generator(env: &mut Environment<'static>, name: &'static str, list: &'static str) {
    env.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| -> Result<Value, minijinja::Error> {
        let items: Vec<Value> = state.apply_filter(list, &args.into_values())?.try_iter()?.collect();
        Ok(Value::make_iterable(move || items.clone().into_iter()))
    });
}

/// What went wrong, on one line.
pub fn tell(e: &minijinja::Error) -> String {
    let mut text = match (e.kind(), e.detail()) {
        (ErrorKind::OutOfFuel, _) => "it does not come to an end".to_string(),
        (ErrorKind::WriteFailure, _) => "it writes without end".to_string(),
        (_, Some(detail)) => detail.to_string(),
        (kind, None) => kind.to_string(),
    };
    if let Some(line) = e.line() {
        text.push_str(&format!(" (line {line})"));
    }
    text.replace('\n', " ")
}

/// Output that refuses to grow without bound.
struct Limited {
    bytes: Vec<u8>,
    room: usize,
}

impl Write for Limited {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.room = self.room.checked_sub(data.len()).ok_or_else(|| io::Error::other("too much output"))?;
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ChatTemplate {
    /// The conversation `messages` (objects with `role` and `content`) as the model wants to read it.
    pub fn render(&self, messages: &[serde_json::Value], options: &RenderOptions) -> Result<String> {
        let mut variables = options.extra.clone();
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        // Templates may ask whether these two are defined, and transformers always defines them.
        variables.insert("tools".into(), options.tools.clone().unwrap_or_default());
        variables.entry("documents").or_insert(json!(null));
        for (name, token) in [("bos_token", &options.bos_token), ("eos_token", &options.eos_token)] {
            if let Some(token) = token {
                variables.insert(name.into(), token.as_str().into());
            }
        }
        let mut size = 0;
        messages.iter().for_each(|m| size += length(m));
        variables.values().for_each(|v| size += length(v));
        variables.insert("messages".into(), messages.into());

        let name = if self.for_tools && options.tools.is_some() { "tool_use" } else { "default" };
        let failed =
            |e: minijinja::Error| Error::model(format!("{}: the chat template failed: {}", self.name(), tell(&e)));
        let mut env = self.environment.clone();
        env.set_fuel(Some(FUEL + FUEL_PER_MESSAGE * messages.len() as u64));
        let template = env.get_template(name).map_err(failed)?;
        let mut out = Limited { bytes: Vec::new(), room: OUTPUT + 16 * size };
        template.render_captured_to(Value::from(Serde(&variables)), &mut out).map_err(failed)?;
        String::from_utf8(out.bytes)
            .map_err(|_| Error::model(format!("{}: the chat template wrote no text", self.name())))
    }
}

/// Bytes of all strings in `value`.
fn length(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(s) => s.len(),
        serde_json::Value::Array(list) => list.iter().map(length).sum(),
        serde_json::Value::Object(map) => map.iter().map(|(k, v)| k.len() + length(v)).sum(),
        _ => 8,
    }
}
