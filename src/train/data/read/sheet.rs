use super::{Counted, Done, Each, Record, guarded};
use crate::cli::size;
use anyhow::{Context, Result, anyhow, bail, ensure};
use calamine::{DataRef, ExcelDateTime, Reader, Xlsx};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use zip::ZipArchive;

/// Most bytes that a spreadsheet may unpack to: its texts are held in memory while its rows are read.
const UNPACKED: u64 = 1 << 30;

/// The rows of the first sheet that has any, cell by cell: a hostile file may claim a cell in the last of a million
/// rows and columns, so nothing is laid out by their numbers. The first row of two cells (or of the one cell `text`)
/// names the columns.
pub fn read(path: &Path, done: &Done, each: Each) -> Result<()> {
    let name = || path.display().to_string();
    check(path)?;
    let file = Counted { file: File::open(path).with_context(name)?, done: done.clone() };
    let mut book = guarded(|| Xlsx::new(BufReader::new(file)))
        .and_then(|book| book.map_err(|e: calamine::XlsxError| anyhow!("no readable .xlsx spreadsheet: {e}")))
        .with_context(name)?;
    let sheets = book.sheet_names();
    let mut used = None;
    for sheet in &sheets {
        let rows = one(&mut book, sheet, each).with_context(|| format!("{}, sheet {sheet}", path.display()))?;
        if rows {
            used = Some(sheet);
            break;
        }
    }
    match used {
        None => bail!("{}: no sheet has a row that names its columns and a row below it", path.display()),
        Some(sheet) if sheets.len() > 1 => tracing::warn!("{}: of its sheets only {sheet} is read", path.display()),
        Some(_) => {}
    }
    Ok(())
}

/// Refuses an archive that says it unpacks to more than a spreadsheet may. One that says less than is true ends with an
/// error where its parts exceed what is said.
fn check(path: &Path) -> Result<()> {
    let file = BufReader::new(File::open(path).with_context(|| path.display().to_string())?);
    // What is no archive is told apart by the one who reads it.
    let Ok(mut archive) = ZipArchive::new(file) else { return Ok(()) };
    let sizes = (0..archive.len()).map(|i| archive.by_index(i).map_or(0, |part| part.size()));
    let all = sizes.fold(0, u64::saturating_add);
    ensure!(
        all <= UNPACKED,
        "{}: this spreadsheet would unpack to {}, and {} is the most that is read of one: save the sheet as .csv",
        path.display(),
        size(all),
        size(UNPACKED)
    );
    Ok(())
}

type Row = BTreeMap<u32, String>;

/// Whether the sheet has rows.
fn one(book: &mut Xlsx<impl std::io::Read + std::io::Seek>, sheet: &str, each: Each) -> Result<bool> {
    let broken = |e: calamine::XlsxError| anyhow!("damaged: {e}");
    let mut cells = guarded(|| book.worksheet_cells_reader(sheet).map_err(broken))??;
    let (mut header, mut row, mut at, mut any) = (None, Row::new(), 0, false);
    loop {
        let cell = guarded(|| cells.next_cell().map_err(broken))??;
        let place = cell.as_ref().map(|c| c.get_position());
        if place.map(|p| p.0) != Some(at) {
            any |= finish(&mut header, std::mem::take(&mut row), u64::from(at) + 1, each)?;
        }
        let (Some(cell), Some((next, column))) = (cell, place) else { return Ok(any) };
        if next < at {
            bail!("damaged: row {} comes after row {}", next + 1, at + 1);
        }
        at = next;
        let text = written(cell.get_value());
        if !text.is_empty() {
            row.insert(column, text);
        }
    }
}

/// Takes `row` as the one that names the columns, or gives it to `each`, which `true` says.
fn finish(header: &mut Option<Row>, row: Row, number: u64, each: Each) -> Result<bool> {
    let Some(names) = header else {
        if row.len() > 1 || row.values().any(|v| v.trim().eq_ignore_ascii_case("text")) {
            *header = Some(row);
        }
        return Ok(false);
    };
    if row.is_empty() {
        return Ok(false);
    }
    let field = |(column, name): (&u32, &String)| {
        (name.trim().to_owned(), Value::from(row.get(column).map_or("", String::as_str)))
    };
    let map: Map<String, Value> = names.iter().map(field).collect();
    each(number, Ok(Record::Fields(map)))?;
    Ok(true)
}

/// A date, a time or a span as people write them.
fn moment(d: &ExcelDateTime) -> String {
    // Beyond the year 9999 it is no date, whatever the file says.
    if !(0.0..2_958_466.0).contains(&d.as_f64()) {
        return d.as_f64().to_string();
    }
    let milliseconds = (d.as_f64() * 86_400_000.0).round().max(0.0) as u64;
    let seconds = milliseconds / 1000 % 60;
    if d.is_duration() {
        return format!("{}:{:02}:{seconds:02}", milliseconds / 3_600_000, milliseconds / 60_000 % 60);
    }
    let (year, month, day, hour, minute, second, _) = d.to_ymd_hms_milli();
    let (date, time) = (format!("{year:04}-{month:02}-{day:02}"), format!("{hour:02}:{minute:02}:{second:02}"));
    // A time of day lies in no day; a day without one begins at midnight.
    match (d.as_f64() < 1.0, (hour, minute, second) == (0, 0, 0)) {
        (true, _) => time,
        (false, true) => date,
        (false, false) => format!("{date} {time}"),
    }
}

fn written(value: &DataRef) -> String {
    match value {
        DataRef::String(s) => s.clone(),
        DataRef::SharedString(s) => s.to_string(),
        // Whole numbers are written without a point: a label is 1, not 1.0.
        DataRef::Float(f) => f.to_string(),
        DataRef::Int(n) => n.to_string(),
        DataRef::Bool(b) => b.to_string(),
        DataRef::DateTime(d) => moment(d),
        DataRef::DateTimeIso(s) | DataRef::DurationIso(s) => s.clone(),
        DataRef::Error(_) | DataRef::Empty => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use calamine::ExcelDateTimeType::{DateTime, TimeDelta};

    #[test]
    fn dates_are_written_as_people_read_them() {
        let told = |value, kind| moment(&ExcelDateTime::new(value, kind, false));
        assert_eq!(told(45351.0, DateTime), "2024-02-29");
        assert_eq!(told(45351.541666666664, DateTime), "2024-02-29 13:00:00");
        assert_eq!(told(0.3125, DateTime), "07:30:00");
        assert_eq!(told(1.25, TimeDelta), "30:00:00");
        for odd in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(told(odd, DateTime), odd.to_string());
        }
    }
}
