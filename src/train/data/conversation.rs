//! Conversations of all the layouts in use, as the messages that chat templates take.

use serde_json::{Map, Value, json};

/// A conversation, ready for a chat template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Objects with `role` (`system`, `user`, `assistant`, `tool`) and `content`; the last is the assistant's.
    pub messages: Vec<Value>,
    /// For each of the assistant's messages whether it is learned.
    pub learned: Vec<bool>,
    /// Tools, as JSON schemas.
    pub tools: Option<Value>,
}

impl Conversation {
    /// From messages in OpenAI's layout (`role`, `content`, `tool_calls`, `weight`) or ShareGPT's (`from`, `value`).
    /// Calls of tools are kept apart where the template `knows_calls`; where it does not, ShareGPT's are plain text and
    /// OpenAI's are refused.
    pub fn from_messages(list: &[Value], knows_calls: bool) -> Result<Conversation, String> {
        let mut conversation = Conversation::default();
        for (i, message) in list.iter().enumerate() {
            let at = |why: String| format!("message {}{why}", i + 1);
            let Value::Object(message) = message else { return Err(at(" is no object".into())) };
            let (message, learned) = read_message(message, knows_calls).map_err(at)?;
            if message["role"] == "assistant" {
                conversation.learned.push(learned);
            }
            conversation.messages.push(message);
        }
        conversation.end()
    }

    /// From questions and answers in turn, after what the system says (where that is not empty).
    pub fn from_turns<'a>(
        system: &str,
        turns: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Conversation, String> {
        let mut conversation = Conversation::default();
        if !system.trim().is_empty() {
            conversation.messages.push(json!({"role": "system", "content": system}));
        }
        for (question, answer) in turns {
            for (what, text) in [("question", question), ("answer", answer)] {
                if text.trim().is_empty() {
                    return Err(format!("the {what} is empty"));
                }
            }
            conversation.messages.push(json!({"role": "user", "content": question}));
            conversation.messages.push(json!({"role": "assistant", "content": answer}));
            conversation.learned.push(true);
        }
        conversation.end()
    }

    /// Puts what the system says first, unless it speaks already.
    pub fn with_system(mut self, system: &str) -> Conversation {
        if !system.trim().is_empty() && self.messages.first().is_none_or(|m| m["role"] != "system") {
            self.messages.insert(0, json!({"role": "system", "content": system}));
        }
        self
    }

    /// Drops what comes after the assistant's last word: there is nothing to learn from it.
    fn end(mut self) -> Result<Conversation, String> {
        let last = self.messages.iter().rposition(|m| m["role"] == "assistant");
        self.messages.truncate(last.map_or(0, |last| last + 1));
        if self.messages.is_empty() {
            return Err("no assistant turn".into());
        }
        if !self.learned.contains(&true) {
            return Err("no assistant turn to learn: each has weight 0".into());
        }
        Ok(self)
    }
}

/// The message for templates, and whether it is learned.
fn read_message(message: &Map<String, Value>, knows_calls: bool) -> Result<(Value, bool), String> {
    let field = |names: [&str; 2]| names.into_iter().find_map(|n| message.get(n)).filter(|v| !v.is_null());
    let name = field(["role", "from"]).and_then(Value::as_str).unwrap_or_default();
    let mut content = text_of(field(["content", "value"]).unwrap_or(&Value::Null)).map_err(|e| format!(": {e}"))?;
    let mut calls = calls_of(message).map_err(|e| format!(": {e}"))?;
    let role = match name.trim().to_lowercase().as_str() {
        "system" | "developer" => "system",
        "user" | "human" | "prompter" => "user",
        "assistant" | "gpt" | "chatgpt" | "bot" | "bing" | "bard" | "model" | "ai" => "assistant",
        "tool" | "function" | "observation" | "function_response" | "ipython" => "tool",
        "function_call" => {
            if knows_calls && let Some(found) = spelled_calls(&content) {
                (calls, content) = (Some(found), String::new());
            }
            "assistant"
        }
        "" => return Err(" has no role".into()),
        _ => return Err(format!(": its role {name:?} is none of system, user, assistant and tool")),
    };
    if calls.is_some() && !knows_calls {
        return Err(" calls tools, which the chat template does not know".into());
    }
    if content.trim().is_empty() && calls.is_none() && role != "tool" && role != "system" {
        return Err(format!(" ({role}) is empty"));
    }
    let weight = message.get("weight").filter(|w| !w.is_null());
    let learned = match weight.map(|w| w.as_f64()) {
        None => true,
        Some(Some(w)) if w == 0.0 || w == 1.0 => w == 1.0,
        Some(_) => return Err(": its weight is neither 0 nor 1".into()),
    };
    let mut out = json!({"role": role, "content": content});
    if let Some(calls) = calls {
        out["tool_calls"] = calls;
    }
    for key in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(value) = message.get(key).filter(|v| v.is_string()) {
            out[key] = value.clone();
        }
    }
    Ok((out, learned))
}

