//! DeepSeek-V2 and V3: keys and values from a latent vector, many small experts, some of them shared.

use super::{Config, FIELDS, Family, Fields, Gguf, Keys, NAMES, Names, PLAIN, Role};
use crate::Result;
use crate::spec::{Biases, Experts, Groups, Latent, Mlp, ModelSpec, Norm, NormKind, RopeScaling, Routing};
use rushlight_quant::ops::RopeLayout;

pub(super) static V2: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    architectures: &["DeepseekV2ForCausalLM"],
    from_config: v2_from_config,
    names: NAMES_OF_LATENT,
    base: NAMES,
    gguf: Some(GGUF),
    ..PLAIN
};

pub(super) static V3: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3"],
    architectures: &["DeepseekV3ForCausalLM"],
    from_config: v3_from_config,
    names: NAMES_OF_LATENT,
    base: NAMES,
    gguf: Some(GGUF),
    ..PLAIN
};

const GGUF: Gguf = Gguf {
    architecture: "deepseek2",
    from_keys,
    names: &[(Role::Q, "blk.{}.attn_q_b"), (Role::Q, "blk.{}.attn_q")],
    reordered: false,
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
    defaults: &Defaults,
    route: impl Fn(Experts) -> Result<Experts>,
) -> Result<ModelSpec> {
    let layout = match config.bool_or("rope_interleave", true)? {
        true => RopeLayout::Interleaved,
        false => RopeLayout::Half,
    };
    let mut spec = config.decoder_of(family, &Fields { layout, ..DEEPSEEK })?;
    let (plain, rotated) = (config.usize("qk_nope_head_dim")?, config.usize("qk_rope_head_dim")?);
    let (attention, mlp) = (config.bool_or("attention_bias", false)?, config.bool_or("mlp_bias", false)?);
    spec.bias = Biases { qkv: attention, output: attention, up: mlp, down: mlp, head: false };
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
        let renormalise = config.bool_or("norm_topk_prob", defaults.renormalise)?;
        let scale = config.f32_opt("routed_scaling_factor")?.unwrap_or(defaults.scale);
        layer.experts = Some(route(Experts { renormalise, scale, ..experts })?);
    }
    Ok(spec)
}

/// What a configuration that says nothing of routing means.
struct Defaults {
    renormalise: bool,
    scale: f32,
    /// Groups, and how many of them are kept.
    groups: Option<(usize, usize)>,
}

const V2_DEFAULTS: Defaults = Defaults { renormalise: false, scale: 1.0, groups: None };
const V3_DEFAULTS: Defaults = Defaults { renormalise: true, scale: 2.5, groups: Some((8, 4)) };

fn groups(config: &Config<'_>, defaults: &Defaults, best: usize) -> Result<Option<Groups>> {
    let count = config.usize_opt("n_group")?.or(defaults.groups.map(|g| g.0));
    let used = config.usize_opt("topk_group")?.or(defaults.groups.map(|g| g.1));
    Ok(count.zip(used).map(|(count, used)| Groups { count, used, best }))
}

fn v2_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only_word("scoring_func", "softmax")?;
    // Divided by their sum, weights are not scaled in DeepSeek's code and are neither in transformers'.
    config.only("norm_topk_prob", false)?;
    from_config(config, "deepseek_v2", &V2_DEFAULTS, |experts| {
        let groups = match config.str("topk_method") {
            Some("greedy") | None => None,
            Some("group_limited_greedy") => groups(config, &V2_DEFAULTS, 1)?,
            Some(other) => return Err(config.error(format!("topk_method = '{other}' is not supported"))),
        };
        Ok(Experts { groups, ..experts })
    })
}

fn v3_from_config(config: &Config<'_>) -> Result<ModelSpec> {
    config.only_word("scoring_func", "sigmoid")?;
    config.only_word("topk_method", "noaux_tc")?;
    from_config(config, "deepseek_v3", &V3_DEFAULTS, |experts| {
        let groups = groups(config, &V3_DEFAULTS, 2)?;
        Ok(Experts { routing: Routing::Sigmoid, choice_bias: true, groups, ..experts })
    })
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("deepseek", RopeLayout::Interleaved)?;
    // Files with the latent vectors' matrices in two parts give the lengths of what attention can be done on without them.
    if let Some(length) = keys.usize_opt("attention.key_length_mla")? {
        spec.head_dim = length;
        spec.value_dim = keys.usize("attention.value_length_mla")?;
        spec.attention_scale = (length as f32).powf(-0.5);
    }
    // All heads have keys of their own, though files may say one.
    spec.kv_heads = spec.heads;
    let rotated = spec.ropes[0].dim;
    spec.ropes[0].first = spec.head_dim.saturating_sub(rotated);
    let norm = Norm { kind: NormKind::Rms, eps: 1e-6, weight_offset: 0.0 };
    let query = keys.usize_opt("attention.q_lora_rank")?.filter(|&n| n > 0);
    spec.latent = Some(Latent { query, kv: keys.usize("attention.kv_lora_rank")?, rotated, norm });
    // The file has a tenth of mscale_all_dim, by which the logarithm of the stretch is multiplied.
    if let (Some(log), RopeScaling::Yarn { factor, attention_factor, .. }) =
        (keys.f32_opt("rope.scaling.yarn_log_multiplier")?, &mut spec.ropes[0].scaling)
    {
        spec.attention_scale *= (log * factor.ln() + 1.0).powi(2);
        *attention_factor = 1.0;
    }
    let scale = keys.f32_opt("expert_weights_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0);
    let renormalise = keys.bool_opt("expert_weights_norm")?.unwrap_or(false);
    let choice_bias = keys.has_tensor_ending(".exp_probs_b.bias");
    // Without the key, the number of groups that DeepSeek-V3 has is not in the file.
    let (routing, best) = match keys.usize_opt("expert_gating_func")?.unwrap_or(1) {
        2 => (Routing::Sigmoid, 2),
        _ => (Routing::Softmax, 1),
    };
    let (count, used) = (keys.usize_opt("expert_group_count")?, keys.usize_opt("expert_group_used_count")?);
    let groups = count.zip(used).map(|(count, used)| Groups { count, used, best });
    let width = keys.usize_opt("expert_feed_forward_length")?.unwrap_or(0);
    let shared = keys.usize_opt("expert_shared_count")?.filter(|&n| n > 0).map(|n| n.saturating_mul(width));
    let change = |_, experts| Experts { scale, renormalise, choice_bias, routing, groups, ..experts };
    keys.mix(&mut spec, change, shared)?;
    Ok(spec)
}
