use super::*;
use crate::checkpoint::{Array, Bytes, Value, ValueType};
use proptest::prelude::*;
use std::path::PathBuf;

/// Reference data that is not part of the repository; `None`, saying so, where it is absent.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

fn strings(list: &[&str]) -> Value {
    let mut data = Vec::new();
    for s in list {
        data.extend((s.len() as u64).to_le_bytes());
        data.extend(s.bytes());
    }
    Value::Array(Array { kind: ValueType::String, count: list.len(), data: Bytes::new(data) })
}

fn ints(list: &[i32]) -> Value {
    let data: Vec<u8> = list.iter().flat_map(|n| n.to_le_bytes()).collect();
    Value::Array(Array { kind: ValueType::I32, count: list.len(), data: Bytes::new(data) })
}

fn floats(list: &[f32]) -> Value {
    let data: Vec<u8> = list.iter().flat_map(|n| n.to_le_bytes()).collect();
    Value::Array(Array { kind: ValueType::F32, count: list.len(), data: Bytes::new(data) })
}

fn metadata(entries: &[(&str, Value)]) -> Metadata {
    Metadata(entries.iter().map(|(k, v)| (format!("tokenizer.ggml.{k}"), v.clone())).collect())
}

fn text(s: &str) -> Value {
    Value::String(s.into())
}

fn open(metadata: &Metadata) -> Result<Tokenizer> {
    Tokenizer::from_gguf(metadata, Path::new("test.gguf"))
}

/// A byte-level vocabulary: the 256 bytes, three merges, and the marks of chatml.
pub fn byte_level() -> Tokenizer {
    open(&byte_level_metadata()).unwrap()
}

fn byte_level_metadata() -> Metadata {
    let mut tokens: Vec<String> = (0..=255u8).map(|b| words::spell(&[b])).collect();
    tokens.extend(["he", "ll", "hell", "<|im_start|>", "<|im_end|>", "<think>"].map(String::from));
    let mut kinds = vec![1; 259];
    kinds.extend([3, 3, 4]);
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    metadata(&[
        ("model", text("gpt2")),
        ("pre", text("gpt-2")),
        ("tokens", strings(&tokens)),
        ("token_type", ints(&kinds)),
        ("merges", strings(&["h e", "l l", "he ll"])),
        ("bos_token_id", Value::Unsigned(259)),
        ("eos_token_id", Value::Unsigned(260)),
    ])
}

/// A SentencePiece vocabulary with byte tokens and a few pieces.
fn pieces(model: &str, byte_fallback: bool) -> Tokenizer {
    open(&pieces_metadata(model, byte_fallback)).unwrap()
}

fn pieces_metadata(model: &str, byte_fallback: bool) -> Metadata {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    let mut kinds = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    if byte_fallback {
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
        kinds.extend([6; 256]);
        scores.extend([0.0; 256]);
    }
    for (k, piece) in ["▁", "a", "b", "ab", "▁ab", "<", "s", ">", "<s"].into_iter().enumerate() {
        tokens.push(piece.into());
        kinds.push(1);
        scores.push(-(10.0 - k as f32));
    }
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    metadata(&[
        ("model", text(model)),
        ("tokens", strings(&tokens)),
        ("token_type", ints(&kinds)),
        ("scores", floats(&scores)),
    ])
}

fn spelled(t: &Tokenizer, text: &str, specials: Specials) -> Vec<String> {
    t.encode(text, specials).unwrap().iter().map(|&id| t.piece(id).unwrap().to_string()).collect()
}

#[test]
fn byte_level_merges_in_order_of_rank() {
    let t = byte_level();
    assert_eq!(spelled(&t, "hello hell", Specials::AsText), ["hell", "o", "Ġ", "hell"]);
    assert_eq!(t.decode(&t.encode("héllo\n", Specials::AsText).unwrap(), true), "héllo\n");
}

#[test]
fn marks_count_only_where_asked() {
    let t = byte_level();
    let text = "a<|im_end|>b";
    assert_eq!(spelled(&t, text, Specials::Parse), ["a", "<|im_end|>", "b"]);
    assert_eq!(t.decode(&t.encode(text, Specials::Parse).unwrap(), true), "ab");
    let ids = t.encode(text, Specials::AsText).unwrap();
    assert!(ids.iter().all(|&id| !t.is_special(id)));
    assert_eq!(t.decode(&ids, true), text);
    // A user-defined token is text, and always whole.
    assert_eq!(spelled(&t, "<think>", Specials::AsText), ["<think>"]);
    assert!(t.is_end_of_turn(260) && !t.is_end_of_turn(259));
}

