//! Loss and gradients of whole micro-batches.

use super::lora::Gain;
use super::memory::half;
use super::method::{Checkpointing, Method};
use super::pool::Pool;
use super::record::{Tape, Value};
use super::setup::{Setup, set_up};
use super::sites::Sites;
use crate::train::batch::{Example, Loss};
use crate::train::params::{Gradients, Params};
use anyhow::{Result, bail};
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::decoder;
use rushlight_models::model::{LowRank, Model, Prefix, Weight};
use rushlight_models::spec::Outline;
use rushlight_quant::{Cpu, Phase};

/// Most bytes of logits that exist at once, and most rows: more fill the processor no better.
const LOGITS: usize = 64 << 20;
const LOGIT_ROWS: usize = 128;

/// A model and what is trained of it.
pub struct Learner {
    model: Model,
    cpu: Cpu,
    pool: Pool,
    sites: Sites,
    params: Params,
    checkpointing: Checkpointing,
    /// DoRA's factors, and the squares of the lengths of the frozen rows.
    gains: Vec<Gain>,
    squares: Vec<Vec<f64>>,
    /// Whether parameters may have changed since what depends on them was computed.
    stale: bool,
}

impl Learner {
    /// Makes the parameters of `method` for `model`; `seed` picks the random ones.
    ///
    /// # Errors
    /// When the method does not fit the model, or the adapter to begin with does not fit the method.
    pub fn new(model: Model, cpu: Cpu, method: &Method, seed: u64) -> Result<Learner> {
        let Setup { sites, params, squares } = set_up(&model, method, seed)?;
        let cpu = cpu.with_half_attention(half(&model, method));
        let gains = vec![Gain::default(); squares.len()];
        let (pool, checkpointing) = Default::default();
        Ok(Learner { model, cpu, pool, sites, params, checkpointing, gains, squares, stale: true })
    }

    /// What is trained.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The same, to be changed.
    pub fn params_mut(&mut self) -> &mut Params {
        self.stale = true;
        &mut self.params
    }

    /// The model without what is trained.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The processor that computes.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Where each parameter belongs.
    pub fn sites(&self) -> &Sites {
        &self.sites
    }

    /// Says which layers are computed a second time on the way back. Gradients do not depend on it.
    pub fn set_checkpointing(&mut self, checkpointing: Checkpointing) {
        self.checkpointing = checkpointing;
    }

    /// Noise on the embeddings while training (NEFTune, Jain et al. 2023); `None`: there is none.
    pub fn set_neftune(&mut self, alpha: Option<f32>) {
        self.sites.neftune = alpha;
    }

    /// Gives the memory of activations back to the system until the next pass: something else has need of it.
    pub fn rest(&self) {
        self.pool.clear();
    }

    /// The most bytes that activations and gradients of activations ever took.
    pub fn scratch(&self) -> u64 {
        self.pool.most()
    }

    /// Adds to `gradients` those of the sum of the loss over the counted tokens of `examples`. `noise` seeds dropout and
    /// NEFTune: the same noise gives the same masks.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, or an example is longer than the model's positions.
    pub fn backward(&mut self, examples: &[Example], noise: u64, gradients: &mut Gradients) -> Result<Loss> {
        let fits = gradients.len() == self.params.list.len()
            && gradients.iter().zip(&self.params.list).all(|(g, p)| g.len() == p.values.len());
        if !fits {
            bail!("the gradients are not in the shape of the parameters");
        }
        let losses = self.pass(examples, Some((noise, &mut *gradients)))?;
        if let Some(param) = self.sites.unit_rows {
            project(&self.params.list[param].values, self.model.spec.hidden_size, &mut gradients[param]);
        }
        Ok(total(&losses))
    }

    /// The loss of `examples`, without dropout.
    ///
    /// # Errors
    /// As [`Learner::backward`].
    pub fn loss(&mut self, examples: &[Example]) -> Result<Loss> {
        Ok(total(&self.losses(examples)?))
    }

    /// The loss of each of `examples`, without dropout.
    ///
    /// # Errors
    /// As [`Learner::backward`].
    pub fn losses(&mut self, examples: &[Example]) -> Result<Vec<Loss>> {
        self.pass(examples, None)
    }

