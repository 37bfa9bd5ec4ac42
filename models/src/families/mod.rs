//! The families: how each reads its description into a [`ModelSpec`], and what it calls its tensors.

mod config;
mod configuration;
mod keys;
mod llama;
mod metadata;
mod mistral;
mod qwen2;

pub use config::Config;
pub(crate) use configuration::configure;
pub use keys::Keys;
pub(crate) use metadata::{Description, describe};

use crate::checkpoint::{Checkpoint, Kind};
use crate::spec::{Biases, Branches, LayerSpec, Mlp, ModelSpec, Norm, Placement, QkNorm, Rope};
use crate::{Error, Result};
use rushlight_quant::formats::Format;

/// What a tensor is in a model, whatever its file calls it.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Embedding,
    FinalNorm,
    Head,
    AttentionNorm,
    Q,
    K,
    V,
    O,
    QNorm,
    KNorm,
    AttentionPostNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    MlpPostNorm,
    /// Divisors of the rotary frequencies (GGUF only). The only one whose name has no `.weight` to be added.
    RopeFactors,
}

/// Names of tensors without `.weight` or `.bias`; `{}` stands for the layer.
pub type Names = &'static [(Role, &'static str)];

/// Whose names a checkpoint uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// Those of the family's Hugging Face implementation.
    HuggingFace,
    /// Those of GGUF.
    Gguf,
}

impl Naming {
    /// The naming of `checkpoint`.
    pub fn of(checkpoint: &Checkpoint) -> Naming {
        match checkpoint.kind() {
            Kind::Gguf(_) => Naming::Gguf,
            Kind::HuggingFace { .. } => Naming::HuggingFace,
        }
    }
}

/// A family of models.
#[derive(Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// `architectures` in config.json, for configurations without a `model_type`.
    pub architectures: &'static [&'static str],
    /// Reads config.json.
    pub from_config: fn(&Config<'_>) -> Result<ModelSpec>,
    /// Its tensors in safetensors files.
    pub names: Names,
    /// Its form in GGUF files, where it has one.
    pub gguf: Option<Gguf>,
    /// Ends of the names of tensors that carry nothing the model needs.
    pub ignored: &'static [&'static str],
}

/// A family's form in GGUF files. Several families may share one.
#[derive(Clone, Copy, Debug)]
pub struct Gguf {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Reads the metadata.
    pub from_keys: fn(&Keys<'_>) -> Result<ModelSpec>,
    /// Its tensors.
    pub names: Names,
    /// Whether rows of queries and keys are reordered within each head, so that the two values of a
    /// rotary pair, which lie half a head apart in safetensors files, are neighbours here.
    pub reordered: bool,
}

/// Every family, in the order they are listed to people.
pub static FAMILIES: &[&Family] = &[&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY];

impl Family {
    /// The name of a tensor without `.weight` or `.bias`; `None` where the family has no such tensor.
    pub fn name(&self, naming: Naming, role: Role, layer: usize) -> Option<String> {
        let name = self.names(naming).iter().find(|(r, _)| *r == role)?.1;
        Some(name.replacen("{}", &layer.to_string(), 1))
    }

    /// The role and layer of a tensor called `name` (without `.weight` or `.bias`).
    pub fn role(&self, naming: Naming, name: &str) -> Option<(Role, usize)> {
        self.names(naming).iter().find_map(|&(role, pattern)| match pattern.split_once("{}") {
            None => (pattern == name).then_some((role, 0)),
            Some((before, after)) => {
                let layer = name.strip_prefix(before)?.strip_suffix(after)?;
                let plain = !layer.is_empty() && layer.bytes().all(|b| b.is_ascii_digit());
                Some((role, layer.parse().ok().filter(|_| plain)?))
            }
        })
    }

    fn names(&self, naming: Naming) -> Names {
        match naming {
            Naming::HuggingFace => self.names,
            Naming::Gguf => self.gguf.map_or(&[], |g| g.names),
        }
    }

