//! safetensors files and Hugging Face directories that lie, stop short or do not belong together: each is refused in
//! one line that names the fault.

mod builder;

use builder::{safetensors as file, vectors};
use rushlight_models::checkpoint::{Bytes, Checkpoint, huggingface, safetensors};
use rushlight_quant::formats::Format;
use std::path::Path;

fn parse(bytes: Vec<u8>) -> Result<safetensors::Safetensors, String> {
    safetensors::parse(Bytes::new(bytes), Path::new("m.safetensors")).map_err(|error| error.to_string())
}

/// Asserts that the file `bytes` is refused in one line that has all of `words` and names the file.
#[track_caller]
fn refused(bytes: Vec<u8>, words: &[&str]) {
    let error = parse(bytes).unwrap_err();
    assert!(error.starts_with("m.safetensors: ") && error.lines().count() == 1, "{error}");
    for word in words {
        assert!(error.contains(word), "'{word}' is not in: {error}");
    }
}

/// A header entry.
fn entry(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

fn of(entries: &[String], data: usize) -> Vec<u8> {
    file(&format!("{{{}}}", entries.join(",")), data)
}

#[test]
fn a_right_file_is_read() {
    let entries = [
        r#""__metadata__":{"format":"pt"}"#.to_owned(),
        // Out of order, as older writers leave them.
        entry("c", "I32", "[2]", 24, 32),
        entry("b", "BF16", "[2,3]", 8, 20),
        entry("a", "F32", "[2]", 0, 8),
        entry("s", "F16", "[]", 20, 22),
        entry("none", "F32", "[0,3]", 22, 22),
        entry("odd", "X9", "[7]", 22, 24),
    ];
    let read = parse(of(&entries, 32)).unwrap();
    assert_eq!(read.metadata["format"], "pt");
    let names: Vec<_> = read.tensors.iter().map(|t| (t.info.name.as_str(), t.info.format, t.data.len())).collect();
    assert_eq!(
        names,
        [("a", Format::F32, 8), ("b", Format::BF16, 12), ("s", Format::F16, 2), ("none", Format::F32, 0)]
    );
    assert_eq!((&read.tensors[1].info.shape[..], read.tensors[1].data[0]), (&[2, 3][..], 8));
    let raw: Vec<_> = read.raw.iter().map(|t| (t.name.as_str(), t.dtype.as_str(), t.data[0])).collect();
    assert_eq!(raw, [("odd", "X9", 22), ("c", "I32", 24)]);
}

#[test]
fn every_truncation_is_refused() {
    let whole = vectors(&[("a", 4), ("b", 8)]);
    for len in 0..whole.len() {
        let error = parse(whole[..len].to_vec()).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let (expected, actual) = (whole.len().to_string(), (whole.len() - 1).to_string());
    refused(whole[..whole.len() - 1].to_vec(), &["download it again", &expected, &actual]);
    refused([&whole[..], &[0]].concat(), &["truncated or corrupt"]);
}

#[test]
fn header_lengths() {
    for length in [100u64, 1 << 20, 1 << 40, 1 << 63, u64::MAX - 7, u64::MAX] {
        refused([&length.to_le_bytes()[..], b"{}"].concat(), &["the file has 10", "download it again"]);
    }
    let mut long = 100_000_001u64.to_le_bytes().to_vec();
    long.resize(100_000_009, b' ');
    refused(long, &["100000001 bytes", "allowed"]);
    refused(b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["git lfs pull"]);
    refused(b"<html><body>404".to_vec(), &["web page"]);
    refused(b"PK\x03\x04\0\0\0\0\0".to_vec(), &["PyTorch"]);
}

#[test]
fn headers_that_are_not_right() {
    for json in ["", " {}", "[]", "{", "{}}", "nonsense", "{\"a\":1}", "{\"a\":{}}", "{\"a\"", "{\"\u{0}\":1}"] {
        refused(file(json, 0), &["header"]);
    }
    refused([&4u64.to_le_bytes()[..], b"{\"\xff\"}"].concat(), &["header"]);
    let a = entry("a", "F32", "[2]", 0, 8);
    refused(of(&[a.clone(), entry("a", "F32", "[2]", 8, 16)], 16), &["'a'", "twice"]);
    refused(of(&[a.clone(), entry("a", "I32", "[2]", 8, 16)], 16), &["'a'", "twice"]);
    let meta = r#""__metadata__":{"x":"y"}"#.to_owned();
    refused(of(&[meta.clone(), meta], 0), &["__metadata__", "twice"]);
    refused(of(&[r#""__metadata__":{"x":"y","x":"z"}"#.to_owned()], 0), &["'x'", "twice"]);
    refused(of(&[r#""__metadata__":{"x":1}"#.to_owned()], 0), &["header"]);
    refused(file(r#"{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#, 8), &["dtype"]);
    refused(file(r#"{"a":{"dtype":"F32","shape":[2]}}"#, 8), &["data_offsets"]);
    refused(file(r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8), &["header"]);
    refused(file(r#"{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}"#, 8), &["header"]);
    refused(file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}"#, 8), &["header"]);
    refused(file(&format!(r#"{{"a":{}"#, "[".repeat(100_000)), 0), &["header"]);
    refused(file(&format!(r#"{{"a":{{"shape":{}"#, "[".repeat(100_000)), 0), &["header"]);
    refused(of(&[entry("a", "F32", "[1,1,1,1,1,1,1,1,2]", 0, 8)], 8), &["at most 8 dimensions"]);
}

#[test]
fn layouts() {
    let (a, b) = (entry("a", "F32", "[2]", 0, 8), |begin, end| entry("b", "F32", "[2]", begin, end));
    assert!(parse(of(&[a.clone(), b(8, 16)], 16)).is_ok());
    refused(of(&[a.clone(), b(4, 12)], 12), &["'a'", "'b'", "overlap"]);
    refused(of(&[a.clone(), b(0, 8)], 8), &["overlap"]);
    refused(of(&[a.clone(), b(12, 20)], 20), &["'b'", "no tensor"]);
    refused(of(&[a.clone(), b(16, 8)], 16), &["'b'", "before it begins"]);
    refused(of(&[a.clone(), b(8, 17)], 17), &["'b'", "9 bytes", "F32 [2]"]);
    refused(of(&[entry("a", "F16", "[2]", 0, 8)], 8), &["'a'", "F16 [2]"]);
    refused(of(&[entry("a", "F4", "[3]", 0, 1)], 1), &["'a'", "F4 [3]"]);
    refused(of(&[a.clone(), b(8, 16)], 12), &["download it again"]);
    let far = u64::MAX;
    refused(of(&[entry("a", "X", "[2]", 0, far)], 8), &["truncated or corrupt"]);
    refused(of(&[entry("a", "F32", "[2]", 0, far)], 8), &["'a'"]);
    for shape in
        ["[9223372036854775808,2]", "[4294967296,4294967296]", "[18446744073709551615]", "[1152921504606846976]"]
    {
        refused(of(&[entry("a", "F32", shape, 0, 8)], 8), &["'a'"]);
        refused(of(&[entry("a", "F32", shape, 0, 0)], 0), &["'a'"]);
    }
    refused(of(&[entry("a", "F32", "[18446744073709551616]", 0, 8)], 8), &["header"]);
}

/// A directory to put a model in.
struct Model(tempfile::TempDir);

impl Model {
    fn new() -> Model {
        Model(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, contents: impl AsRef<[u8]>) -> &Model {
        std::fs::write(self.0.path().join(name), contents).unwrap();
        self
    }

    fn open(&self) -> Result<Checkpoint, String> {
        Checkpoint::open(self.0.path()).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let error = self.open().unwrap_err();
        assert!(error.starts_with(self.0.path().to_str().unwrap()) && error.lines().count() == 1, "{error}");
        for word in words {
            assert!(error.contains(word), "'{word}' is not in: {error}");
        }
    }
}

#[test]
fn what_a_directory_lacks() {
    let model = Model::new();
    model.refused(&["neither config.json nor weights"]);
    model.put("model.safetensors", vectors(&[("a", 2)])).refused(&["config.json is missing"]);
    model.put("config.json", "{}");
    assert_eq!(model.open().unwrap().tensors()[0].name, "a");
    model.put("generation_config.json", "{\"temperature\":0.6}");
    let opened = model.open().unwrap();
    let rushlight_models::checkpoint::Kind::HuggingFace { generation_config, .. } = opened.kind() else { panic!() };
    assert_eq!(generation_config.as_ref().unwrap()["temperature"], 0.6);
    model.put("generation_config.json", "{\n\"temperature\":\n").refused(&["generation_config.json", "line 3"]);

    let file = model.0.path().join("model.safetensors");
    assert!(Checkpoint::open(&file).unwrap_err().to_string().contains("name the directory"));

    let bare = || {
        let model = Model::new();
        model.put("config.json", "{}");
        model
    };
    bare().refused(&["no weights", "model.safetensors"]);
    bare().put("pytorch_model.bin", "PK").refused(&["pytorch_model.bin", "truncated"]);
    bare().put("pytorch_model-00001-of-00002.bin", "PK").refused(&["pytorch_model.bin.index.json is missing"]);
    bare().put("model-00001-of-00002.safetensors", "x").refused(&["model.safetensors.index.json is missing"]);
    bare().put("other.safetensors", "x").refused(&["other.safetensors"]);
    Model::new().put("adapter_config.json", "{}").put("adapter_model.safetensors", "x").refused(&["--adapter"]);
    bare().put("model.safetensors", "").refused(&["model.safetensors", "empty"]);
    let whole = vectors(&[("a", 2)]);
    bare().put("model.safetensors", &whole[..whole.len() - 1]).refused(&["model.safetensors", "download it again"]);
}

#[test]
fn configurations() {
    let model = Model::new();
    model.put("model.safetensors", vectors(&[("a", 2)]));
    model.put("config.json", "{\n  \"hidden_size\": 64,\n  \"num_").refused(&[
        "config.json",
        "line 3",
        "download it again",
    ]);
    model.put("config.json", "").refused(&["config.json", "line 1"]);
    model.put("config.json", "[1]").refused(&["config.json", "not a JSON object"]);
    model.put("config.json", b"{\"a\":\"\xff\"}").refused(&["config.json", "not valid JSON"]);
    model.put("config.json", "[".repeat(1 << 20)).refused(&["config.json"]);
    model.put("config.json", "{\"a\":".repeat(90_000)).refused(&["config.json", "line 1"]);
    model.put("config.json", format!("{{\"a\":[{}0]}}", "0,".repeat(500_000))).refused(&["100000 values"]);
    model.put("config.json", " ".repeat((16 << 20) + 1)).refused(&["config.json", "more than the 16777216"]);
}

const INDEX: &str = "model.safetensors.index.json";
const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

fn index(places: &[(&str, &str)]) -> String {
    let places = places.iter().map(|(tensor, shard)| format!("\"{tensor}\":\"{shard}\"")).collect::<Vec<_>>();
    format!("{{\"metadata\":{{\"total_size\":1}},\"weight_map\":{{{}}}}}", places.join(","))
}

#[test]
fn shards() {
    let model = Model::new();
    model.put("config.json", "{}").put(INDEX, index(&[("b", TWO), ("a", ONE), ("c", TWO)]));
    model.refused(&[ONE, "missing", "download"]);
    model.put(ONE, vectors(&[("a", 2)]));
    model.refused(&[TWO, "one of 2 shards"]);
    model.put(TWO, vectors(&[("c", 3), ("b", 1)]));
    let whole = model.open().unwrap();
    assert_eq!(whole.tensors().iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "c", "b"]);
    assert_eq!(whole.tensor("c").unwrap().data.len(), 12);
    assert_eq!(whole.bytes(), 24);

    model.put(TWO, vectors(&[("c", 3)])).refused(&[TWO, "'b'", INDEX, "missing"]);
    model.put(TWO, vectors(&[("c", 3), ("b", 1), ("x", 1)])).refused(&[TWO, "'x'", INDEX, "does not have it"]);
    model.put(TWO, vectors(&[("c", 3), ("a", 2)])).refused(&[TWO, "'a'", ONE]);
    let whole = vectors(&[("c", 3), ("b", 1)]);
    model.put(TWO, &whole[..whole.len() - 2]).refused(&[TWO, "download it again"]);
    model.put(TWO, whole);
    assert!(model.open().is_ok());

    model.put(INDEX, index(&[("a", ONE), ("a", TWO)])).refused(&["'a'", "twice"]);
    for escape in ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a/", "./a", "a\\\\b"] {
        model.put(INDEX, index(&[("a", escape)])).refused(&[INDEX, "not a plain file name"]);
    }
    model.put(INDEX, "{\"metadata\":{}}").refused(&[INDEX, "weight_map"]);
    model.put(INDEX, "{\n\"weight_map\": {").refused(&[INDEX, "line 2"]);
    model.put(INDEX, "{\"weight_map\":{\"a\":1}}").refused(&[INDEX]);
    model.put(INDEX, "{\"weight_map\":[]}").refused(&[INDEX]);
    model.put(INDEX, index(&[])).open().unwrap();
}

#[test]
fn an_index_is_sorted() {
    let text = index(&[("z", "s2"), ("a", "s1"), ("m", "s2")]);
    let index = huggingface::parse_index(text.as_bytes(), Path::new("i.json")).unwrap();
    assert_eq!(index.shards, ["s1", "s2"]);
    assert_eq!(index.tensors, [("a".to_owned(), 0), ("m".to_owned(), 1), ("z".to_owned(), 1)]);
}
