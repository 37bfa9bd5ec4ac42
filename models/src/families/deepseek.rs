//! DeepSeek-V2 and V3: keys and values from a latent vector, many small experts, some of them shared.

use super::{Config, FIELDS, Family, Fields, NAMES, Names, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Experts, Groups, Latent, Mlp, ModelSpec, Norm, NormKind, Routing};
use rushlight_quant::ops::RopeLayout;

pub(super) static V2: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    architectures: &["DeepseekV2ForCausalLM"],
    from_config: v2_from_config,
    names: NAMES_OF_LATENT,
    base: NAMES,
    ..PLAIN
};

pub(super) static V3: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3"],
    architectures: &["DeepseekV3ForCausalLM"],
    from_config: v3_from_config,
    names: NAMES_OF_LATENT,
    base: NAMES,
    ..PLAIN
};

const NAMES_OF_LATENT: Names = &[
    (Role::Q, "model.layers.{}.self_attn.q_b_proj"),
    (Role::Q, "model.layers.{}.self_attn.q_proj"),
    (Role::QLatent, "model.layers.{}.self_attn.q_a_proj"),
    (Role::QLatentNorm, "model.layers.{}.self_attn.q_a_layernorm"),
    (Role::KvLatent, "model.layers.{}.self_attn.kv_a_proj_with_mqa"),
    (Role::KvLatentNorm, "model.layers.{}.self_attn.kv_a_layernorm"),
    (Role::KvUp, "model.layers.{}.self_attn.kv_b_proj"),
    (Role::Router, "model.layers.{}.mlp.gate"),
    (Role::ChoiceBias, "model.layers.{}.mlp.gate.e_score_correction_bias"),
    (Role::ExpertGate(0), "model.layers.{}.mlp.experts.{}.gate_proj"),
    (Role::ExpertUp(0), "model.layers.{}.mlp.experts.{}.up_proj"),
    (Role::ExpertDown(0), "model.layers.{}.mlp.experts.{}.down_proj"),
    (Role::SharedGate, "model.layers.{}.mlp.shared_experts.gate_proj"),
    (Role::SharedUp, "model.layers.{}.mlp.shared_experts.up_proj"),
    (Role::SharedDown, "model.layers.{}.mlp.shared_experts.down_proj"),
];

/// `head_dim` is here the width of a key's rotated part.
const DEEPSEEK: Fields =
    Fields { head_dim: "qk_rope_head_dim", kv_heads: "", layout: RopeLayout::Interleaved, ..FIELDS };

/// What both have in common; `route` fills in how experts are chosen.
fn from_config(
    config: &Config<'_>,
    family: &'static str,
    route: impl Fn(Experts) -> Result<Experts>,
) -> Result<ModelSpec> {
    let mut spec = config.decoder_of(family, &DEEPSEEK)?;
    let (plain, rotated) = (config.usize("qk_nope_head_dim")?, config.usize("qk_rope_head_dim")?);
    let bias = config.bool_or("attention_bias", false)?;
    spec.bias = Biases { qkv: bias, output: bias, ..Biases::default() };
    spec.head_dim = plain.saturating_add(rotated);
    spec.value_dim = config.usize("v_head_dim")?;
    spec.ropes[0].first = plain;
    // The reference leaves the epsilon of these at its default.
    let norm = Norm { kind: NormKind::Rms, eps: 1e-6, weight_offset: 0.0 };
    let (query, kv) = (config.usize_opt("q_lora_rank")?, config.usize("kv_lora_rank")?);
    spec.latent = Some(Latent { query, kv, rotated, norm });
    spec.attention_scale = (spec.head_dim as f32).powf(-0.5) * config.yarn_scale()?.powi(2);
    spec.spare_layers = config.usize_opt("num_nextn_predict_layers")?.unwrap_or(0);
    let Some(count) = config.usize_opt("n_routed_experts")? else { return Ok(spec) };
    let (used, width) = (config.usize("num_experts_per_tok")?, config.usize("moe_intermediate_size")?);
    let shared = config.usize_opt("n_shared_experts")?.filter(|&n| n > 0).map(|n| n.saturating_mul(width));
    let dense = config.usize_opt("first_k_dense_replace")?.unwrap_or(0);
    let every = config.usize_opt("moe_layer_freq")?.unwrap_or(1).max(1);
    for (_, layer) in spec.layers.iter_mut().enumerate().filter(|(i, _)| *i >= dense && i % every == 0) {
        let Some(mlp) = layer.mlp.take() else { continue };
        layer.mlp = shared.map(|width| Mlp { width, ..mlp.clone() });
        let experts = Experts::new(count, used, Mlp { width, ..mlp });
        let renormalise = config.bool_or("norm_topk_prob", false)?;
        let scale = config.f32_opt("routed_scaling_factor")?.unwrap_or(1.0);
        layer.experts = Some(route(Experts { renormalise, scale, ..experts })?);
    }
    Ok(spec)
}

fn groups(config: &Config<'_>, best: usize) -> Result<Option<Groups>> {
    let (count, used) = (config.usize_opt("n_group")?, config.usize_opt("topk_group")?);
    Ok(count.zip(used).map(|(count, used)| Groups { count, used, best }))
}

fn v2_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    from_config(config, "deepseek_v2", |experts| {
        let groups = match config.str("topk_method") {
            Some("greedy") | None => None,
            Some("group_limited_greedy") => groups(config, 1)?,
            Some(other) => return Err(config.error(format!("topk_method = '{other}' is not supported"))),
        };
        Ok(Experts { groups, ..experts })
    })
}

fn v3_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    from_config(config, "deepseek_v3", |experts| {
        let groups = groups(config, 2)?;
        Ok(Experts { routing: Routing::Sigmoid, choice_bias: true, groups, ..experts })
    })
}
