//! Mixes: more bits for the tensors that need them. They are llama.cpp's, tensor for tensor (`llama_tensor_get_type` of its
//! llama-quant.cpp), so that a name means one thing.

use super::types::{Keep, Target, Wishes};
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::{Metadata, Value};
use rushlight_quant::formats::Format;

/// What a mix looks at in a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Traits {
    architecture: String,
    layers: usize,
    heads: u64,
    kv_heads: u64,
    experts: u64,
}

impl Traits {
    /// Reads them from a model's GGUF metadata.
    pub fn of(metadata: &Metadata) -> Result<Traits> {
        let architecture = metadata.str("general.architecture").context("the metadata lack general.architecture")?;
        let number = |key: &str| {
            let key = format!("{architecture}.{key}");
            // Some architectures give a number for each layer: the first one counts.
            match metadata.get(&key) {
                Some(Value::Array(array)) => array.ints().next().and_then(|n| u64::try_from(n).ok()),
                _ => metadata.u64(&key),
            }
        };
        let heads = number("attention.head_count").unwrap_or(0);
        Ok(Traits {
            architecture: architecture.into(),
            layers: number("block_count").unwrap_or(0).min(1 << 20) as usize,
            heads,
            kv_heads: number("attention.head_count_kv").unwrap_or(heads),
            experts: number("expert_count").unwrap_or(0),
        })
    }

    /// Query heads to one of keys.
    fn group(&self) -> u64 {
        self.heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// Llama 2 70B and its kin, to which llama.cpp gives better values.
    fn is_70b(&self) -> bool {
        match self.architecture.as_str() {
            "llama" => self.layers == 80 && self.heads != self.kv_heads,
            "qwen2" | "olmo" | "deci" => self.layers == 80,
            _ => false,
        }
    }
}

/// The format chosen for a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// What it will be stored as; `None`: it is not for quantizing (a norm, a router), and stays as it is.
    pub format: Option<Format>,
    /// What it would have been if its rows were whole blocks of that.
    pub instead_of: Option<Format>,
}

/// Chooses a format for each of `tensors`, given by GGUF name and shape (rows-major, `[.., rows, cols]`).
///
/// Fails where a pattern of `wishes` fits none that can be quantized.
pub fn choose(
    target: Target,
    wishes: &Wishes,
    model: &Traits,
    with_imatrix: bool,
    tensors: &[(&str, &[usize])],
) -> Result<Vec<Chosen>> {
    let quantizable = |&(name, shape): &(&str, &[usize])| is_matrix(shape) && may_quantize(name);
    for Keep { pattern, .. } in &wishes.keep {
        if !tensors.iter().filter(|t| quantizable(t)).any(|(name, _)| pattern.is_match(name)) {
            bail!(
                "--keep '{pattern}' fits no tensor that can be quantized; names are as in GGUF: {}",
                tensors.iter().rev().filter(|t| quantizable(t)).take(3).map(|t| t.0).collect::<Vec<_>>().join(", ")
            );
        }
    }
    // Mixes count tensors in this order: those of no layer first, then by layer and name.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (layer(tensors[i].0), tensors[i].0));
    let mut mix = Mix {
        target,
        wishes,
        model,
        with_imatrix,
        tied: !tensors.iter().any(|(name, _)| *name == "output.weight"),
        values: tensors.iter().filter(|(name, _)| Part::of(name) == Part::Value).count(),
        values_seen: 0,
        downs_seen: 0,
    };
    let mut chosen = vec![Chosen { format: None, instead_of: None }; tensors.len()];
    for i in order {
        if quantizable(&tensors[i]) {
            let (name, shape) = tensors[i];
            let cols = shape.last().copied().unwrap_or(1);
            let wanted = mix.format(name, shape);
            let format = fallback(wanted, cols);
            chosen[i] = Chosen { format: Some(format), instead_of: (format != wanted).then_some(wanted) };
        }
    }
    Ok(chosen)
}

/// The layer in a GGUF name; -1 for tensors of no layer.
fn layer(name: &str) -> i64 {
    let digits = name.strip_prefix("blk.").unwrap_or_default();
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(-1)
}

/// Whether a tensor has more than one row.
fn is_matrix(shape: &[usize]) -> bool {
    shape.iter().skip_while(|&&n| n == 1).count() > 1
}

