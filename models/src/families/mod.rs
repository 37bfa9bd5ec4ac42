//! The families: how each reads its description into a [`ModelSpec`], and what it calls its tensors.

mod baichuan;
mod bloom;
mod chatglm;
mod chatglm2;
mod cohere;
mod config;
mod configuration;
mod deepseek;
mod ernie;
mod falcon;
mod gemma;
mod glm;
mod gpt2;
mod gpt_bigcode;
mod gpt_neox;
mod gpt_oss;
mod gptj;
mod granite;
mod helium;
mod internlm;
mod internlm2;
mod keys;
mod llama;
mod llama_cpp;
mod metadata;
mod mistral;
mod mixtral;
mod olmo;
mod phi;
mod phi3;
mod qwen;
mod qwen2;
mod qwen3;
mod qwen_moe;
mod smollm3;
mod stablelm;
mod starcoder2;

pub use config::{ALL, Config, Defaults, FIELDS, Fields, GPT_FIELDS, LAYER_NORM};
pub(crate) use configuration::configure;
pub use keys::Keys;
pub(crate) use metadata::{Description, describe};

use crate::checkpoint::{Checkpoint, Kind};
use crate::packing::Packing;
use crate::spec::{Biases, Branches, Context, LayerSpec, Mlp, ModelSpec, Norm, Placement, QkNorm, Rope};
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
    /// Learned positions, added to the embeddings.
    Positions,
    EmbeddingNorm,
    /// Queries, keys and values in one.
    Qkv,
    /// Gate and up in one.
    GateUp,
    /// From the stream to the latent vector of queries.
    QLatent,
    QLatentNorm,
    /// From the stream to the latent vector of keys and values, and to the keys' rotated part.
    KvLatent,
    KvLatentNorm,
    /// From the latent vector to keys and values.
    KvUp,
    /// The same in two parts (GGUF only): `[heads, latent, width]` for keys, `[heads, width, latent]` for values.
    KeyUp,
    ValueUp,
    Router,
    SharedGate,
    SharedUp,
    SharedDown,
    SharedGateUp,
    /// From the stream to what the shared MLP's output is gated by.
    SharedRouter,
    ExpertGate(usize),
    ExpertUp(usize),
    ExpertDown(usize),
    ExpertGateUp(usize),
    /// The table of a prefix, and the two layers that it may go through.
    Prefix,
    PrefixIn,
    PrefixOut,
    /// Added to the router's scores for the choice. From here on the names are whole: nothing is added to them.
    ChoiceBias,
    Sinks,
    /// Divisors of the rotary frequencies (GGUF only).
    RopeFactors,
    RopeFactorsShort,
    RopeFactorsLong,
}

impl Role {
    /// The number of the expert it belongs to.
    pub fn expert(self) -> Option<usize> {
        match self {
            Role::ExpertGate(i) | Role::ExpertUp(i) | Role::ExpertDown(i) | Role::ExpertGateUp(i) => Some(i),
            _ => None,
        }
    }

    /// The same for expert `i`.
    pub fn of_expert(self, i: usize) -> Role {
        match self {
            Role::ExpertGate(_) => Role::ExpertGate(i),
            Role::ExpertUp(_) => Role::ExpertUp(i),
            Role::ExpertDown(_) => Role::ExpertDown(i),
            Role::ExpertGateUp(_) => Role::ExpertGateUp(i),
            other => other,
        }
    }
}

/// Names of tensors without `.weight` or `.bias`; `{}` stands for the layer. Experts (here number 0) have a second one for
/// their number, or none where one tensor holds them all; vectors that are held head by head have one for the head.
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
    /// Its tensors in safetensors files, as far as they are not called as in `base`. A role with several names has one
    /// or the other.
    pub names: Names,
    /// Names that it shares with others.
    pub base: Names,
    /// Its form in GGUF files, where it has one.
    pub gguf: Option<Gguf>,
    /// Ends of the names of tensors that carry nothing the model needs.
    pub ignored: &'static [&'static str],
    /// How safetensors files pack queries, keys and values where they are one (in GGUF they are always stacked).
    pub qkv: Packing,
    /// The same for gate and up.
    pub gate_up: Packing,
    /// Linear layers that safetensors files hold the other way, `[inputs, outputs]`.
    pub transposed: &'static [Role],
    /// A word by which configurations of this family differ from others of the same `model_type`.
    pub is: fn(&Config<'_>) -> bool,
}