#[test]
fn sentencepiece_joins_by_score_and_falls_back_to_bytes() {
    let t = pieces("llama", true);
    assert_eq!(spelled(&t, "ab aé", Specials::AsText), ["▁ab", "▁", "a", "<0xC3>", "<0xA9>"]);
    assert_eq!(t.decode(&t.encode("ab aé", Specials::AsText).unwrap(), true), "ab aé");
    // "<s>" in text is letters, and "<0x41>" is no byte.
    assert_eq!(spelled(&t, "<s>", Specials::AsText), ["▁", "<s", ">"]);
    assert_eq!(t.decode(&t.encode("<0x41>", Specials::AsText).unwrap(), true), "<0x41>");
    assert_eq!(t.encode("<s>ab", Specials::Parse).unwrap()[0], 1);
    let t = pieces("llama", false);
    assert_eq!(spelled(&t, "aéüb", Specials::AsText), ["▁", "a", "<unk>", "b"]);
}

#[test]
fn unigram_takes_the_best_sum() {
    let t = pieces("t5", false);
    assert_eq!(spelled(&t, "abéé", Specials::AsText), ["▁ab", "<unk>"]);
    let t = pieces("t5", true);
    assert_eq!(spelled(&t, "aé", Specials::AsText), ["▁", "a", "<0xC3>", "<0xA9>"]);
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    let good = [("model", text("llama")), ("tokens", strings(&["<unk>", "a"])), ("scores", floats(&[0.0, -1.0]))];
    let with = |key: &str, value: Value| {
        let mut m = metadata(&good);
        m.0.insert(format!("tokenizer.ggml.{key}"), value);
        match open(&m) {
            Ok(_) => panic!("{key} was accepted"),
            Err(e) => e.to_string(),
        }
    };
    open(&metadata(&good)).unwrap();
    assert!(with("model", text("bert")).contains("WordPiece"));
    assert!(with("tokens", strings(&[])).contains("empty"));
    assert!(with("tokens", ints(&[1, 2])).contains("empty"));
    assert!(with("scores", floats(&[0.0])).contains("1 scores for 2 tokens"));
    assert!(with("token_type", ints(&[1])).contains("1 token types for 2 tokens"));
    assert!(with("token_type", ints(&[1, 77])).contains("unknown type 77"));
    assert!(with("bos_token_id", Value::Unsigned(2)).contains("bos_token_id is 2"));
    assert!(with("eos_token_id", Value::Unsigned(u64::MAX)).contains("eos_token_id"));
    for piece in ["<0x-1>", "<0xZZ>", "<0x100>", "byte"] {
        let mut m = metadata(&good);
        m.0.insert("tokenizer.ggml.tokens".into(), strings(&["<unk>", piece]));
        m.0.insert("tokenizer.ggml.token_type".into(), ints(&[2, 6]));
        assert!(open(&m).err().unwrap().to_string().contains(piece));
    }
    let bpe = |merge: &str, pre: &str| {
        let m = metadata(&[
            ("model", text("gpt2")),
            ("pre", text(pre)),
            ("tokens", strings(&["a", "b", "ab", "a", ""])),
            ("merges", strings(&[merge])),
        ]);
        open(&m).map(|t| t.encode("ab", Specials::Parse).unwrap()).map_err(|e| e.to_string())
    };
    assert_eq!(bpe("a b", "default"), Ok(vec![2]));
    assert!(bpe("a c", "default").unwrap_err().contains("\"c\""));
    assert!(bpe("b a", "default").unwrap_err().contains("\"ba\""));
    assert!(bpe("ab", "default").unwrap_err().contains("merge 0"));
    assert!(bpe("a b", "no-such").unwrap_err().contains("no-such"));
}

