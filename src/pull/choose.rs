//! Which files of a repository make the model that was asked for.

use super::base;
use super::hub::Listed;
use crate::store::split_part;
use anyhow::{Result, bail, ensure};

/// The files to download.
#[derive(Debug)]
pub struct Choice {
    pub files: Vec<Listed>,
    /// Several files in a directory, not one GGUF.
    pub directory: bool,
    /// What was chosen and why, for the person to see.
    pub note: String,
}

/// From good at its size to merely usable; the first that a repository has is taken.
const PREFERRED: [&str; 15] = [
    "Q4_K_M", "Q4_K_S", "Q4_K", "Q5_K_M", "Q5_K_S", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "Q5_1", "Q5_0", "Q6_K", "Q8_0",
    "F16", "BF16",
];

/// Chooses from `files` what `wanted` names, or the most useful.
pub fn choose(repo: &str, files: &[Listed], wanted: Option<&str>) -> Result<Choice> {
    // A set of parts is represented by its first.
    let is_model = |f: &&Listed| {
        let name = base(&f.path).to_lowercase();
        name.ends_with(".gguf")
            && !name.contains("mmproj")
            && !name.contains("imatrix")
            && split_part(base(&f.path)).is_none_or(|(part, _)| part == 1)
    };
    let ggufs: Vec<&Listed> = files.iter().filter(is_model).collect();
    let names = || ggufs.iter().map(|f| f.path.as_str()).take(30).collect::<Vec<_>>().join(", ");
    if let Some(wanted) = wanted {
        let exact = files.iter().find(|f| f.path == wanted && f.path.to_lowercase().ends_with(".gguf"));
        let lower = wanted.to_lowercase();
        // `Q4_K` is Q4_K itself before it is a part of Q4_K_M.
        let word = |f: &&&Listed| tag_in(&f.path, wanted);
        let part = |f: &&&Listed| f.path.to_lowercase().contains(&lower);
        let mut found: Vec<&Listed> = exact.into_iter().collect();
        if found.is_empty() {
            found = ggufs.iter().filter(word).copied().collect();
        }
        if found.is_empty() {
            found = ggufs.iter().filter(part).copied().collect();
        }
        return match found[..] {
            [one] => gguf(repo, files, one, ""),
            [] if ggufs.is_empty() => bail!("{repo} has no GGUF file; leave out :{wanted} for its safetensors"),
            [] => bail!("{repo} has no GGUF file '{wanted}'; it has {}", names()),
            _ => bail!(
                "'{wanted}' fits several files of {repo}: {}; give one name whole",
                found.iter().map(|f| f.path.as_str()).collect::<Vec<_>>().join(", ")
            ),
        };
    }
    if let Some(&only) = ggufs.first() {
        let named = PREFERRED.iter().find_map(|tag| ggufs.iter().find(|f| tag_in(&f.path, tag)));
        let why = if ggufs.len() > 1 {
            format!(" of {} GGUF files (:FILE chooses another)", ggufs.len())
        } else {
            String::new()
        };
        // Without a name that says the format, the smallest will run wherever any does.
        let smallest = ggufs.iter().min_by_key(|f| f.size).copied().unwrap_or(only);
        return gguf(repo, files, named.copied().unwrap_or(smallest), &why);
    }
    directory(repo, files)
}

/// Whether a format's name stands in a file's path as a word of its own.
fn tag_in(path: &str, tag: &str) -> bool {
    let (path, tag) = (path.to_uppercase(), tag.to_uppercase());
    let end = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
    path.match_indices(&tag)
        .any(|(at, _)| end(path[..at].chars().next_back()) && end(path[at + tag.len()..].chars().next()))
}

fn gguf(repo: &str, files: &[Listed], first: &Listed, why: &str) -> Result<Choice> {
    let mut chosen = vec![first.clone()];
    if let Some((_, total)) = split_part(base(&first.path)).filter(|&(_, total)| total > 1) {
        ensure!(total <= 1000, "{}: a set of {total} files is more than a model is split into", first.path);
        let stem = &first.path[..first.path.len() - "00001-of-00001.gguf".len()];
        chosen.clear();
        for part in 1..=total {
            let name = format!("{stem}{part:05}-of-{total:05}.gguf");
            match files.iter().find(|f| f.path == name) {
                Some(file) => chosen.push(file.clone()),
                None => bail!("{repo} has only a part of the set: {name} is missing"),
            }
        }
    }
    let bytes: u64 = chosen.iter().map(|f| f.size).sum();
    let note = format!("{} ({:.1} MB){why}", first.path, bytes as f64 / 1e6);
    check(&chosen)?;
    Ok(Choice { directory: chosen.len() > 1, files: chosen, note })
}

