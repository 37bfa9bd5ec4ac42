//! `rushlight train` as a person runs it.

mod golden;

use golden::{json, shared};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn rushlight(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> Output {
    rushlight(args).output().unwrap()
}

fn ok(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The one line of a failure, and its status.
fn error(args: &[&str]) -> (String, i32) {
    let out = run(args);
    let text = String::from_utf8(out.stderr).unwrap();
    let line = text.lines().last().unwrap_or_default().to_string();
    assert!(!out.status.success() && !text.contains("panicked"), "{args:?}: {text}");
    (line, out.status.code().unwrap_or(-1))
}

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
    path.to_str().unwrap().to_string()
}

/// Sequences of tokens with a rule to be learned: each follows from the one before.
fn write_tokens(path: &Path, records: usize) -> String {
    let line = |r: usize| {
        let ids: Vec<usize> = (0..12 + r % 9).map(|i| (7 * r + 3 * i) % 64).collect();
        json!({"input_ids": ids, "labels": ids}).to_string()
    };
    let text: Vec<String> = (0..records).map(line).collect();
    std::fs::write(path, text.join("\n")).unwrap();
    path.to_str().unwrap().to_string()
}

fn metrics(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text(path: PathBuf) -> String {
    path.to_str().unwrap().to_string()
}

/// Every file of an adapter.
fn adapter(dir: &Path) -> [Vec<u8>; 2] {
    ["adapter_model.safetensors", "adapter_config.json"]
        .map(|name| std::fs::read(dir.join("adapter").join(name)).unwrap())
}

#[test]
fn the_curves_of_pytorch() {
    let Some(folder) = shared("fixtures/tiny_llama_train") else { return };
    let golden = json(&folder.join("golden.json"));
    let dir = tempfile::tempdir().unwrap();
    let batches = golden["data"]["sft_batches"].as_array().unwrap();
    let mut lines = String::new();
    for batch in batches {
        for (i, ids) in batch["input_ids"].as_array().unwrap().iter().enumerate() {
            let mask = batch["attention_mask"][i].as_array();
            let n = mask.map_or(ids.as_array().unwrap().len(), |m| m.iter().filter(|v| v.as_i64() == Some(1)).count());
            let cut = |list: &Value| Value::Array(list.as_array().unwrap()[..n].to_vec());
            lines += &json!({"input_ids": cut(ids), "labels": cut(&batch["labels"][i])}).to_string();
            lines.push('\n');
        }
    }
    let data = dir.path().join("tokens.jsonl");
    std::fs::write(&data, lines).unwrap();
    let (model, data) = (text(folder.join("checkpoint")), text(data));
    let size = batches[0]["input_ids"].as_array().unwrap().len().to_string();
    let start = text(folder.join("lora_initial_adapter"));
    let targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";
    let lora = ["--lora-r", "4", "--lora-alpha", "8", "--targets", targets, "--init-adapter", &start];
    for (key, method, extra) in [("lora_sft", "lora", &lora[..]), ("full_ft", "full", &[])] {
        let golden = &golden[key];
        let number = |name: &str| golden[name].to_string();
        let out = dir.path().join(key);
        let (lr, decay, clip, steps) = (number("lr"), number("wd"), number("clip"), number("steps"));
        let args = [
            "train",
            &model,
            "--data",
            &data,
            "-o",
            out.to_str().unwrap(),
            "--method",
            method,
            "--lr",
            &lr,
            "--schedule",
            "constant",
            "--warmup-steps",
            "0",
            "--weight-decay",
            &decay,
            "--clip",
            &clip,
            "--batch-size",
            &size,
            "--max-steps",
            &steps,
            "--no-shuffle",
            "--template",
            "none",
        ];
        ok(&[&args[..], extra].concat());
        let lines = metrics(&out);
        let want = |name: &str| golden[name].as_array().unwrap().clone();
        assert_eq!(lines.len() as u64, golden["steps"].as_u64().unwrap());
        for ((line, loss), norm) in lines.iter().zip(want("loss_f64")).zip(want("grad_norm_f64")) {
            let of = |name: &str| line[name].as_f64().unwrap();
            assert!((of("loss") - loss.as_f64().unwrap()).abs() < 1e-3, "{key}: {line} {loss}");
            assert!((of("grad_norm") / norm.as_f64().unwrap() - 1.0).abs() < 5e-3, "{key}: {line} {norm}");
        }
    }
    // What full fine-tuning wrote is a model.
    let logits: Value =
        serde_json::from_str(&ok(&["logits", &text(dir.path().join("full_ft/model")), "--ids", "1,2", "--json"]))
            .unwrap();
    assert!(logits["positions"][0]["logits"].as_array().unwrap().iter().all(|v| v.is_number()));
}

/// The arguments of a run of 60 steps with everything that has a state.
fn long_run<'a>(model: &'a str, data: &'a str, out: &'a str) -> Vec<&'a str> {
    vec![
        "train",
        model,
        "--data",
        data,
        "-o",
        out,
        "--max-steps",
        "60",
        "--batch-size",
        "3",
        "--lora-dropout",
        "0.1",
        "--lr",
        "0.003",
        "--val-split",
        "0.1",
        "--eval-steps",
        "7",
        "--save-minutes",
        "0",
        "--template",
        "none",
        "--quiet",
    ]
}

