//! `rushlight eval`: what it scores, against plain arithmetic, and what it says of files it cannot read.

mod golden;

use golden::{ids, json as read_json, options, shared};
use rushlight::engine::{Engine, Options};
use rushlight::eval::score::{Choice, Scorer};
use rushlight_models::tokenizer::{Specials, Tokenizer};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};

fn rushlight(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    let output = command.args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// The summary and the lines of each question.
fn eval(args: &[&str], lines: &Path) -> (Value, Vec<Value>) {
    let args = [&["eval", "--json", "-q", "-o", lines.to_str().unwrap()], args].concat();
    let (status, out, err) = rushlight(&args);
    assert_eq!((status, &err[..]), (0, ""), "{args:?}");
    let text = std::fs::read_to_string(lines).unwrap();
    (serde_json::from_str(&out).unwrap(), text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// The logarithm of the probability of `choice` behind `context`, with a pass of its own.
fn plain(engine: &mut Engine, tokenizer: &Tokenizer, context: &str, choice: &str) -> f64 {
    let encode = |text: &str| {
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        bos.into_iter().chain(tokenizer.encode(text, Specials::Native).unwrap()).collect::<Vec<u32>>()
    };
    let (start, ids) = (encode(context).len(), encode(&format!("{context} {choice}")));
    engine.truncate(0, 0);
    let mut sum = 0.0;
    engine
        .prompt_all(0, &ids[..ids.len() - 1], &mut |position, logits| {
            if position + 1 >= start {
                let all: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
                sum += f64::from(logits[ids[position + 1] as usize]) - all.ln();
            }
        })
        .unwrap();
    sum
}

#[test]
fn scores_are_those_of_a_plain_pass_over_each_choice() {
    let Some(model) = shared("models/stories260K-hf") else { return };
    let place = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = place.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    write(
        "m/animals_test.csv",
        "What says \"meow\"?,cat,dog,\"a \"\"red\"\" bird\",sun,A\nWho barks?,cat,dog,fish,sun,B\n",
    );
    write("m/dev/animals_dev.csv", "Who flies?,cat,dog,bird,sun,C\nWho swims?,fish,dog,\"bird,\nblue\",sun,A\n");
    write("m/birds_test.csv", "Who sings?,tree,bird,car,sun,B\n");
    write("m/dev/birds_dev.csv", "Who eats worms?,hen,sun,dog,car,A\nWho has wings?,owl,sun,dog,car,A\n");
    let mut engine = Engine::open(&model, &options(&[])).unwrap();
    let tokenizer = Tokenizer::open(&model).unwrap();
    let (model, lines) = (model.to_str().unwrap(), place.path().join("lines"));
    let mut check = |line: &Value, context: &str, choices: &[&str]| {
        for (i, choice) in choices.iter().enumerate() {
            let (want, got) =
                (plain(&mut engine, &tokenizer, context, choice), line["log_likelihoods"][i].as_f64().unwrap());
            assert!((want - got).abs() < 1e-4, "{context} {choice}: {got} is not {want}");
        }
    };
    // MMLU's files: letters, with examples.
    let folder = place.path().join("m");
    let (summary, answers) = eval(&[model, "--task", folder.to_str().unwrap(), "--shots", "2"], &lines);
    let shots = "The following are multiple choice questions (with answers) about animals.\n\n\
        Who flies?\nA. cat\nB. dog\nC. bird\nD. sun\nAnswer: C\n\n\
        Who swims?\nA. fish\nB. dog\nC. bird,\nblue\nD. sun\nAnswer: A\n\n";
    let letters = ["A", "B", "C", "D"];
    check(
        &answers[0],
        &format!("{shots}What says \"meow\"?\nA. cat\nB. dog\nC. a \"red\" bird\nD. sun\nAnswer:"),
        &letters,
    );
    check(&answers[1], &format!("{shots}Who barks?\nA. cat\nB. dog\nC. fish\nD. sun\nAnswer:"), &letters);
    assert_eq!((&answers[1]["answer"], &answers[2]["subject"]), (&json!(1), &json!("birds")));
    assert!(answers[1]["place"].as_str().unwrap().ends_with("animals_test.csv, line 2"));
    let right = answers.iter().filter(|a| a["answer"] == a["chosen"]).count();
    assert_eq!((&summary["questions"], &summary["shots"]), (&json!(3), &json!(2)));
    assert!((summary["accuracy"].as_f64().unwrap() - right as f64 / 3.0).abs() < 1e-12);
    assert_eq!(summary["subjects"][0]["subject"], "animals");
    assert!(summary["subjects"][0].get("accuracy_norm").is_none());
    // HellaSwag's lines: texts of several tokens.
    let endings = [
        "runs to the big tree and sits.",
        "runs to the big tree and eats it.",
        "was.",
        "[step] sings.  Then it sings, sings and sings to Lily.",
        "runs",
    ];
    let scene = |label: Value| json!({"activity_label": "Play", "ctx_a": "Tom sees a cat. ", "ctx_b": "the cat", "endings": endings, "label": label});
    let file = write("hellaswag_val.jsonl", &format!("{}\n\n{}\n", scene(json!(1)), scene(json!("4"))));
    let (summary, answers) = eval(&[model, "--task", &file], &lines);
    let tidy = endings.map(|e| e.replace("[step] ", " ").replace("  ", " "));
    let tidy: Vec<&str> = tidy.iter().map(String::as_str).collect();
    check(&answers[0], "Play: Tom sees a cat. The cat", &tidy);
    assert_eq!(answers[0]["log_likelihoods"], answers[1]["log_likelihoods"]);
    let by_length = |line: &Value| {
        let each = |i: usize| line["log_likelihoods"][i].as_f64().unwrap() / tidy[i].len() as f64;
        (0..5).max_by(|&a, &b| each(a).total_cmp(&each(b))).unwrap()
    };
    assert_eq!(answers[0]["chosen_by_length"], by_length(&answers[0]));
    assert!(summary["accuracy_norm"].is_number());
    // JSON lines of several subjects, with letters and with texts.
    let text = r#"{"question": "Who sings?", "choices": ["a bird", "a car"], "answer": "a bird", "subject": "x_y"}
{"question": "Who runs?", "choices": {"text": ["the sun", "a dog"], "label": ["1", "2"]}, "answerKey": "2"}
{"question": "Who reads?", "A": "a stone", "B": "a girl", "answer": "B", "subject": "x_y"}"#;
    let file = write("own.jsonl", text);
    let (summary, answers) = eval(&[model, "--task", &file, "--text"], &lines);
    check(&answers[0], "Question: Who sings?\nAnswer:", &["a bird", "a car"]);
    check(&answers[2], "Question: Who runs?\nAnswer:", &["the sun", "a dog"]);
    assert_eq!([0, 1, 2].map(|i| answers[i]["answer"].as_u64().unwrap()), [0, 1, 1]);
    assert_eq!([0, 1].map(|i| summary["subjects"][i]["subject"].as_str().unwrap()), ["x_y", "own"]);
    // The same in one list, and the hub's Parquet.
    let list: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let listed = write("own.json", &json!({"data": list}).to_string());
    let (_, again) = eval(&[model, "--task", &listed, "--text"], &lines);
    assert_eq!(again[2]["log_likelihoods"], answers[2]["log_likelihoods"]);
    assert!(again[2]["place"].as_str().unwrap().ends_with("own.json, record 2"), "{}", again[2]["place"]);
    #[cfg(feature = "parquet")]
    {
        let exam = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/data/exam.parquet")).unwrap();
        let hub = place.path().join("hub/lights");
        std::fs::create_dir_all(&hub).unwrap();
        std::fs::write(hub.join("test-00000-of-00001.parquet"), &exam).unwrap();
        write("hub/lights/dev.jsonl", r#"{"question": "Q", "choices": ["a", "b"], "answer": 1, "subject": "lights"}"#);
        let (summary, answers) = eval(&[model, "--task", hub.to_str().unwrap(), "--shots", "1"], &lines);
        check(
            &answers[1],
            "The following are multiple choice questions (with answers) about lights.\n\nQ\nA. a\nB. b\nAnswer: B\n\n\
             How many rushes make a bundle of a dozen?\nA. two\nB. ten\nC. twelve\nD. twenty\nAnswer:",
            &letters,
        );
        assert_eq!((&summary["questions"], &answers[1]["answer"]), (&json!(3), &json!(2)));
        let half = hub.join("half-00000-of-00002.parquet");
        std::fs::write(&half, &exam).unwrap();
        let run =
            Command::new(env!("CARGO_BIN_EXE_rushlight")).args(["eval", model, "--task"]).arg(&half).output().unwrap();
        assert!(String::from_utf8_lossy(&run.stderr).contains("one of 2 files of one set"));
    }
    let (_, answers) = eval(&[model, "--task", &file, "--limit", "1"], &lines);
    check(
        &answers[0],
        "The following are multiple choice questions (with answers) about x y.\n\nWho sings?\nA. a bird\nB. a car\nAnswer:",
        &["A", "B"],
    );
    assert_eq!(answers.len(), 2);
    // What is longer than the context loses its beginning, alike for plain arithmetic and here.
    let long =
        format!("{{\"question\": \"{}\", \"choices\": [\"yes it is\", \"no\"], \"answer\": 0}}", "so big ".repeat(400));
    let file = write("long.jsonl", &long);
    let (summary, _) = eval(&[model, "--task", &file, "--text"], &lines);
    assert_eq!(summary["truncated"], 1);
    let (status, out, _) = rushlight(&["eval", model, "--task", folder.to_str().unwrap()]);
    assert!(status == 0 && out.starts_with("subject  questions     accuracy, %\nanimals          2 "), "{out}");
}

#[test]
fn choices_score_alike_in_any_company() {
    // Plain; windows; experts; a rotary base that grows with the sequence; a context that is seen whole.
    for family in ["llama", "gemma2", "mixtral", "qwen-7b", "internlm2-bias-dynntk", "chatglm-6b"] {
        let Some(dir) = shared(&format!("fixtures/families/{family}")) else { return };
        let options = Options { context: Some(64), ..options(&[]) };
        let (mut engine, mut other) = (Engine::open(&dir, &options).unwrap(), Engine::open(&dir, &options).unwrap());
        let mut scorer = Scorer::new(&mut engine);
        let golden = read_json(&dir.join("golden.json"));
        for case in golden["cases"].as_array().unwrap() {
            let context = ids(&case["input_ids"]);
            let context = &context[..context.len().min(40)];
            let ends: [&[u32]; 5] = [&[9], &[9, 30, 12, 7], &[9, 30, 5], &[17, 11], &[9, 30]];
            let choices = ends.map(|own| Choice { ids: [context, own].concat(), own: own.len() });
            let got = scorer.log_likelihoods(&choices).unwrap();
            // A second time, when all is at hand.
            assert_eq!(scorer.log_likelihoods(&choices).unwrap(), got, "{family}");
            for (choice, got) in choices.iter().zip(got) {
                let mut want = 0.0;
                other.truncate(0, 0);
                other
                    .prompt_all(0, &choice.ids[..choice.ids.len() - 1], &mut |position, logits| {
                        if position + 1 >= context.len() {
                            let all: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
                            want += f64::from(logits[choice.ids[position + 1] as usize]) - all.ln();
                        }
                    })
                    .unwrap();
                assert!((want - got).abs() < 2e-4, "{family}: {got} is not {want}");
            }
        }
    }
}

#[test]
fn wrong_files_are_named_with_their_lines() {
    let Some(model) = shared("models/stories260K-hf") else { return };
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let model = model.to_str().unwrap();
    let long = "x".repeat(100);
    for (name, text, what) in [
        ("a.csv", "Q,1,2,3,4,A\nQ,1,2,3,4,E\n", "a.csv, line 2: the answer is 'E'"),
        ("l.csv", "Q,1,2,3,4,A\r\n\r\nQ,1,2,3,4,E\r\n", "l.csv, line 3: the answer is 'E'"),
        ("b.csv", "Q,1,2,3,A\n", "b.csv, line 1: there are 5 columns"),
        ("c.csv", "id,question,A,B,C,D\n0,q,1,2,3,4\n", "c.csv, line 1: there is no column of answers"),
        ("d.csv", "id,question,A,B,C,D,answer\n0,q,1,2,3\n", "d.csv, line 2: column 6 is missing"),
        ("e.csv", "", "e.csv: there are no questions"),
        ("f.jsonl", "{\"question\": \"x\"}\n", "f.jsonl, line 1: 'choices' is not a list"),
        (
            "g.jsonl",
            "\n{\"question\": \"x\", \"choices\": [1, 2], \"answer\": 2}",
            "g.jsonl, line 2: the answer 2 is none of the 2",
        ),
        ("h.jsonl", "[1]\n", "h.jsonl, line 1: not a JSON object"),
        (
            "i.jsonl",
            "{\"endings\": [\"a\", \"b\"], \"label\": 0}",
            "i.jsonl, line 1: there is no text 'activity_label'",
        ),
        ("j.txt", &long[..], "j.txt: questions are read from .csv, .jsonl, .json and .parquet"),
    ] {
        std::fs::write(path(name), text).unwrap();
        let (status, _, err) = rushlight(&["eval", model, "--task", &path(name)]);
        assert!(status == 1 && err.contains(what) && err.lines().count() == 1, "{name}: {err}");
    }
    std::fs::write(path("k.csv"), b"Q,1,2,3,4,A\nQ,\xff,2,3,4,A\n").unwrap();
    for (args, status, what) in [
        (vec!["--task", &path("k.csv")[..]], 1, "k.csv, line 2: not UTF-8"),
        (vec!["--task", "no-such-task"], 1, "no such file or folder"),
        (vec!["--task", &path("")], 1, ".csv"),
        (vec!["--task", &path("a.csv"), "--examples", "x"], 2, "--shots says"),
    ] {
        let (code, _, err) = rushlight(&[&["eval", model], &args[..]].concat());
        assert!(code == status && err.contains(what), "{args:?}: {err}");
    }
    std::fs::create_dir(path("alone")).unwrap();
    std::fs::write(path("alone/s_test.csv"), "Q,1,2,3,4,A\n").unwrap();
    let (code, _, err) = rushlight(&["eval", model, "--task", &path("alone"), "--shots", "1"]);
    assert!(code == 1 && err.contains("no dev, train or val file of s"), "{err}");
    std::fs::write(path("alone/s_dev.csv"), "Q,1,2,3,4,A\n").unwrap();
    let out = path("out.jsonl");
    let (code, _, err) = rushlight(&["eval", model, "--task", &path("alone"), "--shots", "2", "-o", &out]);
    assert!(code == 1 && err.contains("there are 1 examples for s, fewer than --shots 2"), "{err}");
    assert!(!Path::new(&out).exists());
    let (task, csv) = (path("alone"), path("alone/s_test.csv"));
    let (code, _, err) = rushlight(&["eval", model, "--task", &task, "--shots", "1", "-o", &csv]);
    assert!(code == 1 && err.contains("is not a file of this command, so it is not replaced"), "{err}");
    assert_eq!(std::fs::read_to_string(&csv).unwrap(), "Q,1,2,3,4,A\n");
}
