//! Tokenizers of GGUF files as the files of a Hugging Face directory: `tokenizer.json` and what goes with it.

use super::bpe::{Merges, Order};
use super::sentencepiece::Whitespace;
use super::vocabulary::{Kind, Vocabulary};
use super::{Added, Model, Pipeline, Tokenizer};
use crate::checkpoint::Metadata;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// Names and contents of the files that say what the `metadata` of the GGUF file `path` say of its tokenizer and chat
/// template. None where it has no tokenizer.
///
/// # Errors
/// When the metadata are broken, or its tokenizer does something for which tokenizer.json has no word.
pub(crate) fn files(metadata: &Metadata, path: &Path) -> Result<Vec<(&'static str, Value)>> {
    if metadata.str("tokenizer.ggml.model").is_none_or(|m| matches!(m, "none" | "no_vocab")) {
        return Ok(Vec::new());
    }
    let tokenizer = Tokenizer::from_gguf(metadata, path)?;
    let cannot = |what: &str| Error::file(path, format!("its tokenizer cannot be written as tokenizer.json: {what}"));
    let file = tokenizer.json().map_err(cannot)?;
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.vocabulary.piece(id));
    let named = |key: &str| {
        let id = metadata.u64(&format!("tokenizer.ggml.{key}_token_id")).and_then(|id| u32::try_from(id).ok());
        id.filter(|id| (*id as usize) < tokenizer.vocabulary.len())
    };
    let unknown = named("unknown").or(tokenizer.unknown());
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos(),
        "add_eos_token": tokenizer.add_eos(),
        "clean_up_tokenization_spaces": false,
        "model_input_names": ["input_ids", "attention_mask"],
    });
    let marks = [("bos", tokenizer.bos), ("eos", tokenizer.eos), ("unk", unknown), ("pad", named("padding"))];
    for (key, id) in marks {
        if let Some(piece) = name(id) {
            config[format!("{key}_token")] = piece.into();
        }
    }
    if let Some(template) = metadata.str("tokenizer.chat_template") {
        config["chat_template"] = match metadata.str("tokenizer.chat_template.tool_use") {
            None => template.into(),
            Some(tools) => json!([
                {"name": "default", "template": template},
                {"name": "tool_use", "template": tools},
            ]),
        };
    }
    let mut generation = json!({});
    if let Some(bos) = tokenizer.bos {
        generation["bos_token_id"] = bos.into();
    }
    // An answer ends where the text does, and at the marks that end a turn.
    let mut ends: Vec<u32> = tokenizer.eos.into_iter().chain(tokenizer.end_of_turn()).collect();
    ends.sort_unstable();
    ends.dedup();
    match ends[..] {
        [] => {}
        [one] => generation["eos_token_id"] = one.into(),
        _ => generation["eos_token_id"] = ends.into(),
    }
    Ok(vec![("tokenizer.json", file), ("tokenizer_config.json", config), ("generation_config.json", generation)])
}

impl Tokenizer {
    /// The token for what no other spells.
    fn unknown(&self) -> Option<u32> {
        match &self.pipeline {
            Pipeline::Words { bpe, .. } => bpe.unknown,
            Pipeline::SentencePiece { model: Model::Bpe(bpe), .. } => bpe.unknown,
            Pipeline::SentencePiece { model: Model::Unigram(unigram), .. } => unigram.unknown,
            Pipeline::Library { .. } => None,
        }
    }