/// What most families have in common.
const PLAIN: Family = Family {
    name: "",
    model_types: &[],
    architectures: &[],
    from_config: |config| config.decoder(""),
    names: &[],
    base: NAMES,
    gguf: None,
    ignored: IGNORED,
    qkv: Packing::Stacked,
    gate_up: Packing::Stacked,
    transposed: &[],
    is: |_| true,
};

/// A family's form in GGUF files. Several families may share one.
#[derive(Clone, Copy, Debug)]
pub struct Gguf {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Reads the metadata.
    pub from_keys: fn(&Keys<'_>) -> Result<ModelSpec>,
    /// Its tensors, as far as they are not called as in [`GGUF_NAMES`].
    pub names: Names,
    /// Whether rows of queries and keys are reordered within each head, so that the two values of a
    /// rotary pair, which lie half a head apart in safetensors files, are neighbours here.
    pub reordered: bool,
}

impl Gguf {
    /// Reads the metadata of a file of the architecture.
    fn read(&self, keys: &Keys<'_>) -> Result<ModelSpec> {
        let mut spec = (self.from_keys)(keys)?;
        keys.depart(&mut spec)?;
        Ok(spec)
    }
}

/// Every family, in the order they are listed to people.
pub static FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &mistral::FAMILY,
    &mixtral::FAMILY,
    &qwen::FAMILY,
    &qwen2::FAMILY,
    &qwen_moe::QWEN2,
    &qwen3::FAMILY,
    &qwen_moe::QWEN3,
    &gemma::FAMILY,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi::FAMILY,
    &phi3::FAMILY,
    &chatglm::FAMILY,
    &chatglm2::FAMILY,
    &glm::FAMILY,
    &glm::GLM4,
    &baichuan::FAMILY,
    &internlm::FAMILY,
    &internlm2::FAMILY,
    &deepseek::V2,
    &deepseek::V3,
    &gpt_oss::FAMILY,
    &gpt2::FAMILY,
    &gpt_bigcode::FAMILY,
    &gptj::FAMILY,
    &gpt_neox::FAMILY,
    &starcoder2::FAMILY,
    &falcon::FAMILY,
    &bloom::FAMILY,
    &olmo::FAMILY,
    &olmo::OLMO2,
    &smollm3::FAMILY,
    &granite::FAMILY,
    &cohere::FAMILY,
    &stablelm::FAMILY,
    &ernie::FAMILY,
    &helium::FAMILY,
];

impl Family {
    /// The name of a tensor without `.weight` or `.bias`; `None` where the family has no such tensor.
    pub fn name(&self, naming: Naming, role: Role, layer: usize) -> Option<String> {
        self.names_of(naming, role, layer).next()
    }

    /// All names that a tensor may have.
    pub fn names_of(&self, naming: Naming, role: Role, layer: usize) -> impl Iterator<Item = String> {
        let patterns = self.patterns(naming).filter(move |(r, _)| *r == role.of_expert(0));
        patterns.map(move |(_, pattern)| {
            let name = pattern.replacen("{}", &layer.to_string(), 1);
            // What is held head by head goes by the name of the first.
            name.replacen("{}", &role.expert().unwrap_or(0).to_string(), 1)
        })
    }

    /// The names of the parts of a vector of `heads` that files hold head by head; `None` where they hold it in one.
    pub fn names_by_head(&self, naming: Naming, role: Role, layer: usize, heads: usize) -> Option<Vec<String>> {
        let (_, pattern) = self.patterns(naming).find(|(r, _)| *r == role)?;
        let name = pattern.replacen("{}", &layer.to_string(), 1);
        let by_head = role.expert().is_none() && name.contains("{}");
        by_head.then(|| (0..heads).map(|head| name.replacen("{}", &head.to_string(), 1)).collect())
    }

    /// Whether the family has a name of its own for `role`.
    pub fn names_itself(&self, naming: Naming, role: Role) -> bool {
        self.own(naming).iter().any(|(r, _)| *r == role.of_expert(0))
    }

    /// Whether one tensor holds the matrix `role` of all experts.
    pub fn stacked(&self, naming: Naming, role: Role) -> bool {
        let pattern = self.patterns(naming).find(|(r, _)| *r == role.of_expert(0));
        role.expert().is_some() && pattern.is_some_and(|(_, name)| name.matches("{}").count() < 2)
    }

