//! The record of a pass: its steps, in order, and the gradients that go back through them.

use super::lora::Gain;
use super::pool::{Buffer, Pool};
use super::sites::Sites;
use crate::engine::angles::Angles;
use crate::train::params::{Gradients, Params};
use rushlight_models::backend::Sequence;
use rushlight_models::model::Model;
use rushlight_models::{Error, Result, decoder};
use rushlight_quant::Cpu;
use rushlight_quant::ops::Waiting;
use std::rc::Rc;

/// Computes a matrix that was dropped again.
pub type Recipe = Rc<dyn Fn(&Cpu, &Pool) -> Buffer>;

/// A matrix of activations that a pass has made.
#[derive(Clone)]
pub struct Value {
    /// The numbers, `[rows, width]`.
    pub data: Rc<Buffer>,
    /// Where its gradient is collected; `None` where nothing that learns had a part in it.
    pub slot: Option<usize>,
    /// How to make it again from what is kept anyway, where that is quick.
    pub recipe: Option<Recipe>,
}

impl Value {
    /// A value to which nothing that learns has contributed.
    pub fn constant(data: Buffer) -> Value {
        Value { data: Rc::new(data), slot: None, recipe: None }
    }

    /// Its numbers, to be changed: its own memory unless a step has kept it.
    pub fn into_buffer(self) -> Buffer {
        Rc::try_unwrap(self.data).unwrap_or_else(|shared| shared.copy())
    }
}

/// How precisely a matrix waits for the way back, where the base's weights are coarser than that.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// bf16 ([`Cpu::halve`]): what the forward pass itself goes on with, or whose columns differ much in size.
    Sixteen,
    /// 8 bits ([`Cpu::quarter`]): what only products with gradients are made of.
    Eight,
}

/// A matrix kept in memory for the way back.
#[derive(Clone)]
pub enum Kept {
    /// As it is.
    Whole(Rc<Buffer>),
    /// Rounded, with its shape.
    Rounded(Rc<Buffer>, Bits, [usize; 2]),
}

impl Kept {
    /// The matrix.
    pub fn matrix(&self, cpu: &Cpu, pool: &Pool) -> Rc<Buffer> {
        match self {
            Kept::Whole(data) => data.clone(),
            Kept::Rounded(data, bits, [rows, width]) => {
                let mut matrix = pool.take(*rows, *width);
                match bits {
                    Bits::Sixteen => cpu.unhalve(data, &mut matrix),
                    Bits::Eight => cpu.unquarter(data, &mut matrix),
                }
                Rc::new(matrix)
            }
        }
    }

    /// The same, to be changed: its own memory unless someone else has it, too.
    pub fn into_buffer(self, cpu: &Cpu, pool: &Pool) -> Buffer {
        match self {
            Kept::Whole(data) => own(data),
            rounded => own(rounded.matrix(cpu, pool)),
        }
    }

    /// The matrix, as it is kept.
    pub fn waiting(&self) -> Waiting<'_> {
        match self {
            Kept::Whole(data) => Waiting::Whole(data),
            Kept::Rounded(data, Bits::Sixteen, _) => Waiting::Half(data),
            Kept::Rounded(data, Bits::Eight, _) => Waiting::Quarter(data),
        }
    }

    /// What [`Cpu::quarter`] made of the matrix, where it waits in 8 bits.
    pub fn quarters(&self) -> Option<&[f32]> {
        match self {
            Kept::Rounded(data, Bits::Eight, _) => Some(data),
            _ => None,
        }
    }
}

/// What a step has of a matrix for the way back.
pub enum Saved {
    /// The matrix.
    Kept(Kept),
    /// As the way to make it.
    Again(Recipe),
}

impl Saved {
    /// The matrix.
    pub fn matrix(&self, cpu: &Cpu, pool: &Pool) -> Rc<Buffer> {
        match self {
            Saved::Kept(kept) => kept.matrix(cpu, pool),
            Saved::Again(recipe) => Rc::new(recipe(cpu, pool)),
        }
    }
}

/// One operation of a pass with what its way back needs.
pub trait Step {
    /// Adds to the gradients of its inputs, and of what learns in it, what those of its outputs say. Those of inputs
    /// without a slot are not wanted.
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()>;
}

/// A backend that remembers how to go back. It lives for one micro-batch.
pub struct Tape<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) pool: &'a Pool,
    pub(super) model: &'a Model,
    pub(super) sites: &'a Sites,
    pub(super) params: &'a Params,
    pub(super) gains: &'a [Gain],
    /// Where the gradients of what learns are added.
    gradients: Option<&'a mut Gradients>,
    /// Whether operations leave steps.
    recording: bool,
    steps: Vec<Box<dyn Step>>,
    /// Gradients of values, by slot.
    slots: Vec<Option<Rc<Buffer>>>,
    /// Seeds dropout and the noise on embeddings; `None`: there are none.
    pub(super) noise: Option<u64>,
    pub(super) sequences: Vec<Sequence>,
    pub(super) angles: Vec<Angles>,
}