    fn pass(&mut self, examples: &[Example], back: Option<(u64, &mut Gradients)>) -> Result<Vec<Loss>> {
        self.check(examples)?;
        self.refresh();
        let ids: Vec<u32> = examples.iter().flat_map(|e| e.ids.iter().copied()).collect();
        let sequences = self.sequences(examples);
        let counted = counted(examples);
        let mut losses: Vec<Loss> = examples.iter().map(|_| Loss::default()).collect();
        if counted.is_empty() {
            return Ok(losses);
        }
        let (noise, gradients) = back.unzip();
        let Learner { model, cpu, pool, sites, params, gains, checkpointing, .. } = &*self;
        pool.begin(ids.len());
        let mut tape = Tape::new(cpu, pool, model, sites, params, gains, gradients, noise);
        let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Prompt };
        tape.begin(model, &batch)?;
        let mut x = decoder::embed(model, &mut tape, &batch)?;
        for i in 0..model.layers.len() {
            x = tape.layer(i, x, checkpointing.again(i))?;
        }
        head(&mut tape, &x, &counted, &mut losses)?;
        drop(x);
        tape.back_to(0)?;
        Ok(losses)
    }

    fn check(&self, examples: &[Example]) -> Result<()> {
        let spec = &self.model.spec;
        for (i, e) in examples.iter().enumerate() {
            if e.targets.len() != e.ids.len() {
                bail!("example {i} has {} targets for {} tokens", e.targets.len(), e.ids.len());
            }
            let strange = e.ids.iter().chain(e.targets.iter().flatten()).find(|&&id| id as usize >= spec.vocab_size);
            if let Some(id) = strange {
                bail!("example {i}: token {id} is not in the model's vocabulary of {}", spec.vocab_size);
            }
            if let Some(most) = spec.learned_positions.filter(|&most| self.start() + e.ids.len() > most) {
                bail!("example {i} is of {} tokens, but the model has {most} positions", e.ids.len());
            }
        }
        Ok(())
    }

    /// Positions that a prefix takes before every sequence.
    fn start(&self) -> usize {
        match (&self.sites.prefix, &self.model.prefix) {
            (Some(site), _) => site.len,
            (None, prefix) => prefix.as_ref().map_or(0, |p| p.len),
        }
    }

    fn sequences(&self, examples: &[Example]) -> Vec<Sequence> {
        let each = examples.iter().enumerate().filter(|(_, e)| !e.ids.is_empty()).map(|(slot, e)| {
            let outline = match &self.sites.prefix {
                Some(_) => Outline { before: 0, ..self.model.spec.outline(&e.ids) },
                None => self.model.outline(&e.ids),
            };
            Sequence { slot, start: self.start(), len: e.ids.len(), outline }
        });
        each.collect()
    }

    /// Brings what depends on the parameters up to date.
    fn refresh(&mut self) {
        if !std::mem::replace(&mut self.stale, false) {
            return;
        }
        if let Some(param) = self.sites.unit_rows {
            for row in self.params.list[param].values.chunks_exact_mut(self.model.spec.hidden_size) {
                let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt().max(1e-12);
                row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
            }
        }
        for linear in self.model.linears() {
            let Some(lora) = self.sites.linear(linear).lora else { continue };
            let (Some(magnitude), Some(dora)) = (lora.magnitude, lora.dora) else { continue };
            let value = |param: usize| &self.params.list[param].values[..];
            let product = (value(lora.a), value(lora.b), lora.scale);
            self.gains[dora] = gain(&self.cpu, &linear.weight, product, value(magnitude), &self.squares[dora]);
        }
    }

    /// The model with what was trained attached to it, for sampling answers and for writing.
    ///
    /// # Errors
    /// When a parameter has lost its shape.
    pub fn model_with_adapter(&mut self) -> Result<Model> {
        self.refresh();
        let mut model = self.model.clone();
        let (sites, list) = (&self.sites, &self.params.list);
        let matrix = |param: usize| -> Result<Weight> {
            let p = &list[param];
            let weight = match p.shape[..] {
                [rows, cols] => Weight::from_f32(rows, cols, &p.values),
                _ => None,
            };
            weight.ok_or_else(|| anyhow::anyhow!("{} is no matrix of {:?}", p.name, p.shape))
        };
        for linear in model.linears_mut() {
            let site = sites.linear(linear);
            if let Some(lora) = site.lora {
                let gain = lora.dora.map(|dora| self.gains[dora].gain.clone());
                let (a, b) = (matrix(lora.a)?, matrix(lora.b)?);
                linear.adapters.push(LowRank { a, b, scale: lora.scale, strength: 1.0, gain });
            }
            if let Some(param) = site.weight {
                linear.replacement = Some(matrix(param)?);
            }
            if let (Some(param), Some(bias)) = (site.bias, &mut linear.bias) {
                bias.values.copy_from_slice(&list[param].values);
            }
        }
        let tables = [Some(&mut model.embedding), model.positions.as_mut()];
        for table in tables.into_iter().flatten() {
            if let Some(param) = sites.table(table) {
                table.replacement = Some(matrix(param)?);
            }
        }
        for vector in model.vectors_mut() {
            if let Some(param) = sites.vector(vector) {
                vector.values.copy_from_slice(&list[param].values);
            }
        }
        if let Some(site) = &sites.prefix {
            let layers = site.layers.iter().map(|&(k, v)| (list[k].values.to_vec(), list[v].values.to_vec()));
            model.prefix = Some(Prefix { len: site.len, counted: true, layers: layers.collect() });
        }
        Ok(model)
    }
}

