//! Encoding as bitsandbytes does: NF4 over blocks of consecutive weights, and double quantization of the blocks' largest
//! magnitudes (Dettmers et al. 2023).

use super::table::{NF4, TableFormat};

/// Weights in a block, unless one is told otherwise.
pub const BLOCK: usize = 64;
/// Magnitudes in a block of double quantization.
pub const NESTED_BLOCK: usize = 256;

/// Encodes `weights`, in blocks of `block` (the last may be shorter): two codes a byte into `codes`, the first in the high
/// half, and the largest magnitude of each block into `absmax`. Weights are finite.
///
/// # Panics
/// If `codes` is not half as long as `weights` (rounded up), or `absmax` has not one number for each block.
pub fn encode(weights: &[f32], block: usize, codes: &mut [u8], absmax: &mut [f32]) {
    assert!(block > 0 && block.is_multiple_of(2), "blocks of {block}");
    assert_eq!(codes.len(), weights.len().div_ceil(2), "two codes a byte");
    assert_eq!(absmax.len(), weights.len().div_ceil(block), "a magnitude for each block");
    for ((weights, codes), absmax) in weights.chunks(block).zip(codes.chunks_mut(block / 2)).zip(absmax) {
        *absmax = weights.iter().fold(0f32, |most, w| most.max(w.abs()));
        let inverse = if *absmax > 0.0 { 1.0 / *absmax } else { 0.0 };
        for (two, code) in weights.chunks(2).zip(codes) {
            let first = nearest(two[0] * inverse) << 4;
            *code = first | two.get(1).map_or(0, |&w| nearest(w * inverse));
        }
    }
}

/// The code whose value is nearest to `x`; the lower one of two that are equally near.
#[inline]
fn nearest(x: f32) -> u8 {
    const MIDDLES: [f32; 15] = {
        let mut middles = [0.0; 15];
        let mut i = 0;
        while i < 15 {
            middles[i] = ((NF4::TABLE[i] as f64 + NF4::TABLE[i + 1] as f64) / 2.0) as f32;
            i += 1;
        }
        middles
    };
    MIDDLES.iter().map(|&middle| u8::from(x > middle)).sum()
}

/// Magnitudes in 8 bits: magnitude `i` is `dynamic_map()[codes[i]] * absmax[i / 256] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    /// Indices into [`dynamic_map`].
    pub codes: Vec<u8>,
    /// The largest difference from the offset in each block.
    pub absmax: Vec<f32>,
    /// The mean of all magnitudes.
    pub offset: f32,
}

/// Quantizes the magnitudes that [`encode`] gave for a whole tensor.
pub fn nest(magnitudes: &[f32]) -> Nested {
    let mean = magnitudes.iter().map(|&m| f64::from(m)).sum::<f64>() / magnitudes.len().max(1) as f64;
    let offset = mean as f32;
    let map = dynamic_map();
    let mut nested = Nested { codes: Vec::with_capacity(magnitudes.len()), absmax: Vec::new(), offset };
    for block in magnitudes.chunks(NESTED_BLOCK) {
        let most = block.iter().fold(0f32, |most, m| most.max((m - offset).abs()));
        let inverse = if most > 0.0 { 1.0 / most } else { 0.0 };
        nested.absmax.push(most);
        nested.codes.extend(block.iter().map(|m| {
            let x = (m - offset) * inverse;
            let above = map.partition_point(|&value| value <= x).clamp(1, 255);
            let nearer = x - map[above - 1] <= map[above] - x;
            (if nearer { above - 1 } else { above }) as u8
        }));
    }
    nested
}

/// The 256 values of double quantization's codes, rising: seven decades, each of twice as many steps as the one below
/// (Dettmers 2015, "8-bit approximations").
pub fn dynamic_map() -> [f32; 256] {
    let mut map = [0f32; 256];
    let mut len = 0;
    for decade in 0..7 {
        let steps = 1 << decade;
        let unit = 10f64.powi(decade - 6) as f32;
        // Edges lie evenly from 0.1 to 1, and a value in the middle of each two. Counted from the nearer end and with one
        // rounding, as PyTorch does it: the map is then the same to the last bit.
        let step = (1.0 - 0.1) / steps as f32;
        let edge = |i: i32| match 2 * i < steps {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((steps - i) as f32, 1.0),
        };
        for i in 0..steps {
            let value = (edge(i) + edge(i + 1)) / 2.0 * unit;
            map[len] = value;
            map[len + 1] = -value;
            len += 2;
        }
    }
    // Zero, and one: what is left of the 256.
    map[255] = 1.0;
    map.sort_by(f32::total_cmp);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(codes: &[u8], absmax: &[f32], len: usize, block: usize) -> Vec<f32> {
        (0..len).map(|i| NF4::TABLE[usize::from(codes[i / 2] >> (4 * (1 - i % 2)) & 15)] * absmax[i / block]).collect()
    }

    #[test]
    fn every_weight_gets_the_nearest_value() {
        let weights: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0 + 1e-4).collect();
        for block in [64, 128, 2] {
            let (mut codes, mut absmax) = (vec![0; 500], vec![0.0; 1000usize.div_ceil(block)]);
            encode(&weights, block, &mut codes, &mut absmax);
            for (i, got) in decoded(&codes, &absmax, 1000, block).into_iter().enumerate() {
                let scale = absmax[i / block];
                let best = NF4::TABLE.iter().map(|v| (v * scale - weights[i]).abs()).fold(f32::MAX, f32::min);
                assert!((got - weights[i]).abs() <= best + 1e-6, "{i}: {got} for {}", weights[i]);
            }
        }
    }

    #[test]
    fn what_is_decoded_is_encoded_alike() {
        let codes: Vec<u8> = (0..96u8).map(|i| i.wrapping_mul(37)).collect();
        // The largest of a block has the code that stands for one.
        let codes: Vec<u8> = codes.iter().enumerate().map(|(i, &c)| if i % 32 == 5 { 0xf3 } else { c }).collect();
        let absmax = [0.02, 1.5, 3e-9];
        let weights = decoded(&codes, &absmax, 192, 64);
        let (mut again, mut most) = (vec![0; 96], vec![0.0; 3]);
        encode(&weights, 64, &mut again, &mut most);
        assert_eq!((again, &most[..]), (codes, &absmax[..]));
    }

    #[test]
    fn zeros_and_odd_lengths() {
        let (mut codes, mut absmax) = (vec![9; 3], vec![9.0; 1]);
        encode(&[0.0; 5], 64, &mut codes, &mut absmax);
        assert_eq!((&codes[..], &absmax[..]), (&[0x77, 0x77, 0x70][..], &[0.0][..]));
        assert_eq!(nest(&[]).codes.len(), 0);
        assert_eq!(nest(&[0.5; 3]), Nested { codes: vec![127; 3], absmax: vec![0.0], offset: 0.5 });
    }

    #[test]
    fn magnitudes_come_back_within_the_maps_steps() {
        let magnitudes: Vec<f32> = (0..600).map(|i| 0.02 + ((i * 37) % 101) as f32 * 1e-4).collect();
        let nested = nest(&magnitudes);
        assert_eq!((nested.codes.len(), nested.absmax.len()), (600, 3));
        let map = dynamic_map();
        for (i, want) in magnitudes.iter().enumerate() {
            let got = map[usize::from(nested.codes[i])] * nested.absmax[i / 256] + nested.offset;
            assert!((got - want).abs() <= 0.008 * nested.absmax[i / 256], "{i}: {got} is not {want}");
        }
        assert!(map.windows(2).all(|two| two[0] < two[1]) && map[127] == 0.0 && map[255] == 1.0);
    }
}
