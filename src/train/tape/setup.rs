//! From a method to parameters: which there are, where they belong, what they begin as.

use super::lora::Lora;
use super::method::{LoraConfig, Method};
use super::noise;
use super::sites::{PrefixSite, Sites};
use super::targets::{Module, Patterns, module, name, norms, targeted};
use crate::train::params::{Param, Params};
use anyhow::{Result, bail};
use rushlight_models::adapter;
use rushlight_models::families::Role;
use rushlight_models::model::{Linear, Model, NormWeights, Weight};
use rushlight_quant::buffer::Aligned;
use std::collections::HashMap;

/// Standard deviation of a prefix that has learnt nothing yet.
const PREFIX_SPREAD: f32 = 0.02;

/// What training needs to know of a model.
pub(super) struct Setup {
    pub sites: Sites,
    pub params: Params,
    /// DoRA: the squares of the lengths of each weight's rows, by the number of its gain.
    pub squares: Vec<Vec<f64>>,
}

/// The parameters of `method` for `model`.
pub(super) fn set_up(model: &Model, method: &Method, seed: u64) -> Result<Setup> {
    if model.linears().any(|l| !l.adapters.is_empty() || l.replacement.is_some()) {
        bail!("the model has an adapter in force already; merge it first, or begin with it (--init-adapter)");
    }
    let sites = Sites::new(model.tensors, model.layers.len());
    let mut setup = Builder { model, seed, sites, params: Params::default(), squares: Vec::new() };
    match method {
        Method::Lora(config) => setup.lora(config)?,
        Method::Full => setup.full(),
        Method::Prefix { tokens } => setup.prefix(*tokens)?,
    }
    setup.mark_experts();
    Ok(Setup { sites: setup.sites, params: setup.params, squares: setup.squares })
}

struct Builder<'m> {
    model: &'m Model,
    seed: u64,
    sites: Sites,
    params: Params,
    squares: Vec<Vec<f64>>,
}

