//! Every family on the reference checkpoints, and the adapters made for them.

mod golden;

use golden::{Steps, check, options, shared};
use rushlight::engine::{Engine, Options};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::families;
use rushlight_models::model::Model;

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
