//! Rounding a matrix to groups of integer codes without a Hessian.

use super::Codes;
use super::grid::Grid;
use super::solution::{Problem, Solution};
use crate::cpu::Cpu;

/// Rounds `weights` (`[rows, cols]`, finite) to codes of `bits` (2, 3, 4 or 8) in groups of `group` columns: each group
/// gets the f16 scale, and unless `symmetric` the zero, by which its squared error is least, and each weight the nearest
/// code. The result does not depend on the number of threads.
///
/// # Panics
/// If `weights` is not whole rows of `cols`, `group` is 0, or there are no codes of `bits`.
pub fn round_groups(cpu: &Cpu, weights: &[f32], cols: usize, bits: u32, group: usize, symmetric: bool) -> Codes {
    assert!(matches!(bits, 2 | 3 | 4 | 8) && group > 0, "{bits}-bit groups of {group}");
    assert!(cols > 0 && weights.len().is_multiple_of(cols), "weights are not rows of {cols}");
    let grid = Grid::Group { bits, group, symmetric };
    let p = Problem { cpu, weights, rows: weights.len() / cols, cols, grid, search: true, half: true };
    let Solution { codes, scales, offsets, unit_of, .. } = Solution::round(&p, None);
    Codes::Groups { codes, scales, zeros: offsets.iter().map(|z| *z as u8).collect(), group_of: unit_of }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn groups_of_any_length_hold_the_nearest_codes() {
        let weights: Vec<f32> = (0..5 * 70).map(|i| ((i * 7919 % 997) as f32 / 997.0 - 0.3) * 0.2).collect();
        for (bits, group, symmetric) in
            [(2, 32, true), (3, 32, false), (4, 48, false), (4, 100, true), (8, 7, false), (8, usize::MAX, true)]
        {
            let made = round_groups(&Cpu::new(2, Isa::Scalar), &weights, 70, bits, group, symmetric);
            assert_eq!(made, round_groups(&Cpu::new(1, Isa::Scalar), &weights, 70, bits, group, symmetric));
            let Codes::Groups { codes, scales, zeros, group_of } = made else { panic!("groups were asked for") };
            let groups = 70usize.div_ceil(group.min(70));
            assert_eq!((scales.len(), zeros.len(), group_of.len()), (5 * groups, 5 * groups, 70));
            assert!(!symmetric || zeros.iter().all(|z| u32::from(*z) == 1 << (bits - 1)));
            for (i, w) in weights.iter().enumerate() {
                let unit = i / 70 * groups + group_of[i % 70] as usize;
                assert_eq!(group_of[i % 70] as usize, i % 70 / group.min(70));
                let value = |code: u32| scales[unit] * (code as f32 - f32::from(zeros[unit]));
                let best = (0..1u32 << bits).map(|q| (value(q) - w).abs()).fold(f32::MAX, f32::min);
                let got = (value(codes[i].into()) - w).abs();
                assert!(got <= best + 1e-6, "{bits} bits, group {group}: {got} where {best} is possible");
            }
        }
    }
}
