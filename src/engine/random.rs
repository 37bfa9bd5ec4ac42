//! The random numbers behind sampling: xoshiro256++, seeded through SplitMix64 as its authors advise
//! (<https://prng.di.unimi.it/>). Our own so that a seed means the same tokens in every version and on every machine.

/// A xoshiro256++ generator.
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

impl Random {
    /// The generator that `seed` stands for.
    pub fn new(seed: u64) -> Random {
        let mut state = seed;
        Random(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }))
    }

    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// The next number in [0, 1), with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A number below `n`, which is not 0 (Lemire 2019, without its correction: for `n` below 2^32 some numbers come
    /// more often by a part in 2^32 at most).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }
}

/// A seed that differs from run to run.
pub fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library keys each hasher with the system's randomness.
    let seed = std::hash::RandomState::new().build_hasher().finish();
    // JSON readers hold integers up to 2^53 exactly.
    seed >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_published_algorithm() {
        // SplitMix64 from 1234567: the first outputs of the reference implementation.
        assert_eq!(Random::new(1234567).0[..3], [6457827717110365317, 3203168211198807973, 9817491932198370423]);
        // xoshiro256++ from the state 1, 2, 3, 4: the first outputs of the reference implementation.
        let mut r = Random([1, 2, 3, 4]);
        let first: Vec<u64> = (0..3).map(|_| r.bits()).collect();
        assert_eq!(first, [41943041, 58720359, 3588806011781223]);
    }

    #[test]
    fn units_are_uniform() {
        let mut r = Random::new(7);
        let (mut sum, mut buckets) = (0.0, [0u32; 10]);
        for _ in 0..100_000 {
            let u = r.unit();
            assert!((0.0..1.0).contains(&u));
            sum += u;
            buckets[(u * 10.0) as usize] += 1;
        }
        assert!((sum / 1e5 - 0.5).abs() < 0.005);
        assert!(buckets.iter().all(|b| b.abs_diff(10_000) < 500));
    }
}
