//! Baichuan 1 and 2: llama with packed queries, keys and values; ALiBi in the 13B models; in the second generation a head
//! with normed rows.

use super::{ALL, Config, Defaults, FIELDS, Family, Fields, Gguf, Keys, PLAIN, Role};
use crate::Result;
use crate::spec::{Alibi, ModelSpec};
use rushlight_quant::ops::RopeLayout;

pub(super) static FAMILY: Family = Family {
    name: "baichuan",
    model_types: &["baichuan"],
    architectures: &["BaichuanForCausalLM", "BaiChuanForCausalLM"],
    from_config,
    names: &[(Role::Qkv, "model.layers.{}.self_attn.W_pack")],
    gguf: Some(Gguf { architecture: "baichuan", from_keys, names: &[], reordered: true }),
    ..PLAIN
};

const BAICHUAN: Fields =
    Fields { context: "max_position_embeddings|model_max_length", or: Defaults { ..ALL }, ..FIELDS };

fn from_config(config: &Config<'_>) -> Result<ModelSpec> {
    let mut spec = config.decoder_of("baichuan", &BAICHUAN)?;
    // The configurations of the 13B models have no rotary positions to give a number of.
    let distances = config.get("max_position_embeddings").is_none();
    if distances {
        use_distances(&mut spec);
    }
    spec.normed_head = normed_head(config, distances, spec.vocab_size);
    Ok(spec)
}

/// Whether it is of the second generation, which configurations do not say outright.
fn normed_head(config: &Config<'_>, distances: bool, vocab_size: usize) -> bool {
    if config.architectures().contains(&"BaiChuanForCausalLM") {
        return false;
    }
    if !distances {
        return true;
    }
    // The 13B models of both generations have the same fields. Their code, where it was downloaded too, tells them apart
    // (it is read, not run), then the vocabulary: 64000 tokens, later 125696. Then the name.
    if let Ok(code) = std::fs::read_to_string(config.folder().join("modeling_baichuan.py")) {
        return code.contains("NormHead");
    }
    let name = config.folder().file_name().map(|name| name.to_string_lossy().to_lowercase());
    match vocab_size {
        64000..100_000 => false,
        100_000.. => true,
        _ => name.is_some_and(|name| name.contains("baichuan2")),
    }
}

fn use_distances(spec: &mut ModelSpec) {
    spec.alibi = Some(Alibi::new(spec.heads));
    // The embedding stays, unused: by it rows of queries and keys change places in GGUF, here as in the 7B models.
    spec.layers.iter_mut().for_each(|layer| layer.rope = None);
}

fn from_keys(keys: &Keys<'_>) -> Result<ModelSpec> {
    let mut spec = keys.decoder("baichuan", RopeLayout::Interleaved)?;
    // llama.cpp knows the 13B models by their depth.
    if spec.layers.len() == 40 || keys.f32_opt("attention.max_alibi_bias")?.is_some_and(|bias| bias > 0.0) {
        use_distances(&mut spec);
    }
    Ok(spec)
}