    /// Whether a tensor may be left unused.
    pub fn ignores(&self, name: &str) -> bool {
        self.ignored.iter().any(|end| name.ends_with(end))
    }
}

/// The names of llama's tensors in safetensors files, which most later families kept.
pub const NAMES: Names = &[
    (Role::Embedding, "model.embed_tokens"),
    (Role::FinalNorm, "model.norm"),
    (Role::Head, "lm_head"),
    (Role::AttentionNorm, "model.layers.{}.input_layernorm"),
    (Role::Q, "model.layers.{}.self_attn.q_proj"),
    (Role::K, "model.layers.{}.self_attn.k_proj"),
    (Role::V, "model.layers.{}.self_attn.v_proj"),
    (Role::O, "model.layers.{}.self_attn.o_proj"),
    (Role::MlpNorm, "model.layers.{}.post_attention_layernorm"),
    (Role::Gate, "model.layers.{}.mlp.gate_proj"),
    (Role::Up, "model.layers.{}.mlp.up_proj"),
    (Role::Down, "model.layers.{}.mlp.down_proj"),
];

/// The names of tensors in GGUF, the same for all families with the same parts.
pub const GGUF_NAMES: Names = &[
    (Role::Embedding, "token_embd"),
    (Role::FinalNorm, "output_norm"),
    (Role::Head, "output"),
    (Role::AttentionNorm, "blk.{}.attn_norm"),
    (Role::Q, "blk.{}.attn_q"),
    (Role::K, "blk.{}.attn_k"),
    (Role::V, "blk.{}.attn_v"),
    (Role::O, "blk.{}.attn_output"),
    (Role::QNorm, "blk.{}.attn_q_norm"),
    (Role::KNorm, "blk.{}.attn_k_norm"),
    (Role::AttentionPostNorm, "blk.{}.post_attention_norm"),
    (Role::MlpNorm, "blk.{}.ffn_norm"),
    (Role::Gate, "blk.{}.ffn_gate"),
    (Role::Up, "blk.{}.ffn_up"),
    (Role::Down, "blk.{}.ffn_down"),
    (Role::MlpPostNorm, "blk.{}.post_ffw_norm"),
    (Role::RopeFactors, "rope_freqs.weight"),
];

/// Tensors that old conversions wrote and nothing needs: they can be computed.
pub const IGNORED: &[&str] = &[".rotary_emb.inv_freq", ".attn_rot_embd.weight"];

/// What every description gives of any decoder, under one name or another.
struct Basics {
    family: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    context_length: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    mlp: Mlp,
    norm: Norm,
    rope: Rope,
    tied_head: bool,
}

impl Basics {
    /// The plain decoder of these sizes, which is llama's; a family changes what it does otherwise.
    fn spec(self) -> ModelSpec {
        ModelSpec {
            family: self.family,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            context_length: self.context_length,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            attention_scale: 1.0 / (self.head_dim as f32).sqrt(),
            attention_softcap: None,
            qk_norm: QkNorm::None,
            norm: self.norm,
            placement: Placement::Before,
            branches: Branches::Sequential,
            bias: Biases::default(),
            ropes: vec![self.rope],
            layers: vec![LayerSpec { window: None, rope: Some(0), mlp: self.mlp }; self.layers],
            tied_head: self.tied_head,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
        }
    }
}

/// The family whose GGUF files say `general.architecture = name`: the first of those that share it.
pub fn by_architecture(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.gguf.is_some_and(|g| g.architecture == name))
}

/// Finds the family of `checkpoint` and has it read the description.
pub fn recognise(checkpoint: &Checkpoint) -> Result<(&'static Family, ModelSpec)> {
    match checkpoint.kind() {
        Kind::Gguf(metadata) => {
            let Some(name) = metadata.str("general.architecture") else {
                return Err(Error::file(checkpoint.path(), "its metadata has no general.architecture: not a model"));
            };
            let forms = || FAMILIES.iter().filter_map(|f| Some((*f, f.gguf?)));
            let (family, form) = forms().find(|(_, g)| g.architecture == name).ok_or_else(|| {
                let mut known: Vec<&str> = forms().map(|(_, g)| g.architecture).collect();
                known.dedup();
                unknown(checkpoint, name, &known)
            })?;
            Ok((family, (form.from_keys)(&Keys::new(checkpoint, metadata, name))?))
        }
        Kind::HuggingFace { config, .. } => {
            let path = checkpoint.path().join("config.json");
            let config = Config::new(config, &path);
            let (model_type, architectures) = (config.str("model_type"), config.architectures());
            let family = FAMILIES.iter().find(|f| match model_type {
                Some(t) => f.model_types.contains(&t),
                None => architectures.iter().any(|a| f.architectures.contains(a)),
            });
            let family = family.ok_or_else(|| {
                let name = model_type.or(architectures.first().copied()).unwrap_or("(none named in config.json)");
                let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
                unknown(checkpoint, name, &known)
            })?;
            Ok((family, (family.from_config)(&config)?))
        }
    }
}

fn unknown(checkpoint: &Checkpoint, name: &str, known: &[&str]) -> Error {
    Error::file(
        checkpoint.path(),
        format!("the architecture '{name}' is not supported; the supported ones are {}", known.join(", ")),
    )
}

/// The values of a vector stored in floating point; `None` for other formats.
pub fn floats(format: Format, data: &[u8]) -> Option<Vec<f32>> {
    if !format.is_float() {
        return None;
    }
    let mut values = vec![0.0; data.len() / format.block_bytes()];
    format.decode(data, &mut values);
    Some(values)
}
