//! config.json as families read it: every field has a type, and a wrong one is an error that names it.

mod rope;

pub(super) use rope::yarn_attention;

use super::Basics;
use crate::spec::{Mlp, ModelSpec, Norm, NormKind};
use crate::{Error, Result};
use rushlight_quant::ops::{Activation, RopeLayout};
use serde_json::Value;
use std::path::Path;

/// Most layers of any model that is believed; the largest published ones have under 200.
pub(super) const MOST_LAYERS: usize = 4096;

/// What a family's configuration calls the usual fields.
pub struct Fields {
    /// Width of the residual stream.
    pub hidden: &'static str,
    /// Query heads.
    pub heads: &'static str,
    /// Key heads; as many as query heads where the configuration does not say.
    pub kv_heads: &'static str,
    /// Width of a head; hidden over heads where the configuration does not say.
    pub head_dim: &'static str,
    /// Number of layers.
    pub layers: &'static str,
    /// Positions.
    pub context: &'static str,
    /// Tokens.
    pub vocab: &'static str,
    /// The nonlinearity of the MLP.
    pub activation: &'static str,
    /// Rows of up.
    pub width: &'static str,
    /// The norms' epsilon.
    pub eps: &'static str,
    /// Base of the rotary frequencies.
    pub rope_theta: &'static str,
    /// Whether the head is tied where the configuration does not say.
    pub tied: bool,
    /// What norms there are.
    pub norm: NormKind,
    /// Which values rotary embeddings pair.
    pub layout: RopeLayout,
    /// How much of a head is rotated where the configuration does not say.
    pub rotated: f64,
    /// Whether layers with a window have rotary positions of their own.
    pub local_rope: bool,
    /// Whether the MLP has a gate.
    pub gated: bool,
    /// What stands for `context`, `activation`, `eps` and `width` (in multiples of the stream's) where the configuration
    /// does not say.
    pub or: Defaults,
}

/// What a family takes for a field that its configurations may leave out.
#[derive(Clone, Copy)]
pub struct Defaults {
    /// Positions.
    pub context: Option<usize>,
    /// The nonlinearity of the MLP.
    pub activation: Option<Activation>,
    /// The norms' epsilon.
    pub eps: Option<f32>,
    /// Rows of up for each value of the stream.
    pub widths: Option<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
}

/// Nothing may be left out but the base of rotary frequencies.
pub const ALL: Defaults = Defaults { context: None, activation: None, eps: None, widths: None, rope_theta: 10000.0 };

/// The fields of llama's configuration, which most later families kept.
pub const FIELDS: Fields = Fields {
    hidden: "hidden_size",
    heads: "num_attention_heads",
    kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    layers: "num_hidden_layers",
    context: "max_position_embeddings",
    vocab: "vocab_size",
    activation: "hidden_act",
    width: "intermediate_size",
    eps: "rms_norm_eps",
    rope_theta: "rope_theta",
    tied: false,
    norm: NormKind::Rms,
    layout: RopeLayout::Half,
    rotated: 1.0,
    local_rope: false,
    gated: true,
    or: ALL,
};

/// The fields of GPT-2's, and its norms and MLP.
pub const GPT_FIELDS: Fields = Fields {
    hidden: "n_embd",
    heads: "n_head",
    kv_heads: "",
    head_dim: "",
    layers: "n_layer",
    context: "n_positions",
    activation: "activation_function",
    width: "n_inner",
    eps: "layer_norm_epsilon",
    tied: true,
    norm: LAYER_NORM,
    gated: false,
    or: Defaults { widths: Some(4), ..ALL },
    ..FIELDS
};

/// A layer norm with weight and bias.
pub const LAYER_NORM: NormKind = NormKind::Layer { weight: true, bias: true };

/// The fields of config.json.
pub struct Config<'a> {
    fields: &'a Value,
    path: &'a Path,
}

