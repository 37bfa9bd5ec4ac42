//! Numbers that wait in bf16, two in the bits of one.

/// Numbers that [`halve`] makes at a time. Fewer, and the compiler takes one of each of several blocks together.
pub const HALF: usize = 256;

#[inline(always)]
pub fn halve(x: &[f32], out: &mut [f32]) {
    // The upper half of the sum is the number to nearest even; what is no number stays none.
    fn rounded(x: f32) -> u32 {
        let bits = x.to_bits();
        if x.is_nan() { bits | 1 << 22 } else { bits.wrapping_add(0x7fff + (bits >> 16 & 1)) }
    }
    let (whole, rest) = x.as_chunks::<{ 2 * HALF }>();
    let (blocks, last) = out.as_chunks_mut::<HALF>().0.split_at_mut(whole.len());
    let block = |x: &[f32; 2 * HALF], out: &mut [f32; HALF]| {
        for i in 0..HALF {
            out[i] = f32::from_bits(rounded(x[i]) & 0xffff_0000 | rounded(x[HALF + i]) >> 16);
        }
    };
    whole.iter().zip(blocks).for_each(|(x, out)| block(x, out));
    if let [out] = last {
        let mut padded = [0.0; 2 * HALF];
        padded[..rest.len()].copy_from_slice(rest);
        block(&padded, out);
    }
}

#[inline(always)]
pub fn unhalve(x: &[f32], out: &mut [f32]) {
    let numbers = |x: &[f32; HALF], out: &mut [f32; 2 * HALF]| {
        for i in 0..HALF {
            out[i] = f32::from_bits(x[i].to_bits() & 0xffff_0000);
            out[HALF + i] = f32::from_bits(x[i].to_bits() << 16);
        }
    };
    let blocks = x.as_chunks::<HALF>().0;
    let (whole, rest) = out.as_chunks_mut::<{ 2 * HALF }>();
    blocks.iter().zip(whole.iter_mut()).for_each(|(x, out)| numbers(x, out));
    if let Some(x) = blocks.get(whole.len()) {
        let mut padded = [0.0; 2 * HALF];
        numbers(x, &mut padded);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}