/// A Hugging Face checkpoint: configuration, tokenizer and safetensors at the top of the repository.
fn directory(repo: &str, files: &[Listed]) -> Result<Choice> {
    let weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    let others = |name: &str| {
        let text = [".json", ".model", ".tiktoken", ".jinja"].iter().any(|end| name.ends_with(end));
        (text && !name.ends_with(".index.json")) || name == "merges.txt" || name.to_uppercase().starts_with("LICENSE")
    };
    let top = files.iter().filter(|f| !f.path.contains('/') && !f.path.starts_with('.'));
    let mut chosen: Vec<Listed> = top.filter(|f| weights(&f.path) || others(&f.path)).cloned().collect();
    let has = |name: &str| chosen.iter().any(|f| f.path == name);
    ensure!(has("config.json"), "{repo} holds neither a GGUF file nor a config.json: not a model we can run");
    ensure!(
        chosen.iter().any(|f| f.path.ends_with(".safetensors")),
        "{repo} has no weights in GGUF or safetensors files: look for a converted copy"
    );
    if has("model.safetensors") || has("model.safetensors.index.json") {
        // Repositories that also keep their weights in another library's arrangement: one copy is enough.
        chosen.retain(|f| !weights(&f.path) || f.path.starts_with("model"));
    }
    let bytes: u64 = chosen.iter().map(|f| f.size).sum();
    check(&chosen)?;
    // Small files first: what is wrong with them shows before the wait.
    chosen.sort_by_key(|f| f.size);
    let note = format!(
        "safetensors and {} other files ({:.1} MB)",
        chosen.iter().filter(|f| !weights(&f.path)).count(),
        bytes as f64 / 1e6
    );
    Ok(Choice { files: chosen, directory: true, note })
}

/// Names come from the network and become files: they must be plain names, and different ones.
fn check(files: &[Listed]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for file in files {
        let name = base(&file.path);
        let plain = !name.is_empty()
            && name.len() <= 200
            && !name.starts_with('.')
            && !name.contains(['\\', ':', '*', '?', '"', '<', '>', '|'])
            && !name.chars().any(char::is_control)
            && file.path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        ensure!(
            plain,
            "the hub lists a file called '{}': not a safe name, nothing was downloaded",
            file.path.escape_debug()
        );
        ensure!(seen.insert(name.to_lowercase()), "the hub lists two files called '{name}': nothing was downloaded");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(paths: &[&str]) -> Vec<Listed> {
        let file = |(i, p): (usize, &&str)| Listed {
            path: p.to_string(),
            size: 100 - i as u64,
            sha256: None,
            identity: String::new(),
        };
        paths.iter().enumerate().map(file).collect()
    }

    fn paths(paths: &[&str], wanted: Option<&str>) -> Result<Vec<String>> {
        Ok(choose("o/r", &listed(paths), wanted)?.files.into_iter().map(|f| f.path).collect())
    }

    #[test]
    fn the_most_useful_gguf() {
        let files = ["m-Q8_0.gguf", "m-q4_k_m.gguf", "m-Q4_K_S.gguf", "mmproj-Q4_K_M.gguf", "config.json"];
        assert_eq!(paths(&files, None).unwrap(), ["m-q4_k_m.gguf"]);
        assert_eq!(paths(&files, Some("Q8_0")).unwrap(), ["m-Q8_0.gguf"]);
        assert_eq!(paths(&files, Some("m-Q4_K_S.gguf")).unwrap(), ["m-Q4_K_S.gguf"]);
        assert!(paths(&files, Some("Q4_K")).unwrap_err().to_string().contains("several"));
        assert!(paths(&files, Some("Q2_K")).unwrap_err().to_string().contains("it has m-Q8_0.gguf"));
        assert_eq!(paths(&["a.gguf", "b.gguf"], None).unwrap(), ["b.gguf"]);
        // A tag is a word: IQ4_XS is not Q4_X, BF16 not F16.
        assert!(tag_in("x/m.Q4_0.gguf", "q4_0") && !tag_in("m-BF16.gguf", "F16") && !tag_in("m-Q4_K_M.gguf", "Q4_K"));
    }

    #[test]
    fn sets_come_whole() {
        let files = ["d/m-Q4_0-00002-of-00002.gguf", "d/m-Q4_0-00001-of-00002.gguf", "m-Q4_K_M-00001-of-00002.gguf"];
        let set = ["d/m-Q4_0-00001-of-00002.gguf", "d/m-Q4_0-00002-of-00002.gguf"];
        assert_eq!(paths(&files, Some("Q4_0")).unwrap(), set);
        assert!(paths(&files, Some("Q4_K_M")).unwrap_err().to_string().contains("00002-of-00002.gguf is missing"));
        assert!(paths(&["m-00001-of-99999.gguf"], None).is_err());
    }

    #[test]
    fn directories() {
        let files = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
            "onnx/model.onnx",
            "tokenizer.model",
            "consolidated.safetensors",
            "pytorch_model.bin",
            ".gitattributes",
        ];
        let mut got = paths(&files, None).unwrap();
        got.sort();
        assert_eq!(got, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]);
        assert!(paths(&["config.json", "pytorch_model.bin"], None).unwrap_err().to_string().contains("no weights"));
        assert!(paths(&["readme.md"], None).unwrap_err().to_string().contains("neither"));
    }

    #[test]
    fn hostile_names() {
        for bad in
            ["../m.gguf", "a/../m.gguf", "/m.gguf", "a\\..\\m.gguf", "m\n.gguf", ".gguf", "a//m.gguf", "c:m.gguf"]
        {
            assert!(paths(&[bad], None).unwrap_err().to_string().contains("not a safe name"), "{bad:?}");
        }
        assert!(paths(&["config.json", "a.safetensors", "A.safetensors"], None).is_err());
    }
}
