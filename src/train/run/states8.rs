//! Optimizer states in 8 bits (Dettmers et al. 2022): blocks that share their largest magnitude, and codes whose steps
//! are a tenth of a decade wide or less, from the largest value of a block down to a millionth of it.

/// Numbers that share a scale.
pub const BLOCK: usize = 256;

/// The values of the 256 codes, in ascending order, between -1 and 1, or 0 and 1.
///
/// A byte is, beside its sign, a run of zeros that says the decade, a one, and what is left of it as a fraction: so each
/// decade has twice as many codes as the one below.
#[derive(Clone, Debug)]
pub struct Codes {
    values: [f32; 256],
    /// Between neighbours: what is above goes to the next.
    middles: [f32; 255],
    zero: u8,
}

impl Codes {
    /// Codes for numbers of both signs.
    pub fn signed() -> Codes {
        Codes::new(true)
    }

    /// Codes for numbers that are not negative.
    pub fn unsigned() -> Codes {
        Codes::new(false)
    }

    fn new(signed: bool) -> Codes {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7 {
            let count = 1 << if signed { decade } else { decade + 1 };
            let top = 10f64.powi(decade - 6);
            for i in 0..count {
                // The middles of `count` equal parts of [0.1, 1].
                let value = (0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(count)) * top;
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| values[i] as f32);
        let zero = values.iter().position(|&v| v == 0.0).unwrap_or(0) as u8;
        Codes { middles: std::array::from_fn(|i| (values[i] + values[i + 1]) / 2.0), values, zero }
    }

    /// Decodes a block.
    pub fn decode(&self, codes: &[u8], scale: f32, out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(x, &code)| *x = self.values[usize::from(code)] * scale);
    }

    /// Encodes a block; returns its scale. What is above 0 never becomes 0: the second moment stands below a fraction.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let scale = values.iter().fold(0f32, |most, x| most.max(x.abs()));
        // So small that its inverse is infinite: as good as 0.
        let inverse = 1.0 / scale;
        if scale == 0.0 || !inverse.is_finite() {
            codes.fill(self.zero);
            return 0.0;
        }
        for (code, &x) in codes.iter_mut().zip(values) {
            let y = x * inverse;
            let nearest = self.middles.partition_point(|&m| m < y) as u8;
            *code = if nearest == self.zero && self.zero == 0 && x > 0.0 { 1 } else { nearest };
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_of_the_paper() {
        let (signed, unsigned) = (Codes::signed(), Codes::unsigned());
        // bitsandbytes' create_dynamic_map(signed) has these ends, neighbours of 0 and steps.
        assert_eq!(
            (signed.values[255], signed.values[0], signed.values[usize::from(signed.zero)]),
            (1.0, -0.99296875, 0.0)
        );
        assert_eq!(signed.values[254], 0.99296875);
        let next = signed.values[usize::from(signed.zero) + 1];
        assert!((next - 5.5e-7).abs() < 1e-12, "{next}");
        assert_eq!((unsigned.values[0], unsigned.values[255]), (0.0, 1.0));
        assert!((unsigned.values[1] - 3.25e-7).abs() < 1e-12);
        assert!(signed.values.is_sorted_by(|a, b| a < b) && unsigned.values.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn errors_are_bounded() {
        for (codes, low) in [(Codes::signed(), -1.0), (Codes::unsigned(), 0.0)] {
            let values: Vec<f32> = (0..BLOCK)
                .map(|i| {
                    let x = 10f32.powf(-5.0 * i as f32 / BLOCK as f32) * 3.0;
                    if i % 2 == 0 { x } else { x * if low < 0.0 { -1.0 } else { 1.0 } }
                })
                .collect();
            let (mut packed, mut back) = ([0u8; BLOCK], [0f32; BLOCK]);
            let scale = codes.encode(&values, &mut packed);
            assert_eq!(scale, 3.0);
            codes.decode(&packed, scale, &mut back);
            for (x, y) in values.iter().zip(back) {
                // Within half a step of its decade, of which the smallest have few.
                assert!((x - y).abs() <= 0.5 * x.abs() + 1e-7 && (x.abs() < 0.3 || (x - y).abs() < 0.03), "{x} {y}");
                assert!(y != 0.0);
            }
        }
        let mut packed = [9u8; 4];
        assert_eq!(Codes::signed().encode(&[0.0; 4], &mut packed), 0.0);
        let mut back = [1f32; 4];
        Codes::signed().decode(&packed, 0.0, &mut back);
        assert_eq!(back, [0.0; 4]);
        Codes::unsigned().encode(&[1.0, 1e-30, 0.0, 0.5], &mut packed);
        assert_eq!((packed[1], packed[2]), (1, 0), "what is above 0 stays above 0");
    }
}