fn wait(mut child: Child) {
    child.wait().unwrap();
}

#[test]
fn killed_at_any_moment_it_ends_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 40));
    let whole = dir.path().join("whole");
    ok(&[&long_run(&model, &data, whole.to_str().unwrap())[..], &["--threads", "1"]].concat());
    let out = dir.path().join("killed");
    let args = long_run(&model, &data, out.to_str().unwrap());
    let lines = || std::fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    // Eight kills spread over the run, each some moments after a step; then to the end, with other threads.
    let mut kills = 0;
    for (i, until) in [4, 11, 17, 24, 31, 37, 46, 53].into_iter().enumerate() {
        let threads = if i % 2 == 0 { "1" } else { "2" };
        let mut child = rushlight(&[&args[..], &["--threads", threads]].concat()).spawn().unwrap();
        while lines() < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(i as u64 * 3_701 % 15_000));
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        wait(child);
    }
    assert!(kills >= 5, "only {kills} runs were still at work when they were killed");
    ok(&[&args[..], &["--threads", "2"]].concat());
    assert_eq!(adapter(&out), adapter(&whole));
    let plain = |dir: &Path| {
        let lines = metrics(dir).into_iter().map(|mut line| {
            line.as_object_mut().unwrap().remove("seconds");
            line.to_string()
        });
        lines.collect::<Vec<_>>()
    };
    assert_eq!(plain(&out), plain(&whole));
    // Checkpoints do not pile up.
    let names: Vec<String> = std::fs::read_dir(out.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.iter().filter(|n| n.starts_with("step-")).count(), 2, "{names:?}");
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_the_same_command_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 30));
    let out = dir.path().join("out");
    let args = [
        "train",
        &model,
        "--data",
        &data,
        "-o",
        out.to_str().unwrap(),
        "--max-steps",
        "4000",
        "--batch-size",
        "2",
        "--template",
        "none",
    ];
    for signal in ["-TERM", "-INT"] {
        let child = rushlight(&args).spawn().unwrap();
        let lines = || std::fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |t| t.lines().count());
        let (before, limit) = (lines(), Instant::now() + Duration::from_secs(60));
        while lines() <= before + 3 && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let end = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&end.stderr).into_owned();
        assert_eq!(end.status.code(), Some(130), "{said}");
        assert!(said.contains("the same command goes on"), "{said}");
        assert!(out.join("adapter/adapter_model.safetensors").exists());
    }
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("polyline"));
}

#[test]
fn another_run_is_not_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 20));
    let out = text(dir.path().join("out"));
    let args = ["train", &model, "--data", &data, "-o", &out, "--max-steps", "3", "--template", "none"];
    ok(&args);
    let (line, code) = error(&[&args[..], &["--lr", "0.5"]].concat());
    assert!(line.contains("lr was 0.0002, now 0.5") && line.contains("--force") && code == 1, "{line}");
    // Another base of the same shape.
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(&model).join(name), other.join(name)).unwrap();
    }
    let path = other.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let other = text(other);
    let (line, _) = error(&[&["train", &other], &args[2..]].concat());
    assert!(line.contains("base model was"), "{line}");
    // What cannot go on leaves the run as it was, even with --force.
    let (line, _) = error(&[&args[..], &["--lora-r", "4", "--force"]].concat());
    assert!(line.contains("cannot change in a run that has begun"), "{line}");
    let (line, _) = error(&[&args[..], &["--lr", "0.5"]].concat());
    assert!(line.contains("(lr was 0.0002, now 0.5)"), "{line}");
    // More steps with --force: it goes on where it was.
    ok(&[&args[..6], &["--max-steps", "5", "--template", "none", "--force"]].concat());
    let steps: Vec<u64> = metrics(Path::new(&out)).iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5]);
}

