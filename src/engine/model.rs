//! A model that runs: tokens in, logits out.

use super::cpu::{Activations, CpuBackend};
use super::kv::{KvCache, KvFormat, KvShape};
use anyhow::{Result, anyhow, bail};
use rushlight_models::backend::{Backend, Batch, Sequence};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::model::Model;
use rushlight_models::spec::{ModelSpec, Outline};
use rushlight_models::{adapter, decoder};
use rushlight_quant::{Cpu, Isa, Phase, PromptRounding, physical_cores};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Prompt rows that go through the model together.
const CHUNK: usize = 512;
/// The context where none is asked for, unless the model's own is shorter.
pub const DEFAULT_CONTEXT: usize = 8192;

/// How a model is to be run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads; the physical cores where `None`.
    pub threads: Option<usize>,
    /// Positions of a sequence; what the model was trained for, but at most 8192, where `None`.
    pub context: Option<usize>,
    /// Sequences held at once; 0 counts as 1.
    pub slots: usize,
    /// Adapters in force from the start, each with its strength (1 as trained).
    pub adapters: Vec<(PathBuf, f32)>,
    /// How prompts' activations are rounded.
    pub prompt_rounding: PromptRounding,
    /// How keys and values are kept; in single precision for models of floats and else in half where `None`.
    pub kv: Option<KvFormat>,
}

/// Where the memory goes, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Weights, mapped from the file or packed from what it holds.
    pub weights: u64,
    /// What each position of a sequence adds to the cache.
    pub kv_per_token: u64,
    /// The cache when every slot is full.
    pub kv: u64,
    /// Buffers of activations.
    pub scratch: u64,
}

/// A loaded model and the sequences it is working on.
pub struct Engine {
    checkpoint: Checkpoint,
    model: Model,
    backend: CpuBackend,
    context: usize,
    logits: Option<Activations>,
    /// What each slot holds.
    held: Vec<Held>,
    /// Where the adapters in force are.
    adapters: Vec<PathBuf>,
}

/// The tokens of a slot, and the outline that they were computed with.
#[derive(Clone, Default)]
struct Held {
    ids: Vec<u32>,
    outline: Outline,
}

fn names(adapters: &[(PathBuf, f32)]) -> Vec<PathBuf> {
    adapters.iter().map(|(path, _)| path.clone()).collect()
}

impl Engine {
    /// Opens a GGUF file or a Hugging Face directory.
    pub fn open(path: &Path, options: &Options) -> Result<Engine> {
        Engine::from_checkpoint(Checkpoint::open(path)?, options)
    }

    /// Makes the model of `checkpoint` ready.
    pub fn from_checkpoint(checkpoint: Checkpoint, options: &Options) -> Result<Engine> {
        for note in checkpoint.notes() {
            tracing::info!("{note}");
        }
        let model = Model::load(&checkpoint)?;
        Engine::from_model(checkpoint, model, options)
    }

    /// Makes a model that was read from `checkpoint` ready. What is attached to it stays, unless `options` name adapters.
    pub fn from_model(checkpoint: Checkpoint, mut model: Model, options: &Options) -> Result<Engine> {
        if !options.adapters.is_empty() {
            adapter::attach(&mut model, &options.adapters)?;
        }
        let spec = &model.spec;
        let context = options.context.unwrap_or(spec.context_length.min(DEFAULT_CONTEXT));
        if context == 0 {
            bail!("a context of 0 tokens holds nothing; leave --ctx out or ask for more");
        }
        if let Some(most) = spec.learned_positions.filter(|&most| context > most) {
            bail!(
                "a context of {context} tokens is longer than the {most} positions that the model has; ask for less with --ctx"
            );
        }
        if context > spec.context_length {
            tracing::warn!(
                "a context of {context} tokens is longer than the {} the model was trained for; answers may degrade",
                spec.context_length
            );
        }
        let shape = KvShape {
            slots: options.slots.max(1),
            layers: spec.layers.len(),
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            value_dim: spec.value_dim,
            capacity: context.saturating_add(model.prefix.as_ref().map_or(0, |p| p.len)),
            format: options.kv.unwrap_or(if model.is_float() { KvFormat::F32 } else { KvFormat::F16 }),
        };
        let kv = KvCache::new(shape)?;
        let isa = Isa::from_env().map_err(|e| anyhow!(e))?;
        let threads = options.threads.unwrap_or_else(physical_cores).max(1);
        let cpu = Cpu::new(threads, isa).with_prompt_rounding(options.prompt_rounding);
        let mut backend = CpuBackend::new(cpu, kv);
        backend.put_prefix(&model);
        let held = vec![Held::default(); options.slots.max(1)];
        let adapters = names(&options.adapters);
        Ok(Engine { checkpoint, model, backend, context, logits: None, held, adapters })
    }

