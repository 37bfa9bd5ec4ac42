//! The inverse of [`Keys`]: GGUF metadata that say what a [`ModelSpec`] says.
//!
//! What was written is read back by the family's own reader. A key that is needed only where a model departs from what
//! its architecture implies is written only where the reader would otherwise miss it, and what no key can say is found
//! here, not in the output of a model that reads its file wrongly.

use super::config::yarn_attention;
use super::keys::{ACTIVATION, ACTIVATIONS};
use super::{Gguf, Keys, llama_cpp};
use crate::checkpoint::{Array, Checkpoint, Metadata, TensorInfo, Value};
use crate::spec::{Branches, LayerSpec, ModelSpec, NormKind, Rope, RopeScaling, Routing};
use crate::{Error, Result};
use rushlight_quant::ops::Activation;
use std::path::Path;

/// What a GGUF file of a model says of it.
pub struct Description {
    /// `general.architecture` and the keys under its name.
    pub metadata: Metadata,
    /// What a reader of the file makes of them: the original but for the order of rotary pairs, the form of their
    /// scaling, and the offset of norms.
    pub spec: ModelSpec,
    /// What could not be said, a sentence each.
    pub notes: Vec<String>,
}

/// A key that is written where a reader would otherwise take something else.
struct Optional {
    /// Whether the reader already has it right.
    same: fn(&ModelSpec, &ModelSpec) -> bool,
    /// The key, and what to write: the first value that makes it right.
    key: &'static str,
    values: fn(&ModelSpec) -> Vec<Value>,
}

const OPTIONAL: &[Optional] = &[
    Optional {
        same: |a, b| windows(a).eq(windows(b)),
        key: "attention.sliding_window",
        values: |s| windows(s).flatten().next().map(|w| Value::Unsigned(w as u64)).into_iter().collect(),
    },
    Optional {
        same: |a, b| a.ropes == b.ropes,
        key: "rope.freq_base_swa",
        values: |s| {
            let sliding = s.layers.iter().find(|l| l.window.is_some()).and_then(|l| s.ropes.get(l.rope?));
            sliding.map(|rope| float(rope.theta)).into_iter().collect()
        },
    },
    Optional {
        same: |a, b| a.attention_scale == b.attention_scale,
        key: "attention.scale",
        values: |s| vec![float(s.attention_scale)],
    },
    Optional {
        same: |a, b| a.attention_softcap == b.attention_softcap,
        key: "attn_logit_softcapping",
        values: |s| vec![float(s.attention_softcap.unwrap_or(0.0))],
    },
    Optional {
        same: |a, b| a.logit_softcap == b.logit_softcap,
        key: "final_logit_softcapping",
        values: |s| vec![float(s.logit_softcap.unwrap_or(0.0))],
    },
    Optional {
        same: |a, b| a.clip_qkv == b.clip_qkv,
        key: "attention.clamp_kqv",
        values: |s| s.clip_qkv.map(float).into_iter().collect(),
    },
    Optional { same: |a, b| a.alibi == b.alibi, key: "attention.max_alibi_bias", values: |_| vec![float(8.0)] },
    Optional {
        same: |a, b| near(a.attention_scale, b.attention_scale),
        key: "rope.scaling.yarn_log_multiplier",
        // DeepSeek's: what makes the scale of attention of the stretch.
        values: |s| {
            let stretch = s.ropes.first().and_then(|rope| match rope.scaling {
                RopeScaling::Yarn { factor, .. } => Some(factor.ln()),
                _ => None,
            });
            let more = (s.attention_scale * (s.head_dim as f32).sqrt()).sqrt() - 1.0;
            stretch.map(|log| float((more / log * 1e4).round() / 1e4)).into_iter().collect()
        },
    },
    Optional {
        same: |a, b| activations(a).eq(activations(b)),
        key: ACTIVATION,
        values: |s| {
            let names = ACTIVATIONS.iter().filter(|(_, activation)| activations(s).any(|a| a == *activation));
            names.map(|(name, _)| Value::String((*name).into())).collect()
        },
    },
    Optional {
        same: |a, b| renormalises(a).eq(renormalises(b)),
        key: "expert_weights_norm",
        values: |s| renormalises(s).take(1).map(Value::Bool).collect(),
    },
    Optional {
        same: |a, b| a.embedding_scale == b.embedding_scale,
        key: "embedding_scale",
        values: |s| vec![float(s.embedding_scale)],
    },
    Optional {
        same: |a, b| a.residual_scale == b.residual_scale,
        key: "residual_scale",
        values: |s| vec![float(s.residual_scale)],
    },
    Optional {
        same: |a, b| near(a.logit_scale, b.logit_scale),
        key: "logit_scale",
        // Architectures differ in whether logits are multiplied or divided by it.
        values: |s| vec![float(s.logit_scale), float(1.0 / s.logit_scale)],
    },
];