/// A row that the loss falls on.
struct Counted {
    row: usize,
    target: u32,
    example: usize,
}

fn counted(examples: &[Example]) -> Vec<Counted> {
    let rows = examples.iter().enumerate().flat_map(|(example, e)| e.targets.iter().map(move |t| (example, *t)));
    let each = rows.enumerate().filter_map(|(row, (example, t))| Some(Counted { row, target: t?, example }));
    each.collect()
}

fn total(losses: &[Loss]) -> Loss {
    let mut sum = Loss::default();
    losses.iter().for_each(|&l| sum += l);
    sum
}

/// How many rows of logits exist at once.
pub(super) fn chunk(vocabulary: usize) -> usize {
    (LOGITS / (4 * vocabulary.max(1))).clamp(16, LOGIT_ROWS) / 16 * 16
}

/// The loss of the counted rows, some at a time, so that the logits of all never exist; while recording, back through the
/// head at once.
fn head(tape: &mut Tape<'_>, hidden: &Value, counted: &[Counted], losses: &mut [Loss]) -> Result<()> {
    let model = tape.model;
    let steps = tape.len();
    for chunk in counted.chunks(chunk(model.spec.vocab_size)) {
        let rows: Vec<usize> = chunk.iter().map(|c| c.row).collect();
        let x = tape.rows(hidden, &rows)?;
        let logits = decoder::logits(model, tape, &x)?;
        let slot = logits.slot;
        let (mut logits, width) = (logits.into_buffer(), model.spec.vocab_size);
        let mut first = 0;
        for part in chunk.chunk_by(|a, b| a.example == b.example) {
            let targets: Vec<Option<u32>> = part.iter().map(|c| Some(c.target)).collect();
            let rows = &mut logits[first * width..(first + part.len()) * width];
            let sum = tape.cpu.cross_entropy(rows, &targets);
            losses[part[0].example] += Loss { sum, tokens: part.len() };
            first += part.len();
        }
        if tape.recording() {
            tape.give(slot, std::rc::Rc::new(logits));
            tape.back_to(steps)?;
        }
    }
    Ok(())
}

/// Takes from the gradient of rows that keep the length 1 what would change it.
fn project(rows: &[f32], width: usize, gradient: &mut [f32]) {
    for (g, w) in gradient.chunks_exact_mut(width).zip(rows.chunks_exact(width)) {
        let along = g.iter().zip(w).map(|(g, w)| f64::from(*g) * f64::from(*w)).sum::<f64>() as f32;
        g.iter_mut().zip(w).for_each(|(g, w)| *g -= along * w);
    }
}

/// DoRA's factors of one layer. The norm's square is `|w|^2 + 2 scale b (A w) + scale^2 b (A A^T) b` for each row `w` of the
/// weight and `b` of `B`, so that the weight is gone through once, for `A W^T`.
fn gain(cpu: &Cpu, weight: &Weight, (a, b, scale): (&[f32], &[f32], f32), magnitude: &[f32], squares: &[f64]) -> Gain {
    let (rows, cols) = (weight.rows(), weight.cols());
    let rank = a.len() / cols;
    let mut across = vec![0.0; rank * rows];
    match weight.order() {
        None => cpu.matmul(Phase::Prompt, a, rank, &[weight.matrix()], &mut [&mut across]),
        Some(order) => {
            let mut gathered = vec![0.0; a.len()];
            cpu.gather_columns(a, order, &mut gathered);
            cpu.matmul(Phase::Prompt, &gathered, rank, &[weight.matrix()], &mut [&mut across]);
        }
    }
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let gram: Vec<f64> =
        (0..rank * rank).map(|i| dot(&a[i / rank * cols..][..cols], &a[i % rank * cols..][..cols])).collect();
    let (mut gain, mut inverse) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
    for (o, b) in b.chunks_exact(rank).enumerate() {
        let scale = f64::from(scale);
        let mut square = squares[o];
        for (i, &bi) in b.iter().enumerate() {
            let bi = f64::from(bi);
            square += 2.0 * scale * bi * f64::from(across[i * rows + o]);
            square +=
                b.iter().zip(&gram[i * rank..]).map(|(&bj, g)| scale * scale * bi * f64::from(bj) * g).sum::<f64>();
        }
        let one_over = 1.0 / square.max(1e-24).sqrt();
        inverse.push(one_over as f32);
        gain.push((f64::from(magnitude[o]) * one_over) as f32);
    }
    Gain { gain, inverse }
}
