//! Files of questions: the CSV layouts of MMLU, C-Eval and CMMLU, and HellaSwag's records or those of question, choices and
//! answer as JSON lines, JSON or Parquet.

use super::Item;
use super::prompt::{Words, scene};
use crate::train::data::read::{self as data, Record};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};
use std::path::Path;

/// Most choices: one for each letter.
const MOST_CHOICES: usize = 26;

/// The questions of a file.
#[derive(Debug)]
pub struct File {
    /// Whose words they are put in.
    pub words: Words,
    /// The questions, each with the subject that its line names.
    pub items: Vec<(Option<String>, Item)>,
}

/// Whether `path` has a kind of name that holds questions.
pub fn is_data(path: &Path) -> bool {
    path.extension().is_some_and(|ext| ["csv", "jsonl", "parquet"].iter().any(|known| ext == *known))
}

/// The place and the number of a file that is one of several (`test-00000-of-00002`) in its name without extension, and
/// what stands before them.
pub fn shard(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, place) = rest.rsplit_once('-')?;
    let number = |digits: &str| digits.parse().ok().filter(|_| digits.len() == 5);
    Some((name, number(place)?, number(count)?))
}

/// Reads the questions of `path`; those of JSON lines are asked with the `texts` of their choices instead of letters.
pub fn read(path: &Path, texts: bool) -> Result<File> {
    let name = path.display().to_string();
    let kind = path.extension().unwrap_or_default();
    ensure!(is_data(path) || kind == "json", "{name}: questions are read from .csv, .jsonl, .json and .parquet files");
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if let Some((_, _, count)) = shard(&stem).filter(|(_, _, count)| *count > 1) {
        bail!("{name}: this is one of {count} files of one set: put them together into one");
    }
    if kind == "json" || kind == "parquet" {
        return records(path, &name, texts);
    }
    let bytes = std::fs::read(path).with_context(|| name.clone())?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        anyhow!("{name}, line {line}: not UTF-8 text: convert it to UTF-8 first")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let file = match path.extension().is_some_and(|ext| ext == "csv") {
        true => csv(text, &name)?,
        false => lines(text, &name, texts)?,
    };
    ensure!(!file.items.is_empty(), "{name}: there are no questions in it");
    Ok(file)
}

/// Whether the questions of the CSV or JSON file `path` come with answers, as far as its first line tells.
pub fn has_answers(path: &Path) -> bool {
    use std::io::BufRead;
    let mut line = String::new();
    let file = std::fs::File::open(path);
    if file.is_ok_and(|file| std::io::BufReader::new(file).read_line(&mut line).is_err()) {
        return true; // To be told by whoever reads it.
    }
    let line = line.to_lowercase();
    !line.contains("question") || ["answer", "label"].iter().any(|word| line.contains(word))
}

fn csv(text: &str, name: &str) -> Result<File> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut header: Option<Header> = None;
    let (mut words, mut items) = (Words::English, Vec::new());
    let (mut line, mut counted) = (1, 0);
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(|e| {
            let line = e.position().map_or(i as u64 + 1, |p| p.line());
            anyhow!("{name}, line {line}: not CSV: {e}")
        })?;
        // A record's position lies before what ends the one above, and before empty lines.
        let from = record.position().map_or(counted, |p| p.byte() as usize).clamp(counted, text.len());
        let empty = text.as_bytes()[from..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        line += text.as_bytes()[counted..from + empty].iter().filter(|b| **b == b'\n').count();
        counted = from + empty;
        let place = format!("{name}, line {line}");
        if i == 0
            && let Some(found) = Header::of(&record)
        {
            words = found.words;
            ensure!(found.answer.is_some(), "{place}: there is no column of answers, so nothing can be scored");
            header = Some(found);
            continue;
        }
        let (question, choices, answer) = match &header {
            Some(Header { question, choices, answer, .. }) => (*question, choices.clone(), answer.unwrap_or(0)),
            None => {
                ensure!(
                    record.len() == 6,
                    "{place}: there are {} columns, but MMLU's layout has 6: the question, four choices, and the letter \
                     of the answer; other layouts begin with a line of names (question, A, B, C, D, answer)",
                    record.len()
                );
                (0, (1..5).collect(), 5)
            }
        };
        let field =
            |column: usize| record.get(column).with_context(|| format!("{place}: column {} is missing", column + 1));
        let question = field(question)?;
        let choices = choices.into_iter().map(|c| Ok(field(c)?.to_owned())).collect::<Result<Vec<_>>>()?;
        let letter = field(answer)?;
        let answer = letter_index(&letter.to_ascii_uppercase(), choices.len()).with_context(|| {
            let letter = letter.escape_debug();
            format!("{place}: the answer is '{letter}', not the letter of one of {} choices", choices.len())
        })?;
        items.push((None, words.item(question, &choices, answer, place)));
    }
    Ok(File { words, items })
}

/// Which columns hold what.
struct Header {
    words: Words,
    question: usize,
    choices: Vec<usize>,
    answer: Option<usize>,
}

