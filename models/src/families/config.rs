//! config.json as families read it: every field has a type, and a wrong one is an error that names it.

use super::Basics;
use crate::spec::{Mlp, ModelSpec, Norm, NormKind, Rope, RopeScaling};
use crate::{Error, Result};
use rushlight_quant::ops::{Activation, RopeLayout};
use serde_json::Value;
use std::path::Path;

/// Most layers of any model that is believed; the largest published ones have under 200.
pub(super) const MOST_LAYERS: usize = 4096;

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

    /// The field `name`; `None` where it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.fields.get(name).filter(|v| !v.is_null())
    }

    /// Whether the field `name` is there, null or not.
    pub fn has(&self, name: &str) -> bool {
        self.fields.get(name).is_some()
    }

    /// A string.
    pub fn str(&self, name: &str) -> Option<&'a str> {
        self.get(name)?.as_str()
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

    /// A number that may be absent.
    pub fn f32_opt(&self, name: &str) -> Result<Option<f32>> {
        self.convert(name, "a number", |v| v.as_f64().map(|x| x as f32))
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
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some(other) => Err(self.error(format!(
                "the activation {name} = '{other}' is not supported; the supported ones are silu, gelu, gelu_new, gelu_pytorch_tanh, relu"
            ))),
            None => Err(self.error(format!("the field {name} is missing"))),
        }
    }

    /// The attention window of each of `layers`: `window` where the field `layer_types` says so, or else where
    /// `slides` does.
    pub fn windows(
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

    /// The rotary embedding that the usual fields describe.
    pub fn rope(&self, head_dim: usize, context_length: usize) -> Result<Rope> {
        let (old, new) = (self.get("rope_scaling"), self.get("rope_parameters"));
        if let (Some(old), Some(new)) = (old, new)
            && kind(old) != kind(new)
        {
            return Err(self.error("rope_scaling and rope_parameters contradict each other"));
        }
        // transformers 5 moved rope_theta and partial_rotary_factor into rope_parameters.
        let empty = Value::Null;
        let parameters = Config::new(new.or(old).unwrap_or(&empty), self.path);
        let theta = match parameters.f32_opt("rope_theta")? {
            Some(theta) => theta,
            None => self.f32_opt("rope_theta")?.unwrap_or(10000.0),
        };
        let partial = match parameters.f32_opt("partial_rotary_factor")? {
            Some(partial) => partial,
            None => self.f32_opt("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let dim = (head_dim as f32 * partial) as usize;
        let scaling = self.rope_scaling(&parameters, context_length)?;
        Ok(Rope { theta, dim, layout: RopeLayout::Half, scaling })
    }

    fn rope_scaling(&self, p: &Config<'_>, context_length: usize) -> Result<RopeScaling> {
        Ok(match kind(p.fields) {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: p.f32("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: p.f32("factor")?,
                low_freq_factor: p.f32("low_freq_factor")?,
                high_freq_factor: p.f32("high_freq_factor")?,
                original_context: p.usize("original_max_position_embeddings")?,
            },
            "yarn" => {
                let factor = p.f32("factor")?;
                let attention_factor = match p.f32_opt("attention_factor")? {
                    Some(given) => given,
                    None => match (p.f32_opt("mscale")?, p.f32_opt("mscale_all_dim")?) {
                        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                            yarn_attention(factor, m) / yarn_attention(factor, all)
                        }
                        _ => yarn_attention(factor, 1.0),
                    },
                };
                RopeScaling::Yarn {
                    factor,
                    beta_fast: p.f32_opt("beta_fast")?.unwrap_or(32.0),
                    beta_slow: p.f32_opt("beta_slow")?.unwrap_or(1.0),
                    original_context: p.usize_opt("original_max_position_embeddings")?.unwrap_or(context_length),
                    attention_factor,
                    truncate: p.bool_or("truncate", true)?,
                }
            }
            other => {
                return Err(self.error(format!(
                    "the rope_scaling type '{other}' is not supported; the supported ones are default, linear, llama3, yarn"
                )));
            }
        })
    }

    /// What llama and most families after it have in common; what they differ in is changed by their own file.
    pub fn decoder(&self, family: &'static str) -> Result<ModelSpec> {
        let (hidden_size, heads) = (self.usize("hidden_size")?, self.usize("num_attention_heads")?);
        let head_dim = match self.usize_opt("head_dim")? {
            Some(given) => given,
            None => hidden_size.checked_div(heads).filter(|d| d * heads == hidden_size).ok_or_else(|| {
                self.error(format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
                ))
            })?,
        };
        let layers = self.usize("num_hidden_layers")?;
        if layers > MOST_LAYERS {
            return Err(self.error(format!("num_hidden_layers is {layers}; more than {MOST_LAYERS} are not believed")));
        }
        let context_length = self.usize("max_position_embeddings")?;
        let activation = self.activation("hidden_act")?;
        Ok(Basics {
            family,
            vocab_size: self.usize("vocab_size")?,
            hidden_size,
            context_length,
            heads,
            kv_heads: self.usize_opt("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            layers,
            mlp: Mlp { width: self.usize("intermediate_size")?, activation, gated: true },
            norm: Norm { kind: NormKind::Rms, eps: self.f32("rms_norm_eps")?, weight_offset: 0.0 },
            rope: self.rope(head_dim, context_length)?,
            tied_head: self.bool_or("tie_word_embeddings", false)?,
        }
        .spec())
    }
}

/// The kind of scaling that a `rope_scaling` object names.
fn kind(scaling: &Value) -> &str {
    let named = scaling.get("rope_type").or_else(|| scaling.get("type"));
    match named {
        None if scaling.as_object().is_none_or(|o| !o.contains_key("factor")) => "default",
        None => "(none named)",
        Some(v) => v.as_str().unwrap_or("(not a string)"),
    }
}

/// YaRN's factor on cosine and sine for a stretch by `factor`.
pub(super) fn yarn_attention(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
