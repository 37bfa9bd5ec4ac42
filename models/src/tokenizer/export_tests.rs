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