    /// tokenizer.json.
    fn json(&self) -> Result<Value, &'static str> {
        let (normalizer, pre_tokenizer, decoder, model) = match &self.pipeline {
            Pipeline::Words { words, bpe } => {
                let split = |pattern: &String| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
                let mut steps: Vec<Value> = words.patterns().iter().map(split).collect();
                steps.push(
                    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
                );
                let compose = if words.composes() { json!({"type": "NFC"}) } else { Value::Null };
                let Order::Merges(merges) = &bpe.order else { return Err("byte-level tokens without merges") };
                let model = self.bpe(ranked(&self.vocabulary, merges), bpe.whole_words, None, false);
                let bytes =
                    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
                (compose, json!({"type": "Sequence", "pretokenizers": steps}), bytes, model)
            }
            Pipeline::SentencePiece { whitespace, model, .. } => {
                let mut decoder = vec![json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})];
                if self.vocabulary.bytes().is_some() {
                    decoder.push(json!({"type": "ByteFallback"}));
                }
                decoder.push(json!({"type": "Fuse"}));
                if whitespace.add_prefix {
                    decoder.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                let model = match model {
                    Model::Bpe(bpe) => {
                        let merges = match &bpe.order {
                            Order::Merges(merges) => ranked(&self.vocabulary, merges),
                            Order::Scores(scores) => scored(&self.vocabulary, scores),
                            Order::Ids => return Err("pieces in order of their ids"),
                        };
                        self.bpe(merges, false, bpe.unknown, bpe.bytes.is_some())
                    }
                    Model::Unigram(unigram) => {
                        let pieces = (0..self.vocabulary.len() as u32).map(|id| self.vocabulary.piece(id));
                        let pieces = pieces.zip(unigram.scores()).map(|(piece, score)| json!([piece, score]));
                        json!({
                            "type": "Unigram",
                            "unk_id": unigram.unknown,
                            "vocab": pieces.collect::<Vec<_>>(),
                            "byte_fallback": unigram.bytes.is_some(),
                        })
                    }
                };
                (normalizer(whitespace), Value::Null, json!({"type": "Sequence", "decoders": decoder}), model)
            }
            Pipeline::Library { .. } => return Err("its steps are not those of a GGUF file"),
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.marks.tokens().iter().map(added).collect::<Vec<_>>(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.template(),
            "decoder": decoder,
            "model": model,
        }))
    }

    fn bpe(&self, merges: Vec<[&str; 2]>, whole: bool, unknown: Option<u32>, bytes: bool) -> Value {
        let piece = |id: u32| Some((self.vocabulary.piece(id)?.to_owned(), id.into()));
        let vocab: serde_json::Map<_, _> = (0..self.vocabulary.len() as u32).filter_map(piece).collect();
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.and_then(|id| self.vocabulary.piece(id)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": unknown.is_some(),
            "byte_fallback": bytes,
            "ignore_merges": whole,
            "vocab": vocab,
            "merges": merges,
        })
    }

    /// What puts marks around a text.
    fn template(&self) -> Value {
        let mark =
            |id: Option<u32>, wanted: bool| id.filter(|_| wanted).and_then(|id| Some((id, self.vocabulary.piece(id)?)));
        let (before, after) = (mark(self.bos, self.add_bos()), mark(self.eos, self.add_eos()));
        if before.is_none() && after.is_none() {
            return Value::Null;
        }
        let token = |mark: Option<(u32, &str)>, turn: u32| {
            mark.map(|(_, name)| json!({"SpecialToken": {"id": name, "type_id": turn}}))
        };
        let part = |which: &str, turn: u32| {
            let text = json!({"Sequence": {"id": which, "type_id": turn}});
            token(before, turn).into_iter().chain([text]).chain(token(after, turn)).collect::<Vec<_>>()
        };
        let tokens = before.into_iter().chain(after);
        let tokens = tokens.map(|(id, name)| (name.to_owned(), json!({"id": name, "ids": [id], "tokens": [name]})));
        let tokens: serde_json::Map<_, _> = tokens.collect();
        let pair = [part("A", 0), part("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": part("A", 0), "pair": pair, "special_tokens": tokens})
    }
}

fn added(token: &Added) -> Value {
    json!({
        "id": token.id,
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.special,
    })
}

/// SentencePiece's preparation of a text in the steps of the `tokenizers` library.
fn normalizer(whitespace: &Whitespace) -> Value {
    let mut steps = Vec::new();
    if let Some(map) = &whitespace.charsmap {
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&map.bytes())}));
    }
    if whitespace.remove_extra {
        steps.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        steps.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    if whitespace.add_prefix {
        steps.push(json!({"type": "Prepend", "prepend": "▁"}));
    }
    if whitespace.escape {
        steps.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
    }
    json!({"type": "Sequence", "normalizers": steps})
}

/// The merges by rank.
fn ranked<'a>(vocabulary: &'a Vocabulary, merges: &Merges) -> Vec<[&'a str; 2]> {
    let mut ranked: Vec<(u32, u32, u32)> = merges.iter().map(|(&(a, b), &(rank, _))| (rank, a, b)).collect();
    ranked.sort_unstable();
    let piece = |id| vocabulary.piece(id).unwrap_or_default();
    ranked.into_iter().map(|(_, a, b)| [piece(a), piece(b)]).collect()
}

/// Longest piece that merges are looked for, in characters; the work grows with the number of its parts.
const LONGEST: usize = 256;

/// The merges that scores stand for: any two pieces that make a third, those of the highest score first, as the
/// `tokenizers` library's own conversion orders them.
fn scored<'a>(vocabulary: &'a Vocabulary, scores: &[f32]) -> Vec<[&'a str; 2]> {
    let text = |id: u32| matches!(vocabulary.kind(id), Kind::Normal | Kind::UserDefined | Kind::Unused);
    let is_text = |piece: &str| vocabulary.id(piece).is_some_and(text);
    let mut all: Vec<(f32, [&str; 2])> = Vec::new();
    for (id, &score) in (0..vocabulary.len() as u32).zip(scores) {
        let Some(piece) = vocabulary.piece(id).filter(|_| matches!(vocabulary.kind(id), Kind::Normal)) else {
            continue;
        };
        for (end, _) in piece.char_indices().skip(1).take(LONGEST) {
            let (a, b) = piece.split_at(end);
            if is_text(a) && is_text(b) {
                all.push((score, [a, b]));
            }
        }
    }
    // A stable sort: what is equal stays in the order of the pieces.
    let lengths = |[a, b]: &[&str; 2]| (a.chars().count(), b.chars().count());
    all.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| lengths(&y.1).cmp(&lengths(&x.1))));
    all.into_iter().map(|(_, pair)| pair).collect()
}

