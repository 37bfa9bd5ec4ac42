//! From what a person names to the questions of each subject.

use super::prompt::Words;
use super::read::{File, has_answers, is_data, read, shard};
use super::{Item, Subject};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A part of a published set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Split {
    /// Questions to be shown as examples.
    Dev,
    /// Questions for trying things out.
    Val,
    /// Questions to be asked.
    Test,
    /// Questions to learn from.
    Train,
}

impl Split {
    fn parse(name: &str) -> Option<Split> {
        match name {
            "dev" => Some(Split::Dev),
            "val" | "valid" | "validation" => Some(Split::Val),
            "test" => Some(Split::Test),
            "train" => Some(Split::Train),
            _ => None,
        }
    }
}

/// What is asked of which questions.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Examples before each question.
    pub shots: usize,
    /// Most questions of a subject.
    pub limit: Option<usize>,
    /// The part to ask; the test where it has answers, or else the validation part.
    pub split: Option<Split>,
    /// A file of examples, instead of the set's own.
    pub examples: Option<PathBuf>,
    /// Compare the texts of choices instead of their letters.
    pub texts: bool,
}

/// The subject that a file's name tells, and the part.
fn parts(path: &Path) -> (String, Option<Split>) {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // As the hub's files are called: SUBJECT/test-00000-of-00001.parquet.
    let stem = shard(&stem).map_or(stem.as_str(), |(name, ..)| name).to_owned();
    let above = path.parent().and_then(Path::file_name);
    if let (Some(split), Some(subject)) = (Split::parse(&stem), above) {
        return (subject.to_string_lossy().into_owned(), Some(split));
    }
    let cut = stem.rfind(['_', '.', '-']).and_then(|at| Some((stem[..at].to_owned(), Split::parse(&stem[at + 1..])?)));
    let folder = above.and_then(|name| Split::parse(&name.to_string_lossy()));
    match cut {
        Some((subject, split)) => (subject, Some(split)),
        None => (stem, folder),
    }
}

/// Files of questions in `dir` and in its folders that are named for a part, in the order of their names.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = |dir: &Path| -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
        let mut paths = Vec::new();
        for entry in entries {
            paths.push(entry.with_context(|| dir.display().to_string())?.path());
        }
        paths.sort();
        Ok(paths)
    };
    let (mut found, all) = (Vec::new(), list(dir)?);
    for path in &all {
        let is_part = path.file_name().is_some_and(|name| Split::parse(&name.to_string_lossy()).is_some());
        match path.is_dir() {
            true if is_part => found.extend(list(path)?.into_iter().filter(|p| is_data(p) && p.is_file())),
            true => {}
            false if is_data(path) => found.push(path.clone()),
            false => {}
        }
    }
    Ok(found)
}

/// The subjects of `task`, a file or a folder of files, with the questions that are wanted.
///
/// # Errors
/// When a file cannot be read as one of the layouts (naming its line), or there are too few examples.
pub fn subjects(task: &Path, wanted: &Wanted) -> Result<Vec<Subject>> {
    let given =
        wanted.examples.as_ref().map(|path| Ok::<_, anyhow::Error>((path, read(path, wanted.texts)?))).transpose()?;
    let mut subjects = Vec::new();
    if task.is_dir() {
        let mut by_subject: BTreeMap<String, Vec<(Option<Split>, PathBuf)>> = BTreeMap::new();
        for path in files(task)? {
            let (subject, split) = parts(&path);
            by_subject.entry(subject).or_default().push((split, path));
        }
        ensure!(!by_subject.is_empty(), "{}: there are no .csv, .jsonl or .parquet files in it", task.display());
        for (name, mut files) in by_subject {
            files.sort();
            let of = |split| files.iter().find(|(s, _)| *s == split).map(|(_, path)| path);
            let asked = match wanted.split {
                Some(split) => of(Some(split)),
                None => (of(Some(Split::Test)).filter(|path| has_answers(path)))
                    .or(of(Some(Split::Val)))
                    .or(of(None))
                    .or(of(Some(Split::Test))),
            };
            // A subject of which there are examples alone.
            let Some(path) = asked else { continue };
            subjects.extend(read_subjects(path, &name, &files, wanted, given.as_ref().map(|(p, f)| (p.as_path(), f)))?);
        }
        if subjects.is_empty() {
            bail!("{}: no file in it is of the part that is asked for (--split)", task.display());
        }
    } else {
        let (name, _) = parts(task);
        let dir = task.parent().unwrap_or(Path::new(""));
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let up = dir.file_name().is_some_and(|name| Split::parse(&name.to_string_lossy()).is_some());
        let mut all = files(dir)?;
        if let Some(above) = dir.parent().filter(|_| up) {
            all.extend(files(if above.as_os_str().is_empty() { Path::new(".") } else { above })?);
        }
        let others = all.into_iter().map(|path| (parts(&path), path)).filter(|((subject, _), _)| *subject == name);
        let others: Vec<_> = others.map(|((_, split), path)| (split, path)).collect();
        subjects.extend(read_subjects(task, &name, &others, wanted, given.as_ref().map(|(p, f)| (p.as_path(), f)))?);
    }
    Ok(subjects)
}

