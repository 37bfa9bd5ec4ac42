//! What is done value by value, or row by row: rotations, activations, sums, scales, limits.

use super::pool::{Buffer, Pool};
use super::record::{Bits, Kept, Step, Tape, Value, own};
use rushlight_models::Result;
use rushlight_quant::Cpu;
use rushlight_quant::ops::Activation;
use std::rc::Rc;

/// Turns each head by its row's position.
pub(super) fn rope(tape: &mut Tape<'_>, x: Value, head_dim: usize, rope: usize) -> Value {
    let from = x.slot;
    let mut x = x.into_buffer();
    let (width, angles) = (x.width(), &tape.angles[rope]);
    if let Some(layout) = angles.layout {
        tape.cpu.rope(&mut x, width, head_dim, &angles.cos, &angles.sin, angles.first, angles.dim, layout);
    }
    let y = tape.value(x, from.is_some());
    if let (Some(from), Some(slot)) = (from, y.slot) {
        tape.push(Rope { from, slot, head_dim, rope });
    }
    y
}

struct Rope {
    from: usize,
    slot: usize,
    head_dim: usize,
    rope: usize,
}

impl Step for Rope {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(mut dx) = tape.take_own(self.slot) else { return Ok(()) };
        let (width, angles) = (dx.width(), &tape.angles[self.rope]);
        if let Some(layout) = angles.layout {
            let (cos, sin) = (&angles.cos, &angles.sin);
            tape.cpu.rope_backward(&mut dx, width, self.head_dim, cos, sin, angles.first, angles.dim, layout);
        }
        tape.give(Some(self.from), Rc::new(dx));
        Ok(())
    }
}

/// `act(gate) * up`.
pub(super) fn gate(tape: &mut Tape<'_>, act: Activation, gate: Value, up: Value) -> Value {
    let learns = (gate.slot.is_some() || up.slot.is_some()) && tape.recording();
    if !learns {
        let mut y = gate.into_buffer();
        tape.cpu.gate(act, &mut y, &up.data);
        return Value::constant(y);
    }
    let slots = [gate.slot, up.slot];
    let kept = [&gate, &up].map(|x| tape.keep(x.data.clone(), Bits::Eight));
    let mut y = gate.into_buffer();
    tape.cpu.gate(act, &mut y, &up.data);
    let mut y = tape.value(y, true);
    let from = kept.clone();
    y.recipe = Some(Rc::new(move |cpu, pool| gated(act, &from, cpu, pool)));
    if let Some(slot) = y.slot {
        tape.push(Gate { act, kept, slots, slot });
    }
    y
}

/// `act(gate) * up` once more.
fn gated(act: Activation, [gate, up]: &[Kept; 2], cpu: &Cpu, pool: &Pool) -> Buffer {
    if let (Kept::Rounded(.., [rows, width]), Some(from), Some(by)) = (gate, gate.quarters(), up.quarters()) {
        let mut y = pool.take(*rows, *width);
        cpu.gate_quarters(act, from, by, &mut y);
        return y;
    }
    let mut y = own(gate.matrix(cpu, pool));
    cpu.gate(act, &mut y, &up.matrix(cpu, pool));
    y
}

struct Gate {
    act: Activation,
    /// The gate and what it gates.
    kept: [Kept; 2],
    slots: [Option<usize>; 2],
    slot: usize,
}

impl Step for Gate {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Gate { act, kept, slots, slot } = *self;
        let (cpu, pool) = (tape.cpu, tape.pool);
        let gradients = if let (Some(gate), Some(up)) = (kept[0].quarters(), kept[1].quarters()) {
            let Some(mut dy) = tape.take_own(slot) else { return Ok(()) };
            let mut dup = pool.take(dy.rows(), dy.width());
            cpu.gate_quarters_backward(act, gate, up, &mut dy, &mut dup);
            [dy, dup]
        } else {
            let Some(dy) = tape.take(slot) else { return Ok(()) };
            let [mut gate, mut up] = kept.map(|x| x.into_buffer(cpu, pool));
            cpu.gate_backward(act, &mut gate, &mut up, &dy);
            [gate, up]
        };
        for (slot, gradient) in slots.into_iter().zip(gradients) {
            tape.give(slot, Rc::new(gradient));
        }
        Ok(())
    }
}

/// `act(x)`.
pub(super) fn activate(tape: &mut Tape<'_>, act: Activation, x: Value) -> Value {
    let Some(from) = x.slot.filter(|_| tape.recording()) else {
        let mut y = x.into_buffer();
        tape.cpu.activate(act, &mut y);
        return Value::constant(y);
    };
    let kept = tape.keep(x.data.clone(), Bits::Eight);
    let mut y = x.into_buffer();
    tape.cpu.activate(act, &mut y);
    let mut y = tape.value(y, true);
    let (x, before) = (kept.clone(), kept);
    y.recipe = Some(Rc::new(move |cpu, pool| {
        let mut y = own(before.matrix(cpu, pool));
        cpu.activate(act, &mut y);
        y
    }));
    if let Some(slot) = y.slot {
        tape.push(Activate { act, x, from, slot });
    }
    y
}

