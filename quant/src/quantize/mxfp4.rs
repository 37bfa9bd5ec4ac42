//! MXFP4: the power of two under which each 32 weights lose least.

use super::pack::put;
use crate::formats::{Format, e8m0_half};

/// Encodes one row.
pub(super) fn encode(row: &[f32], out: &mut [u8]) {
    for (x, block) in row.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(17)) {
        let largest = x.iter().fold(0f32, |most, v| most.max(v.abs()));
        // The largest code is 6 = 1.5 * 2^2, so the exponent of the largest weight less 2 cuts at most a quarter off it;
        // one more cuts nothing.
        let exponent = ((largest.to_bits() >> 23) as i32 - 2).clamp(0, 254) as u8;
        let (mut best, mut found) = (f64::INFINITY, (0, [0; 32]));
        for e in [exponent, exponent.saturating_add(1).min(254)] {
            let scale = e8m0_half(e);
            let mut codes = [0; 32];
            let mut error = 0f64;
            for i in 0..32 {
                codes[i] = level(x[i] / scale);
                error += f64::from(scale * f32::from(codes[i]) - x[i]).powi(2);
            }
            if error < best {
                (best, found) = (error, (e, codes));
            }
        }
        block[0] = found.0;
        put(Format::MXFP4, block, 0, &found.1);
    }
}

/// The nearest of 0, 1, 2, 3, 4, 6, 8, 12 with their signs; the lower in size of two that are equally near.
fn level(x: f32) -> i8 {
    let mut size = 0;
    for (middle, step) in [(0.5, 1), (1.5, 1), (2.5, 1), (3.5, 1), (5.0, 2), (7.0, 2), (10.0, 4)] {
        size += if x.abs() > middle { step } else { 0 };
    }
    if x < 0.0 { -size } else { size }
}
