//! What a record teaches, told by its fields.

use super::conversation::{Conversation, from_moss, text_of};
use super::read::Record;
use serde_json::{Map, Value};
use std::cell::Cell;

/// What a record teaches.
#[derive(Clone, Debug, PartialEq)]
pub enum Lesson {
    /// To answer.
    Chat(Conversation, &'static str),
    /// To go on writing. A text may come in parts.
    Text { text: String, first: bool, last: bool },
    /// Whatever its tokens and labels (-100: none) say.
    Tokens { ids: Vec<i64>, labels: Vec<i64> },
}

/// Names of the column that holds the turns of a conversation.
const TURNS: &[&str] = &["messages", "conversations", "conversation", "dialogue"];

/// What is asked of a template before a record is read.
pub struct Asked<'a> {
    /// Whether the template knows `tool_calls`.
    pub knows_calls: bool,
    /// The columns of questions and answers, where a person has named them.
    pub columns: Option<&'a (String, String)>,
}

/// Names of the column that holds what is asked, most telling first.
const QUESTION: &[&str] = &[
    "prompt",
    "question",
    "query",
    "instruction",
    "input",
    "user",
    "human",
    "problem",
    "request",
    "utterance",
    "sentence",
    "review",
    "q",
    "问题",
    "提问",
    "问",
    "用户",
    "指令",
    "输入",
    "frage",
    "pregunta",
    "pergunta",
    "domanda",
    "вопрос",
    "質問",
    "질문",
];
/// Names of the column that holds what is answered, most telling first.
const ANSWER: &[&str] = &[
    "completion",
    "response",
    "answer",
    "output",
    "solution",
    "reply",
    "assistant",
    "gpt",
    "bot",
    "target",
    "a",
    "答案",
    "回答",
    "回复",
    "答",
    "输出",
    "antwort",
    "respuesta",
    "réponse",
    "resposta",
    "risposta",
    "ответ",
    "答え",
    "답변",
];
/// Names of the column that holds the class of a text.
const CLASS: &[&str] = &["label", "labels", "class", "category", "sentiment", "intent", "类别", "标签"];
/// Names of a column that a question refers to.
const CONTEXT: &[&str] = &["input", "context"];
/// Names of the column that holds what the system says.
const SYSTEM: &[&str] = &["system", "system_prompt", "meta_instruction"];
/// Names of the column of texts to go on with.
const TEXT: &[&str] = &["text", "document", "content"];

/// Whether a column of this name is a question, an answer or a text.
pub fn is_known(name: &str) -> bool {
    let name = plain(name);
    [QUESTION, ANSWER, TEXT].iter().any(|names| names.contains(&name.as_str()))
}

/// A name as the lists above spell them.
fn plain(name: &str) -> String {
    name.trim().to_lowercase().replace([' ', '-'], "_")
}

/// What `record` teaches, and the names of the columns that have no part in it.
///
/// # Errors
/// Says what is missing or wrong, on one line.
pub fn read(record: &Record, asked: &Asked) -> Result<(Lesson, Vec<String>), String> {
    match record {
        Record::Fields(fields) => {
            let fields = Fields::new(fields);
            let lesson = lesson(&fields, asked)?;
            Ok((lesson, fields.unused()))
        }
        Record::Part { text, first, last } => {
            Ok((Lesson::Text { text: text.clone(), first: *first, last: *last }, Vec::new()))
        }
    }
}