/// What a file of the architecture `form` with `tensors` says of the model `spec`; `path` is for messages only.
///
/// # Errors
/// When the architecture cannot say something of `spec`.
pub fn describe(spec: &ModelSpec, form: &Gguf, tensors: &[TensorInfo], path: &Path) -> Result<Description> {
    let impossible = |what: &str| {
        let architecture = form.architecture;
        Error::file(path, format!("GGUF files of the architecture '{architecture}' cannot say this model's {what}"))
    };
    let file = Checkpoint::described(path, tensors)?;
    let mut metadata = Metadata::default();
    metadata.0.insert("general.architecture".into(), Value::String(form.architecture.into()));
    let key = |name: &str| format!("{}.{name}", form.architecture);
    for (name, value) in plain(spec, form.architecture).map_err(impossible)? {
        metadata.0.insert(key(name), value);
    }
    let read = |metadata: &Metadata| {
        let mut read = form.read(&Keys::new(&file, metadata, form.architecture))?;
        let meant = as_read(spec, &read);
        // Products and quotients of one factor differ in the last bit.
        for (rope, meant) in read.ropes.iter_mut().zip(&meant.ropes) {
            if let (RopeScaling::Yarn { attention_factor: a, .. }, RopeScaling::Yarn { attention_factor: b, .. }) =
                (&mut rope.scaling, &meant.scaling)
                && near(*a, *b)
            {
                *a = *b;
            }
        }
        Ok::<_, Error>((meant, read))
    };
    for Optional { same, key: name, values } in OPTIONAL {
        let (meant, has) = read(&metadata)?;
        if same(&meant, &has) {
            continue;
        }
        for value in values(spec) {
            metadata.0.insert(key(name), value);
            let (meant, has) = read(&metadata)?;
            if same(&meant, &has) {
                break;
            }
            metadata.0.remove(&key(name));
        }
    }
    // Readers that know the pattern know the window only with it.
    let sliding = |metadata: &Metadata| read(metadata).map(|(meant, has)| windows(&meant).eq(windows(&has)));
    if let Some(window) = windows(spec).flatten().next()
        && !sliding(&metadata)?
    {
        let mut with = metadata.clone();
        let pattern = Array::of_bool(windows(spec).map(|w| w.is_some()));
        with.0.insert(key("attention.sliding_window"), Value::Unsigned(window as u64));
        with.0.insert(key("attention.sliding_window_pattern"), Value::Array(pattern));
        if sliding(&with)? {
            metadata = with;
        }
    }
    let (mut meant, read) = read(&metadata)?;
    // Rows change places on the way only where the architecture has all of them in its own order.
    if !form.reordered && spec.ropes.iter().zip(&read.ropes).any(|(a, b)| a.layout != b.layout) {
        return Err(impossible("order of rotary pairs"));
    }
    let mut notes = Vec::new();
    let window = windows(&meant).flatten().min();
    for (meant, read) in meant.ropes.iter_mut().zip(&read.ropes) {
        if meant.scaling != read.scaling
            && matches!(meant.scaling, RopeScaling::Dynamic { .. } | RopeScaling::DynamicSteps { .. })
        {
            notes.push(
                "GGUF files cannot say that rotary positions are stretched as the text grows: beyond the trained \
                        length the model is not what it was"
                    .into(),
            );
            meant.scaling = read.scaling.clone();
        }
    }
    if meant.logn != read.logn {
        notes.push("GGUF files cannot say that attention is sharpened beyond the trained length (logn)".into());
        meant.logn = read.logn;
    }
    if !windows(&meant).eq(windows(&read)) {
        notes.push(format!(
            "GGUF files of the architecture '{}' cannot say this model's attention window: positions see all before them",
            form.architecture
        ));
        meant.layers.iter_mut().zip(&read.layers).for_each(|(m, r)| m.window = r.window);
    } else if let Some(window) =
        window.filter(|&w| ["llama", "phi3", "starcoder2"].contains(&form.architecture) && w < spec.context_length)
    {
        // Mistral's files say `llama`, whose windows are read here but not there, as those of some others.
        notes.push(format!(
            "llama.cpp knows no attention window for this architecture: texts longer than {window} tokens it reads otherwise"
        ));
    }
    let usual = (form.from_keys)(&Keys::new(&file, &metadata, form.architecture))?;
    let has = |name: &str| metadata.get(&key(name)).is_some();
    notes.extend(llama_cpp::notes(spec, &usual, form.architecture, has));
    match difference(&meant, &read) {
        Some(what) => Err(impossible(what)),
        None => Ok(Description { metadata, spec: read, notes }),
    }
}

