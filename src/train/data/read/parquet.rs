use super::{Done, Each, Record, guarded, pages};
use anyhow::{Context, Result, anyhow};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};
use std::fs::File;
use std::path::Path;

/// The rows of all row groups; nested columns (lists, structs) become lists and objects.
pub fn read(path: &Path, done: &Done, each: Each) -> Result<()> {
    let name = || path.display().to_string();
    let broken = |e: parquet::errors::ParquetError| anyhow!("no readable Parquet file: {e}");
    let file = File::open(path).with_context(name)?;
    let (copy, size) = (file.try_clone().with_context(name)?, file.metadata().with_context(name)?.len());
    let reader = guarded(|| SerializedFileReader::new(copy)).and_then(|r| r.map_err(broken)).with_context(name)?;
    pages::check(&file, reader.metadata()).with_context(name)?;
    let count = reader.metadata().file_metadata().num_rows().max(1) as f64;
    let mut rows = guarded(|| reader.get_row_iter(None)).and_then(|r| r.map_err(broken)).with_context(name)?;
    let mut number = 0;
    while let Some(row) = guarded(|| rows.next()).with_context(name)? {
        number += 1;
        done.set((size as f64 * (number as f64 / count).min(1.0)) as u64);
        let row = row.map_err(broken).with_context(name)?;
        // To write a date may fail, too.
        let fields = guarded(|| fields(&row)).with_context(name)?;
        each(number, Ok(Record::Fields(fields))).with_context(name)?;
    }
    Ok(())
}

fn fields(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => (*b).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float16(n) => f32::from(*n).into(),
        Field::Float(n) => (*n).into(),
        Field::Double(n) => (*n).into(),
        Field::Str(s) => s.as_str().into(),
        // Writers that know no text type leave plain bytes.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into(),
        Field::Group(row) => Value::Object(fields(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let text = |key: &Field| value(key).as_str().map_or_else(|| key.to_string(), str::to_owned);
            Value::Object(map.entries().iter().map(|(k, v)| (text(k), value(v))).collect())
        }
        // Decimals and dates, as people write them.
        other => other.to_string().into(),
    }
}
