//! Memory for what a pass makes: taken from a pool and given back when dropped, so that after the first step little is
//! asked of the system. Hardly more is held than was in use at once: where no free buffer fits, others make room.

use rushlight_quant::buffer::Aligned;
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Lengths are rounded up to a multiple of this, so that buffers of nearly the same size serve for each other.
const GRAIN: usize = 1024;

#[derive(Default)]
struct State {
    free: Vec<Aligned<f32>>,
    /// Bytes of all buffers, free and in use, now and at most.
    held: u64,
    most: u64,
    /// Bytes in use.
    used: u64,
    /// Bytes that a pass is known to need at once: the largest so far.
    goal: u64,
    /// Rows of the largest pass.
    rows: usize,
    /// When a buffer of each length was last taken, in buffers taken so far.
    asked: HashMap<usize, u64>,
    taken: u64,
}

impl State {
    /// Gives free buffers back to the system until no more than `most` bytes are held, first those of sizes that have not
    /// been asked for the longest: on the way there that is what the way back had in hand, and the other way round.
    fn shrink(&mut self, most: u64) {
        while self.held > most {
            let asked = |i: &usize| self.asked.get(&self.free[*i].len());
            let Some(i) = (0..self.free.len()).min_by_key(asked) else { break };
            self.held -= bytes(&self.free.swap_remove(i));
        }
    }
}

/// Buffers, free and in use.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<State>>);

fn bytes(buffer: &Aligned<f32>) -> u64 {
    4 * buffer.len() as u64
}

impl Pool {
    /// A matrix of `[rows, width]` to be written to: what it holds is arbitrary.
    pub fn take(&self, rows: usize, width: usize) -> Buffer {
        let len = rows * width;
        let wanted = len.next_multiple_of(GRAIN);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A buffer much larger than what is wanted would be missed where it fits.
        let fits = |b: &Aligned<f32>| b.len() >= wanted && b.len() <= wanted + wanted / 4;
        let best = (0..state.free.len()).filter(|&i| fits(&state.free[i])).min_by_key(|&i| state.free[i].len());
        let values = match best {
            Some(i) => state.free.swap_remove(i),
            None => {
                let new = 4 * wanted as u64;
                // A little more than the goal, or a large buffer would go for a small one and be missed at once.
                let rest = (state.goal + state.goal / 128).saturating_sub(new).max(state.used);
                state.shrink(rest);
                state.held += new;
                state.most = state.most.max(state.held);
                Aligned::zeroed(wanted)
            }
        };
        state.used += bytes(&values);
        state.taken += 1;
        // Batches of ever other sizes are forgotten.
        if state.asked.len() > 4096 {
            state.asked.clear();
        }
        let taken = state.taken;
        state.asked.insert(values.len(), taken);
        state.goal = state.goal.max(state.used);
        Buffer { values, len, width, pool: self.clone() }
    }

    /// The same, of zeros.
    pub fn zeros(&self, rows: usize, width: usize) -> Buffer {
        let mut buffer = self.take(rows, width);
        buffer.fill(0.0);
        buffer
    }

    /// A pass over so many rows begins. One of more rows than any before will need more in proportion, so that making room
    /// for each of its buffers as it comes would be in vain.
    pub fn begin(&self, rows: usize) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if rows > state.rows {
            state.goal = (state.goal as f64 * rows as f64 / state.rows.max(1) as f64) as u64;
            state.rows = rows;
        }
    }

    /// Gives everything that is free back to the system.
    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).shrink(0);
    }

    /// The most bytes that buffers ever took.
    pub fn most(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).most
    }
}

/// A matrix of f32 values, `[rows, width]`.
pub struct Buffer {
    values: Aligned<f32>,
    len: usize,
    width: usize,
    pool: Pool,
}

impl Buffer {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.len.checked_div(self.width).unwrap_or(0)
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self[row * self.width..][..self.width]
    }

    /// One row, to be changed.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.width;
        &mut self[row * width..][..width]
    }

    /// Another of the same numbers.
    pub fn copy(&self) -> Buffer {
        let mut copy = self.pool.take(self.rows(), self.width);
        copy.copy_from_slice(self);
        copy
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        let mut state = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.used -= bytes(&values);
        state.free.push(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_make_room() {
        let pool = Pool::default();
        for _ in 0..3 {
            let (a, b) = (pool.take(10, 1000), pool.zeros(3, 5));
            assert_eq!((a.rows(), a.width(), b.row(2).len()), (10, 1000, 5));
        }
        let most = pool.most();
        assert_eq!(most, 4 * (10 * 1024 + 1024));
        // Buffers of other sizes make room for each other.
        for rows in [1, 20, 3, 7, 20, 2] {
            drop((0..40 / rows).map(|_| pool.take(rows, 1000)).collect::<Vec<_>>());
        }
        assert!(pool.most() <= 4 * 40 * 1024 * 129 / 128, "{}", pool.most());
        pool.clear();
        assert_eq!(pool.0.lock().unwrap().held, 0);
    }
}
