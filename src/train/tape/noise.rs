//! Random numbers that depend on nothing but where they are used: a layer that is computed twice drops the same values
//! both times, on any number of threads.

use super::pool::Buffer;
use rushlight_quant::Cpu;
use std::sync::{Mutex, PoisonError};

/// The finalizer of SplitMix64 (Steele et al. 2014): every bit of `x` matters to every bit of the result.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A number in [0, 1) with 24 random bits, for the place `at` of what `key` stands for.
pub fn unit(key: u64, at: u64) -> f32 {
    (mix(key ^ mix(at)) >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
}

/// What the random numbers of `id` (a layer's weight, a parameter) hang on.
pub fn key(seed: u64, id: usize) -> u64 {
    mix(mix(seed) ^ id as u64)
}

/// Dropout: `rate` of the values of `x` become 0, the others are divided by what is left of 1.
pub fn drop(cpu: &Cpu, x: &mut Buffer, cols: usize, rate: f32, seed: u64, id: usize) {
    let key = key(seed, id);
    // Sixteen random bits for each value: a number of them that stands for the rate.
    let least = (rate * 65536.0) as u64;
    let by = 65536.0 / (65536 - least) as f32;
    each_row(cpu, x, cols, &|row, values| {
        let key = mix(key ^ row as u64);
        for (at, values) in values.chunks_mut(4).enumerate() {
            let bits = mix(key ^ at as u64);
            for (i, x) in values.iter_mut().enumerate() {
                *x = if (bits >> (16 * i)) & 0xffff < least { 0.0 } else { *x * by };
            }
        }
    });
}

/// Calls `each(row, values)` for the rows of `x`.
pub fn each_row(cpu: &Cpu, x: &mut Buffer, cols: usize, each: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    const ROWS: usize = 16;
    let parts: Vec<_> = x.chunks_mut(ROWS * cols).map(Mutex::new).collect();
    cpu.team().run(parts.len(), &|i| {
        let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
        for (row, values) in part.chunks_exact_mut(cols).enumerate() {
            each(i * ROWS + row, values);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tape::pool::Pool;
    use rushlight_quant::Isa;

    #[test]
    fn so_many_are_dropped_and_the_rest_make_up_for_them() {
        let (cpu, pool) = (Cpu::new(2, Isa::Scalar), Pool::default());
        let ones = |seed, id| {
            let mut x = pool.take(100, 500);
            x.fill(1.0);
            drop(&cpu, &mut x, 500, 0.2, seed, id);
            x.to_vec()
        };
        let first = ones(1, 7);
        let kept = first.iter().filter(|&&x| (x - 1.25).abs() < 1e-4).count();
        let dropped = first.iter().filter(|&&x| x == 0.0).count();
        assert!(kept + dropped == first.len() && (39_500..40_500).contains(&kept), "{kept}");
        assert_eq!(first, ones(1, 7));
        assert!(first != ones(2, 7) && first != ones(1, 8));
        // Neither rows nor columns repeat.
        let rows: std::collections::HashSet<Vec<u32>> =
            first.chunks(500).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect();
        assert_eq!(rows.len(), 100);
    }

    #[test]
    fn units_fill_the_range() {
        let all: Vec<f32> = (0..100_000).map(|i| unit(key(5, 3), i)).collect();
        assert!(all.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = all.iter().sum::<f32>() / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }
}
