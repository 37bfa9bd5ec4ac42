use super::*;
use std::collections::BTreeMap;

/// The published sets with SmolLM2's template: everything is used but what is truly broken, and what is learned is
/// what the assistant says, read here in another way.
#[test]
fn published_sets() {
    let (Some(dir), Some(tokenizer), Some(templates)) =
        (shared("data"), shared("fixtures/tokenizers/qwen2.5"), shared("fixtures/chat_templates.json"))
    else {
        return;
    };
    let tokenizer = Tokenizer::open(&tokenizer).unwrap();
    let templates: Value = serde_json::from_slice(&fs::read(templates).unwrap()).unwrap();
    let template = |name: &str| {
        ChatTemplate::from_source(templates["templates"][name]["chat_template"].as_str().unwrap(), name).unwrap()
    };
    let (smollm2, qwen3) = (template("smollm2"), template("qwen3"));
    let settings = DataSettings { vocab_size: tokenizer.vocab_size(), max_seq_len: 1 << 20, ..settings() };
    let load_set = |name: &str, template: &ChatTemplate| {
        let data =
            load(&[Source::new(dir.join(name))], Some(&tokenizer), Some(template), &settings, &mut |_, _| {}).unwrap();
        println!("{}", data.report);
        data
    };
    let learned = |data: &Dataset, item: usize| -> Vec<String> {
        let plain: Vec<String> = data
            .examples(item)
            .iter()
            .map(|e| {
                let said: Vec<u32> = e.targets.iter().map(|t| t.unwrap_or(u32::MAX)).collect();
                let turns = said.split(|&t| t == u32::MAX).filter(|t| !t.is_empty());
                turns.map(|t| tokenizer.decode_continued(t, false)).collect::<Vec<_>>().join("\0")
            })
            .collect();
        plain[0].split('\0').map(str::to_owned).collect()
    };
    for (name, used, skipped) in [
        ("alpaca_data-5k.json", 4998, 2),
        ("alpaca_gpt4_en-1k.json", 999, 0),
        ("alpaca_gpt4_zh-1k.json", 1000, 0),
        ("lima-1k.json", 1029, 0),
        ("fastchat_dummy_conversation-500.json", 500, 0),
        ("toolcall_en-300.json", 300, 0),
        ("moss_multiturn-140.jsonl", 140, 0),
        ("moss_plugins-50.jsonl", 50, 0),
        ("sql_create_context-4k.jsonl", 4000, 0),
        ("MedInfo2019-QA-Medications.xlsx", 690, 0),
        ("c4-300.jsonl", 300, 0),
    ] {
        let data = load_set(name, &smollm2);
        let file = &data.report.files[0];
        assert_eq!((file.used(), file.skipped.len()), (used, skipped), "{name}: {:?}", file.reasons());
    }
    let path = dir.join("oasst-chat-1k.jsonl");
    let lines: Vec<Value> =
        fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for template in [&smollm2, &qwen3] {
        let data = load_set("oasst-chat-1k.jsonl", template);
        assert_eq!((data.len(), data.report.skipped()), (1102, 0));
        for (item, line) in lines.iter().enumerate().step_by(7) {
            let turns: Vec<&Value> =
                line["messages"].as_array().unwrap().iter().filter(|m| m["role"] == "assistant").collect();
            let found = learned(&data, item);
            assert_eq!(found.len(), turns.len(), "{line}");
            for (k, (turn, found)) in turns.iter().zip(&found).enumerate() {
                // Qwen3 has the last answer begin with thoughts, even where there are none.
                let thoughts =
                    if template.name() == "qwen3" && k + 1 == turns.len() { "<think>\n\n</think>\n\n" } else { "" };
                let said = turn["content"].as_str().unwrap();
                let said = if thoughts.is_empty() { said } else { said.trim_start_matches('\n') };
                assert_eq!(*found, format!("{thoughts}{said}<|im_end|>"));
            }
        }
    }
    let data = load_set("sst2_test.tsv", &smollm2);
    assert_eq!((data.len(), classes::classes(&data).unwrap().len()), (872, 2));
    // Each question a conversation, each answer with its tool calls in Qwen's own layout.
    let data = load_set("toolcall_en-300.json", &qwen3);
    let calls = (0..data.len()).filter(|&i| learned(&data, i).iter().any(|t| t.contains("<tool_call>"))).count();
    assert!(calls > 100, "{calls}");
    let mut reasons = BTreeMap::new();
    for name in ["dpo_en-300.json", "kto_en-300.json"] {
        match load(&[Source::new(dir.join(name))], Some(&tokenizer), Some(&smollm2), &settings, &mut |_, _| {}) {
            Ok(data) => *reasons.entry("kept").or_insert(0) += data.len(),
            Err(e) => assert!(e.to_string().contains("preference training"), "{e}"),
        }
    }
    assert!((1..300).contains(&reasons["kept"]), "{reasons:?}");
}

/// The sets that come with Rushlight.
#[test]
fn our_own_sets() {
    let room = Room::new();
    let path = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    for name in ["identity.jsonl", "sentiment.csv"] {
        assert!(fs::metadata(path(name)).unwrap().len() < 100_000);
    }
    let identity = room.load_all(&[Source::new(path("identity.jsonl"))]).unwrap();
    assert_eq!((identity.report.skipped(), identity.report.cut()), (0, 0), "{}", identity.report);
    let shown = room.shown(&identity);
    let named = shown.iter().filter(|s| s.contains("Tallow")).count();
    assert!(named >= 120 && shown.len() - named >= 30, "{named} of {}", shown.len());
    let sentiment = room.load_all(&[Source::new(path("sentiment.csv"))]).unwrap();
    assert_eq!((sentiment.len(), classes::classes(&sentiment).unwrap().len()), (200, 2));
}

/// Tokens with labels, as the reference runs have them.
#[test]
fn batches_of_the_reference_runs() {
    let Some(path) = shared("fixtures/tiny_llama_train/golden.json") else { return };
    let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let batch = &golden["data"]["sft_batches"][0];
    let numbers = |v: &Value| v.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect::<Vec<_>>();
    let room = Room::new();
    let rows = batch["input_ids"].as_array().unwrap().iter().zip(batch["labels"].as_array().unwrap());
    let file: String = rows.clone().map(|(i, l)| json!({"input_ids": i, "labels": l}).to_string() + "\n").collect();
    let data = load(&[Source::new(room.file("t.jsonl", file))], None, None, &room.settings, &mut |_, _| {}).unwrap();
    for (item, (ids, labels)) in rows.enumerate() {
        let labels: Vec<_> = numbers(labels).into_iter().map(|l| u32::try_from(l).ok()).collect();
        let ids = numbers(ids).into_iter().map(|i| i as u32).collect();
        assert_eq!(data.examples(item), [crate::train::batch::Example::from_labels(ids, &labels)]);
    }
}
