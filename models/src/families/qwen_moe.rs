//! The mixtures of experts among Qwen 1.5 to 3.

use super::{Config, Family, Gguf, Keys, NAMES, PLAIN, Role, qwen2, qwen3};
use crate::Result;
use crate::spec::{Experts, LayerSpec, Mlp, ModelSpec};

pub(super) static QWEN2: Family = Family {
    name: "qwen2_moe",
    model_types: &["qwen2_moe"],
    architectures: &["Qwen2MoeForCausalLM"],
    from_config: qwen2_from_config,
    names: EXPERTS,
    base: NAMES,
    gguf: Some(Gguf { architecture: "qwen2moe", from_keys: qwen2_from_keys, names: &[], reordered: false }),
    ..PLAIN
};

pub(super) static QWEN3: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    architectures: &["Qwen3MoeForCausalLM"],
    from_config: qwen3_from_config,
    names: EXPERTS,
    gguf: Some(Gguf { architecture: "qwen3moe", from_keys: qwen3_from_keys, names: &[], reordered: false }),
    ..PLAIN
};

const EXPERTS: super::Names = &[
    (Role::Router, "model.layers.{}.mlp.gate"),
    (Role::ExpertGate(0), "model.layers.{}.mlp.experts.{}.gate_proj"),
    (Role::ExpertUp(0), "model.layers.{}.mlp.experts.{}.up_proj"),
    (Role::ExpertDown(0), "model.layers.{}.mlp.experts.{}.down_proj"),
    (Role::SharedGate, "model.layers.{}.mlp.shared_expert.gate_proj"),
    (Role::SharedUp, "model.layers.{}.mlp.shared_expert.up_proj"),
    (Role::SharedDown, "model.layers.{}.mlp.shared_expert.down_proj"),
    (Role::SharedRouter, "model.layers.{}.mlp.shared_expert_gate"),
];

/// Puts experts into the layers that have them, beside a shared MLP of `shared` rows.
fn mix(config: &Config<'_>, spec: &mut ModelSpec, shared: Option<usize>) -> Result<()> {
    let (count, used) = (config.usize("num_experts")?, config.usize("num_experts_per_tok")?);
    let width = config.usize("moe_intermediate_size")?;
    let renormalise = config.bool_or("norm_topk_prob", false)?;
    let step = config.usize_opt("decoder_sparse_step")?.unwrap_or(1).max(1);
    let dense = config.numbers("mlp_only_layers").unwrap_or_default();
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let Some(mlp) = layer.mlp.clone().filter(|_| count > 0 && (i + 1) % step == 0) else { continue };
        if dense.contains(&(i as f32)) {
            continue;
        }
        layer.mlp = shared.map(|width| Mlp { width, ..mlp.clone() });
        let experts = Experts::new(count, used, Mlp { width, ..mlp });
        layer.experts = Some(Experts { renormalise, shared_gate: shared.is_some(), ..experts });
    }
    Ok(())
}

fn qwen2_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { family: "qwen2_moe", ..qwen2::from_config(config)? };
    // With plain and fused attention the reference lets all layers slide, with flash attention those behind
    // max_window_layers.
    let slides = |layer: &LayerSpec| layer.window.is_some();
    if config.bool_or("use_sliding_window", false)? && !spec.layers.iter().all(slides) {
        return Err(config.error("use_sliding_window with max_window_layers is not supported"));
    }
    spec.bias.qkv = config.bool_or("qkv_bias", true)?;
    mix(config, &mut spec, Some(config.usize("shared_expert_intermediate_size")?))?;
    Ok(spec)
}

fn qwen3_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { family: "qwen3_moe", ..qwen3::from_config(config)? };
    if config.bool_or("use_sliding_window", false)? {
        config.slide(&mut spec, Some(4096), |_| true)?;
    }
    mix(config, &mut spec, None)?;
    Ok(spec)
}

fn qwen2_from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { family: "qwen2_moe", ..qwen2::from_keys(keys)? };
    spec.bias.qkv = keys.has_bias(Role::Q);
    let shared = keys.usize("expert_shared_feed_forward_length")?;
    let renormalise = keys.bool_opt("expert_weights_norm")?.unwrap_or(false);
    keys.mix(&mut spec, |_, experts| Experts { shared_gate: true, renormalise, ..experts }, Some(shared))?;
    Ok(spec)
}

fn qwen3_from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { family: "qwen3_moe", ..qwen3::from_keys(keys)? };
    let renormalise = keys.bool_opt("expert_weights_norm")?.unwrap_or(true);
    keys.mix(&mut spec, |_, experts| Experts { renormalise, ..experts }, None)?;
    Ok(spec)
}
