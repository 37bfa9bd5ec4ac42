use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A file of examples, and how often each of them is seen in an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// 1 takes the file as it is, 2 has everything twice, 0.1 a tenth of it.
    pub weight: f64,
}

impl Source {
    /// The file `path` as it is.
    pub fn new(path: impl Into<PathBuf>) -> Source {
        Source { path: path.into(), weight: 1.0 }
    }
}

/// Most copies of a file.
const MOST: f64 = 1000.0;

impl FromStr for Source {
    type Err = String;

    /// `FILE` or `FILE=WEIGHT`. A file whose name has a `=` is taken as it stands if it exists.
    fn from_str(s: &str) -> Result<Source, String> {
        let Some((path, weight)) = s.rsplit_once('=').filter(|_| !Path::new(s).exists()) else {
            return Ok(Source::new(s));
        };
        match weight.parse::<f64>() {
            Ok(weight) if weight > 0.0 && weight <= MOST && !path.is_empty() => {
                Ok(Source { path: path.into(), weight })
            }
            _ => Err(format!("{s}: the weight behind a file is a number above 0, {MOST} at most, as in FILE=0.5")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_stand_behind_the_file() {
        assert_eq!("a.jsonl".parse(), Ok(Source::new("a.jsonl")));
        assert_eq!("d/a=b.csv=2.5".parse(), Ok(Source { path: "d/a=b.csv".into(), weight: 2.5 }));
        for wrong in ["a=0", "a=-1", "a=x", "a=NaN", "a=inf", "a=1e9", "=2", "a="] {
            assert!(wrong.parse::<Source>().unwrap_err().contains("FILE=0.5"), "{wrong}");
        }
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("lr=2");
        std::fs::write(&odd, "").unwrap();
        assert_eq!(odd.to_str().unwrap().parse(), Ok(Source::new(odd)));
    }
}