/// The keys that every architecture has.
fn plain(spec: &ModelSpec, architecture: &str) -> Result<Vec<(&'static str, Value)>, &'static str> {
    let count = |n: usize| Value::Unsigned(n as u64);
    // What all tokens share beside experts has a key of its own.
    let each: Vec<usize> = spec.layers.iter().map(dense_width).collect();
    let dense = spec.layers.iter().find(|l| l.experts.is_none()).or(spec.layers.first());
    // The first Qwen counts gate and up.
    let times = if architecture == "qwen" { 2 } else { 1 };
    let width = dense.map_or(0, dense_width);
    let widths = match spec.layers.iter().all(|l| l.experts.is_some() || dense_width(l) == width) {
        true => count(times * width),
        false => Value::Array(Array::of_i32(&each.iter().map(|&w| w as i32).collect::<Vec<_>>())),
    };
    let eps = match spec.norm.kind {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer { .. } => "attention.layer_norm_epsilon",
    };
    let mut keys = vec![
        ("vocab_size", count(spec.vocab_size)),
        ("context_length", count(spec.context_length)),
        ("embedding_length", count(spec.hidden_size)),
        ("block_count", count(spec.layers.len())),
        ("feed_forward_length", widths),
        ("attention.head_count", count(spec.heads)),
        ("attention.head_count_kv", count(spec.kv_heads)),
        (eps, float(spec.norm.eps)),
    ];
    if spec.query_width() != spec.hidden_size || spec.value_dim != spec.head_dim {
        keys.extend([
            ("attention.key_length", count(spec.head_dim)),
            ("attention.value_length", count(spec.value_dim)),
        ]);
    }
    keys.extend(mixture(spec));
    if let Some(latent) = &spec.latent {
        keys.push(("attention.kv_lora_rank", count(latent.kv)));
        keys.extend(latent.query.map(|n| ("attention.q_lora_rank", count(n))));
    }
    // llama.cpp looks for it even where it is 1.
    if architecture == "command-r" || architecture == "granite" && spec.logit_scale == 1.0 {
        keys.push(("logit_scale", float(spec.logit_scale)));
    }
    if architecture == "gptneox" {
        keys.push(("use_parallel_residual", Value::Bool(spec.branches == Branches::Parallel)));
    }
    // Where layers differ, the keys without a suffix are those of the layers that see everything.
    let main = spec.layers.iter().find(|l| l.window.is_none() && l.rope.is_some());
    let main = main.and_then(|l| spec.ropes.get(l.rope?)).or(spec.ropes.first());
    if let Some(rope) = main {
        keys.extend([("rope.dimension_count", count(rope.dim)), ("rope.freq_base", float(rope.theta))]);
        let mut scaling = scaling(rope)?;
        // DeepSeek's factor on cosine and sine is 1, which readers conclude from the multiplier of the logarithm.
        scaling.retain(|(key, _)| spec.latent.is_none() || *key != "rope.scaling.attn_factor");
        keys.extend(scaling);
    }
    Ok(keys)
}

/// What is said of experts.
fn mixture(spec: &ModelSpec) -> Vec<(&'static str, Value)> {
    let count = |n: usize| Value::Unsigned(n as u64);
    let Some((first, layer)) = spec.layers.iter().enumerate().find(|(_, l)| l.experts.is_some()) else {
        return Vec::new();
    };
    let Some(experts) = &layer.experts else { return Vec::new() };
    let mut keys = vec![
        ("expert_count", count(experts.count)),
        ("expert_used_count", count(experts.used)),
        ("expert_feed_forward_length", count(experts.mlp.width)),
    ];
    if let Some(shared) = &layer.mlp {
        keys.push(("expert_shared_feed_forward_length", count(shared.width)));
        keys.push(("expert_shared_count", count((shared.width / experts.mlp.width.max(1)).max(1))));
    }
    if spec.latent.is_some() {
        keys.push(("leading_dense_block_count", count(first)));
        keys.push(("expert_weights_scale", float(experts.scale)));
        keys.push(("expert_weights_norm", Value::Bool(experts.renormalise)));
        keys.push(("expert_gating_func", count(if experts.routing == Routing::Sigmoid { 2 } else { 1 })));
        if let Some(groups) = experts.groups {
            keys.push(("expert_group_count", count(groups.count)));
            keys.push(("expert_group_used_count", count(groups.used)));
        }
    }
    keys
}

/// Width of the MLP of a layer without experts, or of a single expert.
fn dense_width(layer: &LayerSpec) -> usize {
    let mlp = layer.experts.as_ref().map(|e| &e.mlp).or(layer.mlp.as_ref());
    mlp.map_or(0, |mlp| mlp.width)
}

fn scaling(rope: &Rope) -> Result<Vec<(&'static str, Value)>, &'static str> {
    let text = |s: &str| Value::String(s.into());
    Ok(match rope.scaling {
        // Llama 3's is a tensor of its own.
        RopeScaling::None | RopeScaling::Llama3 { .. } => Vec::new(),
        RopeScaling::Linear { factor } => {
            vec![("rope.scaling.type", text("linear")), ("rope.scaling.factor", float(factor))]
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, .. } => {
            let mut keys = vec![
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", float(factor)),
                ("rope.scaling.original_context_length", Value::Unsigned(original_context as u64)),
            ];
            // Readers take YaRN's own factor and these numbers where the file does not say.
            let extra = attention_factor / yarn_attention(factor, 1.0);
            if !near(extra, 1.0) {
                keys.push(("rope.scaling.attn_factor", float(extra)));
            }
            if (beta_fast, beta_slow) != (32.0, 1.0) {
                keys.push(("rope.scaling.yarn_beta_fast", float(beta_fast)));
                keys.push(("rope.scaling.yarn_beta_slow", float(beta_slow)));
            }
            keys
        }
        // The factors are tensors.
        RopeScaling::Long { original_context, attention_factor, .. } => vec![
            ("rope.scaling.type", text("longrope")),
            ("rope.scaling.original_context_length", Value::Unsigned(original_context as u64)),
            ("rope.scaling.attn_factor", float(attention_factor)),
        ],
        // What grows with the text is not in the file: `describe` says so.
        RopeScaling::Dynamic { .. } | RopeScaling::DynamicSteps { .. } => Vec::new(),
        _ => return Err("scaling of rotary positions"),
    })
}

/// `spec` with what the other form has otherwise, as `read` has it.
pub(super) fn as_read(spec: &ModelSpec, read: &ModelSpec) -> ModelSpec {
    let mut meant = spec.clone();
    meant.family = read.family;
    meant.norm.weight_offset = read.norm.weight_offset;
    // Both are done with when the tensors are written.
    (meant.normed_head, meant.spare_layers) = (read.normed_head, read.spare_layers);
    if near(meant.attention_scale, read.attention_scale) {
        meant.attention_scale = read.attention_scale;
    }
    for (rope, read) in meant.ropes.iter_mut().zip(&read.ropes) {
        rope.layout = read.layout;
        if matches!(rope.scaling, RopeScaling::Llama3 { .. }) && read.scaling == RopeScaling::Stored {
            rope.scaling = RopeScaling::Stored;
        }
        // These too are tensors.
        if let (RopeScaling::Long { short, long, .. }, RopeScaling::Long { short: s, long: l, .. }) =
            (&mut rope.scaling, &read.scaling)
        {
            short.clone_from(s);
            long.clone_from(l);
        }
    }
    meant
}

/// The first thing in which two specs differ.
pub(super) fn difference(a: &ModelSpec, b: &ModelSpec) -> Option<&'static str> {
    let layers = |same: fn(&LayerSpec, &LayerSpec) -> bool| {
        a.layers.len() == b.layers.len() && a.layers.iter().zip(&b.layers).all(|(a, b)| same(a, b))
    };
    let checks = [
        ("sizes", {
            let of = |s: &ModelSpec| {
                [
                    s.vocab_size,
                    s.hidden_size,
                    s.context_length,
                    s.heads,
                    s.kv_heads,
                    s.head_dim,
                    s.value_dim,
                    s.layers.len(),
                ]
            };
            of(a) == of(b)
        }),
        ("norms", a.norm == b.norm && a.placement == b.placement),
        ("norms of queries and keys", a.qk_norm == b.qk_norm),
        ("order of attention and MLP", a.branches == b.branches),
        ("biases", a.bias == b.bias),
        ("rotary positions", a.ropes == b.ropes && layers(|a, b| a.rope == b.rope)),
        ("attention window", windows(a).eq(windows(b))),
        ("MLP width", layers(|a, b| dense_width(a) == dense_width(b))),
        ("experts", layers(|a, b| a.experts == b.experts)),
        ("activation", layers(|a, b| a.mlp == b.mlp)),
        ("attention scale", a.attention_scale == b.attention_scale && a.attention_softcap == b.attention_softcap),
        ("attention scale", layers(|a, b| a.attention_scale == b.attention_scale)),
        ("scales of embeddings and branches", {
            a.embedding_scale == b.embedding_scale && a.residual_scale == b.residual_scale
        }),
        ("scale of logits", near(a.logit_scale, b.logit_scale) && a.logit_softcap == b.logit_softcap),
        ("head", a.tied_head == b.tied_head),
        ("latent attention", a.latent == b.latent),
        ("distances (ALiBi)", a.alibi == b.alibi),
        ("positions", a.learned_positions == b.learned_positions && a.context == b.context),
        ("limit of queries, keys and values", a.clip_qkv == b.clip_qkv),
        ("prefix", a.prefix == b.prefix),
    ];
    let found = checks.iter().find(|(_, same)| !same).map(|(what, _)| *what);
    // A switch that is not in the list must not pass for equal.
    let mut rest = a.clone();
    rest.logit_scale = b.logit_scale;
    found.or((rest != *b).then_some("shape"))
}

pub(super) fn activations(spec: &ModelSpec) -> impl Iterator<Item = Activation> {
    let of =
        |layer: &LayerSpec| layer.experts.as_ref().map(|e| &e.mlp).or(layer.mlp.as_ref()).map(|mlp| mlp.activation);
    spec.layers.iter().filter_map(of)
}

fn renormalises(spec: &ModelSpec) -> impl Iterator<Item = bool> {
    spec.layers.iter().filter_map(|layer| layer.experts.as_ref().map(|e| e.renormalise))
}

fn windows(spec: &ModelSpec) -> impl Iterator<Item = Option<usize>> {
    spec.layers.iter().map(|l| l.window)
}

fn float(x: f32) -> Value {
    Value::Float(f64::from(x))
}

fn near(a: f32, b: f32) -> bool {
    (a - b).abs() <= 1e-6 * b.abs()
}