impl Header {
    /// What the names in `record` say; `None` where they are no names.
    fn of(record: &csv::StringRecord) -> Option<Header> {
        let find = |name: &str| record.iter().position(|field| field.trim() == name);
        let (words, question) = match (find("question"), find("Question")) {
            (Some(column), _) => (Words::CEval, column),
            (None, Some(column)) => (Words::Cmmlu, column),
            (None, None) => return None,
        };
        let choices: Vec<usize> = ('A'..='Z').map_while(|letter| find(&letter.to_string())).collect();
        (choices.len() > 1).then(|| Header { words, question, choices, answer: find("answer").or(find("Answer")) })
    }
}

/// 0 for `A`.
fn letter_index(letter: &str, choices: usize) -> Option<usize> {
    let mut letters = letter.trim().chars();
    let index = (letters.next()? as usize).checked_sub('A' as usize)?;
    (letters.next().is_none() && index < choices).then_some(index)
}

/// The questions of records, as they come.
struct Gathered {
    usual: Words,
    words: Option<Words>,
    items: Vec<(Option<String>, Item)>,
}

impl Gathered {
    fn new(texts: bool) -> Gathered {
        Gathered { usual: if texts { Words::Text } else { Words::English }, words: None, items: Vec::new() }
    }

    fn add(&mut self, value: &Map<String, Value>, place: String) -> Result<()> {
        let these = if value.contains_key("endings") { Words::HellaSwag } else { self.usual };
        ensure!(*self.words.get_or_insert(these) == these, "{place}: it has another layout than what is before it");
        let (question, choices, answer) = match these {
            Words::HellaSwag => hellaswag(value),
            _ => question(value),
        }
        .map_err(|e| anyhow!("{place}: {e}"))?;
        let subject = value.get("subject").and_then(Value::as_str).map(str::to_owned);
        self.items.push((subject, these.item(&question, &choices, answer, place)));
        Ok(())
    }

    fn file(self) -> File {
        File { words: self.words.unwrap_or(self.usual), items: self.items }
    }
}

fn lines(text: &str, name: &str, texts: bool) -> Result<File> {
    let mut all = Gathered::new(texts);
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{name}, line {}", i + 1);
        let value: Map<String, Value> =
            serde_json::from_str(line).map_err(|e| anyhow!("{place}: not a JSON object: {e}"))?;
        all.add(&value, place)?;
    }
    Ok(all.file())
}

/// The questions of a file that training data may be of, too.
fn records(path: &Path, name: &str, texts: bool) -> Result<File> {
    let mut all = Gathered::new(texts);
    data::read(path, &data::Done::default(), &mut |number, record| match record {
        Ok(Record::Fields(value)) => all.add(&value, format!("{name}, record {number}")),
        Ok(Record::Part { .. }) => bail!("{name}: this is plain text, no questions"),
        Err(why) => bail!("{name}, record {number}: {why}"),
    })?;
    Ok(all.file())
}

type Asked = (String, Vec<String>, usize);

fn hellaswag(value: &Map<String, Value>) -> Result<Asked> {
    let text =
        |field: &str| value.get(field).and_then(Value::as_str).with_context(|| format!("there is no text '{field}'"));
    let choices = strings(value.get("endings")).context("'endings' is not a list of texts")?;
    let scene = scene(text("activity_label")?, text("ctx_a")?, text("ctx_b")?);
    let label = value.get("label").context("there is no 'label'")?;
    let answer = match label {
        Value::String(digits) => digits.parse().ok(),
        other => other.as_u64().map(|n| n as usize),
    };
    let answer = answer.filter(|&i| i < choices.len());
    let answer =
        answer.with_context(|| format!("the label {label} is not the number of one of {} endings", choices.len()))?;
    ensure!(choices.len() > 1, "there are fewer than two endings");
    Ok((scene, choices, answer))
}

fn question(value: &Map<String, Value>) -> Result<Asked> {
    let question = value.get("question").and_then(Value::as_str).context("there is no text 'question'")?;
    let lettered = || {
        let each = ('A'..='Z').map_while(|letter| value.get(&letter.to_string()));
        let list: Vec<Value> = each.cloned().collect();
        (!list.is_empty()).then_some(Value::Array(list))
    };
    let (choices, labels) = match value.get("choices").cloned().or_else(lettered) {
        Some(Value::Object(both)) => (strings(both.get("text")), strings(both.get("label"))),
        other => (strings(other.as_ref()), None),
    };
    let choices = choices.context("'choices' is not a list of texts")?;
    let n = choices.len();
    if !(2..=MOST_CHOICES).contains(&n) {
        bail!("there are {n} choices: give 2 to {MOST_CHOICES}");
    }
    let answer = ["answer", "answerKey", "label"].iter().find_map(|field| value.get(*field));
    let answer = answer.context("there is no 'answer'")?;
    let index = match answer {
        Value::String(text) => (labels.and_then(|labels| labels.iter().position(|label| label == text)))
            .or_else(|| letter_index(text, n))
            .or_else(|| choices.iter().position(|choice| choice == text)),
        other => other.as_u64().map(|i| i as usize),
    };
    let index = index.filter(|&i| i < n).with_context(|| {
        format!("the answer {answer} is none of the {n} choices: give its number from 0, its letter or its text")
    })?;
    Ok((question.to_owned(), choices, index))
}

/// A list of texts; numbers are taken as they are written.
fn strings(list: Option<&Value>) -> Option<Vec<String>> {
    let each = list?.as_array()?.iter().map(|value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    });
    each.collect()
}
