//! Chat formats that checkpoints leave to their code: the tokens of conversations, as that code would make them.

use rushlight_models::tokenizer::{ChatTemplate, RenderOptions, Specials, Tokenizer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"));
    let path = root.join("fixtures/tokenizers").join(path);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

/// The folder `name` with this tokenizer and these descriptions.
fn folder(place: &Path, name: &str, file: (&str, &[u8]), descriptions: &[(&str, Value)]) -> PathBuf {
    let dir = place.join(name);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join(file.0), file.1).unwrap();
    for (name, value) in descriptions {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    }
    dir
}

/// The tokens of a conversation in the format that the tokenizer calls for, whose name is to be `format`.
fn chat(tokenizer: &Tokenizer, format: &str, messages: Value) -> Vec<u32> {
    let template = ChatTemplate::choose(None, tokenizer).unwrap();
    assert_eq!(template.name(), format);
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    template.encode_chat(tokenizer, messages.as_array().unwrap(), &options).unwrap()
}

fn text(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, Specials::AsText).unwrap()
}

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn rounds() -> Value {
    json!([{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "soprano"}])
}

#[test]
fn chatglm2_and_3() {
    let Some(source) = shared("chatglm3-spm/tokenizer.model") else { return };
    let pieces = std::fs::read(source).unwrap();
    let place = tempfile::tempdir().unwrap();
    let class = json!({"tokenizer_class": "ChatGLMTokenizer", "eos_token": "</s>"});
    let file = ("tokenizer.model", &pieces[..]);
    let dir = folder(place.path(), "chatglm2-6b", file, &[("tokenizer_config.json", class.clone())]);
    let t = Tokenizer::from_dir(&dir).unwrap();
    let [mask, start] = [64790, 64792];
    assert_eq!((t.vocab_size(), t.prefix(), t.eos()), (64794, vec![mask, start], Some(2)));
    let whole = "[Round 1]\n\n问：你好\n\n答：Hello\n\n[Round 2]\n\n问：soprano\n\n答：";
    assert_eq!(chat(&t, "chatglm2", rounds()), [vec![mask, start], text(&t, whole)].concat());

    let dir = folder(place.path(), "chatglm3-6b", file, &[("tokenizer_config.json", class)]);
    let t = Tokenizer::from_dir(&dir).unwrap();
    let (says, answers) = ([64795], [64796]);
    let said = |what: &str| text(&t, &format!("\n {what}"));
    let want = [&[mask, start], &says[..], &said("你好"), &answers, &said("Hello"), &says, &said("soprano"), &answers];
    assert_eq!(chat(&t, "chatglm3", rounds()), want.concat());
    assert!(t.is_end_of_turn(2) && t.is_end_of_turn(64795) && t.is_end_of_turn(64797) && !t.is_end_of_turn(64796));
}

#[test]
fn baichuan_and_internlm() {
    let Some(dir) = shared("baichuan2") else { return };
    let t = Tokenizer::from_dir(&dir).unwrap();
    let mut messages = rounds();
    messages.as_array_mut().unwrap().insert(0, json!({"role": "system", "content": "Be brief."}));
    let of = |what: &str| text(&t, what);
    let want = [of("Be brief."), vec![195], of("你好"), vec![196], of("Hello"), vec![195], of("soprano"), vec![196]];
    assert_eq!(chat(&t, "baichuan2", messages), want.concat());
    // Who writes a mark does not become another speaker.
    let ids = chat(&t, "baichuan2", user("<reserved_107>"));
    assert_eq!(ids.iter().filter(|&&id| id == 196).count(), 1);
    assert!(t.is_end_of_turn(195) && t.is_end_of_turn(2));

    let Some(dir) = shared("internlm-7b-spm") else { return };
    let t = Tokenizer::from_dir(&dir).unwrap();
    let whole = "<|User|>:你好\n<|Bot|>:Hello<eoa>\n<|User|>:soprano\n<|Bot|>:";
    assert_eq!(chat(&t, "internlm", rounds()), [vec![1], text(&t, whole)].concat());
    assert!(t.is_end_of_turn(t.id("<eoa>").unwrap()));
}

/// A field of a protobuf message.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    assert!(bytes.len() < 128);
    [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
}

/// A SentencePiece model of these pieces: words with their scores, or what the caller finds (type 4).
fn sentencepiece(pieces: &[(&str, f32, u8)]) -> Vec<u8> {
    let piece = |&(text, score, kind): &(&str, f32, u8)| {
        let inner = [field(1, text.as_bytes()), vec![2 << 3 | 5], score.to_le_bytes().to_vec(), vec![3 << 3, kind]];
        field(1, &inner.concat())
    };
    let mut model: Vec<u8> = pieces.iter().flat_map(piece).collect();
    model.extend(field(2, &[3 << 3, 1, 40 << 3 & 0x7f | 0x80, 2, 0]));
    model
}

#[test]
fn the_first_chatglm() {
    let place = tempfile::tempdir().unwrap();
    let pieces = sentencepiece(&[
        ("<unk>", 0.0, 2),
        ("▁", -3.0, 1),
        ("▁a", -1.0, 1),
        ("b", -2.0, 1),
        ("<n>", 0.0, 4),
        ("<|tab|>", 0.0, 4),
        ("<|blank_2|>", 0.0, 4),
        ("<|blank_3|>", 0.0, 4),
        ("[MASK]", 0.0, 4),
        ("[gMASK]", 0.0, 4),
        ("<sop>", 0.0, 4),
        ("<eop>", 0.0, 4),
        ("问：", -2.0, 1),
        ("答：", -2.0, 1),
        ("[Round", -2.0, 1),
        ("]", -2.0, 1),
        ("0", -2.0, 1),
        ("1", -2.0, 1),
        ("▁[Round", -2.0, 1),
    ]);
    let config = |mask: u32| ("config.json", json!({"gmask_token_id": mask, "eos_token_id": 11}));
    let class = ("tokenizer_config.json", json!({"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}));
    let dir = folder(place.path(), "chatglm-6b", ("ice_text.model", &pieces), &[config(9), class]);
    let t = Tokenizer::from_dir(&dir).unwrap();
    assert_eq!((t.bos(), t.eos(), t.prefix()), (Some(10), Some(11), vec![]));
    // A space before the text, and none behind what stands for white space.
    let blank = "a\n\tb   b  b";
    assert_eq!(text(&t, blank), [2, 4, 5, 3, 7, 3, 6, 3]);
    assert_eq!(t.decode(&text(&t, blank), true), blank);
    // A single question as it is, the marks behind it.
    assert_eq!(chat(&t, "chatglm", user("a")), [2, 9, 10]);
    let messages = json!([{"role": "user", "content": "b"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "b"}]);
    let want = [18, 1, 16, 15, 4, 12, 3, 4, 13, 3, 4, 14, 1, 17, 15, 4, 12, 3, 4, 13, 9, 10];
    assert_eq!(chat(&t, "chatglm", messages), want);
    assert!(t.is_end_of_turn(11));

    let dir = folder(place.path(), "first", ("ice_text.model", &pieces), &[config(20009)]);
    let error = Tokenizer::from_dir(&dir).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("[gMASK] is not token 20009") && error.contains("ice_text.model"), "{error}");
}