/// The inverse of [`super::tiktoken::base64`], with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let bits = part.iter().fold(0u32, |bits, &b| bits << 8 | u32::from(b)) << (8 * (3 - part.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= part.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::shared;
    use super::super::{Specials, Tokenizer, export, tiktoken};
    use super::*;
    use crate::checkpoint::gguf;

    #[test]
    fn base64_there_and_back() {
        for len in 1..20u8 {
            let bytes: Vec<u8> = (0..len).map(|i| i.wrapping_mul(91) ^ 0xa5).collect();
            assert_eq!(tiktoken::base64(&base64(&bytes)), Some(bytes));
        }
    }

    /// What `metadata` say, written as files and read from these.
    fn written(metadata: &Metadata) -> (tempfile::TempDir, Tokenizer) {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files(metadata, Path::new("a.gguf")).unwrap() {
            std::fs::write(dir.path().join(name), content.to_string()).unwrap();
        }
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        (dir, tokenizer)
    }

    fn compare(name: &str, metadata: &Metadata, texts: &[String]) {
        let own = Tokenizer::from_gguf(metadata, Path::new(name)).unwrap();
        let (dir, back) = written(metadata);
        assert_eq!(back.vocab_size(), own.vocab_size(), "{name}");
        assert_eq!((own.bos(), own.eos()), (back.bos(), back.eos()), "{name}");
        assert_eq!((own.add_bos(), own.add_eos()), (back.add_bos(), back.add_eos()), "{name}");
        assert_eq!(own.end_of_turn().collect::<Vec<_>>(), back.end_of_turn().collect::<Vec<_>>(), "{name}");
        for text in texts {
            for specials in [Specials::AsText, Specials::Parse] {
                let (a, b) = (own.encode(text, specials).unwrap(), back.encode(text, specials).unwrap());
                assert_eq!(a, b, "{name} {specials:?} {text:?}");
            }
            let ids = own.encode(text, Specials::AsText).unwrap();
            assert_eq!(own.decode(&ids, true), back.decode(&ids, true), "{name} {text:?}");
        }
        let template = |source: &crate::checkpoint::Metadata| source.str("tokenizer.chat_template").map(str::to_owned);
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("tokenizer_config.json")).unwrap()).unwrap();
        assert_eq!(config["chat_template"].as_str().map(str::to_owned), template(metadata), "{name}");
    }

    #[test]
    fn vocabularies_of_gguf_files_encode_alike() {
        let Some(folder) = shared("fixtures/ggml-vocab") else { return };
        let mut seen = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|ext| ext != "gguf") {
                continue;
            }
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let metadata = gguf::read_metadata(&path).unwrap();
            let texts = std::fs::read_to_string(format!("{}.inp", path.display())).unwrap_or_default();
            let mut texts: Vec<String> = texts.split("\n__ggml_vocab_test__\n").map(str::to_owned).collect();
            texts.push("  Two spaces, über 12345 <s>marks</s> und 中文 🦙\n\n\tend  ".into());
            compare(&name, &metadata, &texts);
            seen += 1;
        }
        assert!(seen >= 10);
    }

    #[test]
    fn vocabularies_of_directories_come_back() {
        let Some(folder) = shared("fixtures/tokenizers") else { return };
        for entry in std::fs::read_dir(folder).unwrap() {
            let dir = entry.unwrap().path();
            let rows = Tokenizer::from_dir(&dir).unwrap().vocab_size() + 3;
            let metadata = export(&dir, rows).unwrap().metadata;
            let expected: Value = serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
            let cases = expected["cases"].as_array().unwrap().iter();
            // SentencePiece's pieces end at a NUL, those of the library do not.
            let texts = cases.map(|case| case["text"].as_str().unwrap().to_owned());
            let texts: Vec<String> = texts.filter(|text| !text.contains('\0')).collect();
            compare(dir.file_name().unwrap().to_str().unwrap(), &metadata, &texts);
        }
    }

    /// A unigram vocabulary, whose score decides rather than merges.
    #[test]
    fn unigram_pieces_keep_their_scores() {
        use crate::checkpoint::{Array, Value};
        let mut metadata = Metadata::default();
        let pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁ab", "▁a", "c"];
        let scores = [0.0, 0.0, 0.0, -3.0, -2.0, -2.1, -2.5, -2.6, -5.0, -1.0];
        let kinds = [3, 3, 2, 1, 1, 1, 1, 1, 1, 1];
        let mut set = |key: &str, value| metadata.0.insert(format!("tokenizer.{key}"), value);
        set("ggml.model", Value::String("t5".into()));
        set("ggml.tokens", Value::Array(Array::of_strings(pieces)));
        set("ggml.scores", Value::Array(Array::of_f32(&scores)));
        set("ggml.token_type", Value::Array(Array::of_i32(&kinds)));
        set("ggml.add_space_prefix", Value::Bool(true));
        set("ggml.remove_extra_whitespaces", Value::Bool(true));
        set("chat_template", Value::String("{{ messages }}".into()));
        let texts = ["ab", "abc  ab ", "b a", "c", "", "ax b"].map(str::to_owned);
        compare("unigram", &metadata, &texts);
        let none = Metadata::default();
        assert!(files(&none, Path::new("a.gguf")).unwrap().is_empty());
    }
}