impl<'a> Config<'a> {
    /// The fields of the configuration in the file `path`.
    pub fn new(fields: &'a Value, path: &'a Path) -> Self {
        Config { fields, path }
    }

    /// An error about this configuration.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::file(self.path, what.to_string())
    }

    /// The field `name`, or the first that is there of `name|other`; `None` where it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        name.split('|').find_map(|name| self.fields.get(name).filter(|v| !v.is_null()))
    }

    /// Whether the field `name` is there, null or not.
    pub fn has(&self, name: &str) -> bool {
        self.fields.get(name).is_some()
    }

    /// A string.
    pub fn str(&self, name: &str) -> Option<&'a str> {
        self.get(name)?.as_str()
    }

    /// The fields of the object `name`.
    pub fn object(&self, name: &str) -> Option<Config<'a>> {
        Some(Config::new(self.get(name)?, self.path))
    }

    /// The class names in `architectures`.
    pub fn architectures(&self) -> Vec<&'a str> {
        let list = self.get("architectures").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// A count that may be absent.
    pub fn usize_opt(&self, name: &str) -> Result<Option<usize>> {
        self.convert(name, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A count.
    pub fn usize(&self, name: &str) -> Result<usize> {
        self.usize_opt(name)?.ok_or_else(|| self.error(format!("the field {name} is missing")))
    }

    fn f64_opt(&self, name: &str) -> Result<Option<f64>> {
        self.convert(name, "a number", Value::as_f64)
    }

    /// A number that may be absent.
    pub fn f32_opt(&self, name: &str) -> Result<Option<f32>> {
        Ok(self.f64_opt(name)?.map(|x| x as f32))
    }

    /// A number.
    pub fn f32(&self, name: &str) -> Result<f32> {
        self.f32_opt(name)?.ok_or_else(|| self.error(format!("the field {name} is missing")))
    }

    /// A switch; `default` where it is absent.
    pub fn bool_or(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.convert(name, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    fn convert<T>(&self, name: &str, kind: &str, get: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match get(value) {
            Some(x) => Ok(Some(x)),
            None => Err(self.error(format!("the field {name} is {value}, not {kind}"))),
        }
    }

    /// The nonlinearity that the field `name` spells.
    pub fn activation(&self, name: &str) -> Result<Activation> {
        match self.str(name) {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_python_tanh") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some(other) => Err(self.error(format!(
                "the activation {name} = '{other}' is not supported; the supported ones are silu, gelu, gelu_new, gelu_pytorch_tanh, relu"
            ))),
            None => Err(self.error(format!("the field {name} is missing"))),
        }
    }

    /// Refuses a configuration whose word `name` is not `wanted`, which is what it is where it is absent.
    pub fn only_word(&self, name: &str, wanted: &str) -> Result<()> {
        match self.get(name) {
            Some(other) if other != wanted => Err(self.error(format!("{name} = {other} is not supported"))),
            _ => Ok(()),
        }
    }

    /// The attention window of each of `layers`: `window` where the field `layer_types` says so, or else where
    /// `slides` does.
    fn windows(
        &self,
        layers: usize,
        window: Option<usize>,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>> {
        let Some(types) = self.get("layer_types") else {
            return Ok((0..layers).map(|i| window.filter(|_| slides(i))).collect());
        };
        let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
        if types.len() != layers {
            return Err(self.error(format!("layer_types has {} entries for {layers} layers", types.len())));
        }
        let each = types.iter().map(|t| match t.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => match window {
                Some(_) => Ok(window),
                None => Err(self.error("layer_types has sliding_attention but sliding_window is not set")),
            },
            _ => Err(self.error(format!("the layer type {t} is not supported"))),
        });
        each.collect()
    }

    /// Sets the attention window of every layer: the field `sliding_window`, where `layer_types` says so or else where
    /// `slides` does. `absent` stands for a field that is not there; null is none.
    pub fn slide(&self, spec: &mut ModelSpec, absent: Option<usize>, slides: impl Fn(usize) -> bool) -> Result<()> {
        let window = if self.has("sliding_window") { self.usize_opt("sliding_window")? } else { absent };
        let windows = self.windows(spec.layers.len(), window, slides)?;
        spec.layers.iter_mut().zip(windows).for_each(|(layer, window)| layer.window = window);
        Ok(())
    }

    /// The numbers in the list `name`.
    pub fn numbers(&self, name: &str) -> Result<Vec<f32>> {
        let list = self.get(name).and_then(Value::as_array);
        let numbers = list.and_then(|list| list.iter().map(|v| v.as_f64().map(|x| x as f32)).collect());
        numbers.ok_or_else(|| self.error(format!("the field {name} is missing or not a list of numbers")))
    }

    /// Refuses a configuration whose switch `name` is not `wanted`, which is what it is where it is absent.
    pub fn only(&self, name: &str, wanted: bool) -> Result<()> {
        match self.bool_or(name, wanted)? == wanted {
            true => Ok(()),
            false => Err(self.error(format!("{name} = {} is not supported", !wanted))),
        }
    }

    /// A token's number.
    pub fn token(&self, name: &str) -> Result<u32> {
        u32::try_from(self.usize(name)?).map_err(|_| self.error(format!("the field {name} is not a token")))
    }

    /// What llama and most families after it have in common; what they differ in is changed by their own file.
    pub fn decoder(&self, family: &'static str) -> Result<ModelSpec> {
        self.decoder_of(family, &FIELDS)
    }

    fn or<T>(&self, given: Option<T>, default: Option<T>, name: &str) -> Result<T> {
        given.or(default).ok_or_else(|| self.error(format!("the field {name} is missing")))
    }

    /// The folder of the configuration.
    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(self.path)
    }

    /// The same under other names.
    pub fn decoder_of(&self, family: &'static str, fields: &Fields) -> Result<ModelSpec> {
        let (hidden_size, heads) = (self.usize(fields.hidden)?, self.usize(fields.heads)?);
        let head_dim = match self.usize_opt(fields.head_dim)? {
            Some(given) => given,
            None => hidden_size.checked_div(heads).filter(|d| d * heads == hidden_size).ok_or_else(|| {
                let but = if fields.head_dim.is_empty() {
                    String::new()
                } else {
                    format!(", and {} is not given", fields.head_dim)
                };
                self.error(format!(
                    "{} {hidden_size} is not a multiple of {} {heads}{but}",
                    fields.hidden, fields.heads
                ))
            })?,
        };
        let layers = self.usize(fields.layers)?;
        if layers > MOST_LAYERS {
            return Err(self.error(format!("{} is {layers}; more than {MOST_LAYERS} are not believed", fields.layers)));
        }
        let context_length = self.or(self.usize_opt(fields.context)?, fields.or.context, fields.context)?;
        let activation = match (self.get(fields.activation), fields.or.activation) {
            (None, Some(activation)) => activation,
            _ => self.activation(fields.activation)?,
        };
        let widths = fields.or.widths.map(|n| hidden_size.saturating_mul(n));
        let width = self.or(self.usize_opt(fields.width)?, widths, fields.width)?;
        let eps = self.or(self.f32_opt(fields.eps)?, fields.or.eps, fields.eps)?;
        Ok(Basics {
            family,
            vocab_size: self.usize(fields.vocab)?,
            hidden_size,
            context_length,
            heads,
            kv_heads: self.usize_opt(fields.kv_heads)?.unwrap_or(heads),
            head_dim,
            layers,
            mlp: Mlp { width, activation, gated: fields.gated },
            norm: Norm { kind: fields.norm, eps, weight_offset: 0.0 },
            rope: self.rope_of(head_dim, context_length, fields)?,
            tied_head: self.bool_or("tie_word_embeddings", fields.tied)?,
        }
        .spec())
    }
}
