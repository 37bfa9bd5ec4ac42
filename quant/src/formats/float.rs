//! F32, F16 and BF16.

/// f16 bits to f32, exactly. Without branches, so that loops over it vectorise.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // Moved into place, the exponent is 112 too small (15 is the bias of f16, 127 of f32). Multiplying by 2^112 is
    // exact and also puts subnormal numbers right.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = 0x7f80_0000 | magnitude;
    let value = if bits & 0x7c00 == 0x7c00 { special } else { scaled };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

/// The same for a single number outside a loop, by the instruction for it where every processor has one.
#[inline(always)]
pub(super) fn one_f16_to_f32(bits: u16) -> f32 {
    #[cfg(target_arch = "aarch64")]
    {
        let out;
        // SAFETY: an instruction of every AArch64 processor, on registers only.
        unsafe {
            std::arch::asm!("fcvt {0:s}, {1:h}", out(vreg) out, in(vreg) f32::from_bits(u32::from(bits)),
                options(pure, nomem, nostack, preserves_flags));
        }
        out
    }
    #[cfg(not(target_arch = "aarch64"))]
    f16_to_f32(bits)
}

/// f32 to f16 bits, to nearest even.
pub fn f32_to_f16(x: f32) -> u16 {
    half::f16::from_f32(x).to_bits()
}

/// bf16 bits to f32, exactly.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = f32::from_le_bytes(*bytes);
    }
}

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = f16_to_f32(u16::from_le_bytes(*bytes));
    }
}

pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = bf16_to_f32(u16::from_le_bytes(*bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::{f16_to_f32, one_f16_to_f32};

    #[test]
    fn every_f16_becomes_the_same_number() {
        for bits in 0..=u16::MAX {
            let want = half::f16::from_bits(bits).to_f32();
            for got in [f16_to_f32(bits), one_f16_to_f32(bits)] {
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#06x}: {got} {want}");
            }
        }
    }
}
