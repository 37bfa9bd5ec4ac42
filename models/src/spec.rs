//! Every switch in which decoder families differ. A family file fills one [`ModelSpec`]; the decoder obeys it.

use rushlight_quant::ops::{Activation, RopeLayout};

/// The shape of a decoder and the switches that its forward pass obeys.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family's name, such as `llama`.
    pub family: &'static str,
    /// Rows of the embedding, and logits per position.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Positions the model was trained for.
    pub context_length: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// What attention scores are multiplied by, normally `head_dim^-0.5`.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)` before the mask.
    pub attention_softcap: Option<f32>,
    /// Normalisation of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// The kind of normalisation, the same all over the model.
    pub norm: Norm,
    /// Where a branch (attention, MLP) is normalised.
    pub placement: Placement,
    /// Whether the branches of a layer follow one another or stand side by side.
    pub branches: Branches,
    /// Which linear layers have a bias.
    pub bias: Biases,
    /// The rotary embeddings in use; layers refer to them by index.
    pub ropes: Vec<Rope>,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// The head uses the embedding's weight.
    pub tied_head: bool,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
    /// Each branch is multiplied by this before it is added to the residual stream.
    pub residual_scale: f32,
    /// Logits are multiplied by this.
    pub logit_scale: f32,
    /// Logits become `cap * tanh(logit / cap)`, after `logit_scale`.
    pub logit_softcap: Option<f32>,
}

/// What one layer may have to itself.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// A position sees itself and the `window - 1` before it; all before it where `None`.
    pub window: Option<usize>,
    /// Index into [`ModelSpec::ropes`]; `None`: this layer's queries and keys are not rotated.
    pub rope: Option<usize>,
    /// The MLP.
    pub mlp: Mlp,
}

/// `down(act(gate x) * up x)`, or `down(act(up x))` without a gate.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// Rows of `up` (and of `gate`).
    pub width: usize,
    /// The nonlinearity.
    pub activation: Activation,
    /// Whether there is a gate.
    pub gated: bool,
}

/// A normalisation of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// RMS or LayerNorm.
    pub kind: NormKind,
    /// Added to the mean square (or variance) under the root.
    pub eps: f32,
    /// Added to the stored weight: 1 where files store `weight - 1`.
    pub weight_offset: f32,
}

/// The two normalisations in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms,
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, with whichever of the two the model stores.
    Layer {
        /// A weight is stored.
        weight: bool,
        /// A bias is stored.
        bias: bool,
    },
}

/// Normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself, one weight of `head_dim` for all heads.
    Head,
    /// The whole projection, before it is cut into heads.
    Projection,
}

/// Where a branch is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Its input: `x + f(norm(x))`.
    Before,
    /// Its output: `x + norm(f(x))`.
    After,
    /// Both: `x + norm(f(norm(x)))`.
    Both,
}

/// How a layer's two branches stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branches {
    /// The MLP reads the stream that attention has been added to.
    Sequential,
    /// Both read the layer's input, through one shared norm.
    ParallelShared,
    /// Both read the layer's input, each through its own norm.
    Parallel,
}

/// Which linear layers have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: bool,
    /// Attention's output projection.
    pub output: bool,
    /// Gate and up.
    pub up: bool,
    /// Down.
    pub down: bool,
    /// The head.
    pub head: bool,
}

/// A rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair `i` turns by `theta^(-2i/dim)` per position.
    pub theta: f32,
    /// How many of a head's leading values are rotated.
    pub dim: usize,
    /// Which values make a pair, as the checkpoint's rows are ordered.
    pub layout: RopeLayout,
    /// How frequencies are stretched beyond the original context.
    pub scaling: RopeScaling,
}