    /// Logits per position.
    pub fn vocab_size(&self) -> usize {
        self.model.spec.vocab_size
    }

    /// Positions that a slot can hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The model's shape and switches.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// The model as loaded.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The files it comes from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Threads at work.
    pub fn threads(&self) -> usize {
        self.backend.cpu().threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.backend.cpu().isa()
    }

    /// The processor that it runs on.
    pub fn cpu(&self) -> &Cpu {
        self.backend.cpu()
    }

    /// Sequences held at once.
    pub fn slots(&self) -> usize {
        self.backend.kv.shape().slots
    }

    /// The model and what computes it, for passes of one's own.
    pub fn parts(&mut self) -> (&Model, &mut CpuBackend) {
        (&self.model, &mut self.backend)
    }

    /// Positions held in the cache of `slot`.
    pub fn len(&self, slot: usize) -> usize {
        self.backend.kv.len(slot) - self.prefix()
    }

    /// Positions that an adapter's prefix takes before every sequence.
    fn prefix(&self) -> usize {
        self.model.prefix.as_ref().map_or(0, |p| p.len)
    }

    /// Whether `slot` holds nothing.
    pub fn is_empty(&self, slot: usize) -> bool {
        self.len(slot) == 0
    }

    /// Where the memory goes.
    pub fn memory(&self) -> Memory {
        let shape = self.backend.kv.shape();
        Memory {
            weights: self.checkpoint.bytes(),
            kv_per_token: shape.bytes_per_token(),
            kv: shape.bytes().unwrap_or(u64::MAX),
            scratch: self.backend.scratch(),
        }
    }

    /// Puts `ids` behind what `slot` holds and gives the logits of the last of them. `progress` is told after each
    /// chunk how many of them are done; when it says no, the logits are those of the last one done.
    pub fn prompt(&mut self, slot: usize, ids: &[u32], progress: &mut dyn FnMut(usize) -> bool) -> Result<&[f32]> {
        self.check_prompt(slot, ids)?;
        self.prepare(slot, ids)?;
        let mut done = 0;
        while done < ids.len() {
            let chunk = &ids[done..][..self.chunk(slot, ids.len() - done)];
            let hidden = self.forward(slot, chunk)?;
            done += chunk.len();
            if done == ids.len() || !progress(done) {
                let last = self.backend.rows(&hidden, &[chunk.len() - 1])?;
                drop(hidden);
                self.head(&last)?;
                break;
            }
        }
        if done == ids.len() {
            progress(done);
        }
        self.last_logits()
    }