struct Activate {
    act: Activation,
    x: Kept,
    from: usize,
    slot: usize,
}

impl Step for Activate {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(mut dy) = tape.take_own(self.slot) else { return Ok(()) };
        tape.cpu.activate_backward(self.act, &self.x.matrix(tape.cpu, tape.pool), &mut dy);
        tape.give(Some(self.from), Rc::new(dy));
        Ok(())
    }
}

/// `x + y`.
pub(super) fn add(tape: &mut Tape<'_>, x: Value, y: Value) -> Value {
    let slots = [x.slot, y.slot];
    // Into whichever nobody has kept.
    let (into, other) = if Rc::strong_count(&x.data) > 1 { (y, x) } else { (x, y) };
    let other = other.data;
    let mut sum = into.into_buffer();
    tape.cpu.add(&mut sum, &other);
    let sum = tape.value(sum, slots.iter().any(Option::is_some));
    if let Some(slot) = sum.slot {
        tape.push(Add { slots, slot });
    }
    sum
}

struct Add {
    slots: [Option<usize>; 2],
    slot: usize,
}

impl Step for Add {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(dy) = tape.take(self.slot) else { return Ok(()) };
        tape.give(self.slots[0], dy.clone());
        tape.give(self.slots[1], dy);
        Ok(())
    }
}

/// `x * by`.
pub(super) fn scale(tape: &mut Tape<'_>, x: Value, by: f32) -> Value {
    let from = x.slot;
    let mut x = x.into_buffer();
    tape.cpu.scale(&mut x, by);
    let y = tape.value(x, from.is_some());
    if let (Some(from), Some(slot)) = (from, y.slot) {
        tape.push(Scale { by, from, slot });
    }
    y
}

struct Scale {
    by: f32,
    from: usize,
    slot: usize,
}

impl Step for Scale {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(mut dy) = tape.take_own(self.slot) else { return Ok(()) };
        tape.cpu.scale(&mut dy, self.by);
        tape.give(Some(self.from), Rc::new(dy));
        Ok(())
    }
}

/// `x` no further than `limit` from 0.
pub(super) fn clamp(tape: &mut Tape<'_>, x: Value, limit: f32) -> Value {
    let Some(from) = x.slot.filter(|_| tape.recording()) else {
        let mut y = x.into_buffer();
        tape.cpu.clamp(&mut y, limit);
        return Value::constant(y);
    };
    let mut y = x.data.copy();
    tape.cpu.clamp(&mut y, limit);
    let y = tape.value(y, true);
    if let Some(slot) = y.slot {
        tape.push(Clamp { limit, x: x.data, from, slot });
    }
    y
}

struct Clamp {
    limit: f32,
    x: Rc<Buffer>,
    from: usize,
    slot: usize,
}

impl Step for Clamp {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(mut dy) = tape.take_own(self.slot) else { return Ok(()) };
        tape.cpu.clamp_backward(&self.x, self.limit, &mut dy);
        tape.give(Some(self.from), Rc::new(dy));
        Ok(())
    }
}

/// `cap * tanh(x / cap)`.
pub(super) fn softcap(tape: &mut Tape<'_>, x: Value, cap: f32) -> Value {
    let from = x.slot;
    let mut x = x.into_buffer();
    tape.cpu.soft_cap(&mut x, cap);
    let y = tape.value(x, from.is_some());
    if let (Some(from), Some(slot)) = (from, y.slot) {
        tape.push(SoftCap { cap, y: y.data.clone(), from, slot });
    }
    y
}

struct SoftCap {
    cap: f32,
    y: Rc<Buffer>,
    from: usize,
    slot: usize,
}

impl Step for SoftCap {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(mut dy) = tape.take_own(self.slot) else { return Ok(()) };
        tape.cpu.soft_cap_backward(&self.y, self.cap, &mut dy);
        tape.give(Some(self.from), Rc::new(dy));
        Ok(())
    }
}

/// Each row of `x` times the sigmoid of the row's one value in `by`.
pub(super) fn gate_rows(tape: &mut Tape<'_>, x: Value, by: Value) -> Value {
    let slots = [x.slot, by.slot];
    if !tape.recording() || slots.iter().all(Option::is_none) {
        let mut y = x.into_buffer();
        tape.cpu.gate_rows(&mut y, &by.data);
        return Value::constant(y);
    }
    let mut y = x.data.copy();
    tape.cpu.gate_rows(&mut y, &by.data);
    let y = tape.value(y, true);
    if let Some(slot) = y.slot {
        tape.push(GateRows { x: x.data, by: by.data, slots, slot });
    }
    y
}

struct GateRows {
    x: Rc<Buffer>,
    by: Rc<Buffer>,
    slots: [Option<usize>; 2],
    slot: usize,
}

impl Step for GateRows {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(mut dy) = tape.take_own(self.slot) else { return Ok(()) };
        let mut dby = tape.pool.zeros(self.by.rows(), 1);
        tape.cpu.gate_rows_backward(&self.x, &self.by, &mut dy, &mut dby);
        tape.give(self.slots[0], Rc::new(dy));
        tape.give(self.slots[1], Rc::new(dby));
        Ok(())
    }
}
