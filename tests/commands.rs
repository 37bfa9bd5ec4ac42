//! The program as a person runs it: results on standard output, one clear line on standard error, the exit status.

mod chat_model;

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

struct Home {
    dir: tempfile::TempDir,
}

struct Outcome {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Home {
    /// A store with the tiny model `tiny`.
    fn new() -> Home {
        let dir = tempfile::tempdir().unwrap();
        chat_model::write(&dir.path().join("models/tiny"));
        Home { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
        command.args(args).env("RUSHLIGHT_HOME", self.dir.path()).env_remove("RUSHLIGHT_ISA");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Outcome {
        self.feed(args, b"")
    }

    fn feed(&self, args: &[&str], input: &[u8]) -> Outcome {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        // A program that fails early need not read.
        child.stdin.take().unwrap().write_all(input).ok();
        let output = child.wait_with_output().unwrap();
        let text = |b| String::from_utf8(b).unwrap();
        Outcome { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    fn ok(&self, args: &[&str]) -> String {
        let outcome = self.run(args);
        assert_eq!(outcome.code, Some(0), "{args:?}: {}", outcome.err);
        outcome.out
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// The one line of a failure with status 1.
    fn error(&self, args: &[&str]) -> String {
        failure(args, self.run(args))
    }
}

fn failure(args: &[&str], outcome: Outcome) -> String {
    assert_eq!(outcome.code, Some(1), "{args:?}: {} {}", outcome.out, outcome.err);
    assert_eq!(outcome.out, "", "{args:?}");
    assert_eq!(outcome.err.lines().count(), 1, "{args:?}: {}", outcome.err);
    outcome.err.strip_prefix("error: ").unwrap_or_else(|| panic!("{args:?}: {}", outcome.err)).trim().to_string()
}

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let path = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join(path);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn wrong_arguments_are_status_2() {
    let home = Home::new();
    let long = "9".repeat(40);
    for args in [
        &["unknown"][..],
        &[],
        &["run", "tiny"],
        &["run", "tiny", "-p", "a", "-f", "b"],
        &["run", "tiny", "-p", "a", "-n", "0"],
        &["run", "tiny", "-p", "a", "--temp", "-1"],
        &["run", "tiny", "-p", "a", "--temp", "nan"],
        &["run", "tiny", "-p", "a", "--top-p", "1.5"],
        &["run", "tiny", "-p", "a", "--min-p", "x"],
        &["run", "tiny", "-p", "a", "--seed", &long],
        &["run", "tiny", "-p", "a", "--threads", "0"],
        &["run", "tiny", "-p", "a", "--raw", "--system", "s"],
        &["run", "tiny", "-p", "a", "--logit-bias", "5"],
        &["run", "tiny", "-p", "a", "--json-schema", "{}", "--regex", "a"],
        &["logits", "tiny"],
        &["logits", "tiny", "--ids", "1,x"],
        &["logits", "tiny", "--ids", "-1"],
        &["perplexity", "tiny"],
        &["perplexity", "tiny", "-f", "x", "--ctx", "1"],
        &["run", "tiny", "-p", "a", "-t", "100000"],
        &["run", "tiny", "-p", "a", "--seed", "-1"],
        &["run", "tiny", "-p", "a", "--regex", "(a"],
        &["run", "tiny", "-p", "a", "--json-schema", "{\"type\": \"nothing\"}"],
        &["train", "tiny", "--data", "x", "-o", "y", "--lr", "nan"],
        &["train", "tiny", "--data", "x", "-o", "y", "--lora-r", "0"],
    ] {
        let outcome = home.run(args);
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""), "{args:?}: {}", outcome.err);
        assert!(outcome.err.starts_with("error: ") || outcome.err.contains("Usage:"), "{args:?}: {}", outcome.err);
    }
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let outcome = home.run(args);
        assert!(outcome.code == Some(0) && !outcome.out.is_empty() && outcome.err.is_empty());
    }
}

#[test]
fn bad_prompts_are_one_clear_line() {
    let home = Home::new();
    let (empty, binary) = (home.write("empty.txt", "\n \n"), home.write("binary.txt", b"abc\xff\xfe"));
    for args in [["run", "tiny", "-p", ""], ["run", "tiny", "-p", " \n"], ["run", "tiny", "-f", &empty]] {
        assert!(home.error(&args).contains("the prompt is empty"));
    }
    for command in ["run", "perplexity"] {
        let error = home.error(&[command, "tiny", "-f", &binary]);
        assert!(error.contains("binary.txt: not UTF-8 text (byte 3)"), "{error}");
    }
    let error = failure(&["run"], home.feed(&["run", "tiny", "-f", "-"], b"\xff"));
    assert!(error.contains("standard input: not UTF-8"), "{error}");
    assert!(home.error(&["run", "tiny", "-f", "no-such-file"]).contains("no-such-file"));
    assert!(home.error(&["run", "tiny", "-f", home.dir.path().to_str().unwrap()]).contains("directory"));
    let long = "word ".repeat(100);
    let error = home.error(&["run", "tiny", "-p", &long]);
    assert!(error.contains("but the context holds 256"), "{error}");
    let error = home.error(&["run", "tiny", "--raw", "--ctx", "64", "-p", &long]);
    assert!(error.contains("the prompt has 500 tokens, but the context holds 64"), "{error}");
    assert!(home.error(&["perplexity", "tiny", "-f", &empty, "--ctx", "128"]).contains("fewer than the 128"));
    let error = home.error(&["logits", "tiny", "--ids", "1,320"]);
    assert!(error.contains("no token 320") && error.contains("from 0 to 319"), "{error}");
}

#[test]
fn bad_rules_are_one_clear_line() {
    let home = Home::new();
    let broken = home.write("schema.json", "{\"type\": ");
    for (args, says) in [
        (["--json-schema", "{\"type\": 3"], "--json-schema: not JSON"),
        (["--json-schema", &broken], "schema.json: not JSON"),
        (["--json-schema", "missing.json"], "missing.json"),
    ] {
        let error = home.error(&["run", "tiny", "-p", "a", args[0], args[1]]);
        assert!(error.contains(says), "{args:?}: {error}");
    }
    for (args, says) in [
        (["--json-schema", "{\"type\": \"nothing\"}"], "the JSON schema cannot be used"),
        (["--json-schema", "{\"oneOf\": [{\"type\": \"integer\"}, {\"type\": \"number\"}]}"], "say anyOf"),
        (["--regex", "(a"], "the regular expression cannot be used: unclosed group"),
        (["--regex", "(?=a)b"], "the regular expression cannot be used: look-around"),
    ] {
        let outcome = home.run(&["run", "tiny", "-p", "a", args[0], args[1]]);
        assert!(outcome.code == Some(2) && outcome.err.contains(says), "{args:?}: {}", outcome.err);
    }
}

#[test]
fn nothing_else_is_written_over() {
    let home = Home::new();
    let text = home.write("text.txt", some_text());
    let model = home.path("models/tiny/model.safetensors").to_str().unwrap().to_string();
    let (before, text_before) = (std::fs::read(&model).unwrap(), std::fs::read(&text).unwrap());
    let page = home.write("page.html", "<!doctype html>\n<p>An old report.\n");
    for out in [&model, &text, &page] {
        let error = home.error(&["imatrix", "tiny", "-f", &text, "-c", "64", "-o", out]);
        assert!(error.contains("is not an importance matrix, so it is not replaced"), "{error}");
    }
    let new = home.path("new.gguf").to_str().unwrap().to_string();
    for report in [&model, &text] {
        let error = home.error(&["quantize", "tiny", "-o", &new, "--type", "Q8_0", "--report", report]);
        assert!(error.contains("is not a report, so it is not replaced"), "{error}");
    }
    assert_eq!(home.run(&["quantize", "tiny", "-o", &new, "--type", "Q8_0", "--report", &new]).code, Some(2));
    let outcome = home.feed(&["chat", "tiny", "--template", "chatml"], format!("/save {text}\n").as_bytes());
    let said = outcome.out + &outcome.err;
    assert!(said.contains("so it is not replaced"), "{said}");
    // Somebody's example is a conversation too, but not this one.
    let mine = home.write("mine.json", r#"{"messages": [{"role": "user", "content": "hi"}], "note": "precious"}"#);
    let input = format!("/save {mine}\n");
    let outcome = home.feed(&["chat", "tiny", "--template", "chatml"], input.as_bytes());
    assert!((outcome.out + &outcome.err).contains("is not of this talk"));
    assert!(std::fs::read_to_string(&mine).unwrap().contains("precious"));
    let other = home.path("other.json");
    let input = format!("/load {mine}\n/save {mine}\n/save {0}\n/save {0}\n", other.display());
    let outcome = home.feed(&["chat", "tiny", "--template", "chatml"], input.as_bytes());
    assert_eq!((outcome.code, outcome.err.matches("Saved to").count()), (Some(0), 3), "{}", outcome.err);
    assert!(std::fs::read(&model).unwrap() == before && std::fs::read(&text).unwrap() == text_before);
    assert!(!std::path::Path::new(&new).exists());
}

#[test]
fn bad_models_are_one_clear_line() {
    let home = Home::new();
    let tiny = home.path("models/tiny");
    let read = |name: &str| std::fs::read(tiny.join(name)).unwrap();
    let copy = |to: &str, but: &str, with: Option<Vec<u8>>| {
        let dir = home.path(to);
        chat_model::write(&dir);
        match with {
            Some(bytes) => std::fs::write(dir.join(but), bytes).unwrap(),
            None => std::fs::remove_file(dir.join(but)).unwrap(),
        }
        dir.to_str().unwrap().to_string()
    };
    let weights = read("model.safetensors");
    let mut nan = weights.clone();
    let len = nan.len();
    // The last tensor's last number.
    nan[len - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let config = String::from_utf8(read("config.json")).unwrap();
    let foreign = config.replace("LlamaForCausalLM", "SomethingElse").replace("\"llama\"", "\"something\"");
    let cases = [
        (home.write("empty.gguf", ""), "empty.gguf"),
        (home.write("text.gguf", "this is no model"), "text.gguf"),
        (home.write("cut.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\x01\0\0\0\0\0\0\0"), "cut.gguf"),
        (home.path("nowhere.gguf").to_str().unwrap().to_string(), "no such file"),
        ("tini".to_string(), "did you mean tiny?"),
        ("tiny/../tiny".to_string(), "no such file"),
        (copy("truncated", "model.safetensors", Some(weights[..len / 2].to_vec())), "model.safetensors"),
        (copy("no-weights", "model.safetensors", None), "safetensors"),
        (copy("no-config", "config.json", None), "config.json"),
        (copy("bad-config", "config.json", Some(b"{".to_vec())), "config.json"),
        (copy("foreign", "config.json", Some(foreign.into_bytes())), "'something' is not supported"),
        (copy("no-tokenizer", "tokenizer.json", None), "tokenizer"),
        (copy("bad-tokenizer", "tokenizer.json", Some(b"[]".to_vec())), "tokenizer.json"),
        (copy("nan", "model.safetensors", Some(nan)), "not numbers"),
    ];
    for (model, says) in &cases {
        let error = home.error(&["run", model, "-p", "hello"]);
        assert!(error.contains(says), "{model}: {error}");
    }
    let error = home.error(&["run", "tiny", "-p", "hello", "--template", "no-such"]);
    assert!(error.contains("chatml"), "the built-in templates are listed: {error}");
    let outcome = home.command(&["run", "tiny", "-p", "hello"]).env("RUSHLIGHT_ISA", "z80").output().unwrap();
    assert_eq!(outcome.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&outcome.stderr).contains("RUSHLIGHT_ISA"));
}

#[test]
fn the_same_seed_says_the_same() {
    let home = Home::new();
    let run = |seed: &str, threads: &str| {
        home.ok(&["run", "tiny", "-p", "Hello", "-n", "20", "--seed", seed, "--threads", threads, "--temp", "1"])
    };
    assert_eq!(run("1", "1"), run("1", "2"));
    assert_ne!(run("1", "1"), run("2", "1"));
    let json = home.json(&["run", "tiny", "-p", "Hello", "-n", "20", "--seed", "1", "--temp", "1", "--json"]);
    assert_eq!(json["text"].as_str().unwrap().trim_end_matches('\n'), run("1", "1").trim_end_matches('\n'));
    assert_eq!(json["seed"], 1);
    let file = home.write("prompt.txt", "Hello");
    let args = ["run", "tiny", "-f", &file, "-n", "20", "--seed", "1", "--temp", "1"];
    assert_eq!(home.ok(&args), run("1", "1"));
}

#[test]
fn constrained_answers_fit() {
    let home = Home::new();
    let schema = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["name", "age"],
        "additionalProperties": false}"#;
    let file = home.write("schema.json", schema);
    for (i, given) in [schema, &file].into_iter().enumerate() {
        let seed = i.to_string();
        let text = home.ok(&["run", "tiny", "-p", "Who?", "--json-schema", given, "--seed", &seed]);
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert!(value["name"].is_string() && (0..100).contains(&value["age"].as_i64().unwrap()), "{text}");
    }
    let text = home.ok(&["run", "tiny", "-p", "Who?", "--regex", "[0-9]{3}-(yes|no)"]);
    assert!(text.as_bytes()[3] == b'-' && (text.ends_with("yes\n") || text.ends_with("no\n")), "{text:?}");
}

#[test]
fn a_conversation_through_a_pipe() {
    let home = Home::new();
    let saved = home.path("talk.json");
    let input = format!(
        "Hello\n\"\"\"\ntwo\nlines\n\"\"\"\n/set temperature 0\nand \\\nmore\n/stats\n/save {}\n",
        saved.display()
    );
    let args = ["chat", "tiny", "--system", "Be brief.", "-n", "8", "--seed", "3", "--logit-bias", "257=-100"];
    let outcome = home.feed(&args, input.as_bytes());
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(outcome.err.contains("tokens/s") && outcome.err.contains("Saved to"), "{}", outcome.err);
    let talk: Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    let said: Vec<_> = talk["messages"].as_array().unwrap().iter().map(|m| m["content"].as_str().unwrap()).collect();
    assert_eq!((said.len(), said[0], said[1], said[3], said[5]), (7, "Be brief.", "Hello", "two\nlines", "and \nmore"));
    // Only answers go to standard output.
    let answers = outcome.out.replace('\n', "");
    assert_eq!(answers, [said[2], said[4], said[6]].concat().replace('\n', ""));
    // Loading goes on where it was; retrying takes the last answer back.
    let input = format!("/load {}\n/retry\n/save {}\n", saved.display(), home.path("again.json").display());
    let outcome = home.feed(&["chat", "tiny", "-n", "8", "--temp", "0", "--logit-bias", "257=-100"], input.as_bytes());
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    let again: Value = serde_json::from_slice(&std::fs::read(home.path("again.json")).unwrap()).unwrap();
    assert_eq!(again["messages"], talk["messages"]);
    let names: Vec<_> = std::fs::read_dir(home.dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().contains("partial")), "{names:?}");

    for (input, says) in [
        ("/nonsense\n", "no command /nonsense"),
        ("/load nowhere.json\n", "nowhere.json"),
        ("/set top_p 7\n", "top_p must be"),
        ("/set nothing 7\n", "no setting nothing"),
        ("/adapter nowhere\n", "nowhere"),
        ("/retry\n", "no message to answer"),
        ("\u{0}\n\u{ff}", "context"),
    ] {
        let input = if says == "context" { "x".repeat(1000) } else { input.to_string() };
        let error = failure(&["chat"], home.feed(&["chat", "tiny"], input.as_bytes()));
        assert!(error.contains(says), "{input:?}: {error}");
    }
}

#[test]
fn logits_agree_with_the_reference() {
    let home = Home::new();
    let model = chat_model::llama();
    let model = model.to_str().unwrap();
    let golden: Value = serde_json::from_slice(&std::fs::read(Path::new(model).join("golden.json")).unwrap()).unwrap();
    let case = &golden["cases"][0];
    let numbers = |v: &Value| v.as_array().unwrap().iter().map(|x| x.to_string()).collect::<Vec<_>>();
    let ids = numbers(&case["input_ids"]).join(",");
    for extra in [&[][..], &["--step"]] {
        let args = [&["logits", model, "--ids", &ids, "--all", "--greedy", "8", "--json"], extra].concat();
        let json = home.json(&args);
        for (position, want) in case["logits"].as_object().unwrap() {
            let row = json["positions"].as_array().unwrap();
            let row = row.iter().find(|p| p["position"].as_u64() == position.parse().ok()).unwrap();
            let centred = |v: &Value| {
                let x: Vec<f64> = v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                x.into_iter().map(|x| x - mean).collect::<Vec<_>>()
            };
            let (got, want) = (centred(&row["logits"]), centred(want));
            assert_eq!(got.len(), want.len());
            let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < 3e-4, "position {position}: {worst}");
        }
        assert_eq!(json["greedy"].as_array().unwrap().len(), 8);
    }
    // The last position alone, and numbers that read back as the same f32.
    let last = home.json(&["logits", model, "--ids", &ids, "--json"]);
    assert_eq!(last["positions"].as_array().unwrap().len(), 1);
    let all = home.json(&["logits", model, "--ids", &ids, "--all", "--json"]);
    assert_eq!(last["positions"][0], *all["positions"].as_array().unwrap().last().unwrap());
    for x in numbers(&last["positions"][0]["logits"]) {
        assert_eq!(x, serde_json::to_string(&x.parse::<f32>().unwrap()).unwrap());
    }
    assert!(home.ok(&["logits", model, "--ids", "1,2"]).starts_with("position 1:"));
}

#[test]
fn fields_left_out_are_what_the_family_takes() {
    let Some(model) = shared("fixtures/families/deepseek_v3") else { return };
    let home = Home::new();
    let weights = std::fs::read(model.join("model.safetensors")).unwrap();
    home.write("v3/model.safetensors", weights);
    let mut config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    let ids = ["--ids", "5,9,200,31,7,80", "--json"];
    let whole = home.json(&[&["logits", model.to_str().unwrap()], &ids[..]].concat())["positions"].clone();
    for name in ["norm_topk_prob", "routed_scaling_factor"] {
        config.as_object_mut().unwrap().remove(name);
    }
    home.write("v3/config.json", config.to_string());
    let without = home.path("v3");
    assert_eq!(home.json(&[&["logits", without.to_str().unwrap()], &ids[..]].concat())["positions"], whole);
    // Groups too, which here do not fit.
    for name in ["n_group", "topk_group"] {
        config.as_object_mut().unwrap().remove(name);
    }
    home.write("v3/config.json", config.to_string());
    let error = home.error(&[&["logits", without.to_str().unwrap()], &ids[..]].concat());
    assert!(error.contains("4 of 8 groups"), "{error}");
}

#[test]
fn info_and_list_tell_what_is_there() {
    let home = Home::new();
    let info = home.json(&["info", "tiny", "--ctx", "100", "--json"]);
    assert_eq!((info["parameters"].as_u64(), info["bits_per_weight"].as_f64()), (Some(108_864), Some(32.0)));
    assert_eq!(info["shape"]["context"], 256);
    assert_eq!((info["tokenizer"].as_u64(), info["chat_template"].as_bool()), (Some(258), Some(true)));
    assert_eq!(info["memory"][0]["context"], 100);
    let (kv, weights) = (info["memory"][1]["kv"].as_u64().unwrap(), info["memory"][1]["weights"].as_u64().unwrap());
    // Keys and values of 2 layers, 2 heads of 16, in f32 since the weights are.
    assert_eq!((kv, weights), (256 * 2 * 2 * 2 * 16 * 4, info["bytes"].as_u64().unwrap()));
    assert!(home.ok(&["info", "tiny"]).contains("F32"));
    assert_eq!(home.json(&["list", "--json"])["models"][0]["name"], "tiny");
    assert!(home.ok(&["list"]).starts_with("tiny "));
    let ids = home.json(&["tokenize", "tiny", "hi<|im_end|>", "--json"])["ids"].clone();
    assert_eq!(ids.as_array().unwrap()[..2], [Value::from(b'h'), Value::from(b'i')]);
    // What cannot be run is still described.
    let dir = home.path("foreign");
    chat_model::write(&dir);
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    std::fs::write(
        dir.join("config.json"),
        config.replace("LlamaForCausalLM", "Else").replace("\"llama\"", "\"else\""),
    )
    .unwrap();
    let info = home.json(&["info", dir.to_str().unwrap(), "--json"]);
    assert!(info["shape"].is_null() && info["why"].as_str().unwrap().contains("'else'"), "{info}");
}

#[test]
fn perplexity_of_random_weights_is_near_the_vocabulary() {
    let home = Home::new();
    let text: String = (0..400).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
    let file = home.write("text.txt", text);
    let json = home.json(&["perplexity", "tiny", "-f", &file, "--ctx", "64", "--chunks", "4", "--json"]);
    assert_eq!((json["chunks"].as_u64(), json["tokens"].as_u64()), (Some(4), Some(4 * 31)));
    let perplexity = json["perplexity"].as_f64().unwrap();
    assert!((50.0..5000.0).contains(&perplexity), "{perplexity}");
    let one =
        home.json(&["perplexity", "tiny", "-f", &file, "--ctx", "64", "--chunks", "1", "--json", "--threads", "1"]);
    assert_eq!(one["tokens"], 31);
    let outcome = home.run(&["perplexity", "tiny", "-f", &file, "--ctx", "64", "--quiet"]);
    assert!(outcome.out.starts_with("perplexity ") && outcome.err.is_empty(), "{}", outcome.err);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_and_a_closed_pipe() {
    let home = Home::new();
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    for args in [&["run", "tiny", "-p", "Hello", "-n", "5"][..], &["logits", "tiny", "--ids", "1", "--json"], &["list"]]
    {
        let outcome = home.command(args).stdout(full()).output().unwrap();
        let err = String::from_utf8(outcome.stderr).unwrap();
        assert_eq!((outcome.status.code(), err.lines().count()), (Some(1), 1), "{args:?}: {err}");
        assert!(err.contains("No space left"), "{args:?}: {err}");
    }
    // A reader that has seen enough is no error.
    let mut child = home.command(&["run", "tiny", "-p", "Hello", "--logit-bias", "257=-100"]).spawn().unwrap();
    drop(child.stdout.take());
    let outcome = child.wait_with_output().unwrap();
    assert_eq!((outcome.status.code(), String::from_utf8(outcome.stderr).unwrap().as_str()), (Some(0), ""));
}

#[test]
fn a_real_model_tells_its_story() {
    let Some(model) = shared("models/stories260K-hf") else { return };
    let home = Home::new();
    let model = model.to_str().unwrap();
    let reference: Value =
        serde_json::from_slice(&std::fs::read(Path::new(model).join("greedy_reference.json")).unwrap()).unwrap();
    let json = home.json(&["logits", model, "--ids", "1", "--greedy", "64", "--json"]);
    assert_eq!(json["greedy"].as_array().unwrap()[..64], reference["greedy_ids"].as_array().unwrap()[1..65]);
    let text = home.ok(&["run", model, "--raw", "-p", "Once upon a time", "-n", "12", "--temp", "0"]);
    assert!(text.contains("there was a little girl"), "{text}");
}

#[test]
fn a_model_beside_itself() {
    let home = Home::new();
    let text: String = (0..400).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
    let file = home.write("text.txt", text);
    let args = ["perplexity", "tiny", "-f", &file, "--ctx", "64", "--against", "tiny"];
    let json = home.json(&[&args[..], &["--json"]].concat());
    assert_eq!((json["kl"].as_f64(), json["same_top"].as_f64()), (Some(0.0), Some(1.0)));
    assert_eq!(json["perplexity"], json["original"]["perplexity"]);
    assert_eq!(json["tokens"].as_u64(), Some(6 * 31));
    assert!(home.ok(&args).contains("same likeliest token 100.00 %"));
    let error = home.error(&["perplexity", "tiny", "-f", &file, "--ctx", "64", "--against", "nothing-here"]);
    assert!(error.contains("nothing-here"), "{error}");
}

#[test]
fn imatrix_in_both_forms() {
    use rushlight_models::checkpoint::imatrix::Imatrix;
    let home = Home::new();
    let file = home.write("text.txt", (0..300).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect::<String>());
    let (new, old) = (home.path("i.gguf"), home.path("i.dat"));
    for out in [&new, &old] {
        let said = home.ok(&["imatrix", "tiny", "-f", &file, "-c", "64", "-t", "1", "-o", out.to_str().unwrap()]);
        assert!(said.contains("14 matrices, from 256 tokens"), "{said}");
    }
    let (new, old) = (Imatrix::read(&new).unwrap(), Imatrix::read(&old).unwrap());
    assert_eq!((new.chunks, new.chunk_size, new.entries.len()), (4, 64, 14));
    assert_eq!(new.entries["blk.1.ffn_down.weight"].counts, [256]);
    for name in new.entries.keys() {
        let (new, old) = (new.importance(name).unwrap(), old.importance(name).unwrap());
        new.iter().zip(&old).for_each(|(a, b)| assert!((a - b).abs() <= 1e-6 * a && *a > 0.0, "{name}: {a} {b}"));
    }
    let short = home.write("short.txt", "ab");
    let error = home.error(&["imatrix", "tiny", "-f", &short, "-o", "x.gguf", "--ctx", "64"]);
    assert!(error.contains("has 2 tokens, fewer than the 64"), "{error}");
}

/// A text that a tiny model can be calibrated on: every byte comes, in many orders.
fn some_text() -> String {
    (0..6000u32).map(|i| char::from(32 + (i * i / 7 + i * 13) as u8 % 95)).collect()
}

#[test]
fn gptq_loses_less_than_rounding_and_survives_being_killed() {
    let home = Home::new();
    let text = home.write("text.txt", some_text());
    let out = |name: &str| home.path(name).to_str().unwrap().to_string();
    let quantize = |name: &str, method: &str| {
        let [command, model, kind, q4, how] = ["quantize", "tiny", "--type", "Q4_0", "--method"];
        [command, model, kind, q4, how, method, "--calib", &text, "--pure", "-o", &out(name)].map(String::from)
    };
    let run = |args: &[String]| home.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    run(&quantize("rtn.gguf", "rtn"));
    run(&quantize("gptq.gguf", "gptq"));
    let kl = |name: &str| {
        let json = home.json(&["perplexity", &out(name), "-f", &text, "--ctx", "128", "--against", "tiny", "--json"]);
        json["kl"].as_f64().unwrap()
    };
    let (rounded, better) = (kl("rtn.gguf"), kl("gptq.gguf"));
    assert!(better < 0.8 * rounded, "{better} against {rounded}");
    assert!(!home.path("gptq.gguf.unfinished").exists());

    let args = quantize("killed.gguf", "gptq");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    for pause in [50, 150, 250, 350, 500] {
        let mut child = home.command(&args).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(pause));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    home.ok(&[&args[..], &["--threads", "1"]].concat());
    assert!(std::fs::read(home.path("killed.gguf")).unwrap() == std::fs::read(home.path("gptq.gguf")).unwrap());

    let short = home.write("short.txt", "ab");
    let error =
        home.error(&["quantize", "tiny", "-o", &out("x.gguf"), "--method", "gptq", "--calib", &short, "--quiet"]);
    assert!(error.contains("has 2 tokens, too few to calibrate on"), "{error}");
    assert!(!home.path("x.gguf").exists() && !home.path("x.gguf.unfinished").exists());
}

#[test]
fn formats_are_chosen_to_a_size() {
    let home = Home::new();
    let text = home.write("text.txt", some_text());
    let out = home.path("out.gguf").to_str().unwrap().to_string();
    let run = |bits: &str| home.json(&["quantize", "tiny", "-o", &out, "--bpw", bits, "--calib", &text, "--json"]);
    let (small, large) = (run("8"), run("9"));
    let bits = |json: &Value| json["bits_per_weight"].as_f64().unwrap();
    assert!(bits(&small) <= 8.0 && bits(&large) <= 9.0 && bits(&small) < bits(&large), "{small} {large}");
    let error = home.error(&["quantize", "tiny", "-o", &out, "--size", "20kB", "--calib", &text]);
    assert!(error.contains("does not fit"), "{error}");

    // What is to be kept has its format whatever that costs; the others make do with the rest.
    let kept = |more: &[&str]| {
        let args = ["quantize", "tiny", "-o", &out, "--calib", &text, "--dry-run", "--json"];
        home.json(&[&args[..], more].concat())
    };
    let formats = |json: &Value, part: &str, is: bool| -> Vec<String> {
        let plan = json["plan"].as_array().unwrap().iter().map(|t| (t["name"].as_str().unwrap(), &t["to"]));
        plan.filter(|(name, to)| *to != "F32" && name.contains(part) == is).map(|(_, to)| to.to_string()).collect()
    };
    let keep = ["--keep", "blk.1.attn_output=Q5_0", "--keep", "attn_=F16"];
    let json = kept(&[&["--bpw", "10"][..], &keep].concat());
    assert_eq!(formats(&json, "blk.1.attn_output", true), ["\"Q5_0\""], "the first that fits decides");
    assert_eq!(formats(&json, "attn_", true).iter().filter(|to| *to == "\"F16\"").count(), 7, "{json}");
    assert!(formats(&json, "attn_", false).iter().any(|to| to != "\"F16\""), "{json}");
    assert!(bits(&json) <= 10.0 && bits(&json) > 9.0, "{json}");
    // The same by a size, which counts all of the file.
    let whole = kept(&["--size", "150kB", "--keep", "attn_=F16"]);
    assert!(formats(&whole, "attn_", true).iter().all(|to| to == "\"F16\""), "{whole}");
    home.ok(&["quantize", "tiny", "-o", &out, "--calib", &text, "--size", "150kB", "--keep", "attn_=F16"]);
    let length = std::fs::metadata(&out).unwrap().len();
    assert!(length <= 150_000 && length > whole["bytes"].as_u64().unwrap(), "{length} {whole}");
    // All kept: nothing is left to choose (rows of 112 hold no blocks), and what is kept may alone be too much.
    let all = kept(&["--bpw", "10", "--keep", ".*=Q8_0"]);
    assert!(formats(&all, "ffn_down", false).iter().all(|to| to == "\"Q8_0\""), "{all}");
    let error = home.error(&["quantize", "tiny", "-o", &out, "--bpw", "5", "--calib", &text, "--keep", ".*=F16"]);
    assert!(error.contains("does not fit, 16.05 is") && error.contains("--keep"), "{error}");
    assert!(!home.path("out.gguf.unfinished").exists());
}
