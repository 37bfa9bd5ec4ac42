//! A tokenizer that belongs to another model: whatever has to do with text says so before it begins.

mod chat_model;

use serde_json::{Value, json};
use std::process::{Command, Stdio};

#[test]
fn nothing_begins_with_tokens_that_have_no_embedding() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| {
        std::fs::write(path(name), text).unwrap();
        path(name)
    };
    let (good, bad) = (path("good"), path("bad"));
    for dir in [&good, &bad] {
        chat_model::write(dir.as_ref());
    }
    // The model has 320 rows.
    let file = path("bad/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["ab"] = json!(320);
    std::fs::write(&file, tokenizer.to_string()).unwrap();

    let text = write("text.txt", &"Some words to read. ".repeat(300));
    let task = write("task.jsonl", r#"{"question": "Who barks?", "choices": ["cat", "dog"], "answer": 1}"#);
    let data = write(
        "data.jsonl",
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
    );
    let out = path("out");
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
        command.args(args).env("RUSHLIGHT_HOME", home.path()).stdin(Stdio::null());
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for args in [
        &["chat", &bad][..],
        &["run", &bad, "-p", "a"],
        &["run", &good, "-p", "a", "--draft", &bad],
        &["perplexity", &bad, "-f", &text],
        &["imatrix", &bad, "-f", &text, "-o", &out],
        &["eval", &bad, "--task", &task],
        &["train", &bad, "--data", &data, "-o", &out, "--max-steps", "1"],
        &["quantize", &bad, "-o", &out, "--type", "Q4_0", "--method", "gptq"],
        &["quantize", &bad, "-o", &out, "--type", "int4"],
        &["quantize", &bad, "-o", &out, "--bpw", "7"],
    ] {
        let (status, error) = run(args);
        assert_eq!(status, Some(1), "{args:?}: {error}");
        let told = error.lines().last().unwrap_or_default();
        assert!(told.contains("bad") && told.contains("token 320 (\"ab\") has no embedding"), "{args:?}: {error}");
    }
    // What needs no text goes on.
    let (status, error) = run(&["logits", &bad, "--ids", "1,2"]);
    assert_eq!(status, Some(0), "{error}");
}
