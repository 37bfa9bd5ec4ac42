//! gpt-oss: experts with biases, an attention sink for each head, windows in turn.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::packing::Packing;
use crate::spec::{Biases, Experts, Mlp, ModelSpec, RopeScaling, Routing};
use rushlight_quant::ops::{Activation, RopeLayout};

pub(super) static FAMILY: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    architectures: &["GptOssForCausalLM"],
    from_config,
    names: &[
        (Role::Router, "model.layers.{}.mlp.router"),
        (Role::ExpertGateUp(0), "model.layers.{}.mlp.experts.gate_up_proj"),
        (Role::ExpertDown(0), "model.layers.{}.mlp.experts.down_proj"),
        (Role::Sinks, "model.layers.{}.self_attn.sinks"),
    ],
    gguf: Some(Gguf {
        architecture: "gpt-oss",
        from_keys,
        names: &[(Role::MlpNorm, "blk.{}.post_attention_norm")],
        reordered: false,
    }),
    gate_up: Packing::Grouped,
    transposed: &[Role::ExpertGateUp(0), Role::ExpertDown(0)],
    ..PLAIN
};

const OSS: Fields = Fields { or: Defaults { rope_theta: 150000.0, ..ALL }, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    // The reference takes the released models' for granted.
    if !config.has("rope_scaling") && !config.has("rope_parameters") {
        return Err(config.error("the field rope_scaling is missing"));
    }
    // GGUF files have no key for it, and the reference takes it for granted too.
    if let Some(other) = config.f32_opt("swiglu_limit")?.filter(|limit| *limit != 7.0) {
        return Err(config.error(format!("swiglu_limit = {other} is not supported")));
    }
    let mut spec = ModelSpec { sinks: true, ..config.decoder_of("gpt_oss", &OSS)? };
    let attention = config.bool_or("attention_bias", true)?;
    spec.bias = Biases { qkv: attention, output: attention, up: true, down: true, head: false };
    config.slide(&mut spec, Some(128), |layer| layer % 2 == 0)?;
    let (count, used) = (config.usize("num_local_experts|num_experts")?, config.usize("num_experts_per_tok")?);
    for layer in &mut spec.layers {
        let mlp = layer.mlp.take().map(|mlp| Mlp { activation: Activation::ClampedSilu, ..mlp });
        let routed =
            |mlp| Experts { routing: Routing::SoftmaxOfChosen, router_bias: true, ..Experts::new(count, used, mlp) };
        layer.experts = mlp.map(routed);
    }
    Ok(spec)
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = ModelSpec { sinks: true, ..keys.decoder("gpt_oss", RopeLayout::Half)? };
    spec.bias = Biases { qkv: true, output: true, up: true, down: true, head: false };
    // The reference does not round where the stretch sets in, which no key says.
    for rope in &mut spec.ropes {
        if let RopeScaling::Yarn { truncate, .. } = &mut rope.scaling {
            *truncate = false;
        }
    }
    keys.slide(&mut spec, None, |layer| layer % 2 == 0)?;
    spec.layers.iter_mut().filter_map(|l| l.mlp.as_mut()).for_each(|mlp| mlp.activation = Activation::ClampedSilu);
    let special = |experts| Experts { routing: Routing::SoftmaxOfChosen, router_bias: true, ..experts };
    keys.mix(&mut spec, |_, experts| special(experts), None)?;
    Ok(spec)
}