impl<'a> Tape<'a> {
    /// An empty record. Without `gradients` it remembers nothing and only computes.
    pub fn new(
        cpu: &'a Cpu,
        pool: &'a Pool,
        model: &'a Model,
        sites: &'a Sites,
        params: &'a Params,
        gains: &'a [Gain],
        gradients: Option<&'a mut Gradients>,
        noise: Option<u64>,
    ) -> Tape<'a> {
        let recording = gradients.is_some();
        let (steps, slots, sequences, angles) = Default::default();
        Tape { cpu, pool, model, sites, params, gains, gradients, recording, steps, slots, noise, sequences, angles }
    }

    /// Whether operations leave steps.
    pub fn recording(&self) -> bool {
        self.recording
    }

    /// A place for a value's gradient.
    pub fn new_slot(&mut self) -> usize {
        self.slots.push(None);
        self.slots.len() - 1
    }

    /// The value `data`, whose gradient matters if `learns`; it then has a slot of its own.
    pub fn value(&mut self, data: Buffer, learns: bool) -> Value {
        let slot = (learns && self.recording).then(|| self.new_slot());
        Value { data: Rc::new(data), slot, recipe: None }
    }

    /// Keeps `data` for the way back, where the base's weights are coarser than that in `bits`.
    pub fn keep(&self, data: Rc<Buffer>, bits: Bits) -> Kept {
        let shape = [data.rows(), data.width()];
        if !self.cpu.half_attention() || data.is_empty() {
            return Kept::Whole(data);
        }
        let len = if bits == Bits::Eight { Cpu::quarter_len(data.len()) } else { Cpu::half_len(data.len()) };
        let mut rounded = self.pool.take(1, len);
        match bits {
            Bits::Sixteen => self.cpu.halve(&data, &mut rounded),
            Bits::Eight => self.cpu.quarter(&data, &mut rounded),
        }
        Kept::Rounded(Rc::new(rounded), bits, shape)
    }

    /// Keeps `x`, or the way to make it again.
    pub fn saved(&self, x: &Value) -> Saved {
        match &x.recipe {
            Some(recipe) => Saved::Again(recipe.clone()),
            None => Saved::Kept(self.keep(x.data.clone(), Bits::Sixteen)),
        }
    }

    /// Remembers `step`.
    pub fn push(&mut self, step: impl Step + 'static) {
        if self.recording {
            self.steps.push(Box::new(step));
        }
    }

    /// What layer `i` makes of `x`. With `again`, none of its steps is kept: the layer is computed a second time on the
    /// way back.
    pub fn layer(&mut self, i: usize, x: Value, again: bool) -> Result<Value> {
        let learns = x.slot.is_some() || self.sites.layer_learns(i);
        if !again || !self.recording || !learns {
            return decoder::layer(self.model, self, i, x);
        }
        self.recording = false;
        let y = decoder::layer(self.model, self, i, x.clone());
        self.recording = true;
        let y = self.value(y?.into_buffer(), true);
        let Some(out) = y.slot else { return Ok(y) };
        self.push(LayerAgain { layer: i, x, out });
        Ok(y)
    }

    /// Goes back until `steps` are left.
    pub fn back_to(&mut self, steps: usize) -> Result<()> {
        while self.steps.len() > steps {
            let Some(step) = self.steps.pop() else { break };
            step.backward(self)?;
        }
        Ok(())
    }

    /// Steps recorded and not yet gone back through.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// The gradient collected for a value, which is complete when the step that made it goes back. `None`: it is zero.
    pub fn take(&mut self, slot: usize) -> Option<Rc<Buffer>> {
        self.slots[slot].take()
    }

    /// The same, to be changed.
    pub fn take_own(&mut self, slot: usize) -> Option<Buffer> {
        self.take(slot).map(own)
    }

    /// Adds `gradient` to a value's.
    pub fn give(&mut self, slot: Option<usize>, gradient: Rc<Buffer>) {
        let Some(slot) = slot else { return };
        match self.slots[slot].take() {
            None => self.slots[slot] = Some(gradient),
            Some(there) => {
                let mut sum = own(there);
                self.cpu.add(&mut sum, &gradient);
                self.slots[slot] = Some(Rc::new(sum));
            }
        }
    }

    /// A value's gradient, `[rows, width]`, to be added to; what comes back goes to [`Tape::give_back`].
    pub fn borrow(&mut self, slot: usize, rows: usize, width: usize) -> Buffer {
        match self.slots[slot].take() {
            Some(there) => own(there),
            None => self.pool.zeros(rows, width),
        }
    }

    /// Puts back what [`Tape::borrow`] gave.
    pub fn give_back(&mut self, slot: usize, gradient: Buffer) {
        self.slots[slot] = Some(Rc::new(gradient));
    }

    /// The gradient of parameter `param`, to be added to.
    ///
    /// # Errors
    /// When the tape only computes.
    pub fn gradient(&mut self, param: usize) -> Result<&mut [f32]> {
        match &mut self.gradients {
            Some(gradients) => Ok(gradients.meet(param)),
            None => Err(Error::model("a tape without gradients cannot go back")),
        }
    }

    /// The values of parameter `param`.
    pub fn param(&self, param: usize) -> &'a [f32] {
        &self.params.list[param].values
    }
}

/// The matrix behind `shared`, copied only if someone else holds it.
pub fn own(shared: Rc<Buffer>) -> Buffer {
    Rc::try_unwrap(shared).unwrap_or_else(|shared| shared.copy())
}

/// A layer that is computed a second time when its turn to go back comes (Chen et al. 2016).
struct LayerAgain {
    layer: usize,
    x: Value,
    out: usize,
}

impl Step for LayerAgain {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(gradient) = tape.take(self.out) else { return Ok(()) };
        // Its steps come to lie on top of the record and are gone back through next.
        let y = decoder::layer(tape.model, tape, self.layer, self.x)?;
        tape.give(y.slot, gradient);
        Ok(())
    }
}