impl Builder<'_> {
    /// A new parameter; its number.
    fn param(&mut self, name: String, shape: &[usize], rate: f32, fill: impl FnOnce(u64, &mut [f32])) -> usize {
        let number = self.params.list.len();
        let mut values = Aligned::zeroed(shape.iter().product());
        fill(noise::key(self.seed, number), &mut values);
        self.params.list.push(Param { name, shape: shape.to_vec(), values, rate, decay: true, idles: false });
        number
    }

    /// Experts that are modules of their own have no gradient in PyTorch where no token chose them.
    fn mark_experts(&mut self) {
        let own = |l: &&Linear| l.role.expert().is_some() && module(self.model, l).is_some();
        for linear in self.model.linears().filter(own) {
            let site = &self.sites.linears[linear.id];
            let lora = site.lora.iter().flat_map(|lora| [Some(lora.a), Some(lora.b), lora.magnitude]);
            for param in lora.chain([site.weight, site.bias]).flatten() {
                self.params.list[param].idles = true;
            }
        }
    }

    fn learns(&mut self, linear: &Linear) {
        if linear.role != Role::Head {
            self.sites.layers[linear.layer] = true;
        }
    }

    fn lora(&mut self, config: &LoraConfig) -> Result<()> {
        check(config)?;
        self.sites.dropout = config.dropout;
        let mut patterns = Patterns::new(&config.train_full)?;
        self.whole(&mut patterns);
        patterns.verdict(self.model)?;
        let mut shared: HashMap<String, usize> = HashMap::new();
        let targeted = targeted(self.model, &config.targets)?;
        for (linear, module) in &targeted {
            if self.sites.linears[linear.id].weight.is_some() {
                continue;
            }
            let lora = self.low_rank(config, linear, module, &mut shared);
            self.sites.linears[linear.id].lora = Some(lora);
            self.learns(linear);
        }
        match &config.init {
            Some(dir) => self.begin_with(dir, config),
            None => Ok(()),
        }
    }

    fn low_rank(
        &mut self,
        config: &LoraConfig,
        linear: &Linear,
        module: &Module,
        shared: &mut HashMap<String, usize>,
    ) -> Lora {
        let (rows, cols, rank) = (linear.weight.rows(), linear.weight.cols(), config.rank);
        let part = module.part.map_or(String::new(), |part| format!(".{part:?}"));
        let a = match shared.get(&module.name) {
            Some(&a) => a,
            None => {
                // Kaiming's uniform numbers with a = sqrt 5, as PEFT draws them.
                let bound = 1.0 / (cols as f32).sqrt();
                let a = self.param(format!("{}.lora_A", module.name), &[rank, cols], 1.0, |key, values| {
                    for (i, x) in values.iter_mut().enumerate() {
                        *x = bound * (2.0 * noise::unit(key, i as u64) - 1.0);
                    }
                });
                shared.insert(module.name.clone(), a);
                a
            }
        };
        let rate = config.lora_plus.unwrap_or(1.0);
        let b = self.param(format!("{}.lora_B{part}", module.name), &[rows, rank], rate, |_, _| {});
        let magnitude = config.dora.then(|| {
            let lengths = lengths(&linear.weight);
            self.squares.push(lengths.iter().map(|length| length * length).collect());
            // PEFT's optimizer for LoRA+ has vectors learn as fast as B.
            self.param(format!("{}.lora_magnitude{part}", module.name), &[rows], rate, |_, values| {
                values.iter_mut().zip(lengths).for_each(|(m, length)| *m = length as f32);
            })
        });
        let dora = magnitude.map(|_| self.squares.len() - 1);
        Lora { a, b, rank, scale: config.scale(), magnitude, dora }
    }

    /// Makes parameters of everything that `patterns` mean.
    fn whole(&mut self, patterns: &mut Patterns) {
        let model = self.model;
        if patterns.mean(&name(model, Role::Embedding, 0)) {
            self.table(Role::Embedding);
        }
        if model.positions.is_some() && patterns.mean(&name(model, Role::Positions, 0)) {
            self.table(Role::Positions);
        }
        for (role, layer, weights) in norms(model) {
            let name = name(model, role, layer);
            if patterns.mean(&name) {
                self.norm(role, layer, &name, weights);
            }
        }
        for linear in model.linears() {
            let Some(module) = module(model, linear) else { continue };
            if patterns.mean(&module.name) {
                self.weight(linear, &module);
            }
        }
    }

    fn full(&mut self) {
        let model = self.model;
        self.table(Role::Embedding);
        if model.positions.is_some() {
            self.table(Role::Positions);
        }
        for (role, layer, weights) in norms(model) {
            self.norm(role, layer, &name(model, role, layer), weights);
        }
        for (i, layer) in model.layers.iter().enumerate() {
            if let Some(sinks) = &layer.sinks {
                let values = &sinks.values;
                let param =
                    self.param(name(model, Role::Sinks, i), &[values.len()], 1.0, |_, p| p.copy_from_slice(values));
                self.sites.vectors[sinks.id] = Some(param);
                self.sites.layers[i] = true;
            }
        }
        for linear in model.linears() {
            let tied = linear.role == Role::Head && linear.id == model.embedding.id;
            let module = module(model, linear).unwrap_or_else(|| {
                let name = format!("{}.{:?}", name(model, linear.role, linear.layer), linear.role);
                Module { name, part: None }
            });
            match tied {
                true => self.sites.linears[linear.id].weight = self.sites.tables[model.embedding.id],
                false => self.weight(linear, &module),
            }
            if let Some(bias) = &linear.bias {
                let part = module.part.map_or(String::new(), |part| format!(".{part:?}"));
                let (name, values) = (format!("{}.bias{part}", module.name), &bias.values);
                let param = self.param(name, &[values.len()], 1.0, |_, p| p.copy_from_slice(values));
                self.sites.linears[linear.id].bias = Some(param);
            }
        }
    }

    /// A parameter in the place of a linear layer's weight.
    fn weight(&mut self, linear: &Linear, module: &Module) {
        let (weight, part) = (&linear.weight, module.part.map_or(String::new(), |part| format!(".{part:?}")));
        let (rows, cols) = (weight.rows(), weight.cols());
        let param = self.param(format!("{}.weight{part}", module.name), &[rows, cols], 1.0, |_, p| decode(weight, p));
        self.sites.linears[linear.id].weight = Some(param);
        self.learns(linear);
        if linear.role == Role::Head && self.model.spec.normed_head {
            self.sites.unit_rows = Some(param);
        }
    }

    fn table(&mut self, role: Role) {
        let table = match (role, &self.model.positions) {
            (Role::Positions, Some(table)) => table,
            _ => &self.model.embedding,
        };
        let weight = &table.weight;
        let name = format!("{}.weight", name(self.model, role, 0));
        let param = self.param(name, &[weight.rows(), weight.cols()], 1.0, |_, p| decode(weight, p));
        self.sites.tables[table.id] = Some(param);
    }

    fn norm(&mut self, role: Role, layer: usize, name: &str, weights: &NormWeights) {
        for (vector, end) in [(&weights.weight, "weight"), (&weights.bias, "bias")] {
            let Some(vector) = vector else { continue };
            let values = &vector.values;
            let param = self.param(format!("{name}.{end}"), &[values.len()], 1.0, |_, p| p.copy_from_slice(values));
            self.sites.vectors[vector.id] = Some(param);
        }
        if !matches!(role, Role::EmbeddingNorm | Role::FinalNorm) {
            self.sites.layers[layer] = true;
        }
    }

    fn prefix(&mut self, len: usize) -> Result<()> {
        let spec = &self.model.spec;
        if len == 0 {
            bail!("a prefix of 0 positions trains nothing; ask for some (20 is usual)");
        }
        if spec.latent.is_some() || spec.value_dim != spec.head_dim {
            bail!("prefix-tuning of models with latent attention is not supported; train LoRA adapters");
        }
        if len >= spec.context_length {
            bail!("a prefix of {len} positions leaves nothing of the {} the model has", spec.context_length);
        }
        let width = spec.kv_width();
        let each = |i: usize, what: &str| format!("prefix.layers.{i}.{what}");
        let layers = (0..spec.layers.len())
            .map(|i| {
                let mut one = |what| {
                    self.param(each(i, what), &[len, width], 1.0, |key, values| {
                        for (i, x) in values.iter_mut().enumerate() {
                            *x = PREFIX_SPREAD * normal(key, i as u64);
                        }
                    })
                };
                (one("keys"), one("values"))
            })
            .collect();
        self.sites.prefix = Some(PrefixSite { len, layers });
        Ok(())
    }

    /// Puts the numbers of the adapter in `dir` in the place of random ones.
    fn begin_with(&mut self, dir: &std::path::Path, config: &LoraConfig) -> Result<()> {
        let mut model = self.model.clone();
        adapter::attach(&mut model, &[(dir.to_path_buf(), 1.0)])?;
        let stop = |what: String| anyhow::anyhow!("{}: {what}", dir.display());
        if model.prefix.is_some() && self.model.prefix.is_none() {
            return Err(stop("the adapter is a prefix, not LoRA".into()));
        }
        for linear in model.linears() {
            let module = module(&model, linear).map_or(format!("{:?}", linear.role), |m| m.name);
            if linear.own_bias.is_some() {
                return Err(stop(format!("it brings its own bias for {module}, and biases are not trained")));
            }
            let (lora, weight) = (self.sites.linears[linear.id].lora, self.sites.linears[linear.id].weight);
            match (lora, linear.adapters.first()) {
                (None, None) => {}
                (Some(_), None) => {
                    return Err(stop(format!(
                        "it has no adapter for {module}, which is to be trained; name its own modules with --targets"
                    )));
                }
                (None, Some(_)) => {
                    return Err(stop(format!(
                        "its adapter for {module} is not among what is to be trained; name it with --targets"
                    )));
                }
                (Some(lora), Some(there)) => {
                    if there.a.rows() != lora.rank || (there.scale / lora.scale - 1.0).abs() > 1e-4 {
                        return Err(stop(format!(
                            "its adapter for {module} has rank {} and scale {}, but rank {} and scale {} are asked for: give its own --lora-r and --lora-alpha",
                            there.a.rows(),
                            there.scale,
                            lora.rank,
                            lora.scale
                        )));
                    }
                    if there.gain.is_some() != config.dora {
                        return Err(stop(format!("it is {}DoRA", if config.dora { "not " } else { "" })));
                    }
                    decode(&there.a, &mut self.params.list[lora.a].values);
                    decode(&there.b, &mut self.params.list[lora.b].values);
                    if let (Some(param), Some(gain)) = (lora.magnitude, &there.gain) {
                        let lengths = changed_lengths(&linear.weight, &there.a, &there.b, there.scale);
                        let values = self.params.list[param].values.iter_mut();
                        values
                            .zip(gain.iter().zip(lengths))
                            .for_each(|(m, (g, length))| *m = (f64::from(*g) * length) as f32);
                    }
                }
            }
            match (weight, &linear.replacement) {
                (Some(param), Some(there)) => decode(there, &mut self.params.list[param].values),
                (None, Some(_)) => {
                    return Err(stop(format!("it brings {module} as a whole; name it with --train-full")));
                }
                _ => {}
            }
        }
        match (self.sites.tables[self.model.embedding.id], &model.embedding.replacement) {
            (Some(param), Some(there)) => decode(there, &mut self.params.list[param].values),
            (None, Some(_)) => {
                return Err(stop("it brings the embeddings as a whole; name them with --train-full".into()));
            }
            _ => {}
        }
        Ok(())
    }
}

