//! Switches of `ModelSpec` that the families here leave alone, on reference checkpoints of families that use them.

#[allow(dead_code)]
mod golden;

use golden::{check_golden, json, options, shared};
use rushlight::engine::Engine;
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::families::{Config, FAMILIES, Family, NAMES, Role};
use rushlight_models::model::Model;
use rushlight_models::spec::{Biases, Branches, ModelSpec, NormKind, Placement, QkNorm};
use rushlight_quant::ops::Activation;
use serde_json::{Value as Json, json};

/// Runs the checkpoint `name` as llama with `extra` fields in its configuration, other `names` and what `change` does.
fn check(name: &str, extra: Json, names: &[(Role, &'static str)], change: impl Fn(&mut ModelSpec, &Config<'_>)) {
    let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
    let mut fields = json(&dir.join("config.json"));
    for (key, value) in extra.as_object().unwrap() {
        fields[key] = value.clone();
    }
    let config = Config::new(&fields, &dir);
    let mut spec = config.decoder("llama").unwrap();
    change(&mut spec, &config);
    let renamed = |role| names.iter().all(|(other, _)| *other != role);
    let all = NAMES.iter().filter(|(role, _)| renamed(*role)).chain(names).copied().collect::<Vec<_>>();
    let family: &'static Family = Box::leak(Box::new(Family { names: all.leak(), ..*FAMILIES[0] }));
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let model = Model::from_spec(&checkpoint, family, spec).unwrap();
    let mut engine = Engine::from_model(checkpoint, model, &options(&[])).unwrap();
    check_golden(&mut engine, &dir.join("golden.json"), name);
}

const LAYER_NORM: NormKind = NormKind::Layer { weight: true, bias: true };

#[test]
fn multipliers_of_granite() {
    check("granite", json!({}), &[], |spec, config| {
        spec.embedding_scale = config.f32("embedding_multiplier").unwrap();
        spec.attention_scale = config.f32("attention_multiplier").unwrap();
        spec.residual_scale = config.f32("residual_multiplier").unwrap();
        spec.logit_scale = 1.0 / config.f32("logits_scaling").unwrap();
    });
}

#[test]
fn four_norms_caps_and_alternating_windows_of_gemma2() {
    let names = [
        (Role::AttentionPostNorm, "model.layers.{}.post_attention_layernorm"),
        (Role::MlpNorm, "model.layers.{}.pre_feedforward_layernorm"),
        (Role::MlpPostNorm, "model.layers.{}.post_feedforward_layernorm"),
    ];
    let extra = json!({"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true});
    check("gemma2", extra, &names, |spec, config| {
        spec.placement = Placement::Both;
        spec.norm.weight_offset = 1.0;
        spec.embedding_scale = (spec.hidden_size as f32).sqrt();
        spec.attention_scale = config.f32("query_pre_attn_scalar").unwrap().powf(-0.5);
        spec.attention_softcap = config.f32_opt("attn_logit_softcapping").unwrap();
        spec.logit_softcap = config.f32_opt("final_logit_softcapping").unwrap();
        spec.layers.iter_mut().step_by(2).for_each(|layer| layer.window = Some(8));
    });
}

#[test]
fn norms_behind_the_branches_of_olmo2() {
    let names = [
        (Role::AttentionPostNorm, "model.layers.{}.post_attention_layernorm"),
        (Role::MlpPostNorm, "model.layers.{}.post_feedforward_layernorm"),
        (Role::QNorm, "model.layers.{}.self_attn.q_norm"),
        (Role::KNorm, "model.layers.{}.self_attn.k_norm"),
    ];
    check("olmo2", json!({}), &names, |spec, _| {
        spec.placement = Placement::After;
        spec.qk_norm = QkNorm::Projection;
    });
}

#[test]
fn normed_heads_of_qwen3() {
    let names = [(Role::QNorm, "model.layers.{}.self_attn.q_norm"), (Role::KNorm, "model.layers.{}.self_attn.k_norm")];
    check("qwen3", json!({}), &names, |spec, _| spec.qk_norm = QkNorm::Head);
}

#[test]
fn layer_norms_and_partial_rotation_of_stablelm() {
    check("stablelm", json!({"rms_norm_eps": 1e-5}), &[], |spec, _| {
        spec.norm.kind = LAYER_NORM;
        spec.bias.qkv = true;
    });
}

#[test]
fn the_mlp_without_a_gate_of_starcoder2() {
    let names = [(Role::Up, "model.layers.{}.mlp.c_fc"), (Role::Down, "model.layers.{}.mlp.c_proj")];
    let extra = json!({"rms_norm_eps": 1e-5, "tie_word_embeddings": true});
    check("starcoder2", extra, &names, |spec, _| {
        spec.norm.kind = LAYER_NORM;
        spec.bias = Biases { qkv: true, output: true, up: true, down: true, head: false };
        for layer in &mut spec.layers {
            (layer.window, layer.mlp.gated) = (Some(8), false);
        }
    });
}

#[test]
fn the_parallel_branches_of_phi() {
    let names = [
        (Role::FinalNorm, "model.final_layernorm"),
        (Role::O, "model.layers.{}.self_attn.dense"),
        (Role::Up, "model.layers.{}.mlp.fc1"),
        (Role::Down, "model.layers.{}.mlp.fc2"),
    ];
    check("phi", json!({"rms_norm_eps": 1e-5}), &names, |spec, _| {
        spec.norm.kind = LAYER_NORM;
        spec.branches = Branches::ParallelShared;
        spec.bias = Biases { qkv: true, output: true, up: true, down: true, head: true };
        for layer in &mut spec.layers {
            assert_eq!(layer.mlp.activation, Activation::GeluTanh);
            layer.mlp.gated = false;
        }
    });
}
