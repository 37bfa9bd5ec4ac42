use super::{Each, LONGEST, Record};
use crate::train::data::layout;
use anyhow::{Result, anyhow, bail};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::io::{BufRead, Read};

/// One object a line, or an object that holds a list of them.
pub fn lines(mut reader: impl BufRead, each: Each) -> Result<()> {
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        if (&mut reader).take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        number += 1;
        if line.len() as u64 == LONGEST {
            bail!("line {number} has more than 256 MiB: this is not one object a line");
        }
        if !line.trim_ascii().is_empty() {
            match parse(&line) {
                Ok(Record::Fields(map)) if holds_records(&map) => {
                    let lists = map.into_values().filter(is_list_of_objects);
                    let records = lists.flat_map(|list| match list {
                        Value::Array(records) => records,
                        _ => Vec::new(),
                    });
                    records.map(fields).try_for_each(|record| each(number, record))?;
                }
                record => each(number, record)?,
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Record, String> {
    match serde_json::from_slice(line) {
        Ok(value) => fields(value),
        Err(e) => Err(format!("broken JSON: {}", e.to_string().replace(" at line 1 column ", " at column "))),
    }
}

fn fields(value: Value) -> Result<Record, String> {
    match value {
        Value::Object(map) => Ok(Record::Fields(map)),
        _ => Err("not a JSON object".into()),
    }
}

/// A list of objects, an object that holds such a list, or objects one after the other.
pub fn read(mut reader: impl BufRead, each: Each) -> Result<&'static str> {
    if by_line(reader.fill_buf()?) {
        return lines(reader, each).map(|()| "line");
    }
    let mut give = Give { each, count: 0, failed: None };
    let mut json = serde_json::Deserializer::from_reader(reader);
    while json.end().is_err() {
        if let Err(e) = Top(&mut give).deserialize(&mut json) {
            return Err(give.failed.unwrap_or_else(|| anyhow!("broken JSON: {e}")));
        }
    }
    Ok("record")
}

/// Whether the first line is a record of its own, so that the file is JSONL whatever its name.
fn by_line(begin: &[u8]) -> bool {
    let Some(line) = begin.trim_ascii_start().split(|&b| b == b'\n').next() else { return false };
    line.starts_with(b"{") && serde_json::from_slice::<Map<String, Value>>(line).is_ok_and(|map| !holds_records(&map))
}

/// Whether a list of objects is among the members, and nothing that a record has.
fn holds_records(map: &Map<String, Value>) -> bool {
    map.values().any(is_list_of_objects)
        && !map.keys().any(|name| FIELDS.contains(&name.as_str()) || layout::is_known(name))
}

fn is_list_of_objects(value: &Value) -> bool {
    value.as_array().and_then(|list| list.first()).is_some_and(Value::is_object)
}

struct Give<'a> {
    each: Each<'a>,
    count: u64,
    failed: Option<anyhow::Error>,
}

impl Give<'_> {
    fn give<E: Error>(&mut self, value: Value) -> Result<(), E> {
        self.count += 1;
        (self.each)(self.count, fields(value)).map_err(|e| {
            self.failed = Some(e);
            E::custom("stopped")
        })
    }

    fn rest<'de, A: SeqAccess<'de>>(&mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(value) = list.next_element()? {
            self.give(value)?;
        }
        Ok(())
    }
}

/// A value that is a list of records, or a record, or an object that holds a list of records.
struct Top<'a, 'g>(&'a mut Give<'g>);

impl<'de> DeserializeSeed<'de> for Top<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Top<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of objects, or an object")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<(), A::Error> {
        self.0.rest(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut record, before) = (Map::new(), self.0.count);
        while let Some(key) = map.next_key::<String>()? {
            let own = FIELDS.contains(&key.as_str());
            if let Some(value) = map.next_value_seed(Member { give: self.0, own })? {
                record.insert(key, value);
            }
        }
        if self.0.count == before { self.0.give(Value::Object(record)) } else { Ok(()) }
    }
}

/// Fields of a record that hold lists of objects: such a list is no list of records.
const FIELDS: [&str; 8] =
    ["messages", "conversations", "conversation", "dialogue", "chat", "history", "tools", "functions"];

/// A member of the outermost object. A list of objects gives its records and `None`.
struct Member<'a, 'g> {
    give: &'a mut Give<'g>,
    own: bool,
}

impl<'de> DeserializeSeed<'de> for Member<'_, '_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Value>, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Member<'_, '_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Option<Value>, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element::<Value>()? {
            if values.is_empty() && value.is_object() && !self.own {
                self.give.give(value)?;
                self.give.rest(list)?;
                return Ok(None);
            }
            values.push(value);
        }
        Ok(Some(values.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<Value>, A::Error> {
        use serde::de::value::MapAccessDeserializer;
        serde::Deserialize::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }

    fn visit_str<E>(self, s: &str) -> Result<Option<Value>, E> {
        Ok(Some(s.into()))
    }

    fn visit_bool<E>(self, b: bool) -> Result<Option<Value>, E> {
        Ok(Some(b.into()))
    }

    fn visit_i64<E>(self, n: i64) -> Result<Option<Value>, E> {
        Ok(Some(n.into()))
    }

    fn visit_u64<E>(self, n: u64) -> Result<Option<Value>, E> {
        Ok(Some(n.into()))
    }

    fn visit_f64<E>(self, n: f64) -> Result<Option<Value>, E> {
        Ok(Some(n.into()))
    }

    fn visit_unit<E>(self) -> Result<Option<Value>, E> {
        Ok(Some(Value::Null))
    }
}