fn lesson(fields: &Fields, asked: &Asked) -> Result<Lesson, String> {
    let chat = |conversation: Result<Conversation, String>, kind| {
        let system = fields.text(SYSTEM)?;
        conversation.map(|c| Lesson::Chat(c.with_system(&system), kind))
    };
    if let Some((question, answer)) = asked.columns {
        return chat(fields.pair(question, answer), "questions and answers");
    }
    if let Some(ids) = fields.list(&["input_ids"])? {
        return tokens(&ids, fields);
    }
    if fields.get("chosen").is_some() && fields.get("rejected").is_some() {
        return Err("a choice between two answers (chosen, rejected), which is for preference training".into());
    }
    if let Some(messages) = fields.list(TURNS)? {
        if let Some(Value::Bool(label)) = fields.get("label") {
            fields.mark("label");
            if !label {
                return Err("marked as an answer not to give (label is false)".into());
            }
        }
        let conversation = Conversation::from_messages(&messages, asked.knows_calls);
        let tools = fields.list(&["tools", "functions"]).unwrap_or_default().filter(|t| !t.is_empty());
        let tools = tools.map(Value::Array);
        return chat(conversation.map(|c| Conversation { tools, ..c }), "conversations");
    }
    if let Some(Value::Object(turns)) = fields.get("chat") {
        fields.mark("chat");
        return chat(from_moss(turns), "conversations");
    }
    if fields.get("instruction").is_some() && fields.first(&["output", "response"]).is_some() {
        return chat(fields.instruction(), "instructions");
    }
    let Some((question, answer)) = fields.columns() else {
        if let Some(name) = fields.first(TEXT) {
            let text = fields.text(&[name])?;
            return Ok(Lesson::Text { text, first: true, last: true });
        }
        return Err(fields.unknown());
    };
    if let (Some(Value::Array(prompt)), Some(Value::Array(completion))) = (fields.get(question), fields.get(answer)) {
        fields.mark(question);
        fields.mark(answer);
        let list: Vec<Value> = prompt.iter().chain(completion).cloned().collect();
        let mut conversation = Conversation::from_messages(&list, asked.knows_calls);
        if let Ok(c) = &mut conversation {
            let given = prompt.iter().filter(|m| m["role"] == "assistant").count();
            c.learned.iter_mut().take(given).for_each(|l| *l = false);
        }
        return chat(conversation, "questions and answers");
    }
    chat(fields.pair(question, answer), "questions and answers")
}

/// A record's fields by their names in lower case, and whether each was of use.
struct Fields<'a>(Vec<(String, &'a Value, Cell<bool>)>);

impl<'a> Fields<'a> {
    fn new(fields: &'a Map<String, Value>) -> Fields<'a> {
        Fields(fields.iter().map(|(name, value)| (plain(name), value, Cell::new(false))).collect())
    }

    /// Says that the field `name` is of use.
    fn mark(&self, name: &str) {
        self.0.iter().filter(|f| f.0 == name).for_each(|f| f.2.set(true));
    }

    /// The names of those that were of no use, and are not empty.
    fn unused(&self) -> Vec<String> {
        let empty = |value: &Value| match value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        self.0.iter().filter(|f| !f.2.get() && !empty(f.1)).map(|f| f.0.clone()).collect()
    }

    /// The field `name`, where it is not null.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.iter().find(|f| f.0 == name).map(|f| f.1).filter(|v| !v.is_null())
    }

    /// The first of `names` that there is.
    fn first(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().find(|n| self.get(n).is_some()).copied()
    }

    /// The text of the first of `names`; empty where there is none.
    fn text(&self, names: &[&str]) -> Result<String, String> {
        let Some((name, value)) = names.iter().find_map(|n| Some((n, self.get(n)?))) else { return Ok(String::new()) };
        self.mark(name);
        text_of(value).map_err(|e| format!("column {name}: {e}"))
    }

    /// The list in the first of `names`, which a table holds as JSON.
    fn list(&self, names: &[&str]) -> Result<Option<Vec<Value>>, String> {
        let Some((name, value)) = names.iter().find_map(|n| Some((n, self.get(n)?))) else { return Ok(None) };
        self.mark(name);
        match value {
            Value::Array(list) => Ok(Some(list.clone())),
            Value::String(s) => match serde_json::from_str(s) {
                Ok(Value::Array(list)) => Ok(Some(list)),
                _ => Err(format!("column {name} holds no list")),
            },
            _ => Err(format!("column {name} holds no list")),
        }
    }

    /// Alpaca's layout, with LLaMA-Factory's `history` of earlier turns.
    fn instruction(&self) -> Result<Conversation, String> {
        let (instruction, input) = (self.text(&["instruction"])?, self.text(CONTEXT)?);
        let question = joined(&instruction, &input);
        let answer = self.text(&["output", "response"])?;
        let history = self.list(&["history"]).unwrap_or_default().unwrap_or_default();
        let mut turns: Vec<(String, String)> = Vec::new();
        for turn in &history {
            match (turn[0].as_str(), turn[1].as_str()) {
                (Some(q), Some(a)) => turns.push((q.to_owned(), a.to_owned())),
                _ => return Err("history is no list of questions and answers".into()),
            }
        }
        turns.push((question, answer));
        Conversation::from_turns("", turns.iter().map(|(q, a)| (q.as_str(), a.as_str())))
    }

