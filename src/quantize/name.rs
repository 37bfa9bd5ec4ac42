//! Names for files, by GGML's convention: `BaseName-SizeLabel-FineTune-Version-Encoding.gguf`.

use ggml_rs::{GGUFComponents, parse_gguf_filename};
use rushlight_models::checkpoint::Metadata;
use std::path::Path;

/// What a file of a model is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Naming {
    base: String,
    size: String,
    fine_tune: Option<String>,
    version: String,
}

impl Naming {
    /// Puts a name together from the metadata; what they do not tell is taken from the name of the file or directory
    /// that they come from, and from the number of `parameters`.
    pub fn of(metadata: &Metadata, source: &Path, parameters: u64) -> Naming {
        let known = parse(source);
        let from_file = known.as_ref();
        let text = |key: &str| metadata.str(key).map(plain).filter(|text| !text.is_empty());
        let stem = match source.is_dir() {
            true => source.file_name(),
            false => source.file_stem(),
        };
        let stem = plain(&stem.unwrap_or_default().to_string_lossy());
        // Without anything better, the file's own name is the model's.
        let base = text("general.basename")
            .or_else(|| from_file?.base_name.clone())
            .or_else(|| text("general.name").map(|name| without_type(&name)))
            .or_else(|| Some(without_type(&stem)).filter(|s| !s.is_empty()))
            .unwrap_or_else(|| "model".into());
        let size = metadata.str("general.size_label").map(size_label).filter(|label| !label.is_empty());
        let size = size.or_else(|| from_file?.size_label.clone());
        let version = metadata.str("general.version").and_then(version).or_else(|| version(&from_file?.version));
        Naming {
            base,
            size: size.unwrap_or_else(|| rounded(parameters)),
            fine_tune: text("general.finetune").or_else(|| from_file?.fine_tune.clone()),
            version: version.unwrap_or_else(|| "v1.0".into()),
        }
    }

    /// The name of a file whose weights are of type `encoding`. It reads as what it was made of: other programs can tell
    /// its parts.
    pub fn file(&self, encoding: &str) -> String {
        let Naming { base, size, fine_tune, version } = self;
        let with = |fine_tune: &str| format!("{base}-{size}{fine_tune}-{version}-{encoding}.gguf");
        let full = with(&fine_tune.as_ref().map_or(String::new(), |text| format!("-{text}")));
        let reads = |name: &str| {
            parse_gguf_filename(name).is_some_and(|parts| {
                parts.encoding.as_deref() == Some(encoding) && parts.size_label.as_deref() == Some(size)
            })
        };
        // A fine-tune's name can look like something else, such as a second size.
        if reads(&full) { full } else { with("") }
    }
}

/// The parts of a file name that keeps to the convention.
fn parse(source: &Path) -> Option<GGUFComponents> {
    parse_gguf_filename(source.file_name()?.to_str()?)
}

/// `text` in the characters that the convention allows in a name: letters and digits with dashes between.
fn plain(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").chars().take(80).collect::<String>().trim_end_matches('-').into()
}

/// A file's name without what tells its form at the end.
fn without_type(stem: &str) -> String {
    let lower = stem.to_ascii_lowercase();
    let types = super::types::Target::ALL.iter().map(|t| format!("-{}", t.name.to_ascii_lowercase().replace('_', "-")));
    let ends = types.chain(["-hf".into(), "-gguf".into()]);
    let end = ends.filter(|end| lower.ends_with(end.as_str())).map(|end| end.len()).max().unwrap_or(0);
    stem[..stem.len() - end].to_owned()
}

/// `1.5B`, `8x7B` and the like; empty for anything else.
fn size_label(text: &str) -> String {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[number.len()..];
    let ends = number.as_bytes().first().zip(number.as_bytes().last());
    let digits = number.chars().all(|c| c.is_ascii_digit() || ".x".contains(c))
        && ends.is_some_and(|(a, b)| a.is_ascii_digit() && b.is_ascii_digit());
    if digits && unit.len() == 1 { text.to_owned() } else { String::new() }
}

/// `v1.2` from `1.2` or `v1.2`; `None` for anything else.
fn version(text: &str) -> Option<String> {
    let number = text.strip_prefix('v').unwrap_or(text);
    let well = number.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    well.then(|| format!("v{number}"))
}

/// A number of parameters as labels have it: `135M`, `1.1B`.
fn rounded(parameters: u64) -> String {
    const UNITS: [&str; 4] = ["K", "M", "B", "T"];
    let (mut value, mut unit) = (parameters as f64 / 1e3, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1e3;
        unit += 1;
    }
    match value {
        v if v >= 9.95 => format!("{v:.0}{}", UNITS[unit]),
        v => format!("{v:.1}{}", UNITS[unit]).replace(".0", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rushlight_models::checkpoint::Value;

    fn named(entries: &[(&str, &str)], source: &str, parameters: u64) -> String {
        let value = |(key, value): &(&str, &str)| (format!("general.{key}"), Value::String(value.to_string()));
        let metadata = Metadata(entries.iter().map(value).collect());
        let name = Naming::of(&metadata, Path::new(source), parameters).file("Q4_K_M");
        let parts = parse_gguf_filename(&name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(parts.encoding.as_deref(), Some("Q4_K_M"), "{name}");
        name
    }

    #[test]
    fn names_keep_to_the_convention() {
        let qwen = [("basename", "Qwen2.5-Coder"), ("size_label", "1.5B"), ("finetune", "Instruct")];
        assert_eq!(named(&qwen, "x.gguf", 1), "Qwen2-5-Coder-1.5B-Instruct-v1.0-Q4_K_M.gguf");
        let mixtral = [("basename", "Mixtral"), ("size_label", "8x7B"), ("version", "0.1")];
        assert_eq!(named(&mixtral, "x.gguf", 1), "Mixtral-8x7B-v0.1-Q4_K_M.gguf");
        // From the file's name, where that says it.
        assert_eq!(
            named(&[], "a/Hermes-2-Pro-Llama-3-8B-DPO-v1.2-F16.gguf", 1),
            "Hermes-2-Pro-Llama-3-8B-DPO-v1.2-Q4_K_M.gguf"
        );
        // From whatever there is.
        assert_eq!(named(&[("name", "My model: \u{1}2!")], "x.gguf", 134_515_008), "My-model-2-135M-v1.0-Q4_K_M.gguf");
        assert_eq!(named(&[], "tales-q8_0.gguf", 260_032), "tales-260K-v1.0-Q4_K_M.gguf");
        assert_eq!(named(&[], "a/tales-hf", 260_032), "tales-260K-v1.0-Q4_K_M.gguf");
        assert_eq!(named(&[("version", "../x"), ("size_label", "large")], "é.gguf", 1), "model-0K-v1.0-Q4_K_M.gguf");
        // A fine-tune that would be taken for a size goes.
        let odd = [("basename", "a"), ("size_label", "1B"), ("finetune", "2B-x")];
        named(&odd, "x.gguf", 1);
    }

    #[test]
    fn parameters_become_labels() {
        let labels = [1_100_048_384, 134_515_008, 260_032, 7_241_732_096, 70_553_706_496, 999_600_000].map(rounded);
        assert_eq!(labels, ["1.1B", "135M", "260K", "7.2B", "71B", "1B"]);
    }
}