/// Ways to stretch rotary frequencies to longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    None,
    /// All divided by `factor`.
    Linear {
        /// The stretch.
        factor: f32,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a smooth passage between.
    Llama3 {
        /// The stretch.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are stretched whole.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Positions before the stretch.
        original_context: usize,
    },
    /// A ramp over dimensions between stretched and kept, and a factor on cosine and sine.
    Yarn {
        /// The stretch.
        factor: f32,
        /// Dimensions that turn more often than this in the original context are kept.
        beta_fast: f32,
        /// Dimensions that turn less often than this are stretched whole.
        beta_slow: f32,
        /// Positions before the stretch.
        original_context: usize,
        /// What cosine and sine are multiplied by.
        attention_factor: f32,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Each frequency divided by a number of its own, stored in the checkpoint as a tensor of `dim / 2`.
    Stored,
}

impl ModelSpec {
    /// Width of the queries: all heads side by side.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// What is wrong with the numbers, so that nothing is built or allocated from a false claim.
    pub fn check(&self) -> Result<(), String> {
        // Far above any real model, far below what could overflow a product of two.
        const LARGEST: usize = 1 << 28;
        for (what, n) in [
            ("vocabulary size", self.vocab_size),
            ("hidden size", self.hidden_size),
            ("context length", self.context_length),
            ("number of heads", self.heads),
            ("number of key/value heads", self.kv_heads),
            ("head size", self.head_dim),
            ("number of layers", self.layers.len()),
        ] {
            if n == 0 || n > LARGEST {
                return Err(format!("the {what} is {n}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads cannot share {} key/value heads evenly", self.heads, self.kv_heads));
        }
        if self.heads.checked_mul(self.head_dim).is_none_or(|n| n > LARGEST) {
            return Err(format!("{} heads of {} values are too many", self.heads, self.head_dim));
        }
        for (what, x) in [
            ("attention scale", self.attention_scale),
            ("embedding scale", self.embedding_scale),
            ("residual scale", self.residual_scale),
            ("logit scale", self.logit_scale),
            ("attention softcap", self.attention_softcap.unwrap_or(1.0)),
            ("logit softcap", self.logit_softcap.unwrap_or(1.0)),
        ] {
            if !x.is_finite() || x == 0.0 {
                return Err(format!("the {what} is {x}"));
            }
        }
        if !self.norm.eps.is_finite() || self.norm.eps < 0.0 {
            return Err(format!("the norm's epsilon is {}", self.norm.eps));
        }
        if self.norm.weight_offset != 0.0 && self.norm.kind != NormKind::Rms {
            return Err("only RMS norms can have an offset on their weight".into());
        }
        for rope in &self.ropes {
            rope.check(self.head_dim)?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            if layer.mlp.width == 0 || layer.mlp.width > LARGEST {
                return Err(format!("the MLP width of layer {i} is {}", layer.mlp.width));
            }
            if layer.window == Some(0) {
                return Err(format!("the attention window of layer {i} is 0"));
            }
            if layer.rope.is_some_and(|r| r >= self.ropes.len()) {
                return Err(format!("layer {i} refers to a rotary embedding that is not there"));
            }
        }
        Ok(())
    }
}

impl Rope {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        if self.dim == 0 || self.dim > head_dim || !self.dim.is_multiple_of(2) {
            return Err(format!("{} rotated values do not fit a head of {head_dim}", self.dim));
        }
        let positive = |what: &str, x: f32| match x.is_finite() && x > 0.0 {
            true => Ok(()),
            false => Err(format!("the rotary {what} is {x}")),
        };
        positive("base (rope_theta)", self.theta)?;
        match self.scaling {
            RopeScaling::None | RopeScaling::Stored => Ok(()),
            RopeScaling::Linear { factor } => positive("scaling factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("scaling factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                if high_freq_factor <= low_freq_factor || !high_freq_factor.is_finite() {
                    return Err(format!(
                        "the rotary high_freq_factor {high_freq_factor} is not above low_freq_factor {low_freq_factor}"
                    ));
                }
                positive("original context", original_context as f32)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, .. } => {
                positive("scaling factor", factor)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention factor", attention_factor)?;
                if self.theta == 1.0 {
                    return Err("the rotary base of YaRN scaling is 1".into());
                }
                positive("original context", original_context as f32)
            }
        }
    }
}