    /// The columns of questions and answers, by their names. Of two columns one name is enough.
    fn columns(&self) -> Option<(&str, &str)> {
        let question = self.first(QUESTION);
        let answer = self.first(ANSWER).or_else(|| self.first(CLASS)).filter(|a| Some(*a) != question);
        let other = |name: &str| match self.0.as_slice() {
            [(a, ..), (b, ..)] if a == name => Some(b.as_str()),
            [(a, ..), (b, ..)] if b == name => Some(a.as_str()),
            _ => None,
        };
        match (question, answer) {
            (Some(question), Some(answer)) => Some((question, answer)),
            // A text with a class is a question; with anything else it is a text.
            (None, Some(answer)) => match self.first(TEXT) {
                Some(text) => Some((text, answer)),
                None => other(answer).map(|question| (question, answer)),
            },
            (Some(question), None) if self.first(TEXT).is_none() => other(question).map(|answer| (question, answer)),
            _ => None,
        }
    }

    fn pair(&self, question: &str, answer: &str) -> Result<Conversation, String> {
        let (question, answer) = (plain(question), plain(answer));
        for name in [&question, &answer] {
            if !self.0.iter().any(|f| f.0 == *name) {
                return Err(format!("there is no column {name}; there are {}", self.names()));
            }
        }
        let context = CONTEXT.iter().find(|c| **c != question && **c != answer && self.get(c).is_some());
        let context = context.map_or(Ok(String::new()), |c| self.text(&[c]))?;
        let asked = joined(&self.text(&[&question])?, &context);
        Conversation::from_turns("", [(asked.as_str(), self.text(&[&answer])?.as_str())])
    }

    fn names(&self) -> String {
        let mut names: Vec<&str> = self.0.iter().take(12).map(|f| f.0.as_str()).collect();
        if self.0.len() > names.len() {
            names.push("...");
        }
        names.join(", ")
    }

    fn unknown(&self) -> String {
        if self.0.is_empty() {
            return "the record is empty".into();
        }
        if let Some((name, ..)) = self
            .0
            .iter()
            .find(|f| f.1.is_null() && (is_known(&f.0) || TURNS.contains(&f.0.as_str()) || f.0 == "input_ids"))
        {
            return format!("{name} is null");
        }
        let known = "messages, conversations, instruction and output, prompt and completion, question and answer, text, input_ids";
        format!("its columns ({}) are none that are known ({known}); name two with --columns", self.names())
    }
}

fn joined(a: &str, b: &str) -> String {
    match (a.trim().is_empty(), b.trim().is_empty()) {
        (_, true) => a.to_owned(),
        (true, false) => b.to_owned(),
        (false, false) => format!("{a}\n{b}"),
    }
}

/// Tokens with their labels; without `labels` each token is learned. What `attention_mask` hides is padding.
fn tokens(ids: &[Value], fields: &Fields) -> Result<Lesson, String> {
    let numbers = |name: &str, list: &[Value]| -> Result<Vec<i64>, String> {
        let whole = |v: &Value| v.as_i64().ok_or_else(|| format!("{name} holds {v}, which is no token id"));
        list.iter().map(whole).collect()
    };
    let mut ids = numbers("input_ids", ids)?;
    let mut labels = match fields.list(&["labels"])? {
        Some(labels) => numbers("labels", &labels)?,
        None => ids.clone(),
    };
    if labels.len() != ids.len() {
        return Err(format!("{} labels for {} input_ids", labels.len(), ids.len()));
    }
    if let Some(mask) = fields.list(&["attention_mask"])? {
        let mask = numbers("attention_mask", &mask)?;
        if mask.len() != ids.len() {
            return Err(format!("an attention_mask of {} for {} input_ids", mask.len(), ids.len()));
        }
        let shown = |list: Vec<i64>| list.into_iter().zip(&mask).filter(|(_, m)| **m != 0).map(|(v, _)| v).collect();
        (ids, labels) = (shown(ids), shown(labels));
    }
    if ids.is_empty() {
        return Err("input_ids is empty".into());
    }
    Ok(Lesson::Tokens { ids, labels })
}