#[test]
fn broken_tokenizer_json_is_refused_by_name() {
    let path = Path::new("somewhere/tokenizer.json");
    let read = |s: &str| json::read(s.as_bytes(), path).map(|_| ()).map_err(|e| e.to_string());
    let good = r#"{"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}"#;
    read(good).unwrap();
    read(&good.replace(r#""a b""#, r#"["a","b"]"#)).unwrap();
    for (old, new, told) in [
        ("BPE", "WordPiece", "WordPiece"),
        (r#""a b""#, r#""a c""#, "\"c\""),
        (r#""a b""#, r#""ab""#, "merge"),
        (r#""a b""#, r#"["a"]"#, "two tokens"),
        (r#""ab":2"#, r#""ab":4294967295"#, "4294967295"),
        (r#""ab":2"#, r#""ab":1"#, "both have the id 1"),
        (r#""ab":2"#, r#""ab":-1"#, "not a tokenizer"),
        (r#"{"model""#, r#"{"added_tokens":[{"id":0,"content":"x"}],"model""#, "\"x\""),
        (r#"{"model""#, r#"{"decoder":{"type":"CTC"},"model""#, "CTC"),
        (r#"{"model""#, r#"{"pre_tokenizer":{"type":"FixedLength","length":0},"model""#, "length 0"),
        (
            r#"{"model""#,
            r#"{"pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated","invert":false},"model""#,
            "pre_tokenizer",
        ),
        (
            r#"{"model""#,
            r#"{"normalizer":{"type":"Precompiled","precompiled_charsmap":"/////w=="},"model""#,
            "charsmap",
        ),
        (r#"{"model""#, r#"["model""#, "not a tokenizer"),
    ] {
        let broken = good.replacen(old, new, 1);
        assert_ne!(broken, good);
        let e = read(&broken).expect_err(&broken);
        assert!(e.contains(told) && e.contains("somewhere/tokenizer.json"), "{e}");
    }
    // A normaliser that doubles the text again and again is stopped.
    let double = r#"{"type":"Replace","pattern":{"String":"a"},"content":"aa"}"#;
    let bomb = format!(r#"{{"type":"Sequence","normalizers":[{}]}}"#, vec![double; 60].join(","));
    let t = json::read(good.replacen(r#"{"model""#, &format!(r#"{{"normalizer":{bomb},"model""#), 1).as_bytes(), path);
    assert!(t.unwrap().encode("a", Specials::Parse).is_err());
}

const TOKENIZER_JSON: &str = r#"{
        "added_tokens": [{"id":5,"content":"<end>","special":true,"lstrip":true},{"id":4,"content":"Xy","normalized":true}],
        "normalizer": {"type":"Sequence","normalizers":[{"type":"Lowercase"}]},
        "pre_tokenizer": {"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":true},
        "post_processor": {"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<end>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{}},
        "decoder": {"type":"Metaspace","replacement":"▁","prepend_scheme":"first"},
        "model": {"type":"BPE","unk_token":"?","vocab":{"▁":0,"a":1,"▁a":2,"?":3},"merges":["▁ a"]}}"#;

#[test]
fn tokenizer_json_steps_and_marks() {
    let t = json::read(TOKENIZER_JSON.as_bytes(), Path::new("t.json")).unwrap();
    assert_eq!(t.encode("A A", Specials::Parse).unwrap(), [2, 2]);
    assert_eq!(t.encode("a <end>a", Specials::Parse).unwrap(), [2, 5, 1]);
    // Tokens that are matched after normalisation are found however the text is written.
    assert_eq!(t.encode("XYxy", Specials::Parse).unwrap(), [4, 4]);
    assert_eq!((t.bos(), t.add_bos(), t.is_special(5)), (Some(5), true, true));
    assert_eq!(t.decode(&[2, 5, 2], false), "a<end> a");
    assert_eq!(t.decode_continued(&[2, 5, 2], true), " a a");
    assert!(!t.encode("a<end>", Specials::AsText).unwrap().contains(&5));
}

/// A SentencePiece model of six pieces.
fn sentencepiece_model() -> Vec<u8> {
    let mut model = Vec::new();
    for (piece, kind) in [("<unk>", 2u8), ("<s>", 3), ("</s>", 3), ("▁a", 1), ("a", 1), ("▁", 1)] {
        let mut inner = vec![0x0A, piece.len() as u8];
        inner.extend(piece.bytes());
        inner.extend([0x15, 0, 0, 0, 0, 0x18, kind]);
        model.extend([0x0A, inner.len() as u8]);
        model.extend(inner);
    }
    model.extend([0x12, 2, 0x18, 2]);
    model
}

#[test]
fn truncated_sentencepiece_and_tiktoken_files_are_refused() {
    let model = sentencepiece_model();
    let path = Path::new("tokenizer.model");
    let m = sentencepiece::read(&model, path).unwrap();
    assert_eq!((m.vocabulary.len(), m.unigram, m.bos, m.eos), (6, false, Some(1), Some(2)));
    let mut refused = 0;
    for cut in 0..model.len() {
        if let Err(e) = sentencepiece::read(&model[..cut], path) {
            assert!(e.to_string().starts_with("tokenizer.model: "));
            refused += 1;
        }
    }
    // Where a whole field ends, what remains is a smaller model.
    assert!(refused >= model.len() - 8, "{refused}");
    for lines in ["", "IQ== 1\n", "IQ== 0\nIg==\n", "IQ== 0\n", "?? 0\n"] {
        assert!(tiktoken::read(lines.as_bytes(), path).is_err());
    }
    assert!(tiktoken::is_one(b"IQ== 0\nIg== 1\n") && !tiktoken::is_one(&model));
}

proptest! {
    #[test]
    fn text_comes_back_and_never_becomes_a_mark(s in "(<\\|im_end\\|>|<s>|</s>|hello|\\PC| |\n)*") {
        // SentencePiece's own mark for a space comes back as one.
        prop_assume!(!s.contains('▁'));
        for t in [byte_level(), pieces("llama", true), pieces("t5", true)] {
            let ids = t.encode(&s, Specials::AsText).unwrap();
            prop_assert!(ids.iter().all(|&id| !t.is_special(id)));
            prop_assert_eq!(t.decode(&ids, true), s.as_str());
            let mut stream = t.stream();
            let mut out = String::new();
            for &id in &ids {
                out += &stream.push(id);
            }
            out += &stream.finish();
            prop_assert_eq!(out, t.decode_continued(&ids, true));
        }
    }

    #[test]
    fn any_ids_stream_to_what_they_decode_to(ids in prop::collection::vec(0u32..300, 0..40)) {
        for t in [byte_level(), pieces("llama", true)] {
            let mut stream = t.stream();
            let mut out: String = ids.iter().map(|&id| stream.push(id)).collect();
            out += &stream.finish();
            prop_assert_eq!(out, t.decode_continued(&ids, true));
        }
    }
}

/// The cases of a folder of `fixtures/tokenizers`, as its own library tokenizes them.
fn golden(dir: &Path) -> (usize, Vec<String>) {
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let t = Tokenizer::open(dir).unwrap();
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let cases = expected["cases"].as_array().unwrap();
    let mut wrong = Vec::new();
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let want = ["ids_qwen", "ids_ordinary", "ids"].iter().map(|k| &case[k]).find(|v| !v.is_null()).unwrap();
        let ids = t.encode(text, Specials::Native).unwrap();
        if serde_json::json!(ids) != *want {
            wrong.push(format!("{name} {text:?}: {ids:?}, not {want}"));
        }
        let plain = t.encode(text, Specials::AsText).unwrap();
        if plain.iter().any(|&id| t.is_special(id) && Some(id) != t.id("<unk>")) {
            wrong.push(format!("{name} {text:?}: text became a special token"));
        }
        let back = t.decode(&ids, false);
        if case["decoded"].as_str().is_some_and(|d| d == text) && case.get("ids_qwen").is_none() && back != text {
            wrong.push(format!("{name} {text:?} comes back as {back:?}"));
        }
    }
    (cases.len(), wrong)
}

#[test]
fn tokenizer_goldens() {
    let Some(folder) = shared("fixtures/tokenizers") else { return };
    let mut dirs: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    let results: Vec<_> = dirs.iter().map(|d| golden(d)).collect();
    let wrong: Vec<_> = results.iter().flat_map(|r| &r.1).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(results.iter().map(|r| r.0).sum::<usize>() >= 300);
}

#[test]
fn gguf_vocabulary_goldens() {
    let Some(folder) = shared("fixtures/ggml-vocab") else { return };
    let mut cases = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Some(gguf) = path.to_str().and_then(|p| p.strip_suffix(".inp")) else { continue };
        let t = Tokenizer::open(Path::new(gguf)).unwrap();
        let texts = std::fs::read_to_string(&path).unwrap();
        let want = std::fs::read_to_string(format!("{gguf}.out")).unwrap();
        for (text, ids) in texts.split("\n__ggml_vocab_test__\n").zip(want.split('\n')) {
            let ids: Vec<u32> = ids.split_whitespace().map(|n| n.parse().unwrap()).collect();
            assert_eq!(t.encode(text, Specials::Native).unwrap(), ids, "{gguf} {text:?}");
            cases += 1;
        }
    }
    assert!(cases >= 300);
}

#[test]
#[ignore = "writes fuzz/corpus, for scripts/fuzz.sh"]
fn write_fuzz_seeds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let vocabularies = [byte_level_metadata(), pieces_metadata("llama", false), pieces_metadata("t5", true)];
    std::fs::create_dir_all(corpus.join("tokenizer")).unwrap();
    for (k, metadata) in vocabularies.iter().enumerate() {
        let path = corpus.join(format!("tokenizer/gguf-{k}"));
        crate::checkpoint::gguf::Writer::create(&path, metadata, &[]).unwrap().finish().unwrap();
        Tokenizer::open(&path).unwrap();
    }
    let unigram = r#"{"model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0],["a",-1.5],["ab",-2]]}}"#;
    let files = [TOKENIZER_JSON.as_bytes(), unigram.as_bytes(), &sentencepiece_model(), b"IQ== 0\nIg== 1\n"];
    for (k, file) in files.iter().enumerate() {
        std::fs::write(corpus.join(format!("tokenizer/file-{k}")), file).unwrap();
    }
    std::fs::create_dir_all(corpus.join("template")).unwrap();
    for name in ChatTemplate::builtin_names() {
        std::fs::write(corpus.join("template").join(name), template::builtin_source(name).unwrap()).unwrap();
    }
}
