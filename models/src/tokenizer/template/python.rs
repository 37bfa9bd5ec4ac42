//! What Python writes for a value, where Jinja's templates rely on it.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting of lists and maps that is written.
const DEEPEST: usize = 100;

fn invalid(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// `str(value)`: what `{{ value }}` writes.
pub fn text(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.to_string()),
        _ => {
            let mut out = String::new();
            repr(value, 0, &mut out)?;
            Ok(out)
        }
    }
}

fn repr(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(invalid("a value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => {
            let s = value.as_str().unwrap_or_default();
            let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in s.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Map => {
            out.push('{');
            for (k, key) in value.try_iter()?.enumerate() {
                out.push_str(if k > 0 { ", " } else { "" });
                repr(&key, depth + 1, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (k, item) in value.try_iter()?.enumerate() {
                out.push_str(if k > 0 { ", " } else { "" });
                repr(&item, depth + 1, out)?;
            }
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// An integer or float as Python writes it: floats keep a point, and get an exponent of two digits from 1e16 up and
/// below 1e-4.
fn number(value: &Value, out: &mut String) {
    let float = if value.is_integer() { None } else { f64::try_from(value.clone()).ok() };
    let Some(x) = float else { return out.push_str(&value.to_string()) };
    if x.is_finite() && x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        out.push_str(&format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()));
    } else if x.is_finite() {
        out.push_str(&format!("{x:?}"));
    } else {
        out.push_str(if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        });
    }
}

/// Enclose what the filter `safe` returned. Two characters that Unicode sets aside for a program's inner use.
const SAFE: [char; 2] = ['\u{FDD0}', '\u{FDD1}'];

/// `text` as Jinja's `Markup`: what is joined to it by `+` will be escaped for HTML when it is written.
pub fn safe(text: &str) -> String {
    format!("{}{text}{}", SAFE[0], SAFE[1])
}

/// `text` as it is written: escaped for HTML around its safe parts if it has any, and as it is if not.
pub fn escaped(text: String) -> String {
    if !text.contains(SAFE) {
        return text;
    }
    let mut out = String::with_capacity(text.len());
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            c if c == SAFE[0] => depth += 1,
            c if c == SAFE[1] => depth = depth.saturating_sub(1),
            '&' if depth == 0 => out.push_str("&amp;"),
            '<' if depth == 0 => out.push_str("&lt;"),
            '>' if depth == 0 => out.push_str("&gt;"),
            '"' if depth == 0 => out.push_str("&#34;"),
            '\'' if depth == 0 => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// `json.dumps(value, ensure_ascii=False, ...)`, which transformers gives templates as `tojson`.
pub fn json(value: &Value, args: &Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = args.get("indent")?;
    let ascii: Option<bool> = args.get("ensure_ascii")?;
    let sort: Option<bool> = args.get("sort_keys")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    args.assert_all_used()?;
    let indent = match indent.filter(|v| !v.is_none()) {
        Some(v) if v.as_str().is_some() => v.as_str().map(str::to_string),
        Some(v) => Some(" ".repeat(usize::try_from(v)?.min(64))),
        None => None,
    };
    let between = if indent.is_some() { "," } else { ", " };
    let (between, colon) = match separators.as_deref() {
        None => (between, ": "),
        Some([a, b]) => (a.as_str(), b.as_str()),
        Some(_) => return Err(invalid("separators must be a pair")),
    };
    let mut writer =
        Json { out: String::new(), indent, between, colon, ascii: ascii == Some(true), sort: sort == Some(true) };
    writer.write(value, 0)?;
    Ok(writer.out)
}

struct Json<'a> {
    out: String,
    indent: Option<String>,
    between: &'a str,
    colon: &'a str,
    ascii: bool,
    sort: bool,
}

impl Json<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(invalid("a value is nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => number(value, &mut self.out),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.all('{', '}', depth, keys.into_iter(), |json, key| {
                    match key.as_str() {
                        Some(s) => json.string(s),
                        None => json.string(&text(&key)?),
                    }
                    json.out.push_str(json.colon);
                    json.write(&value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Seq => {
                self.all('[', ']', depth, value.try_iter()?, |json, item| json.write(&item, depth + 1))?;
            }
            ValueKind::Undefined => return Err(invalid("an undefined value has no JSON")),
            _ => return Err(invalid("a generator or function has no JSON")),
        }
        Ok(())
    }

    fn all(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: impl Iterator<Item = Value>,
        mut each: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut any = false;
        for item in items {
            if any {
                self.out.push_str(self.between);
            }
            any = true;
            self.line(depth + 1);
            each(self, item)?;
        }
        if any {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, s: &str) {
        self.out.push('"');
        for c in s.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 => self.out.push_str(&format!("\\u{:04x}", c as u32)),
                c if self.ascii && !c.is_ascii() => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Jinja's `indent(width=4, first=False, blank=False)`; `width` may be a string.
pub fn indent(
    text: String,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    args: Kwargs,
) -> Result<String, Error> {
    let width = width.or(args.get("width")?);
    let first = first.or(args.get("first")?).unwrap_or(false);
    let blank = blank.or(args.get("blank")?).unwrap_or(false);
    args.assert_all_used()?;
    let pad = match width {
        None => "    ".to_string(),
        Some(w) if w.as_str().is_some() => w.to_string(),
        Some(w) => " ".repeat(usize::try_from(w)?.min(256)),
    };
    let mut out = String::with_capacity(text.len());
    for (k, line) in text.split('\n').enumerate() {
        if k > 0 {
            out.push('\n');
        }
        if (k > 0 || first) && (blank || !line.is_empty()) {
            out.push_str(&pad);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Formats `seconds` since 1970 (UTC) as Python's strftime does in English.
pub fn strftime(format: &str, seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = seconds / 86400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let of_year = day + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (day, weekday) = (day + 1, DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{:02}", month + 1)),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('j') => out.push_str(&format!("{of_year:03}")),
            Some('B') => out.push_str(MONTHS[month]),
            Some('b') => out.push_str(&MONTHS[month][..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{second:02}")),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => out.push_str(&format!("{year}-{:02}-{day:02}", month + 1)),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}