/// The text of a field: a string, a number, or OpenAI's list of parts.
pub fn text_of(value: &Value) -> Result<String, String> {
    match value {
        Value::String(s) => Ok(s.clone()),
        Value::Null => Ok(String::new()),
        Value::Number(n) => Ok(n.to_string()),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Array(texts) if texts.len() > 1 && texts.iter().all(Value::is_string) => {
            Err(format!("a list of {} texts, and which of them is meant is not said", texts.len()))
        }
        Value::Array(parts) => {
            let text = |part: &Value| match part["text"].as_str().or(part.as_str()) {
                Some(text) => Ok(text.to_owned()),
                None => Err(format!("a part of type {} is no text", part["type"])),
            };
            parts.iter().map(text).collect()
        }
        Value::Object(_) => Err("an object stands where a text should".into()),
    }
}

/// OpenAI's `tool_calls` (or the older `function_call`), with arguments as objects: templates write them as JSON.
fn calls_of(message: &Map<String, Value>) -> Result<Option<Value>, String> {
    let one = |function: &Value, id: &Value| {
        let (Some(name), arguments) = (function["name"].as_str(), &function["arguments"]) else {
            return Err("a tool call without a name".to_owned());
        };
        let mut call = json!({"type": "function", "function": {"name": name, "arguments": parsed(arguments)}});
        if id.is_string() {
            call["id"] = id.clone();
        }
        Ok(call)
    };
    match (message.get("tool_calls"), message.get("function_call")) {
        (Some(Value::Array(calls)), _) if !calls.is_empty() => {
            let call = |c: &Value| one(if c["function"].is_object() { &c["function"] } else { c }, &c["id"]);
            calls.iter().map(call).collect::<Result<Value, _>>().map(Some)
        }
        (_, Some(call @ Value::Object(_))) => Ok(Some(json!([one(call, &Value::Null)?]))),
        _ => Ok(None),
    }
}

/// The calls that a ShareGPT message spells as JSON.
fn spelled_calls(content: &str) -> Option<Value> {
    let calls = match serde_json::from_str(content).ok()? {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    let read = |c: &Value| {
        c["name"]
            .as_str()
            .map(|name| json!({"type": "function", "function": {"name": name, "arguments": parsed(&c["arguments"])}}))
    };
    calls.iter().map(read).collect::<Option<Vec<_>>>().filter(|c| !c.is_empty()).map(Value::Array)
}

fn parsed(arguments: &Value) -> Value {
    let Some(text) = arguments.as_str() else { return arguments.clone() };
    serde_json::from_str(text).ok().filter(Value::is_object).unwrap_or_else(|| arguments.clone())
}

/// The conversation in the `chat` field of MOSS's sets: turns `turn_1`, `turn_2`, ..., in which the assistant may think
/// and call a plugin before it answers.
pub fn from_moss(chat: &Map<String, Value>) -> Result<Conversation, String> {
    let mut turns: Vec<(u32, &Value)> =
        chat.iter().filter_map(|(name, turn)| Some((name.strip_prefix("turn_")?.parse().ok()?, turn))).collect();
    turns.sort_by_key(|t| t.0);
    let mut messages = Vec::new();
    for (_, turn) in turns {
        let part = |name: &str, mark: &str, end: &str| {
            let text = turn[name].as_str().unwrap_or_default().trim();
            let text = text.strip_prefix(&format!("<|{mark}|>:")).unwrap_or(text);
            let text = text.strip_suffix(end).unwrap_or(text).trim();
            if text == "None" { String::new() } else { text.to_owned() }
        };
        let thought = part("Inner Thoughts", "Inner Thoughts", "<eot>");
        let (command, result) = (part("Commands", "Commands", "<eoc>"), part("Tool Responses", "Results", "<eor>"));
        messages.push(json!({"role": "user", "content": part("Human", "Human", "<eoh>")}));
        if !command.is_empty() {
            messages.push(json!({"role": "assistant", "content": command, "reasoning_content": thought}));
            messages.push(json!({"role": "tool", "content": result}));
        }
        messages.push(json!({"role": "assistant", "content": part("MOSS", "MOSS", "<eom>")}));
    }
    Conversation::from_messages(&messages, false)
}
