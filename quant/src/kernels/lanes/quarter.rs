//! Numbers that wait in 8 bits, four in the bits of one, with a scale for each 64.

/// Numbers whose codes [`quarter`] puts into one run of words, and the words that takes: a quarter as many, then scales.
pub const QUARTERED: usize = 1024;
pub const QUARTER: usize = PLANE + QUARTERED / RUN;

/// Numbers in the same byte of their words.
const PLANE: usize = QUARTERED / 4;
/// Numbers that share a scale.
const RUN: usize = 64;
/// Added to a small number, it leaves that number rounded (to even) in the low bits.
const MAGIC: f32 = 12_582_912.0;
/// Below this 127 over the largest number would not be finite; so small numbers become zeros.
const LEAST: f32 = 1e-30;

#[inline(always)]
pub fn quarter(x: &[f32], out: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<QUARTERED>();
    let (blocks, last) = out.as_chunks_mut::<QUARTER>().0.split_at_mut(whole.len());
    for (x, out) in whole.iter().zip(blocks) {
        block(x, out);
    }
    if let [out] = last {
        let mut padded = [0.0; QUARTERED];
        padded[..rest.len()].copy_from_slice(rest);
        block(&padded, out);
    }
}

#[inline(always)]
fn block(x: &[f32; QUARTERED], out: &mut [f32; QUARTER]) {
    let (words, scales) = out.split_at_mut(PLANE);
    for (r, words) in words.as_chunks_mut::<RUN>().0.iter_mut().enumerate() {
        let mut all = [0u32; RUN];
        for plane in 0..4 {
            let run = &x.as_chunks::<RUN>().0[plane * (PLANE / RUN) + r];
            // As integers the bits of positive numbers are in order, and those of no number above all.
            let mut most = [0u32; 16];
            for part in run.as_chunks::<16>().0 {
                for i in 0..16 {
                    most[i] = most[i].max(part[i].to_bits() & 0x7fff_ffff);
                }
            }
            let most = f32::from_bits(most.iter().fold(0, |a, &b| a.max(b)));
            let inverse = if most < LEAST { 0.0 } else { 127.0 / most };
            scales[plane * (PLANE / RUN) + r] = if most < LEAST { 0.0 } else { most / 127.0 };
            for i in 0..RUN {
                all[i] |= ((run[i] * inverse + MAGIC).to_bits() & 0xff) << (8 * plane);
            }
        }
        for i in 0..RUN {
            words[i] = f32::from_bits(all[i]);
        }
    }
}

#[inline(always)]
pub fn unquarter(x: &[f32], out: &mut [f32]) {
    let blocks = x.as_chunks::<QUARTER>().0;
    let (whole, rest) = out.as_chunks_mut::<QUARTERED>();
    for (x, out) in blocks.iter().zip(whole.iter_mut()) {
        unblock(x, out);
    }
    if let Some(x) = blocks.get(whole.len()) {
        let mut padded = [0.0; QUARTERED];
        unblock(x, &mut padded);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

#[inline(always)]
fn unblock(x: &[f32; QUARTER], out: &mut [f32; QUARTERED]) {
    let (words, scales) = x.split_at(PLANE);
    for (plane, out) in out.as_chunks_mut::<PLANE>().0.iter_mut().enumerate() {
        for (r, (out, words)) in out.as_chunks_mut::<RUN>().0.iter_mut().zip(words.as_chunks::<RUN>().0).enumerate() {
            let scale = scales[plane * (PLANE / RUN) + r];
            for i in 0..RUN {
                let code = (words[i].to_bits() << (24 - 8 * plane)) as i32 >> 24;
                out[i] = scale * code as f32;
            }
        }
    }
}