#[test]
fn what_is_wrong_is_said_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 20));
    let out = text(dir.path().join("out"));
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        text_of(dir.path().join(name))
    };
    fn text_of(path: PathBuf) -> String {
        path.to_str().unwrap().to_string()
    }
    let chat =
        file("chat.jsonl", r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}]}"#);
    let outside = file("outside.jsonl", r#"{"input_ids":[1,2,3],"labels":[1,2,99999]}"#);
    let unlearned = file("unlearned.jsonl", r#"{"input_ids":[1,2,3],"labels":[-100,-100,-100]}"#);
    let rubbish = file("rubbish.jsonl", "\u{0}\u{1}{{{{");
    let empty = file("empty.jsonl", "");
    let with = |data: &str, extra: &[&str]| {
        let args = ["train", &model, "--data", data, "-o", &out, "--max-steps", "2", "--template", "none"];
        error(&[&args[..], extra].concat())
    };
    for bad in [&chat, &outside, &unlearned, &rubbish, &empty, "/nonexistent.jsonl"] {
        let (line, code) = with(bad, &[]);
        let name = Path::new(bad).file_name().unwrap().to_str().unwrap();
        assert!(line.contains(name) && code == 1, "{bad}: {line}");
    }
    for (extra, part) in [
        (&["--max-seq-len", "100000"][..], "--max-seq-len 100000"),
        (&["--lr", "-1"], "--lr"),
        (&["--lr", "nan"], "--lr"),
        (&["--targets", "nonsense"], "'nonsense'"),
        (&["--lora-r", "0"], "--lora-r 0"),
        (&["--lora-dropout", "1"], "dropout"),
        (&["--val-split", "1.5"], "--val-split"),
        (&["--patience", "3"], "--patience"),
        (&["--compute-classification-metrics", "--val-split", "0.2"], "classification"),
        (&["--sample-prompt", "hi"], "--sample-prompt"),
        (&["--init-adapter", "/nonexistent"], "/nonexistent"),
        (&["--train-full", "norm"], "--train-full"),
        (&["--gguf", "--dora"], "--gguf"),
        (&["--memory", "20MB"], "--memory"),
        (&["--method", "full", "--rslora"], "--rslora"),
    ] {
        let (line, _) = with(&data, extra);
        assert!(line.contains(part), "{extra:?}: {line}");
        assert!(!Path::new(&out).join("metrics.jsonl").exists(), "{extra:?}");
    }
    // The adapter of another base.
    if let Some(other) = shared("fixtures/tiny_llama_train/lora_initial_adapter") {
        let (line, _) = with(&data, &["--lora-r", "4", "--lora-alpha", "8", "--init-adapter", other.to_str().unwrap()]);
        assert!(line.contains("another base"), "{line}");
    }
    let (line, _) = error(&["train", &model, "--data", &data, "-o", &out, "--template", "nonsense"]);
    assert!(line.contains("nonsense") && line.contains("built-in"), "{line}");
    // A folder that is something else.
    let mine = text(dir.path().to_path_buf());
    let (line, _) = error(&["train", &model, "--data", &data, "-o", &mine, "--template", "none"]);
    assert!(line.contains("not a run"), "{line}");
}

#[test]
fn the_plan_says_what_fits() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 20));
    let args = ["train", &model, "--data", &data, "--template", "none", "--plan"];
    let plan: Value = serde_json::from_str(&ok(&[&args[..], &["--json"]].concat())).unwrap();
    assert!(plan["total"].as_u64().unwrap() > plan["memory"]["weights"].as_u64().unwrap());
    assert!(plan["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!((plan["steps"].as_u64(), plan["steps_per_epoch"].as_u64()), (Some(80), Some(20)));
    let words = ok(&args);
    assert!(words.contains("memory") && words.contains("tokens/s measured, done in"), "{words}");
}

#[test]
fn every_method_writes_what_it_learned() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 24));
    let logits = |model: &str, extra: &[&str]| ok(&[&["logits", model, "--ids", "5,8,11", "--json"], extra].concat());
    let base = logits(&model, &[]);
    for (name, extra) in [
        ("lora", &["--gguf"][..]),
        ("rslora", &["--rslora", "--lora-plus", "4", "--optimizer", "adamw8bit"]),
        ("dora", &["--dora", "--train-full", "lm_head"]),
        ("prefix", &["--method", "prefix", "--prefix-tokens", "4"]),
        ("full", &["--method", "full", "--optimizer", "sgd"]),
    ] {
        let out = dir.path().join(name);
        // A prefix has little to say in a model of random weights.
        let (lr, better) = match name {
            "full" => ("0.05", 0.1),
            "prefix" => ("0.1", 0.02),
            _ => ("0.01", 0.1),
        };
        let args = ["train", &model, "--data", &data, "-o", out.to_str().unwrap(), "--epochs", "6", "--lr", lr];
        let said = ok(&[&args[..], &["--batch-size", "4", "--template", "none"], extra].concat());
        assert!(said.contains("36 steps"), "{said}");
        let lines = metrics(&out);
        let loss = |i: usize| lines[i]["loss"].as_f64().unwrap();
        assert!(loss(35) < loss(0) - better, "{name}: {} {}", loss(0), loss(35));
        let learned = match name {
            "full" => logits(&text(out.join("model")), &[]),
            _ => logits(&model, &["--adapter", &text(out.join("adapter"))]),
        };
        assert_ne!(learned, base, "{name}");
        if name == "lora" {
            assert_eq!(logits(&model, &["--adapter", &text(out.join("adapter.gguf"))]), learned);
        }
    }
}

