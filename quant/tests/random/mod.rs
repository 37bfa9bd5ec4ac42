//! Random numbers and weights, and what else several tests need of arithmetic.
// No test needs all of it.
#![allow(dead_code)]

use rushlight_quant::formats::Format;

/// A small reproducible generator (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Roughly normal, standard deviation 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum();
        (sum - 6.0) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Random blocks whose scales are ordinary numbers.
    pub fn weights(&mut self, format: Format, rows: usize, cols: usize) -> Vec<u8> {
        let bytes = rows * format.row_bytes(cols).unwrap();
        if format.is_float() {
            let mut out = Vec::new();
            for _ in 0..rows * cols {
                let x = self.normal();
                match format {
                    Format::F32 => out.extend(x.to_le_bytes()),
                    Format::F16 => out.extend(half::f16::from_f32(x).to_le_bytes()),
                    _ => out.extend(half::bf16::from_f32(x).to_le_bytes()),
                }
            }
            return out;
        }
        let mut out: Vec<u8> = (0..bytes).map(|_| self.next() as u8).collect();
        // Where each format keeps its f16 numbers.
        let halves: &[usize] = match format {
            Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
            Format::Q2_K => &[80, 82],
            Format::Q3_K => &[108],
            Format::Q6_K => &[208],
            Format::MXFP4 | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => &[],
            _ => &[0],
        };
        for block in out.chunks_exact_mut(format.block_bytes()) {
            for at in halves {
                let scale = half::f16::from_f32(self.normal() * 0.01).to_le_bytes();
                block[*at..at + 2].copy_from_slice(&scale);
            }
            if format == Format::MXFP4 {
                block[0] = 120 + (self.next() % 8) as u8;
            }
            if format == Format::Q4_Z {
                block[2] %= 17;
            }
            let wide = match format {
                Format::Q8_Z => 2,
                Format::Q8_F | Format::NF4 | Format::FP4 => 1,
                _ => 0,
            };
            for i in 0..wide {
                block[4 * i..4 * i + 4].copy_from_slice(&(self.normal() * 0.01).to_le_bytes());
            }
        }
        out
    }
}

/// The weights as f32.
pub fn decode(format: Format, rows: usize, cols: usize, data: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    let row = format.row_bytes(cols).unwrap();
    for (out, data) in out.chunks_exact_mut(cols).zip(data.chunks_exact(row)) {
        format.decode(data, out);
    }
    out
}

/// The slope of `f` along each of `x`, by central differences.
pub fn differences(x: &[f32], f: &dyn Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut at: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    (0..x.len())
        .map(|i| {
            let (middle, step) = (at[i], 1e-5);
            at[i] = middle + step;
            let above = f(&at);
            at[i] = middle - step;
            let below = f(&at);
            at[i] = middle;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// As f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Rounded to bf16.
pub fn bf16(x: f32) -> f64 {
    half::bf16::from_f32(x).to_f64()
}
