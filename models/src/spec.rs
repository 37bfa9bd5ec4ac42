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
    /// Width of one head of queries and keys.
    pub head_dim: usize,
    /// Width of one head of values, normally `head_dim`.
    pub value_dim: usize,
    /// Keys and values made from a narrow latent vector (DeepSeek's MLA).
    pub latent: Option<Latent>,
    /// What attention scores are multiplied by, normally `head_dim^-0.5`.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)` before the mask.
    pub attention_softcap: Option<f32>,
    /// Distances instead of rotations: what is added to the scores.
    pub alibi: Option<Alibi>,
    /// Queries behind this many positions are multiplied by `ln(position + 1) / ln(this)` (Qwen's logn attention).
    pub logn: Option<usize>,
    /// Each head has one more score, which takes its share of the softmax and is dropped.
    pub sinks: bool,
    /// Queries, keys and values go no further than this from 0.
    pub clip_qkv: Option<f32>,
    /// How much of a sequence is seen whole, in both directions, and how its positions count.
    pub context: Context,
    /// Rows of the table of learned positions that is added to the embeddings.
    pub learned_positions: Option<usize>,
    /// Embeddings are normalised.
    pub embedding_norm: bool,
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
    /// The head's rows are divided by their length when they are loaded.
    pub normed_head: bool,
    /// Trained keys and values in the checkpoint itself, which stand before every sequence (p-tuning).
    pub prefix: Option<PrefixSpec>,
    /// Layers stored behind the last, which predict further tokens and are left alone.
    pub spare_layers: usize,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
    /// Each branch is multiplied by this before it is added to the residual stream.
    pub residual_scale: f32,
    /// What the residual stream is multiplied by before a branch is added to it.
    pub stream_scale: f32,
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
    /// What [`ModelSpec::attention_scale`] is multiplied by in this layer.
    pub attention_scale: f32,
    /// The MLP; where there are experts, the one that all tokens share, if there is one.
    pub mlp: Option<Mlp>,
    /// The experts.
    pub experts: Option<Experts>,
}

/// A mixture of experts: each token goes through a few of many MLPs.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many each token goes through.
    pub used: usize,
    /// What each of them is.
    pub mlp: Mlp,
    /// How the router's scores become weights.
    pub routing: Routing,
    /// The router has a bias.
    pub router_bias: bool,
    /// A stored bias takes part in the choice (not in the weights).
    pub choice_bias: bool,
    /// Experts stand in groups, of which only the best are looked at.
    pub groups: Option<Groups>,
    /// Weights of the chosen are divided by their sum.
    pub renormalise: bool,
    /// Weights are multiplied by this.
    pub scale: f32,
    /// The shared MLP's output is multiplied by the sigmoid of a score of its own.
    pub shared_gate: bool,
}

impl Experts {
    /// `used` of `count` experts, weighed by a softmax over all, and nothing more.
    pub fn new(count: usize, used: usize, mlp: Mlp) -> Experts {
        Experts {
            count,
            used,
            mlp,
            routing: Routing::Softmax,
            router_bias: false,
            choice_bias: false,
            groups: None,
            renormalise: false,
            scale: 1.0,
            shared_gate: false,
        }
    }
}

/// How the router's scores become the experts' weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// Softmax over those that were chosen.
    SoftmaxOfChosen,
}

/// Groups of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many there are.
    pub count: usize,
    /// How many are looked at.
    pub used: usize,
    /// A group is as good as the sum of so many of its best.
    pub best: usize,
}

/// Keys and values made from a latent vector that all heads share (DeepSeek-V2, 2024).
#[derive(Clone, Debug, PartialEq)]
pub struct Latent {
    /// Width of the latent vector of the queries; `None`: they are made from the stream.
    pub query: Option<usize>,
    /// Width of the latent vector of keys and values.
    pub kv: usize,
    /// How many of a key's values are rotated and the same for all heads. They stand behind the others.
    pub rotated: usize,
    /// The norm of the latent vectors.
    pub norm: Norm,
}

/// Attention with linear biases (Press et al. 2022): `slope * (key - query)` is added to each score.
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi {
    /// A slope for each head.
    pub slopes: Vec<f32>,
    /// Falcon's form: products with the key's position are rounded to bf16 and multiplied by this.
    pub rounded: Option<f32>,
}

impl Alibi {
    /// The usual slopes: a geometric sequence for the greatest power of two of heads, and every second term of the
    /// sequence for twice as many for the rest.
    pub fn new(heads: usize) -> Alibi {
        let n = heads.checked_ilog2().map_or(1, |log| 1usize << log);
        let term = |i: usize, of: usize| 2f64.powf(-8.0 * i as f64 / of as f64) as f32;
        let slopes = (1..=n).map(|i| term(i, n)).chain((1..).step_by(2).map(|i| term(i, 2 * n)));
        Alibi { slopes: slopes.take(heads).collect(), rounded: None }
    }
}

