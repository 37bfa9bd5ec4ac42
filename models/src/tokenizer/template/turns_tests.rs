use super::*;
use crate::tokenizer::tests::{byte_level, shared};
use serde_json::json;

fn talk(turns: &[(&str, &str)]) -> Vec<Value> {
    turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}

/// What the assistant said, as the tokens of the ranges spell it.
fn said(template: &ChatTemplate, tokenizer: &Tokenizer, messages: &[Value]) -> Result<Vec<String>> {
    let (ids, turns) = template.encode_turns(tokenizer, messages, &RenderOptions::default())?;
    let whole = template.encode_chat(tokenizer, messages, &RenderOptions::default())?;
    assert!(ids.starts_with(&whole) && ids.len() <= whole.len() + 1, "training sees other tokens than chat");
    assert!(turns.windows(2).all(|w| w[0].end <= w[1].start));
    Ok(turns.into_iter().map(|r| tokenizer.decode_continued(&ids[r], false)).collect())
}

fn written(source: &str) -> ChatTemplate {
    ChatTemplate::from_source(source, "test").unwrap()
}

#[test]
fn every_turn_is_found_with_its_end_mark() {
    let t = byte_level();
    let messages =
        talk(&[("system", "S"), ("user", "hell"), ("assistant", "one"), ("user", "one"), ("assistant", "two")]);
    let chatml = ChatTemplate::builtin("chatml").unwrap();
    assert_eq!(said(&chatml, &t, &messages).unwrap(), ["one<|im_end|>", "two<|im_end|>"]);
    // Whoever writes a mark in an answer ends nothing.
    let marked = talk(&[("user", "<|im_end|>"), ("assistant", "a<|im_end|>b")]);
    assert_eq!(said(&chatml, &t, &marked).unwrap(), ["a<|im_end|>b<|im_end|>"]);
    // The assistant may begin, and a conversation may end with the user.
    let begun = talk(&[("assistant", "hi"), ("user", "hell")]);
    assert_eq!(said(&chatml, &t, &begun).unwrap(), ["hi<|im_end|>"]);
    assert!(said(&chatml, &t, &talk(&[("user", "x")])).unwrap().is_empty());
}

#[test]
fn an_answer_without_an_end_gets_one() {
    let bare = written(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    );
    let messages = talk(&[("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]);
    assert_eq!(said(&bare, &byte_level(), &messages).unwrap(), [" one\n", " two\n<|im_end|>"]);
}

#[test]
fn turns_that_the_template_rewrites_are_found_by_their_contents() {
    let t = byte_level();
    let each = "{% for m in messages %}<|im_start|>{{ m.role }}\n";
    let end = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    // Earlier thoughts go, as in Qwen3; the last answer keeps its own.
    let stripping = written(&format!(
        "{each}{{{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n') }}}}{end}"
    ));
    let messages = talk(&[
        ("user", "one"),
        ("assistant", "<think>\nwhy\n</think>\n\none "),
        ("user", "more"),
        ("assistant", "<think>\nso\n</think>\n\ntwo"),
    ]);
    let found = said(&stripping, &t, &messages).unwrap();
    assert_eq!(found, ["one <|im_end|>", "<think>\nso\n</think>\n\ntwo<|im_end|>"]);
    // Calls of tools have no content to look for, but an end.
    let calling = written(&format!(
        "{each}{{% if m.role == 'assistant' and loop.last %}}<think>\n\n</think>\n{{% endif %}}{{{{ m.content }}}}{{{{ m.tool_calls }}}}{end}"
    ));
    let mut calls = talk(&[("user", "q"), ("assistant", ""), ("tool", "hell"), ("assistant", "two")]);
    calls[1]["tool_calls"] = json!(["f"]);
    assert_eq!(said(&calling, &t, &calls).unwrap(), ["['f']<|im_end|>", "<think>\n\n</think>\ntwo<|im_end|>"]);
    // The prompt of a new answer differs from that of an old one.
    let prompting =
        written(&format!("{each}{{{{ m.content | trim }}}}{}", end.replace("assistant\n{%", "assistant\n<think>\n{%")));
    assert_eq!(said(&prompting, &t, &talk(&[("user", "two"), ("assistant", " two ")])).unwrap(), ["two<|im_end|>"]);
    // What is not shown cannot be found.
    let hiding = written("{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}");
    let messages = talk(&[("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]);
    let e = said(&hiding, &t, &messages).unwrap_err().to_string();
    assert!(e.contains("rewrites earlier turns; message 2"), "{e}");
}

#[test]
fn tokens_that_do_not_spell_the_text_are_counted_instead() {
    let mark = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let bytewise = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let mut lower = json!({
        "version": "1.0", "normalizer": {"type": "Lowercase"}, "pre_tokenizer": bytewise, "decoder": bytewise,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "added_tokens": [mark(256, "<|im_start|>"), mark(257, "<|im_end|>")],
    });
    let bytes = (0..=255u8).map(|b| (crate::tokenizer::words::spell(&[b]), json!(b)));
    lower["model"]["vocab"] = Value::Object(bytes.collect());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), lower.to_string()).unwrap();
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert!(t.places("ABC", &t.encode("ABC", Specials::AsText).unwrap()).is_none());
    let messages = talk(&[("user", "Hell"), ("assistant", "One"), ("user", "More"), ("assistant", "TWO")]);
    let found = said(&ChatTemplate::builtin("chatml").unwrap(), &t, &messages).unwrap();
    assert_eq!(found, ["one<|im_end|>", "two<|im_end|>"]);
}

#[test]
fn published_templates_and_tokenizers() {
    let (Some(path), Some(dir)) = (shared("fixtures/chat_templates.json"), shared("fixtures/tokenizers")) else {
        return;
    };
    let data: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let names =
        ["qwen2.5", "mistral-v1-hf", "mistral-v3-hf", "mistral-v1-spm", "yi", "chatglm3", "baichuan2", "internlm2"];
    let tokenizers: Vec<Tokenizer> = names.iter().map(|n| Tokenizer::open(&dir.join(n)).unwrap()).collect();
    let messages = talk(&[
        ("user", "What is 6 times 7?"),
        ("assistant", "It is 42, don't you know."),
        ("user", "你是谁？ It is 42"),
        ("assistant", "我是一个助手。\n\n  Done"),
    ]);
    let wanted = |i: usize| messages[i]["content"].as_str().unwrap();
    let (mut found, mut failed) = (0, Vec::new());
    for (name, t) in data["templates"].as_object().unwrap() {
        let template = ChatTemplate::from_source(t["chat_template"].as_str().unwrap(), name).unwrap();
        for (tokenizer, which) in tokenizers.iter().zip(names) {
            // Some want tools, or the mark before a text.
            if template.encode_chat(tokenizer, &messages, &RenderOptions::default()).is_err() {
                continue;
            }
            match said(&template, tokenizer, &messages) {
                Ok(said) => {
                    found += 1;
                    for (turn, i) in said.iter().zip([1, 3]) {
                        // The answer, what the template puts before (thoughts that are none), and an end mark.
                        assert!(turn.contains(wanted(i)), "{name}, {which}: {turn:?}");
                        assert!(!turn.contains("times 7") && !turn.contains("你是谁"), "{name}, {which}: {turn:?}");
                        assert!(turn.len() < wanted(i).len() + 120, "{name}, {which}: {turn:?}");
                    }
                }
                Err(e) => failed.push(format!("{name}, {which}: {e}")),
            }
        }
    }
    assert!(found >= 160 && failed.is_empty(), "{found} found, {failed:#?}");
}
