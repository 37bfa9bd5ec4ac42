use super::tests::shared;
use super::*;
use std::collections::HashMap;

/// Exports the tokenizer of `dir` and reads it back from the metadata.
fn there_and_back(dir: &Path) -> (Tokenizer, Tokenizer, export::Exported) {
    let own = Tokenizer::from_dir(dir).unwrap();
    let exported = export(dir, own.vocab_size() + 3).unwrap();
    let back = Tokenizer::from_gguf(&exported.metadata, Path::new("back.gguf")).unwrap();
    (own, back, exported)
}

/// Where the two tokenizers differ on `text`.
fn differences(name: &str, own: &Tokenizer, back: &Tokenizer, text: &str) -> Vec<String> {
    let modes = [Specials::AsText, Specials::Parse];
    let all = modes.into_iter().filter_map(|specials| {
        let (a, b) = (own.encode(text, specials).unwrap(), back.encode(text, specials).unwrap());
        (a != b).then(|| format!("{name} {specials:?} {text:?}: {a:?}, as GGUF {b:?}"))
    });
    all.collect()
}

#[test]
fn every_tokenizer_encodes_as_in_its_directory() {
    let Some(folder) = shared("fixtures/tokenizers") else { return };
    let (mut wrong, mut pre, mut cases) = (Vec::new(), HashMap::new(), 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let (own, back, exported) = there_and_back(&dir);
        assert_eq!(back.vocab_size(), own.vocab_size() + 3, "{name}");
        assert_eq!((own.bos(), own.eos()), (back.bos(), back.eos()), "{name}");
        assert_eq!((own.add_bos(), own.add_eos()), (back.add_bos(), back.add_eos()), "{name}");
        assert_eq!(own.end_of_turn().collect::<Vec<_>>(), back.end_of_turn().collect::<Vec<_>>(), "{name}");
        let expected: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
        for text in expected["cases"].as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap()) {
            // What GGUF's readers do otherwise: SentencePiece's pieces end at a NUL; marks include the unknown token;
            // the space before a text does not depend on how the text begins.
            let otherwise = match name.as_str() {
                "internlm2" => text.contains('\0'),
                "mistral-v3-hf" => text.starts_with([' ', '<']),
                name if name.ends_with("-spm") => text.contains("<unk>"),
                _ => false,
            };
            if !otherwise {
                cases += 1;
                wrong.extend(differences(&name, &own, &back, text));
            }
        }
        let say = |key: &str| exported.metadata.str(&format!("tokenizer.ggml.{key}")).unwrap_or_default().to_owned();
        println!("{name}: {} {} {:?}", say("model"), say("pre"), exported.notes);
        pre.insert(name, (say("model"), say("pre")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(cases >= 345);
    for (name, model, cut) in
        [("qwen2.5", "gpt2", "qwen2"), ("llama3-tiktoken", "gpt2", "llama-bpe"), ("yi", "llama", "default")]
    {
        assert_eq!(pre[name], (model.to_owned(), cut.to_owned()), "{name}");
    }
}

/// A directory with a byte-level tokenizer.json that cuts words by `pattern`: `changes` go into its model, `files` beside
/// it.
fn byte_level_dir(pattern: &str, changes: serde_json::Value, files: &[(&str, serde_json::Value)]) -> tempfile::TempDir {
    let mut vocab: serde_json::Map<_, _> = (0..=255u8).map(|b| (words::spell(&[b]), b.into())).collect();
    for (i, piece) in ["he", "ll", "hell", "hello"].into_iter().enumerate() {
        vocab.insert(piece.into(), (256 + i).into());
    }
    let mut file = serde_json::json!({
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "l l", "he ll", "hell o"]},
        "added_tokens": [
            {"id": 260, "content": "<end>", "special": true},
            {"id": 261, "content": "<|stop|>", "special": false},
            {"id": 262, "content": "<tool>", "special": false},
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
        ]},
        "decoder": {"type": "ByteLevel"},
    });
    for (key, value) in changes.as_object().unwrap() {
        file["model"][key] = value.clone();
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

#[test]
fn pre_tokenizers_are_known_by_what_they_do() {
    let none = || serde_json::json!({});
    let whole = || serde_json::json!({"ignore_merges": true});
    // The pattern of GPT-2, and the same as its authors write it today.
    let today = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    for (pattern, changes, name) in [
        (pre::GPT2, none(), "gpt-2"),
        (today, none(), "gpt-2"),
        // Every token here is what merges make of it, so that taking words whole changes nothing.
        (pre::GPT2, whole(), "gpt-2"),
        (pre::QWEN2, none(), "stablelm2"),
        (pre::LLAMA3, none(), "dbrx"),
        (pre::LLAMA3, whole(), "llama-bpe"),
    ] {
        let dir = byte_level_dir(pattern, changes, &[]);
        let (own, back, exported) = there_and_back(dir.path());
        assert_eq!(exported.metadata.str("tokenizer.ggml.pre"), Some(name));
        assert!(exported.notes.is_empty(), "{:?}", exported.notes);
        for text in ["hello hellhe's 12345!\n\n x", "<tool><end> <|stop|>hello"] {
            assert_eq!(own.encode(text, Specials::Parse).unwrap(), back.encode(text, Specials::Parse).unwrap());
        }
    }
    let dir = byte_level_dir(r"\w+|\W", none(), &[]);
    let error = export(dir.path(), 300).err().unwrap().to_string();
    assert!(error.contains("cannot be said in GGUF") && error.contains(r"\\w+|\\W"), "{error}");
    // A token that no merge makes is only found by taking words whole.
    let dir = byte_level_dir(pre::GPT2, serde_json::json!({"ignore_merges": true, "merges": ["h e"]}), &[]);
    assert!(export(dir.path(), 300).err().unwrap().to_string().contains("takes words that are tokens otherwise"));
}

#[test]
fn kinds_marks_and_rows() {
    let config = serde_json::json!({"bos_token": "<end>", "eos_token": {"content": "<end>"}, "pad_token": "<tool>",
        "unk_token": "hell", "add_bos_token": true, "chat_template": [
            {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]});
    let generation = serde_json::json!({"eos_token_id": [260, 262, 257, 256]});
    let dir = byte_level_dir(
        pre::GPT2,
        serde_json::json!({}),
        &[("tokenizer_config.json", config), ("generation_config.json", generation)],
    );
    let exported = export(dir.path(), 265).unwrap();
    let get = |key: &str| exported.metadata.u64(&format!("tokenizer.ggml.{key}_token_id"));
    assert_eq!(
        (get("bos"), get("eos"), get("padding"), get("unknown")),
        (Some(260), Some(260), Some(262), Some(259 - 1))
    );
    assert_eq!((get("eot"), get("eom")), (Some(256), Some(257)));
    assert!(exported.notes.len() == 1 && exported.notes[0].contains("ends at the tokens 262"), "{:?}", exported.notes);
    assert_eq!(exported.metadata.bool("tokenizer.ggml.add_bos_token"), Some(true));
    assert_eq!(exported.metadata.str("tokenizer.chat_template"), Some("plain"));
    assert_eq!(exported.metadata.str("tokenizer.chat_template.tool_use"), Some("tools"));
    let kinds: Vec<i64> = exported.metadata.array("tokenizer.ggml.token_type").unwrap().ints().skip(258).collect();
    assert_eq!(kinds, [1, 1, 3, 3, 4, 5, 5]);
    let tokens: Vec<&str> = exported.metadata.array("tokenizer.ggml.tokens").unwrap().strings().skip(260).collect();
    assert_eq!(tokens, ["<end>", "<|stop|>", "<tool>", "[PAD263]", "[PAD264]"]);
    // Rows without a token say nothing, here as there.
    let back = Tokenizer::from_gguf(&exported.metadata, Path::new("back.gguf")).unwrap();
    assert_eq!((back.decode(&[263, 262, 264], false), back.token_bytes(263)), ("<tool>".into(), vec![]));
    // Fewer rows than tokens: no text may need what has none; marks may lie beyond.
    let own = Tokenizer::from_dir(dir.path()).unwrap();
    assert!(own.check_rows(263).is_ok() && own.check_rows(1 << 20).is_ok());
    let what = own.check_rows(262).unwrap_err();
    assert!(what.contains("263 tokens but the model 262") && what.contains("token 262 (\"<tool>\")"), "{what}");
    assert!(own.check_rows(259).unwrap_err().contains("token 259"));
    // Fewer rows than tokens: what has no embedding goes, and the merges that would make it.
    let short = export(dir.path(), 258).unwrap();
    assert!(short.notes.iter().any(|n| n.contains("last 5 of the tokenizer's 263 tokens")), "{:?}", short.notes);
    assert_eq!(short.metadata.array("tokenizer.ggml.merges").unwrap().strings().collect::<Vec<_>>(), ["h e", "l l"]);
    let back = Tokenizer::from_gguf(&short.metadata, Path::new("short.gguf")).unwrap();
    assert_eq!((back.vocab_size(), back.bos(), back.add_bos()), (258, None, false));
}

#[test]
fn unigram_models_keep_their_scores() {
    let mut vocab: Vec<(String, f64)> = vec![("<unk>".into(), 0.0)];
    vocab.extend(
        [("▁", -3.0), ("a", -2.5), ("b", -2.5), ("ab", -4.0), ("▁ab", -4.5), ("▁a", -4.25)].map(|(p, s)| (p.into(), s)),
    );
    let mut file = serde_json::json!({
        "model": {"type": "Unigram", "vocab": vocab, "unk_id": 0},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let (own, back, exported) = there_and_back(dir.path());
    assert_eq!(exported.metadata.str("tokenizer.ggml.model"), Some("t5"));
    assert!(exported.notes.len() == 1 && exported.notes[0].ends_with("begins with one"), "{:?}", exported.notes);
    for text in ["ab a b", "abab", "aéb", "b  a"] {
        assert_eq!(own.encode(text, Specials::AsText).unwrap(), back.encode(text, Specials::AsText).unwrap(), "{text}");
    }
    // A piece that reaches over the place where words are cut would be found by readers that do not cut.
    file["model"]["vocab"].as_array_mut().unwrap().push(serde_json::json!(["a▁b", -1.0]));
    std::fs::write(&path, file.to_string()).unwrap();
    assert!(export(dir.path(), 8).err().unwrap().to_string().contains("Metaspace"));
    file["normalizer"] = serde_json::json!({"type": "Lowercase"});
    std::fs::write(&path, file.to_string()).unwrap();
    assert!(export(dir.path(), 8).err().unwrap().to_string().contains("Lowercase"));
}
