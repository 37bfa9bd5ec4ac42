//! What this machine can do at most, measured: the measure of every speed.

use crate::buffer::Aligned;
use crate::cpu::Cpu;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

impl Cpu {
    /// Bytes a second that the team reads from memory: the best of several passes over a buffer that no cache holds.
    pub fn read_bandwidth(&self) -> f64 {
        const NUMBERS: usize = 96 << 20;
        const TASKS: usize = 256;
        let mut buffer = Aligned::<f32>::zeroed(NUMBERS);
        // Fresh pages are all the same page of zeros: write each once.
        buffer.iter_mut().step_by(1024).for_each(|x| *x = 1.0);
        let total = AtomicU64::new(0);
        let mut best = Duration::MAX;
        for _ in 0..6 {
            let start = Instant::now();
            self.team.run(TASKS, &|t| {
                let part = &buffer[t * (NUMBERS / TASKS)..(t + 1) * (NUMBERS / TASKS)];
                total.fetch_add((self.kernels.lanes.sum)(part) as u64, Ordering::Relaxed);
            });
            best = best.min(start.elapsed());
        }
        std::hint::black_box(total.into_inner());
        (4 * NUMBERS) as f64 / best.as_secs_f64()
    }

    /// What the team's arithmetic reaches in registers: the best of several short runs of each kind.
    pub fn peak_arithmetic(&self) -> PeakArithmetic {
        let kernels = self.kernels.peaks;
        PeakArithmetic {
            int8: kernels.int8.map(|peak| self.operations(peak)),
            bf16: kernels.bf16.map(|peak| self.operations(peak)),
            f32: kernels.f32.map(|peak| self.operations(peak)),
        }
    }

    fn operations(&self, peak: fn(u64) -> u64) -> f64 {
        let mut best = 0f64;
        for _ in 0..8 {
            let start = Instant::now();
            let total = AtomicU64::new(0);
            self.team.run(self.threads(), &|_| {
                total.fetch_add(peak(200_000), Ordering::Relaxed);
            });
            best = best.max(total.into_inner() as f64 / start.elapsed().as_secs_f64());
        }
        best
    }
}

/// Operations a second (a multiplication and an addition are two) by kind of number, with the instruction set in use;
/// `None` for what it lacks or is not measured here.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeakArithmetic {
    /// 8-bit integers.
    pub int8: Option<f64>,
    /// bf16: vectors, or tiles with AMX.
    pub bf16: Option<f64>,
    /// Single precision.
    pub f32: Option<f64>,
}
