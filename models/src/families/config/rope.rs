//! Rotary positions as configurations describe them.

use super::{Config, Fields};
use crate::Result;
use crate::spec::{Rope, RopeScaling};
use serde_json::Value;

impl Config<'_> {
    /// The rotary embedding that the fields called as in `fields` describe.
    pub(super) fn rope_of(&self, head_dim: usize, context_length: usize, fields: &Fields) -> Result<Rope> {
        let (old, new) = (self.get("rope_scaling"), self.get("rope_parameters"));
        if let (Some(old), Some(new)) = (old, new)
            && kind(old) != kind(new)
        {
            return Err(self.error("rope_scaling and rope_parameters contradict each other"));
        }
        // transformers 5 moved rope_theta and partial_rotary_factor into rope_parameters, which may differ by kind of layer.
        let full = new.and_then(|new| new.get("full_attention"));
        if full.is_some()
            && !fields.local_rope
            && new.and_then(|new| new.get("sliding_attention")).is_some_and(|s| Some(s) != full)
        {
            return Err(self.error("rope_parameters that differ between layers are not supported for this family"));
        }
        let empty = Value::Null;
        let parameters = Config::new(full.or(new).or(old).unwrap_or(&empty), self.path);
        let theta = match parameters.f32_opt("rope_theta")? {
            Some(theta) => theta,
            None => self.f32_opt(fields.rope_theta)?.unwrap_or(fields.or.rope_theta),
        };
        let partial = match parameters.f64_opt("partial_rotary_factor")? {
            Some(partial) => partial,
            None => self.f64_opt("rotary_pct|partial_rotary_factor")?.unwrap_or(fields.rotated),
        };
        let dim = (head_dim as f64 * partial) as usize;
        let scaling = self.rope_scaling(&parameters, context_length)?;
        Ok(Rope { theta, dim, first: 0, layout: fields.layout, scaling })
    }

    /// The base of rotary frequencies in layers with a window, where they have one of their own.
    pub(in crate::families) fn local_theta(&self) -> Result<Option<f32>> {
        match self.get("rope_parameters").and_then(|p| p.get("sliding_attention")) {
            Some(local) if kind(local) != "default" => {
                Err(self.error("rotary positions that are scaled in layers with a window are not supported"))
            }
            Some(local) => Config::new(local, self.path).f32_opt("rope_theta"),
            None => self.f32_opt("rope_local_base_freq"),
        }
    }

    /// DeepSeek's factor on queries and on keys for stretched positions, 1 where they are not.
    pub(in crate::families) fn yarn_scale(&self) -> Result<f32> {
        let Some(scaling) = self.get("rope_parameters|rope_scaling") else { return Ok(1.0) };
        let p = Config::new(scaling, self.path);
        match (p.f32_opt("factor")?, p.f32_opt("mscale_all_dim")?) {
            (Some(factor), Some(all)) if kind(scaling) == "yarn" && all != 0.0 => Ok(yarn_attention(factor, all)),
            _ => Ok(1.0),
        }
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
            "longrope" | "su" => {
                // Beside the scaling, the original context gives the stretch too.
                let outer = self.usize_opt("original_max_position_embeddings")?;
                let original = match p.usize_opt("original_max_position_embeddings")? {
                    Some(original) => original,
                    None => outer.unwrap_or(context_length),
                };
                let stretch = match p.f32_opt("factor")?.filter(|_| outer.is_none()) {
                    Some(factor) => factor,
                    None => context_length as f32 / original as f32,
                };
                let attention_factor = match p.f32_opt("attention_factor")? {
                    Some(given) => given,
                    None if stretch <= 1.0 => 1.0,
                    None => (1.0 + stretch.ln() / (original as f32).ln()).sqrt(),
                };
                let (short, long) = (p.numbers("short_factor")?, p.numbers("long_factor")?);
                RopeScaling::Long { short, long, original_context: original, attention_factor }
            }
            "dynamic" => RopeScaling::Dynamic { factor: p.f32("factor")?, original_context: context_length },
            other => {
                return Err(self.error(format!(
                    "the rope_scaling type '{other}' is not supported; the supported ones are default, linear, dynamic, \
                     llama3, yarn, longrope"
                )));
            }
        })
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
pub(in crate::families) fn yarn_attention(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