    /// Puts `ids` behind what `slot` holds and shows `each` the logits of every one of them, with its position.
    pub fn prompt_all(&mut self, slot: usize, ids: &[u32], each: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check_prompt(slot, ids)?;
        // A large vocabulary's logits are made for fewer rows at a time: 64 MB of them at most.
        let rows = ((16 << 20) / self.vocab_size()).clamp(1, CHUNK);
        self.prepare(slot, ids)?;
        let mut done = 0;
        while done < ids.len() {
            let start = self.len(slot);
            let chunk = &ids[done..][..self.chunk(slot, ids.len() - done)];
            done += chunk.len();
            let hidden = self.forward(slot, chunk)?;
            let all: Vec<usize> = (0..chunk.len()).collect();
            for part in all.chunks(rows) {
                let hidden = self.backend.rows(&hidden, part)?;
                self.head(&hidden)?;
                if let Some(logits) = &self.logits {
                    part.iter().enumerate().for_each(|(i, row)| each(start + row, logits.row(i)));
                }
            }
        }
        Ok(())
    }

    /// Puts one token behind what each of the given slots holds; logits `[next.len(), vocabulary]`.
    pub fn step(&mut self, next: &[(usize, u32)]) -> Result<&[f32]> {
        let mut ids = Vec::with_capacity(next.len());
        let mut sequences = Vec::with_capacity(next.len());
        for (i, &(slot, id)) in next.iter().enumerate() {
            self.check(slot, &[id])?;
            if next[..i].iter().any(|(s, _)| *s == slot) {
                bail!("slot {slot} was given two tokens in one step");
            }
            if self.len(slot) >= self.context {
                bail!("the context of {} tokens is full", self.context);
            }
            ids.push(id);
        }
        for &(slot, id) in next {
            self.prepare_step(slot, id)?;
            sequences.push(Sequence {
                slot,
                start: self.backend.kv.len(slot),
                len: 1,
                outline: self.held[slot].outline,
            });
        }
        if ids.is_empty() {
            bail!("a step needs at least one token");
        }
        let batch = Batch { ids: &ids, sequences: &sequences, phase: Phase::Generate };
        let hidden = decoder::hidden(&self.model, &mut self.backend, &batch)?;
        self.head(&hidden)?;
        for (s, id) in sequences.iter().zip(&ids) {
            self.backend.kv.set_len(s.slot, s.start + 1);
            self.held[s.slot].ids.push(*id);
        }
        self.last_logits()
    }

    /// Puts one token behind what `slot` holds, and behind it `guesses` of those that follow; logits of each, a row for
    /// the token and for each guess that could be taken. They are the same bits as of [`Engine::step`] by
    /// [`Engine::step`]. Guesses that turn out wrong are to be cut off by [`Engine::truncate`].
    pub fn step_ahead(&mut self, slot: usize, id: u32, guesses: &[u32]) -> Result<&Activations> {
        let mut ids = vec![id];
        ids.extend_from_slice(guesses);
        self.check(slot, &ids)?;
        if self.len(slot) >= self.context {
            bail!("the context of {} tokens is full", self.context);
        }
        self.prepare_step(slot, id)?;
        let room = self.context - self.len(slot);
        ids.truncate(room.min(1 + self.alike(slot, id, guesses)));
        let outline = self.held[slot].outline;
        let sequence = Sequence { slot, start: self.backend.kv.len(slot), len: ids.len(), outline };
        let batch = Batch { ids: &ids, sequences: &[sequence], phase: Phase::Generate };
        let hidden = decoder::hidden(&self.model, &mut self.backend, &batch)?;
        self.head(&hidden)?;
        self.backend.kv.set_len(slot, sequence.start + ids.len());
        self.held[slot].ids.extend_from_slice(&ids);
        self.logits.as_ref().ok_or_else(|| anyhow!("no logits were computed"))
    }

    /// How many of `guesses` behind `id` leave the outline of `slot` as it is.
    fn alike(&mut self, slot: usize, id: u32, guesses: &[u32]) -> usize {
        let held = self.held[slot].ids.len();
        self.held[slot].ids.push(id);
        let mut count = 0;
        for &guess in guesses {
            self.held[slot].ids.push(guess);
            if self.stepped(slot) != self.held[slot].outline {
                break;
            }
            count += 1;
        }
        self.held[slot].ids.truncate(held);
        count
    }

