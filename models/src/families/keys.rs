//! GGUF metadata as families read it. Names are those of the GGUF specification, under the architecture's prefix.

use super::config::{LAYER_NORM, MOST_LAYERS, yarn_attention};
use super::{Basics, GGUF_NAMES, Role};
use crate::checkpoint::{Checkpoint, Metadata, Value};
use crate::spec::{Biases, Experts, Mlp, ModelSpec, Norm, NormKind, Rope, RopeScaling};
use crate::{Error, Result};
use rushlight_quant::ops::{Activation, RopeLayout};

/// The key of the nonlinearity of the MLP.
pub const ACTIVATION: &str = "hidden_activation";

/// Its values.
pub const ACTIVATIONS: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
];

/// The metadata of a GGUF file under its architecture's prefix.
pub struct Keys<'a> {
    checkpoint: &'a Checkpoint,
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    /// The keys `architecture.*` of `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint, metadata: &'a Metadata, architecture: &'a str) -> Self {
        Keys { checkpoint, metadata, architecture }
    }

    /// An error about this file.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::file(self.checkpoint.path(), what.to_string())
    }

    /// Whether the file has the tensor called `name`.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.checkpoint.find(name).is_some()
    }

    /// Whether the file has a tensor whose name ends like this.
    pub fn has_tensor_ending(&self, end: &str) -> bool {
        self.checkpoint.tensors().iter().any(|t| t.name.ends_with(end))
    }

    /// The values of the vector `name`.
    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.checkpoint.tensor(name)?;
        let values = super::floats(tensor.info.format, &tensor.data);
        values.ok_or_else(|| self.error(format!("{name} is stored as {}, not in floating point", tensor.info.format)))
    }

    /// Whether layer 0 (or the model) has a bias for `role`: GGUF says so by the tensor alone.
    pub fn has_bias(&self, role: Role) -> bool {
        self.has_part(role, "bias")
    }

    /// Whether layer 0 (or the model) has a weight for `role`.
    pub fn has(&self, role: Role) -> bool {
        self.has_part(role, "weight")
    }

    fn has_part(&self, role: Role, part: &str) -> bool {
        let name = GGUF_NAMES.iter().find(|(r, _)| *r == role).map(|(_, name)| name.replacen("{}", "0", 1));
        name.is_some_and(|name| self.has_tensor(&format!("{name}.{part}")))
    }

    /// The biases that are there.
    pub fn biases(&self) -> Biases {
        Biases {
            qkv: self.has_bias(Role::Q) || self.has_bias(Role::Qkv),
            output: self.has_bias(Role::O),
            up: self.has_bias(Role::Up),
            down: self.has_bias(Role::Down),
            head: self.has_bias(Role::Head),
        }
    }

    /// Makes every MLP one without a gate, with the tanh form of GELU between.
    pub fn ungated(&self, spec: &mut ModelSpec) {
        for mlp in spec.layers.iter_mut().filter_map(|layer| layer.mlp.as_mut()) {
            (mlp.activation, mlp.gated) = (Activation::GeluTanh, false);
        }
    }

    /// Puts experts into the layers that have them, beside a shared MLP of `shared` rows; `change` says what is special
    /// about them.
    pub fn mix(
        &self,
        spec: &mut ModelSpec,
        change: impl Fn(usize, Experts) -> Experts,
        shared: Option<usize>,
    ) -> Result<()> {
        let (count, used) = (self.usize("expert_count")?, self.usize("expert_used_count")?);
        let width = match self.usize_opt("expert_feed_forward_length")? {
            Some(width) => width,
            None => self.usize("feed_forward_length")?,
        };
        for (i, layer) in spec.layers.iter_mut().enumerate() {
            let Some(mlp) = layer.mlp.clone() else { continue };
            if self.has_tensor(&format!("blk.{i}.ffn_gate_inp.weight")) {
                layer.mlp = shared.map(|width| Mlp { width, ..mlp.clone() });
                layer.experts = Some(change(i, Experts::new(count, used, Mlp { width, ..mlp })));
            }
        }
        Ok(())
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A value read by `get`, which gives `None` for a wrong type.
    fn convert<T>(&self, name: &str, kind: &str, get: impl Fn(&str) -> Option<T>) -> Result<Option<T>> {
        let key = self.key(name);
        match (self.metadata.get(&key), get(&key)) {
            (None, _) => Ok(None),
            (Some(_), Some(x)) => Ok(Some(x)),
            (Some(_), None) => Err(self.error(format!("the metadata value {key} is not {kind}"))),
        }
    }

    fn missing(&self, name: &str) -> Error {
        self.error(format!("the metadata value {} is missing", self.key(name)))
    }

    /// A count that may be absent. Lists of one value for each layer are taken where all are the same.
    pub fn usize_opt(&self, name: &str) -> Result<Option<usize>> {
        if let Some(list) = self.metadata.array(&self.key(name)) {
            let mut all = list.ints();
            let first = all.next().and_then(|n| usize::try_from(n).ok());
            return match first {
                Some(n) if all.all(|m| usize::try_from(m) == Ok(n)) => Ok(Some(n)),
                _ => Err(self.error(format!(
                    "{} differs from layer to layer, which is not supported for {}",
                    self.key(name),
                    self.architecture
                ))),
            };
        }
        self.convert(name, "a whole number", |key| self.metadata.u64(key).and_then(|n| usize::try_from(n).ok()))
    }

    /// A count.
    pub fn usize(&self, name: &str) -> Result<usize> {
        self.usize_opt(name)?.ok_or_else(|| self.missing(name))
    }

    /// A number that may be absent.
    pub fn f32_opt(&self, name: &str) -> Result<Option<f32>> {
        self.convert(name, "a number", |key| self.metadata.f32(key))
    }

    /// A number.
    pub fn f32(&self, name: &str) -> Result<f32> {
        self.f32_opt(name)?.ok_or_else(|| self.missing(name))
    }

    /// A switch that may be absent.
    pub fn bool_opt(&self, name: &str) -> Result<Option<bool>> {
        self.convert(name, "true or false", |key| match self.metadata.get(key) {
            Some(Value::Bool(b)) => Some(*b),
            _ => None,
        })
    }

    /// A string that may be absent.
    pub fn str_opt(&self, name: &str) -> Result<Option<&'a str>> {
        let key = self.key(name);
        match self.metadata.get(&key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.error(format!("the metadata value {key} is not a string"))),
        }
    }

    /// The attention window, where there is one.
    pub fn window(&self) -> Result<Option<usize>> {
        Ok(self.usize_opt("attention.sliding_window")?.filter(|&n| n > 0))
    }

    /// Sets the attention window of every layer: where the pattern says so or else where `slides` does. `absent` stands for
    /// a window that the file does not give.
    pub fn slide(&self, spec: &mut ModelSpec, absent: Option<usize>, slides: impl Fn(usize) -> bool) -> Result<()> {
        const PATTERN: &str = "attention.sliding_window_pattern";
        let window = self.window()?.or(absent);
        let wrong = || self.error(format!("{} does not fit {} layers", self.key(PATTERN), spec.layers.len()));
        // A list with a place for each layer, or how far those are apart that see everything.
        let pattern: Option<Vec<bool>> = match self.metadata.array(&self.key(PATTERN)) {
            Some(list) => Some(list.ints().map(|n| n != 0).collect()),
            None => self.usize_opt(PATTERN)?.map(|n| (1..=spec.layers.len()).map(|i| n == 0 || i % n != 0).collect()),
        };
        if pattern.as_ref().is_some_and(|pattern| pattern.len() != spec.layers.len()) {
            return Err(wrong());
        }
        for (i, layer) in spec.layers.iter_mut().enumerate() {
            layer.window = window.filter(|_| pattern.as_ref().map_or_else(|| slides(i), |pattern| pattern[i]));
        }
        Ok(())
    }

    /// Reads what a file may say that its architecture would otherwise imply.
    pub fn depart(&self, spec: &mut ModelSpec) -> Result<()> {
        let named = match self.str_opt(ACTIVATION)? {
            None => return Ok(()),
            Some(name) => ACTIVATIONS.iter().find(|(n, _)| *n == name).ok_or_else(|| {
                self.error(format!("the activation {} = '{name}' is not supported", self.key(ACTIVATION)))
            })?,
        };
        for layer in &mut spec.layers {
            layer
                .mlp
                .iter_mut()
                .chain(layer.experts.as_mut().map(|e| &mut e.mlp))
                .for_each(|mlp| mlp.activation = named.1);
        }
        Ok(())
    }

    /// The rotary embedding that the usual keys describe.
    pub fn rope(&self, head_dim: usize, context_length: usize, layout: RopeLayout) -> Result<Rope> {
        let theta = self.f32_opt("rope.freq_base")?.unwrap_or(10000.0);
        let dim = self.usize_opt("rope.dimension_count")?.unwrap_or(head_dim);
        let stored = self.has_tensor("rope_freqs.weight");
        // Files older than rope.scaling.* have the inverse factor alone.
        let factor = match self.f32_opt("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.f32_opt("rope.scale_linear")?,
        };
        let kind = match self.str_opt("rope.scaling.type")? {
            Some(kind) => kind,
            None if factor.is_some_and(|f| f != 1.0) => "linear",
            None => "none",
        };
        let scaling = match kind {
            _ if self.has_tensor("rope_factors_long.weight") => {
                let original = self.usize("rope.scaling.original_context_length")?;
                let stretch = context_length as f32 / original as f32;
                let usual = if stretch > 1.0 { (1.0 + stretch.ln() / (original as f32).ln()).sqrt() } else { 1.0 };
                RopeScaling::Long {
                    short: self.vector("rope_factors_short.weight")?,
                    long: self.vector("rope_factors_long.weight")?,
                    original_context: original,
                    attention_factor: self.f32_opt("rope.scaling.attn_factor")?.unwrap_or(usual),
                }
            }
            "none" if stored => RopeScaling::Stored,
            "none" => RopeScaling::None,
            "linear" | "yarn" if stored => {
                return Err(self.error(format!("it has both rope_freqs.weight and rope.scaling.type = {kind}")));
            }
            "linear" => RopeScaling::Linear { factor: factor.ok_or_else(|| self.missing("rope.scaling.factor"))? },
            "yarn" => {
                let factor = factor.ok_or_else(|| self.missing("rope.scaling.factor"))?;
                // The file's factor comes on top of YaRN's own.
                let extra = match self.f32_opt("rope.scaling.attn_factor")? {
                    Some(given) => given,
                    None => self.f32_opt("rope.scaling.yarn_attn_factor")?.unwrap_or(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    beta_fast: self.f32_opt("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.f32_opt("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    original_context: self.usize_opt("rope.scaling.original_context_length")?.unwrap_or(context_length),
                    attention_factor: extra * yarn_attention(factor, 1.0),
                    truncate: true,
                }
            }
            other => {
                return Err(self.error(format!(
                    "the rope.scaling.type '{other}' is not supported; the supported ones are none, linear, yarn"
                )));
            }
        };
        Ok(Rope { theta, dim, first: 0, layout, scaling })
    }

    /// What llama and most families after it have in common; what they differ in is changed by their own file.
    pub fn decoder(&self, family: &'static str, layout: RopeLayout) -> Result<ModelSpec> {
        let (hidden_size, heads) = (self.usize("embedding_length")?, self.usize("attention.head_count")?);
        let head_dim = match self.usize_opt("attention.key_length")? {
            Some(given) => given,
            None => hidden_size.checked_div(heads).filter(|d| d * heads == hidden_size).ok_or_else(|| {
                self.error(format!("embedding_length {hidden_size} is not a multiple of attention.head_count {heads}"))
            })?,
        };
        let value_dim = self.usize_opt("attention.value_length")?.unwrap_or(head_dim);
        let layers = self.usize("block_count")?;
        if layers > MOST_LAYERS {
            return Err(self.error(format!("block_count is {layers}; more than {MOST_LAYERS} are not believed")));
        }
        let embedding = self.checkpoint.find("token_embd.weight");
        let rows = embedding.and_then(|t| t.shape.first().copied()).ok_or_else(|| {
            self.error("it has no token_embd.weight: a vocabulary without a model, or an incomplete file")
        })?;
        let vocab_size = self.usize_opt("vocab_size")?.unwrap_or(rows);
        let context_length = self.usize("context_length")?;
        let (kind, eps) = match self.f32_opt("attention.layer_norm_epsilon")? {
            Some(eps) => (LAYER_NORM, eps),
            None => (NormKind::Rms, self.f32("attention.layer_norm_rms_epsilon")?),
        };
        let width = self.usize("feed_forward_length")?;
        let spec = Basics {
            family,
            vocab_size,
            hidden_size,
            context_length,
            heads,
            kv_heads: self.usize_opt("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            layers,
            mlp: Mlp { width, activation: Activation::Silu, gated: true },
            norm: Norm { kind, eps, weight_offset: 0.0 },
            rope: self.rope(head_dim, context_length, layout)?,
            tied_head: !self.has_tensor("output.weight"),
        }
        .spec();
        Ok(ModelSpec { value_dim, ..spec })
    }
}
