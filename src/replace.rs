//! What a command may write over: an earlier file of the same kind, and nothing else that somebody has made.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

/// Fails where writing `path` would destroy something, or could not be done; `what` a file is that `same` says may go.
pub fn check(path: &Path, what: &str, same: impl FnOnce(&Path) -> bool) -> Result<()> {
    if path.is_dir() {
        bail!("{} is a directory: name a file", path.display());
    }
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.is_dir()) {
        bail!("{}: there is no directory {}: make it first", path.display(), dir.display());
    }
    match std::fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
        Ok(there) if there.is_file() && (there.len() == 0 || same(path)) => Ok(()),
        Ok(_) => bail!("{} exists and is not {what}, so it is not replaced: write to another file", path.display()),
    }
}

/// Whether a file begins with `start`.
pub fn begins(path: &Path, start: &[u8]) -> bool {
    let mut found = vec![0; start.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut found)).is_ok() && found == start
}

/// Whether the first line of a file is a JSON object with these `keys`.
pub fn is_json_lines(path: &Path, keys: &[&str]) -> bool {
    // Lines of results are short; of another file's not all need be read.
    let mut line = Vec::new();
    let read = File::open(path).and_then(|file| BufReader::new(file.take(1 << 20)).read_until(b'\n', &mut line));
    let Ok(serde_json::Value::Object(object)) = serde_json::from_slice(&line) else { return false };
    read.is_ok() && keys.iter().all(|key| object.contains_key(*key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_same_kind_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let lines = |path: &Path| is_json_lines(path, &["a", "b"]);
        check(&path("new"), "lines", lines).unwrap();
        for (name, text, may) in [
            ("lines", "{\"a\": 1, \"b\": 2}\n{}", true),
            ("empty", "", true),
            ("others", "{\"a\": 1}\n", false),
            ("text", "thesis", false),
            ("array", "[\"a\", \"b\"]", false),
        ] {
            std::fs::write(path(name), text).unwrap();
            assert_eq!(check(&path(name), "lines", lines).is_ok(), may, "{name}");
        }
        let error = check(&path("text"), "a file of lines", lines).unwrap_err().to_string();
        assert!(
            error.ends_with("text exists and is not a file of lines, so it is not replaced: write to another file")
        );
        assert!(check(dir.path(), "lines", lines).unwrap_err().to_string().contains("is a directory"));
        let error = check(&path("nowhere/lines"), "lines", lines).unwrap_err().to_string();
        assert!(error.contains("there is no directory"), "{error}");
        assert!(begins(&path("text"), b"the") && !begins(&path("text"), b"tea") && !begins(&path("empty"), b"t"));
    }
}
