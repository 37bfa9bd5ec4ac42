//! A chat template, on a conversation with tools.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rushlight_models::tokenizer::{ChatTemplate, RenderOptions};
use serde_json::json;

fuzz_target!(|data: &[u8]| {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::from_source(source, "fuzz") else { return };
    let messages = [
        json!({"role": "system", "content": "S"}),
        json!({"role": "user", "content": "a <|im_end|> b"}),
        json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]}),
    ];
    let options = RenderOptions {
        add_generation_prompt: true,
        tools: Some(json!([{"type": "function", "function": {"name": "f", "parameters": {}}}])),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..RenderOptions::default()
    };
    let _ = template.render(&messages, &options);
});
