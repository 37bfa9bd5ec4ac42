//! Every family on the reference checkpoints, and the adapters made for them.

#[allow(dead_code)]
mod golden;

use golden::{best, distance, ids, json, numbers, options, shared};
use rushlight::engine::{Engine, Options};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::families;
use rushlight_models::model::Model;
use serde_json::Value as Json;
use std::path::Path;

/// The reference's own arithmetic grows with the logits; so does what may be between it and ours.
fn room(case: &Json) -> f32 {
    let all = case["logits"].as_object().unwrap().values().flat_map(numbers);
    3e-4 * (all.fold(0.0, |most: f32, x| most.max(x.abs())) / 10.0).max(1.0)
}

/// Which rows the reference's numbers hold for when tokens come one by one.
#[derive(Clone, Copy, PartialEq)]
enum Steps {
    /// All of them.
    All,
    /// The last alone: what rows see, or how far they are turned, is another matter while the rest is not there.
    Last,
    /// None: what is in the cache stays as it was computed.
    None,
}

/// The cases of `golden`: the prompt token by token and at once, then the greedy continuation.
fn check(engine: &mut Engine, golden: &Path, steps: Steps) {
    let label = golden.display();
    for (i, case) in json(golden)["cases"].as_array().unwrap().iter().enumerate() {
        let (prompt, want, room) = (ids(&case["input_ids"]), case["logits"].as_object().unwrap(), room(case));
        let compare = |how: &str, position: usize, logits: &[f32]| {
            let Some(want) = want.get(&position.to_string()) else { return };
            let d = distance(logits, &numbers(want));
            assert!(d < room, "{label} case {i} {how} position {position}: off by {d}");
        };
        engine.truncate(0, 0);
        for (position, &id) in prompt.iter().enumerate() {
            let logits = engine.step(&[(0, id)]).unwrap();
            if steps == Steps::All || steps == Steps::Last && position + 1 == prompt.len() {
                compare("step", position, logits);
            }
        }
        engine.truncate(0, 0);
        let mut last = Vec::new();
        let mut seen = 0;
        engine
            .prompt_all(0, &prompt, &mut |position, logits| {
                compare("prompt", position, logits);
                last = logits.to_vec();
                seen += 1;
            })
            .unwrap();
        assert!(seen == prompt.len() && want.keys().all(|p| p.parse::<usize>().unwrap() < seen));
        // What a model with a cache says, where the reference has one that says otherwise.
        let greedy = case.get("greedy_continuation_cached").unwrap_or(&case["greedy_continuation"]);
        let margins = numbers(&case["greedy_margins"]);
        for (k, want) in ids(greedy).into_iter().enumerate() {
            assert!(best(&last) == want || margins[k] < 5e-3, "{label} case {i}: greedy token {k} is not {want}");
            last = engine.step(&[(0, want)]).unwrap().to_vec();
        }
    }
}

/// All of these checkpoints, and the adapters that lie with them.
fn check_families(names: &str, steps: Steps) {
    for name in names.split_whitespace() {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let exact = dir.join("golden_exact_invfreq.json");
        let golden = if exact.exists() { exact } else { dir.join("golden.json") };
        let mut engine = Engine::open(&dir, &Options { context: Some(64), ..options(&[]) }).unwrap();
        check(&mut engine, &golden, steps);
        let adapters = std::fs::read_dir(dir.join("adapters"));
        for adapter in adapters.into_iter().flatten().map(|entry| entry.unwrap().path()) {
            engine.set_adapters(&[(adapter.clone(), 1.0)]).unwrap();
            check(&mut engine, &adapter.join("golden.json"), steps);
        }
    }
}

#[test]
fn llama_and_its_kin() {
    check_families(
        "llama llama-rope3 llama-rope3-v5config llama-tied-bias llama-linear-rope llama-yarn llama-sharded-bf16 \
         llama-sharded-f16 llama-torchbin yi mistral smollm3 granite helium ernie4_5 olmo olmo2 stablelm",
        Steps::All,
    );
}

#[test]
fn qwen() {
    check_families("qwen2 qwen2-tied qwen3", Steps::All);
    check_families("qwen-7b", Steps::None);
}

#[test]
fn experts() {
    check_families("mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss", Steps::All);
}

#[test]
fn gemma() {
    check_families("gemma gemma2 gemma3", Steps::All);
}

#[test]
fn phi_and_cohere() {
    check_families("phi phi3 cohere", Steps::All);
    check_families("phi3-longrope", Steps::Last);
}

#[test]
fn glm() {
    check_families(
        "glm glm4 chatglm2-6b chatglm2-6b-ptuning chatglm2-6b-ptuning-proj chatglm3-6b chatglm3-6b-32k",
        Steps::All,
    );
    check_families("chatglm-6b chatglm-6b-28l chatglm-6b-ptuning", Steps::Last);
}

#[test]
fn baichuan_and_internlm() {
    check_families("baichuan-7b baichuan-13b baichuan2-7b baichuan2-13b internlm-7b internlm2", Steps::All);
    check_families("internlm2-bias-dynntk", Steps::None);
}

#[test]
fn gpt_and_others_of_its_time() {
    check_families(
        "gpt2 gpt_bigcode gpt_bigcode-mha gpt_neox gptj starcoder2 bloom falcon-7b-style falcon-40b-style",
        Steps::All,
    );
}

/// transformers 4.57 adds Falcon's distances twice where it computes attention itself, as it did for the reference data:
/// once to the scores and once more with the mask. With fused attention, its default, it adds them once, as these models
/// were trained and as we do. Twice as much must give the reference's numbers.
#[test]
fn distances_of_falcon() {
    let Some(dir) = shared("fixtures/families/falcon-rw-alibi") else { return };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let (family, mut spec) = families::recognise(&checkpoint).unwrap();
    let rounded = &mut spec.alibi.as_mut().unwrap().rounded;
    assert_eq!(*rounded, Some(spec.attention_scale));
    *rounded = Some(2.0 * spec.attention_scale);
    let model = Model::from_spec(&checkpoint, family, spec).unwrap();
    let mut engine = Engine::from_model(checkpoint, model, &options(&[])).unwrap();
    check(&mut engine, &dir.join("golden.json"), Steps::All);
}