/// Whether a matrix of this name may be quantized. Small ones that decide much are not.
fn may_quantize(name: &str) -> bool {
    const LEFT: [&str; 29] = [
        "_norm.weight",
        "ffn_gate_inp.weight",
        "ffn_gate_tid2eid.weight",
        "altup",
        "laurel",
        "per_layer_model_proj",
        "ssm_conv1d",
        "shortconv.conv.weight",
        "indexer.k_proj.weight",
        "indexer.q_proj.weight",
        "time_mix_first.weight",
        "time_mix_w0.weight",
        "time_mix_w1.weight",
        "time_mix_w2.weight",
        "time_mix_v0.weight",
        "time_mix_v1.weight",
        "time_mix_v2.weight",
        "time_mix_a0.weight",
        "time_mix_a1.weight",
        "time_mix_a2.weight",
        "time_mix_g1.weight",
        "time_mix_g2.weight",
        "time_mix_decay_w1.weight",
        "time_mix_decay_w2.weight",
        "time_mix_lerp_fused.weight",
        "attn_rel_b.weight",
        ".position_embd",
        ".rel_pos",
        ".patch_embd",
    ];
    let whole = ["position_embd.weight", "token_types.weight"];
    name.ends_with("weight") && !whole.contains(&name) && !LEFT.iter().any(|part| name.contains(part))
}

/// The nearest format that rows of `cols` weights can have.
fn fallback(wanted: Format, cols: usize) -> Format {
    let divides = |format: Format| cols.is_multiple_of(format.block_len());
    if divides(wanted) {
        return wanted;
    }
    let smaller = match wanted {
        Format::IQ4_XS => Format::IQ4_NL,
        Format::Q2_K | Format::Q3_K => Format::Q4_0,
        Format::Q4_K => Format::Q5_0,
        Format::Q5_K => Format::Q5_1,
        Format::Q6_K => Format::Q8_0,
        _ => Format::F16,
    };
    if divides(smaller) { smaller } else { Format::F16 }
}

/// The part that a tensor plays, as far as mixes care.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Embedding,
    Head,
    /// Values, or what holds them among others.
    Value,
    Key,
    AttentionOutput,
    Down,
    Other,
}

impl Part {
    fn of(name: &str) -> Part {
        match name {
            "output.weight" => return Part::Head,
            "token_embd.weight" | "per_layer_token_embd.weight" => return Part::Embedding,
            _ => {}
        }
        let known = [
            ("attn_qkv.weight", Part::Value),
            ("attn_kv_b.weight", Part::Value),
            ("attn_v.weight", Part::Value),
            ("attn_k.weight", Part::Key),
            ("attn_q.weight", Part::Other),
            ("attn_output.weight", Part::AttentionOutput),
            ("ffn_up", Part::Other),
            ("ffn_gate", Part::Other),
            ("ffn_down", Part::Down),
        ];
        known.iter().find(|(text, _)| name.contains(text)).map_or(Part::Other, |&(_, part)| part)
    }
}

/// Goes through a model's tensors in the order that mixes count them in.
struct Mix<'a> {
    target: Target,
    wishes: &'a Wishes,
    model: &'a Traits,
    with_imatrix: bool,
    /// There is no output matrix: the embedding serves as one.
    tied: bool,
    values: usize,
    values_seen: usize,
    downs_seen: usize,
}

/// Whether a layer is among those where more bits help most: the first and last eighth, and each third between.
fn needs_more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