/// NF4 made in memory is what `quantize --type nf4` writes, and trains alike.
#[test]
fn a_base_in_nf4() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("llama"), write_tokens(&dir.path().join("t.jsonl"), 8));
    let written = text(dir.path().join("nf4"));
    ok(&["quantize", &model, "-o", &written, "--type", "nf4"]);
    let losses = |model: &str, name: &str, extra: &[&str]| {
        let out = dir.path().join(name);
        let args = ["train", model, "--data", &data, "-o", out.to_str().unwrap(), "--template", "none", "--lr", "0.01"];
        ok(&[&args[..], &["--batch-size", "4", "--max-steps", "3"], extra].concat());
        metrics(&out).iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (there, here) = (losses(&written, "there", &[]), losses(&model, "here", &["--base", "nf4"]));
    assert_eq!(there, here);
    assert_ne!(losses(&model, "floats", &[]), here);
    let (message, code) = error(&["train", &model, "--data", &data, "--plan", "--base", "nf4", "--method", "full"]);
    assert!(message.contains("--base nf4 belongs to --method lora") && code == 2, "{message}");
}

#[test]
fn stories_are_learned() {
    let Some(model) = shared("models/stories260K-hf") else { return };
    let dir = tempfile::tempdir().unwrap();
    let tale =
        "Tom had a red kite. The kite flew up, up, up. Tom said: fly, kite, fly! The kite was gone in the blue sky. ";
    let lines: Vec<String> = (0..12).map(|i| json!({"text": tale.repeat(1 + i % 3)}).to_string()).collect();
    let data = dir.path().join("tales.jsonl");
    std::fs::write(&data, lines.join("\n")).unwrap();
    let (model, data, out) = (text(model), text(data), dir.path().join("out"));
    ok(&[
        "train",
        &model,
        "--data",
        &data,
        "-o",
        out.to_str().unwrap(),
        "--epochs",
        "12",
        "--max-seq-len",
        "64",
        "--lr",
        "0.01",
        "--batch-size",
        "2",
        "--val-split",
        "0.2",
        "--sample-prompt",
        "Tom had a red",
        "--template",
        "none",
    ]);
    let lines = metrics(&out);
    let losses: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    assert!(losses[losses.len() - 1] < 0.5 * losses[0], "{losses:?}");
    let evaluations: Vec<&Value> = lines.iter().filter(|l| l.get("val_loss").is_some()).collect();
    assert!(!evaluations.is_empty() && evaluations.iter().all(|e| e["samples"][0]["answer"].is_string()));
    let adapter = text(out.join("adapter"));
    let answer = ok(&["run", &model, "--adapter", &adapter, "--raw", "-p", "Tom had a red", "-n", "12", "--temp", "0"]);
    assert!(answer.contains("kite"), "{answer}");
}
