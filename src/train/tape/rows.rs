//! Rows taken from tables and from one another.

use super::noise;
use super::record::{Step, Tape, Value};
use rushlight_models::model::Table;
use rushlight_models::{Error, Result};
use std::rc::Rc;

/// The table's rows `ids`.
pub(super) fn embed(tape: &mut Tape<'_>, table: &Table, ids: &[u32]) -> Result<Value> {
    let (weight, param) = (table.weight(), tape.sites.table(table));
    let width = weight.cols();
    let mut x = tape.pool.take(ids.len(), width);
    for (&id, row) in ids.iter().zip(x.chunks_exact_mut(width)) {
        let id = id as usize;
        if id >= weight.rows() {
            return Err(Error::model(format!("token {id} is not in the vocabulary of {}", weight.rows())));
        }
        match param {
            Some(param) => row.copy_from_slice(&tape.param(param)[id * width..][..width]),
            None => weight.decode_row(id, row),
        }
    }
    if let (Some(alpha), Some(seed), true) = (tape.sites.neftune, tape.noise, table.id == tape.model.embedding.id) {
        disturb(tape, &mut x, alpha, seed);
    }
    let x = tape.value(x, param.is_some());
    if let (Some(param), Some(slot)) = (param, x.slot) {
        tape.push(Embed { param, ids: ids.to_vec(), slot });
    }
    Ok(x)
}

/// NEFTune (Jain et al. 2023): noise between `-1` and `1`, times `alpha / sqrt(values of the sequence)`.
fn disturb(tape: &Tape<'_>, x: &mut super::pool::Buffer, alpha: f32, seed: u64) {
    let width = x.width();
    let mut scales = Vec::with_capacity(x.rows());
    for s in &tape.sequences {
        scales.extend(std::iter::repeat_n(alpha / ((s.len * width) as f32).sqrt(), s.len));
    }
    // A number that no weight has.
    let key = noise::key(seed, usize::MAX);
    noise::each_row(tape.cpu, x, width, &|row, values| {
        for (col, x) in values.iter_mut().enumerate() {
            *x += scales[row] * (2.0 * noise::unit(key, (row * width + col) as u64) - 1.0);
        }
    });
}

struct Embed {
    param: usize,
    ids: Vec<u32>,
    slot: usize,
}

impl Step for Embed {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(dx) = tape.take(self.slot) else { return Ok(()) };
        let (width, gradient) = (dx.width(), tape.gradient(self.param)?);
        for (&id, row) in self.ids.iter().zip(dx.chunks_exact(width)) {
            let into = &mut gradient[id as usize * width..][..width];
            into.iter_mut().zip(row).for_each(|(g, x)| *g += x);
        }
        Ok(())
    }
}

/// The given rows of `x`.
pub(super) fn rows(tape: &mut Tape<'_>, x: &Value, rows: &[usize]) -> Value {
    let mut y = tape.pool.take(rows.len(), x.data.width());
    for (i, &row) in rows.iter().enumerate() {
        y.row_mut(i).copy_from_slice(x.data.row(row));
    }
    let y = tape.value(y, x.slot.is_some());
    if let (Some(from), Some(slot)) = (x.slot, y.slot) {
        tape.push(Rows { from, of: x.data.rows(), rows: rows.to_vec(), slot });
    }
    y
}

struct Rows {
    from: usize,
    of: usize,
    rows: Vec<usize>,
    slot: usize,
}

impl Step for Rows {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Some(dy) = tape.take(self.slot) else { return Ok(()) };
        let mut dx = tape.borrow(self.from, self.of, dy.width());
        for (i, &row) in self.rows.iter().enumerate() {
            dx.row_mut(row).iter_mut().zip(dy.row(i)).for_each(|(dx, dy)| *dx += dy);
        }
        tape.give_back(self.from, dx);
        Ok(())
    }
}

/// Keys and values from `kv`, rows of `heads` times `[key | value]`, with the row's `rotated` values behind each key.
pub(super) fn latent(tape: &mut Tape<'_>, kv: Value, rotated: Value, heads: usize, value_dim: usize) -> (Value, Value) {
    let (n, size) = (kv.data.rows(), kv.data.width() / heads);
    let (own, shared) = (size - value_dim, rotated.data.width());
    let mut k = tape.pool.take(n, heads * (own + shared));
    let mut v = tape.pool.take(n, heads * value_dim);
    let parts = k.chunks_exact_mut(own + shared).zip(v.chunks_exact_mut(value_dim)).zip(kv.data.chunks_exact(size));
    for (i, ((k, v), kv)) in parts.enumerate() {
        k[..own].copy_from_slice(&kv[..own]);
        k[own..].copy_from_slice(rotated.data.row(i / heads));
        v.copy_from_slice(&kv[own..]);
    }
    let learns = kv.slot.is_some() || rotated.slot.is_some();
    let (k, v) = (tape.value(k, learns), tape.value(v, learns));
    if let (Some(k), Some(v)) = (k.slot, v.slot) {
        tape.push(Latent { n, heads, value_dim, own, shared, from: [kv.slot, rotated.slot], slots: [k, v] });
    }
    (k, v)
}

struct Latent {
    n: usize,
    heads: usize,
    value_dim: usize,
    own: usize,
    shared: usize,
    from: [Option<usize>; 2],
    slots: [usize; 2],
}

impl Step for Latent {
    fn backward(self: Box<Self>, tape: &mut Tape<'_>) -> Result<()> {
        let Latent { n, heads, value_dim, own, shared, from, slots } = *self;
        let (dk, dv) = (tape.take(slots[0]), tape.take(slots[1]));
        let mut dkv = tape.pool.zeros(n, heads * (own + value_dim));
        let mut drotated = tape.pool.zeros(n, shared);
        for (i, dkv) in dkv.chunks_exact_mut(own + value_dim).enumerate() {
            if let Some(dk) = &dk {
                let dk = &dk[i * (own + shared)..][..own + shared];
                dkv[..own].copy_from_slice(&dk[..own]);
                drotated.row_mut(i / heads).iter_mut().zip(&dk[own..]).for_each(|(d, dk)| *d += dk);
            }
            if let Some(dv) = &dv {
                dkv[own..].copy_from_slice(&dv[i * value_dim..][..value_dim]);
            }
        }
        tape.give(from[0], Rc::new(dkv));
        tape.give(from[1], Rc::new(drotated));
        Ok(())
    }
}