    /// What the family's own files call its linear layers, the last part of each name: what adapters are made for.
    pub fn targets(&self) -> Vec<&'static str> {
        let other = |role: Role| {
            use Role::*;
            matches!(role, Embedding | Positions | FinalNorm | EmbeddingNorm | AttentionNorm | AttentionPostNorm)
                || matches!(role, MlpNorm | MlpPostNorm | QNorm | KNorm | QLatentNorm | KvLatentNorm | Head | Router)
                || matches!(role, ChoiceBias | Sinks | SharedRouter | Prefix | PrefixIn | PrefixOut)
        };
        let own = |role: Role| self.names_itself(Naming::HuggingFace, role);
        let last = |name: &'static str| name.rsplit('.').next().unwrap_or(name);
        // Whether the family has something else in the place of what its base names.
        let replaced = |role: Role| {
            let experts = self.names.iter().find(|(r, _)| *r == Role::ExpertDown(0));
            let mixed = experts.is_some_and(|(_, other)| last(other) != last("mlp.down_proj"));
            own(role)
                || match role {
                    Role::Q => own(Role::Qkv),
                    Role::K | Role::V => own(Role::Qkv) || own(Role::KvLatent),
                    Role::Gate => own(Role::GateUp) || own(Role::ExpertGateUp(0)) || own(Role::Up) || mixed,
                    Role::Up => own(Role::GateUp) || own(Role::ExpertGateUp(0)) || mixed,
                    Role::Down => mixed,
                    _ => false,
                }
        };
        let base = self.base.iter().filter(|(role, _)| !replaced(*role));
        let mut targets = Vec::new();
        for &(role, name) in self.names.iter().chain(base) {
            if !other(role) && !targets.contains(&last(name)) {
                targets.push(last(name));
            }
        }
        targets
    }

    /// How the packed matrix `role` holds its parts.
    pub fn packing(&self, naming: Naming, role: Role) -> Packing {
        match (naming, role) {
            (Naming::Gguf, _) => Packing::Stacked,
            (_, Role::Qkv) => self.qkv,
            (_, Role::GateUp | Role::SharedGateUp | Role::ExpertGateUp(_)) => self.gate_up,
            _ => Packing::Stacked,
        }
    }

    /// Whether the matrix `role` is stored as `[inputs, outputs]`.
    pub fn is_transposed(&self, naming: Naming, role: Role) -> bool {
        naming == Naming::HuggingFace && self.transposed.contains(&role.of_expert(0))
    }

    /// The role and layer of a tensor called `name` (without `.weight` or `.bias`).
    pub fn role(&self, naming: Naming, name: &str) -> Option<(Role, usize)> {
        self.patterns(naming).find_map(|&(role, pattern)| {
            let mut pieces = pattern.split("{}");
            let mut rest = name.strip_prefix(pieces.next()?)?;
            let mut numbers = [0; 2];
            for (piece, number) in pieces.zip(&mut numbers) {
                let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
                *number = rest[..digits].parse().ok()?;
                rest = rest[digits..].strip_prefix(piece)?;
            }
            rest.is_empty().then(|| (role.of_expert(numbers[1]), numbers[0]))
        })
    }

    fn own(&self, naming: Naming) -> Names {
        match naming {
            Naming::HuggingFace => self.names,
            Naming::Gguf => self.gguf.map_or(&[], |g| g.names),
        }
    }

    fn patterns(&self, naming: Naming) -> impl Iterator<Item = &'static (Role, &'static str)> {
        let base = match (naming, self.gguf) {
            (Naming::HuggingFace, _) => self.base,
            (Naming::Gguf, Some(_)) => GGUF_NAMES,
            (Naming::Gguf, None) => &[],
        };
        self.own(naming).iter().chain(base)
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
    (Role::QNorm, "model.layers.{}.self_attn.q_norm"),
    (Role::KNorm, "model.layers.{}.self_attn.k_norm"),
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
    (Role::Qkv, "blk.{}.attn_qkv"),
    (Role::O, "blk.{}.attn_output"),
    (Role::QNorm, "blk.{}.attn_q_norm"),
    (Role::KNorm, "blk.{}.attn_k_norm"),
    (Role::AttentionPostNorm, "blk.{}.post_attention_norm"),
    (Role::MlpNorm, "blk.{}.ffn_norm"),
    (Role::Gate, "blk.{}.ffn_gate"),
    (Role::Up, "blk.{}.ffn_up"),
    (Role::Down, "blk.{}.ffn_down"),
    (Role::MlpPostNorm, "blk.{}.post_ffw_norm"),
    (Role::Positions, "position_embd"),
    (Role::EmbeddingNorm, "token_embd_norm"),
    (Role::QLatent, "blk.{}.attn_q_a"),
    (Role::QLatentNorm, "blk.{}.attn_q_a_norm"),
    (Role::KvLatent, "blk.{}.attn_kv_a_mqa"),
    (Role::KvLatentNorm, "blk.{}.attn_kv_a_norm"),
    (Role::KvUp, "blk.{}.attn_kv_b"),
    (Role::KeyUp, "blk.{}.attn_k_b"),
    (Role::ValueUp, "blk.{}.attn_v_b"),
    (Role::Router, "blk.{}.ffn_gate_inp"),
    (Role::SharedGate, "blk.{}.ffn_gate_shexp"),
    (Role::SharedUp, "blk.{}.ffn_up_shexp"),
    (Role::SharedDown, "blk.{}.ffn_down_shexp"),
    (Role::SharedRouter, "blk.{}.ffn_gate_inp_shexp"),
    (Role::ExpertGate(0), "blk.{}.ffn_gate_exps"),
    (Role::ExpertUp(0), "blk.{}.ffn_up_exps"),
    (Role::ExpertDown(0), "blk.{}.ffn_down_exps"),
    (Role::ChoiceBias, "blk.{}.exp_probs_b.bias"),
    (Role::Sinks, "blk.{}.attn_sinks.weight"),
    (Role::RopeFactors, "rope_freqs.weight"),
    (Role::RopeFactorsShort, "rope_factors_short.weight"),
    (Role::RopeFactorsLong, "rope_factors_long.weight"),
];