/// The subjects of the file `path`: one, unless its lines name several. `files` are those of the same name.
fn read_subjects(
    path: &Path,
    name: &str,
    files: &[(Option<Split>, PathBuf)],
    wanted: &Wanted,
    given: Option<(&Path, &File)>,
) -> Result<Vec<Subject>> {
    let File { words, items } = read(path, wanted.texts)?;
    let mut found: Vec<Subject> = Vec::new();
    let tables = matches!(words, Words::CEval | Words::Cmmlu) || path.extension().is_some_and(|ext| ext == "csv");
    for (subject, item) in items {
        let own = subject.as_deref().unwrap_or(name);
        let at = found.iter().position(|s| s.name == own).unwrap_or_else(|| {
            let said = subject.as_deref().or(tables.then_some(name));
            let (examples, items) = (Vec::new(), Vec::new());
            found.push(Subject {
                name: own.to_owned(),
                description: words.description(said),
                examples,
                items,
                texts: words.texts(),
            });
            found.len() - 1
        });
        if wanted.limit.is_none_or(|limit| found[at].items.len() < limit) {
            found[at].items.push(item);
        }
    }
    if wanted.shots == 0 {
        return Ok(found);
    }
    let read_here;
    let (examples_path, examples) = match given {
        Some((path, file)) => (path.to_owned(), file),
        None => {
            let same =
                |path: &Path, other: &Path| std::fs::canonicalize(path).ok() == std::fs::canonicalize(other).ok();
            let of =
                |split| files.iter().find(|(s, other)| *s == Some(split) && !same(other, path)).map(|(_, path)| path);
            let from = of(Split::Dev).or(of(Split::Train)).or(of(Split::Val)).with_context(|| {
                format!(
                    "{}: there is no dev, train or val file of {name} beside it to take examples from: give one with \
                     --examples, or leave --shots out",
                    path.display()
                )
            })?;
            read_here = read(from, wanted.texts)?;
            (from.clone(), &read_here)
        }
    };
    ensure!(
        examples.words == words,
        "{}: its layout is not that of the questions in {}",
        examples_path.display(),
        path.display()
    );
    let named = examples.items.iter().any(|(subject, _)| subject.is_some());
    for subject in &mut found {
        let fits = |other: &Option<String>| !named || other.as_ref() == Some(&subject.name);
        let shown = examples.items.iter().filter(|(other, _)| fits(other)).map(|(_, item)| item.clone());
        subject.examples = shown.take(wanted.shots).collect::<Vec<Item>>();
        let there = subject.examples.len();
        ensure!(
            there == wanted.shots,
            "{}: there are {there} examples for {}, fewer than --shots {}",
            examples_path.display(),
            subject.name,
            wanted.shots
        );
    }
    Ok(found)
}