impl Mix<'_> {
    fn format(&mut self, name: &str, shape: &[usize]) -> Format {
        let cols = shape.last().copied().unwrap_or(1);
        let (wishes, default) = (self.wishes, self.target.format);
        if let Some(keep) = wishes.keep.iter().find(|keep| keep.pattern.is_match(name)) {
            return keep.format;
        }
        let part = Part::of(name);
        match (wishes.embedding, wishes.output) {
            (Some(format), _) if part == Part::Embedding => return format,
            (_, Some(format)) if part == Part::Head || part == Part::Embedding && self.tied => return format,
            _ => {}
        }
        if default.is_float() || wishes.pure {
            return default;
        }
        if self.target.name == "MXFP4_MOE" {
            // Experts alone, which come as stacks.
            return if shape.iter().rev().nth(2).is_some_and(|&n| n > 1) { default } else { Format::Q8_0 };
        }
        match part {
            Part::Head => self.head(cols),
            Part::Embedding if self.tied => self.head(cols),
            Part::Value => {
                let format = self.value();
                self.values_seen += 1;
                format
            }
            Part::Key if self.model.experts == 8 => Format::Q8_0,
            Part::Down => {
                let format = self.down(name);
                self.downs_seen += 1;
                format
            }
            Part::AttentionOutput => self.attention_output(),
            Part::Embedding | Part::Key | Part::Other => default,
        }
    }

    fn head(&self, cols: usize) -> Format {
        let default = self.target.format;
        let divides = cols.is_multiple_of(default.block_len());
        if self.model.architecture == "falcon" || !divides || default == Format::Q8_0 {
            Format::Q8_0
        } else {
            Format::Q6_K
        }
    }

    fn value(&self) -> Format {
        let (model, default, layer) = (self.model, self.target.format, self.values_seen);
        let shared = model.group() >= 4;
        let format = match self.target.name {
            "Q2_K" if shared => Format::Q4_K,
            "Q2_K" => Format::Q3_K,
            "Q2_K_S" if shared => Format::Q4_K,
            "Q3_K_M" if layer < 2 => Format::Q5_K,
            "Q3_K_M" => Format::Q4_K,
            "Q3_K_L" => Format::Q5_K,
            "IQ4_NL" | "IQ4_XS" if shared => Format::Q5_K,
            "Q4_K_M" | "Q5_K_M" if needs_more_bits(layer, self.values) => Format::Q6_K,
            "Q4_K_S" if layer < 4 => Format::Q5_K,
            _ => default,
        };
        match format {
            // There they are small beside the rest, and many queries share them.
            _ if model.experts == 8 => Format::Q8_0,
            Format::Q3_K | Format::Q4_K if model.is_70b() => Format::Q5_K,
            format => format,
        }
    }

    fn down(&self, name: &str) -> Format {
        let (model, default) = (self.model, self.target.format);
        let layers = model.layers;
        // The experts of a layer count as one.
        let layer = match model.experts > 1 {
            true => usize::try_from(layer(name)).unwrap_or(0),
            false => self.downs_seen,
        };
        let falcon = model.architecture == "falcon";
        let early = layer < layers / 8;
        match self.target.name {
            "Q2_K" => Format::Q3_K,
            "Q2_K_S" if early => Format::Q4_K,
            "Q3_K_M" if layer < layers / 16 => Format::Q5_K,
            "Q3_K_M" if !falcon || needs_more_bits(layer, layers) => Format::Q4_K,
            "Q3_K_L" if falcon => Format::Q4_K,
            "Q3_K_L" => Format::Q5_K,
            "Q4_K_M" if falcon && layer < layers / 16 => Format::Q6_K,
            "Q4_K_M" if needs_more_bits(layer, layers) => match falcon {
                true => Format::Q5_K,
                false => Format::Q6_K,
            },
            "IQ4_NL" | "IQ4_XS" if early && !self.with_imatrix => Format::Q5_K,
            "Q5_K_M" if needs_more_bits(layer, layers) => Format::Q6_K,
            "Q4_K_S" if early && !falcon => Format::Q5_K,
            // With an imatrix the first layers may go wrong without a minimum.
            "Q4_0" if early && self.with_imatrix => Format::Q4_1,
            "Q5_0" if early && self.with_imatrix => Format::Q5_1,
            _ => default,
        }
    }

    fn attention_output(&self) -> Format {
        let default = self.target.format;
        if self.model.architecture == "falcon" {
            return if self.target.name == "Q3_K_L" { Format::Q4_K } else { default };
        }
        if self.model.experts == 8 {
            return match self.target.name {
                "Q2_K" | "Q3_K_S" | "Q3_K_M" | "IQ4_NL" | "Q4_K_S" | "Q4_K_M" | "IQ4_XS" => Format::Q5_K,
                _ => default,
            };
        }
        match self.target.name {
            "Q2_K" => Format::Q3_K,
            "Q3_K_M" => Format::Q4_K,
            "Q3_K_L" => Format::Q5_K,
            _ => default,
        }
    }
}

#[cfg(test)]
#[path = "mix_tests.rs"]
mod tests;