    /// Forgets all positions of `slot` from `len` on.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        if len < self.len(slot) {
            self.backend.kv.set_len(slot, self.prefix() + len);
            self.held[slot].ids.truncate(len);
        }
    }

    /// Drops the positions `range` of `slot` and moves those behind it down; without computing them again, unless the
    /// model's positions are of a kind that cannot be changed afterwards.
    pub fn forget(&mut self, slot: usize, range: Range<usize>) -> Result<()> {
        if range.start > range.end || range.end > self.len(slot) {
            bail!("positions {}..{} are not among the {} that are held", range.start, range.end, self.len(slot));
        }
        if range.is_empty() {
            return Ok(());
        }
        self.held[slot].ids.drain(range.clone());
        if !self.model.spec.shiftable() {
            let ids = self.held[slot].ids.split_off(range.start);
            self.backend.kv.set_len(slot, self.prefix() + range.start);
            self.prepare(slot, &ids)?;
            return self.run(slot, &ids);
        }
        let (prefix, outline) = (self.prefix(), self.held[slot].outline);
        self.backend.forget(&self.model, slot, prefix + range.start..prefix + range.end, &outline);
        Ok(())
    }

    /// Puts these adapters in force instead of those there were, each with its strength (1 as trained). What the slots
    /// hold was computed with the old ones and is forgotten.
    pub fn set_adapters(&mut self, adapters: &[(PathBuf, f32)]) -> Result<()> {
        let before = self.model.clone();
        adapter::attach(&mut self.model, adapters)?;
        let shape = KvShape { capacity: self.context.saturating_add(self.prefix()), ..*self.backend.kv.shape() };
        if shape.capacity != self.backend.kv.shape().capacity {
            match KvCache::new(shape) {
                Ok(kv) => self.backend.kv = kv,
                Err(e) => {
                    self.model = before;
                    return Err(e);
                }
            }
        }
        self.backend.put_prefix(&self.model);
        self.held.fill(Held::default());
        self.adapters = names(adapters);
        Ok(())
    }

    /// Gives `slot` the outline of what it holds with `ids` behind it. Where that changes what rows already there have
    /// to know of the sequence, they are computed again.
    fn prepare(&mut self, slot: usize, ids: &[u32]) -> Result<()> {
        let held = &mut self.held[slot];
        let before = held.ids.len();
        held.ids.extend_from_slice(ids);
        let outline = self.model.outline(&held.ids);
        held.ids.truncate(before);
        if outline != std::mem::replace(&mut held.outline, outline) && before > 0 {
            let ids = std::mem::take(&mut held.ids);
            self.backend.kv.set_len(slot, self.prefix());
            self.run(slot, &ids)?;
        }
        Ok(())
    }

    /// The same for one generated token, which does not change the base of rotary embeddings that grows step by step.
    fn prepare_step(&mut self, slot: usize, id: u32) -> Result<()> {
        self.held[slot].ids.push(id);
        let outline = self.stepped(slot);
        let held = &mut self.held[slot];
        held.ids.pop();
        if held.ids.is_empty() {
            held.outline = self.model.outline(&[id]);
        } else if held.outline != outline {
            return self.prepare(slot, &[id]);
        }
        Ok(())
    }

    /// The outline of what `slot` holds, were its last tokens generated ones.
    fn stepped(&self, slot: usize) -> Outline {
        let held = &self.held[slot];
        let outline = self.model.outline(&held.ids);
        let restarts = self.model.spec.ropes.iter().any(|rope| rope.scaling.restarts());
        Outline { length: if restarts { outline.length } else { held.outline.length }, ..outline }
    }

    /// How many of the `left` rows of a prompt go through the model together. A context that is seen whole stays in one
    /// piece.
    fn chunk(&self, slot: usize, left: usize) -> usize {
        let held = &self.held[slot];
        let whole = held.outline.context.saturating_sub(held.ids.len());
        left.min(CHUNK.max(whole))
    }

    /// Runs `ids` through the layers, chunk by chunk, for their keys and values alone.
    fn run(&mut self, slot: usize, ids: &[u32]) -> Result<()> {
        let mut done = 0;
        while done < ids.len() {
            let chunk = &ids[done..][..self.chunk(slot, ids.len() - done)];
            self.forward(slot, chunk)?;
            done += chunk.len();
        }
        Ok(())
    }

    fn check(&self, slot: usize, ids: &[u32]) -> Result<()> {
        if slot >= self.slots() {
            bail!("there is no slot {slot}: the model was opened with {}", self.slots());
        }
        match ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            Some(id) => bail!("token {id} is not in the model's vocabulary of {}", self.vocab_size()),
            None => Ok(()),
        }
    }

    fn check_prompt(&self, slot: usize, ids: &[u32]) -> Result<()> {
        self.check(slot, ids)?;
        if ids.is_empty() {
            bail!("the prompt is empty: there is nothing to continue");
        }
        match (self.len(slot), self.context) {
            (0, context) if ids.len() > context => bail!(
                "the prompt has {} tokens but the context holds {context}; shorten it or ask for more with --ctx",
                ids.len()
            ),
            (held, context) if ids.len() > context - held => bail!(
                "{} more tokens do not fit: {held} of the context's {context} are taken; ask for more with --ctx",
                ids.len()
            ),
            _ => Ok(()),
        }
    }

    /// Runs one sequence's rows through the layers.
    fn forward(&mut self, slot: usize, ids: &[u32]) -> Result<Activations> {
        let outline = self.held[slot].outline;
        let sequence = Sequence { slot, start: self.backend.kv.len(slot), len: ids.len(), outline };
        let batch = Batch { ids, sequences: &[sequence], phase: Phase::Prompt };
        let hidden = decoder::hidden(&self.model, &mut self.backend, &batch)?;
        self.backend.kv.set_len(slot, sequence.start + ids.len());
        self.held[slot].ids.extend_from_slice(ids);
        Ok(hidden)
    }

    /// Computes the logits of `hidden` and makes sure that they are numbers.
    fn head(&mut self, hidden: &Activations) -> Result<()> {
        self.logits = None;
        let logits = decoder::logits(&self.model, &mut self.backend, hidden)?;
        // Without a way out in the middle, so that it becomes vector code.
        let finite = logits.iter().fold(true, |all, x| all & (x.to_bits() & 0x7f80_0000 != 0x7f80_0000));
        if !finite {
            return Err(self.not_finite());
        }
        self.logits = Some(logits);
        Ok(())
    }

    fn last_logits(&self) -> Result<&[f32]> {
        self.logits.as_deref().ok_or_else(|| anyhow!("no logits were computed"))
    }

    /// Why logits are not numbers: the first tensor with a weight that is not one, if there is any.
    fn not_finite(&self) -> anyhow::Error {
        let path = self.checkpoint.path().display();
        for info in self.checkpoint.tensors() {
            let Ok(tensor) = self.checkpoint.tensor(&info.name) else { continue };
            let bytes = info.format.block_bytes() * (4096 / info.format.block_len());
            let mut values = vec![0.0; 4096];
            for part in tensor.data.chunks(bytes) {
                let values = &mut values[..part.len() / info.format.block_bytes() * info.format.block_len()];
                info.format.decode(part, values);
                if values.iter().any(|v| !v.is_finite()) {
                    return anyhow!(
                        "{path}: tensor '{}' holds weights that are not numbers (NaN or infinite): the file is damaged; \
                         download or convert it again",
                        info.name
                    );
                }
            }
        }
        match &self.adapters[..] {
            [] => {
                anyhow!("{path}: the model's output is not a number although its weights are: activations overflowed")
            }
            [adapter, ..] => anyhow!(
                "{}: with this adapter the output of {path} is not a number: its training went astray (a lower --lr helps), \
                 or it is damaged",
                adapter.display()
            ),
        }
    }
}