/// How much of a sequence is seen whole, and how positions count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// Nothing: attention is causal.
    None,
    /// What stands before the first `start` (GLM, Du et al. 2022). Positions are two-dimensional: the first counts the
    /// context and from then on stays where `masks` stand (the first of them that occurs), the second counts what
    /// follows.
    Before {
        /// The token that ends the context.
        start: u32,
        /// The tokens that stand for what follows.
        masks: [u32; 2],
    },
}

/// Keys and values that a checkpoint brings for the positions before every sequence (p-tuning v2, Liu et al. 2022).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixSpec {
    /// How many positions.
    pub len: usize,
    /// The table goes through two linear layers.
    pub projected: bool,
}

/// What rows of a sequence need to know of the whole of it. Rows of one outline can be computed after one another; where
/// the outline changes, all have to be computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    /// The length that rotary embeddings go by which depend on it; 0 where none does.
    pub length: usize,
    /// Places in the cache that a prefix takes without being counted as positions.
    pub before: usize,
    /// Positions that are seen whole.
    pub context: usize,
    /// Where the first of two-dimensional positions stays from `context` on.
    pub anchor: usize,
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
    /// Each head by itself, with a weight of its own: `[heads, head_dim]`.
    Heads,
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
    /// The stream itself: `n + f(n)` with `n = norm(x)`.
    Stream,
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
    /// How many of a head's values are rotated.
    pub dim: usize,
    /// The first of them.
    pub first: usize,
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
    /// Each frequency divided by a number of its own, which depends on whether the sequence is longer than the original
    /// context (LongRoPE, Ding et al. 2024).
    Long {
        /// Up to the original context; `dim / 2` of them.
        short: Vec<f32>,
        /// Beyond it.
        long: Vec<f32>,
        /// Positions before the stretch.
        original_context: usize,
        /// What cosine and sine are multiplied by.
        attention_factor: f32,
    },
    /// The base grows with the length `n` of a sequence beyond the context `c`: times
    /// `(factor n / c - (factor - 1))^(dim / (dim - 2))`.
    Dynamic {
        /// The stretch.
        factor: f32,
        /// Positions before the stretch.
        original_context: usize,
    },
    /// Qwen's form of it: times `(2^ceil(log2(n / c) + 1) - 1)^(dim / (dim - 2))`.
    DynamicSteps {
        /// Positions before the stretch.
        original_context: usize,
    },
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

    /// Width of the values.
    pub fn value_width(&self) -> usize {
        self.kv_heads * self.value_dim
    }

    /// Whether positions can be taken out of the middle of a sequence without computing what follows again.
    pub fn shiftable(&self) -> bool {
        self.learned_positions.is_none() && self.context == Context::None
    }

    /// What the rows of the sequence `ids` need to know of the whole of it.
    pub fn outline(&self, ids: &[u32]) -> Outline {
        let length = self.ropes.iter().map(|rope| rope.scaling.length(ids.len())).max().unwrap_or(0);
        let find = |id: u32| ids.iter().position(|&other| other == id);
        match self.context {
            Context::None => Outline { length, ..Outline::default() },
            Context::Before { start, masks } => {
                let context = find(start).unwrap_or(0);
                let anchor = masks.iter().find_map(|&mask| find(mask)).unwrap_or(context.saturating_sub(1));
                Outline { length, before: 0, context, anchor }
            }
        }
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
            ("size of a head's values", self.value_dim),
            ("number of layers", self.layers.len()),
        ] {
            if n == 0 || n > LARGEST {
                return Err(format!("the {what} is {n}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads cannot share {} key/value heads evenly", self.heads, self.kv_heads));
        }
        for width in [self.head_dim, self.value_dim] {
            if self.heads.checked_mul(width).is_none_or(|n| n > LARGEST) {
                return Err(format!("{} heads of {width} values are too many", self.heads));
            }
        }
        for (what, x) in [
            ("attention scale", self.attention_scale),
            ("embedding scale", self.embedding_scale),
            ("residual scale", self.residual_scale),
            ("scale of the residual stream", self.stream_scale),
            ("limit of queries, keys and values (clip_qkv)", self.clip_qkv.unwrap_or(1.0)),
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
        if let Some(cap) = self.clip_qkv.filter(|&cap| cap < 0.0) {
            return Err(format!("the limit of queries, keys and values (clip_qkv) is {cap}"));
        }
        if let Some(latent) = &self.latent {
            for (what, n) in [("kv_lora_rank", latent.kv), ("q_lora_rank", latent.query.unwrap_or(1))] {
                if n == 0 || n > LARGEST {
                    return Err(format!("the width of a latent vector ({what}) is {n}"));
                }
            }
            if latent.rotated >= self.head_dim || self.kv_heads != self.heads {
                return Err(format!(
                    "{} of a key's {} values are rotated, and {} heads have {} keys",
                    latent.rotated, self.head_dim, self.heads, self.kv_heads
                ));
            }
        }
        if self.logn.is_some_and(|n| n < 2) {
            return Err("the length that logn attention starts from is below 2".into());
        }
        let extra = [("learned positions", self.learned_positions), ("prefix", self.prefix.map(|p| p.len))];
        for (what, n) in extra {
            if n.is_some_and(|n| n == 0 || n > LARGEST) {
                return Err(format!("the number of positions of the {what} is {}", n.unwrap_or(0)));
            }
        }
        for (i, layer) in self.layers.iter().enumerate() {
            for mlp in layer.mlp.iter().chain(layer.experts.as_ref().map(|e| &e.mlp)) {
                if mlp.width == 0 || mlp.width > LARGEST {
                    return Err(format!("the MLP width of layer {i} is {}", mlp.width));
                }
            }
            match &layer.experts {
                Some(experts) => experts.check().map_err(|e| format!("{e} in layer {i}"))?,
                None if layer.mlp.is_none() => return Err(format!("layer {i} has no MLP")),
                None => {}
            }
            if !layer.attention_scale.is_finite() || layer.attention_scale == 0.0 {
                return Err(format!("the attention scale of layer {i} is {}", layer.attention_scale));
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

impl Experts {
    fn check(&self) -> Result<(), String> {
        const MOST: usize = 1 << 16;
        if self.count == 0 || self.count > MOST || self.used == 0 || self.used > self.count {
            return Err(format!("{} of {} experts cannot be used", self.used, self.count));
        }
        if !self.scale.is_finite() || self.scale == 0.0 {
            return Err(format!("the scale of the experts' weights is {}", self.scale));
        }
        let Some(Groups { count, used, best }) = self.groups else { return Ok(()) };
        let size = self.count.checked_div(count).filter(|size| size * count == self.count).unwrap_or(0);
        if size == 0 || used == 0 || used > count || best > size || used * size < self.used {
            return Err(format!(
                "{used} of {count} groups (n_group) of the {} experts cannot give {}",
                self.count, self.used
            ));
        }
        Ok(())
    }
}

impl RopeScaling {
    /// The length that a sequence of `len` is to be taken for: equal ones rotate alike. 0 where the length plays no
    /// part.
    fn length(&self, len: usize) -> usize {
        match *self {
            RopeScaling::Long { original_context, .. } if len > original_context => original_context + 1,
            RopeScaling::Dynamic { original_context, .. } if len > original_context => len,
            RopeScaling::DynamicSteps { original_context } if len > original_context => {
                // The longest of those that share its step.
                std::iter::successors(Some(original_context), |n| n.checked_mul(2))
                    .find(|&n| n == 0 || n >= len)
                    .unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }

    /// Whether a sequence that outgrows the length it was begun with is to be computed again from the start.
    pub fn restarts(&self) -> bool {
        matches!(self, RopeScaling::Long { .. })
    }
}

impl Rope {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        let pairs = if self.layout == RopeLayout::TwoHalves { 4 } else { 2 };
        let end = self.first.checked_add(self.dim);
        if self.dim == 0 || end.is_none_or(|end| end > head_dim) || !self.dim.is_multiple_of(pairs) {
            return Err(format!("{} rotated values do not fit a head of {head_dim}", self.dim));
        }
        let positive = |what: &str, x: f32| match x.is_finite() && x > 0.0 {
            true => Ok(()),
            false => Err(format!("the rotary {what} is {x}")),
        };
        positive("base (rope_theta)", self.theta)?;
        match self.scaling {
            RopeScaling::None | RopeScaling::Stored => Ok(()),
            RopeScaling::Long { ref short, ref long, original_context, attention_factor } => {
                for (what, factors) in [("short", short), ("long", long)] {
                    if factors.len() != self.dim / 2 {
                        return Err(format!(
                            "the rotary scaling has {} {what} factors for {} pairs",
                            factors.len(),
                            self.dim / 2
                        ));
                    }
                    factors.iter().try_for_each(|&f| positive(&format!("{what} factor"), f))?;
                }
                positive("attention factor", attention_factor)?;
                positive("original context", original_context as f32)
            }
            RopeScaling::Dynamic { .. } | RopeScaling::DynamicSteps { .. } if self.dim < 4 => {
                Err(format!("{} rotated values are too few for dynamic scaling", self.dim))
            }
            RopeScaling::Dynamic { factor, original_context } => {
                positive("scaling factor", factor)?;
                positive("original context", original_context as f32)
            }
            RopeScaling::DynamicSteps { original_context } => positive("original context", original_context as f32),
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