/// What can be told wrong of `config` without a model.
pub fn check(config: &LoraConfig) -> Result<()> {
    if config.rank == 0 || config.rank > 4096 {
        bail!("--lora-r {}: a rank is from 1 to 4096", config.rank);
    }
    if !config.alpha.is_finite() || config.alpha <= 0.0 {
        bail!("--lora-alpha {} is not above 0", config.alpha);
    }
    if !(0.0..1.0).contains(&config.dropout) {
        bail!("a dropout of {} is not in [0, 1)", config.dropout);
    }
    if let Some(ratio) = config.lora_plus.filter(|r| !r.is_finite() || *r <= 0.0) {
        bail!("the ratio of LoRA+ is {ratio}, not above 0");
    }
    Ok(())
}

/// All of `weight` in f32.
fn decode(weight: &Weight, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(weight.cols()).enumerate() {
        weight.decode_row(row, out);
    }
}

/// The length of each row.
fn lengths(weight: &Weight) -> Vec<f64> {
    let mut row = vec![0.0; weight.cols()];
    let each = (0..weight.rows()).map(|r| {
        weight.decode_row(r, &mut row);
        row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
    });
    each.collect()
}

/// The length of each row of `weight + scale * b a`.
fn changed_lengths(weight: &Weight, a: &Weight, b: &Weight, scale: f32) -> Vec<f64> {
    let (rank, cols) = (a.rows(), a.cols());
    let mut all = vec![0.0; rank * cols];
    decode(a, &mut all);
    let (mut row, mut low) = (vec![0.0; cols], vec![0.0; rank]);
    let each = (0..weight.rows()).map(|o| {
        weight.decode_row(o, &mut row);
        b.decode_row(o, &mut low);
        for (a, b) in all.chunks_exact(cols).zip(&low) {
            row.iter_mut().zip(a).for_each(|(w, a)| *w += scale * b * a);
        }
        row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
    });
    each.collect()
}

/// A normally distributed number (Box and Muller 1958).
fn normal(key: u64, at: u64) -> f32 {
    let (u, v) = (noise::unit(key, 2 * at), noise::unit(key, 2 * at + 1));
    let radius = (-2.0 * f64::from(1.0 - u).ln()).sqrt();
    (radius * (std::f64::consts::TAU * f64::from(v)).cos()) as f32
}