/// Tensors that old conversions wrote and nothing needs: they can be computed.
pub const IGNORED: &[&str] = &[".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq", ".attn_rot_embd.weight"];

/// The same, and the causal masks of old GPT checkpoints.
pub const IGNORED_MASKS: &[&str] =
    &[".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"];

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
            value_dim: self.head_dim,
            latent: None,
            attention_scale: 1.0 / (self.head_dim as f32).sqrt(),
            attention_softcap: None,
            alibi: None,
            logn: None,
            sinks: false,
            clip_qkv: None,
            context: Context::None,
            learned_positions: None,
            embedding_norm: false,
            qk_norm: QkNorm::None,
            norm: self.norm,
            placement: Placement::Before,
            branches: Branches::Sequential,
            bias: Biases::default(),
            ropes: vec![self.rope],
            layers: vec![
                LayerSpec {
                    window: None,
                    rope: Some(0),
                    attention_scale: 1.0,
                    mlp: Some(self.mlp),
                    experts: None
                };
                self.layers
            ],
            tied_head: self.tied_head,
            normed_head: false,
            prefix: None,
            spare_layers: 0,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            stream_scale: 1.0,
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
    checkpoint.expect_model()?;
    match checkpoint.kind() {
        Kind::Gguf(metadata) => {
            let Some(name) = metadata.str("general.architecture") else {
                return Err(Error::file(checkpoint.path(), "its metadata has no general.architecture: not a model"));
            };
            let forms = || FAMILIES.iter().filter_map(|f| Some((*f, f.gguf?)));
            let (family, form) = forms().find(|(_, g)| g.architecture == name).ok_or_else(|| {
                let mut known: Vec<&str> = Vec::new();
                forms().for_each(|(_, g)| {
                    if !known.contains(&g.architecture) {
                        known.push(g.architecture)
                    }
                });
                unknown(checkpoint, name, &known)
            })?;
            let spec = form.read(&Keys::new(checkpoint, metadata, name))?;
            // Of families that share an architecture, one with experts is that which has names for them.
            let names_experts = |f: &Family| f.name(Naming::HuggingFace, Role::ExpertGate(0), 0).is_some();
            let mixture = spec.layers.iter().any(|l| l.experts.is_some()) && !names_experts(family);
            let other = forms().find(|(f, g)| mixture && g.architecture == name && names_experts(f));
            Ok((other.map_or(family, |(f, _)| f), spec))
        }
        Kind::HuggingFace { config, .. } => {
            let path = checkpoint.path().join("config.json");
            let config = Config::new(config, &path);
            let (model_type, architectures) = (config.str("model_type"), config.architectures());
            let family = FAMILIES.iter().find(|f| match model_type {
                Some(t) => f.model_types.contains(&t) && (f.is)(&config),
                None => architectures.iter().any(|a| f.architectures.contains(a)) && (f.is)(&config),
            });
            let family = family.ok_or_else(|| {
                let name = model_type.or(architectures.first().copied()).unwrap_or("(none named in config.json)");
                let mut known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
                known.dedup();
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
