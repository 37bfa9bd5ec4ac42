//! Numbers that wait for the way back in fewer bits, packed into the bits of fewer f32: memory of one kind serves all.

use super::Activation;
use crate::cpu::Cpu;
use crate::kernels::Lanes;
use crate::kernels::lanes::{HALF, QUARTER, QUARTERED};
use crate::threads::Disjoint;

/// Words that one task of rounding writes, in whole blocks.
const HALVES: usize = 64 * HALF;
const QUARTERS: usize = 16;

/// Numbers as they wait.
#[derive(Clone, Copy)]
pub enum Waiting<'a> {
    /// As they are.
    Whole(&'a [f32]),
    /// What [`Cpu::halve`] made of them.
    Half(&'a [f32]),
    /// What [`Cpu::quarter`] made of them.
    Quarter(&'a [f32]),
}

impl Waiting<'_> {
    /// Whether these are `len` numbers.
    pub(crate) fn holds(&self, len: usize) -> bool {
        match self {
            Waiting::Whole(x) => x.len() == len,
            Waiting::Half(x) => x.len() == Cpu::half_len(len),
            Waiting::Quarter(x) => x.len() == Cpu::quarter_len(len),
        }
    }

    /// As many of them as there is room for, from number `start` on, which begins a block: where they lie, or in `room`.
    pub(crate) fn read<'b>(&'b self, lanes: &Lanes, start: usize, room: &'b mut [f32]) -> &'b [f32] {
        debug_assert!(start.is_multiple_of(QUARTERED));
        match self {
            Waiting::Whole(x) => return &x[start..start + room.len()],
            Waiting::Half(x) => (lanes.unhalve)(&x[start / 2..][..Cpu::half_len(room.len())], room),
            Waiting::Quarter(x) => (lanes.unquarter)(quarters(x, start, room.len()), room),
        }
        room
    }
}

impl Cpu {
    /// Rounds `x` to bf16 (to nearest even) and puts it into half the memory: two numbers into the bits of each of `out`,
    /// which is as long as [`Cpu::half_len`] says and of no other use.
    pub fn halve(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), Cpu::half_len(x.len()), "half of another size");
        self.elements(out, HALVES, &|start, out| {
            (self.kernels.lanes.halve)(&x[2 * start..x.len().min(2 * (start + out.len()))], out);
        });
    }

    /// What [`Cpu::halve`] rounded, as many as `out` has room for.
    pub fn unhalve(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), Cpu::half_len(out.len()), "half of another size");
        self.elements(out, 2 * HALVES, &|start, out| {
            (self.kernels.lanes.unhalve)(&x[start / 2..][..Cpu::half_len(out.len())], out);
        });
    }

    /// Numbers that [`Cpu::halve`] makes of `len`.
    pub fn half_len(len: usize) -> usize {
        HALF * len.div_ceil(2 * HALF)
    }

    /// Rounds `x` to 8 bits, in steps of a 127th of the largest of each 64 numbers, and puts it into a quarter of the
    /// memory (and a 64th for the steps): `out` is as long as [`Cpu::quarter_len`] says and of no other use.
    pub fn quarter(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), Cpu::quarter_len(x.len()), "a quarter of another size");
        self.elements(out, QUARTERS * QUARTER, &|start, out| {
            let (first, count) = (start / QUARTER * QUARTERED, out.len() / QUARTER * QUARTERED);
            (self.kernels.lanes.quarter)(&x[first..x.len().min(first + count)], out);
        });
    }

    /// What [`Cpu::quarter`] rounded, as many as `out` has room for.
    pub fn unquarter(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), Cpu::quarter_len(out.len()), "a quarter of another size");
        self.elements(out, QUARTERS * QUARTERED, &|start, out| {
            (self.kernels.lanes.unquarter)(quarters(x, start, out.len()), out);
        });
    }

    /// Numbers that [`Cpu::quarter`] makes of `len`.
    pub fn quarter_len(len: usize) -> usize {
        QUARTER * len.div_ceil(QUARTERED)
    }

    /// [`Cpu::gate`] of what [`Cpu::quarter`] made of its inputs.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn gate_quarters(&self, act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        let lanes = &self.kernels.lanes;
        assert_eq!(gate.len(), Cpu::quarter_len(out.len()), "a quarter of another size");
        assert_eq!(gate.len(), up.len(), "gate and up differ in size");
        self.elements(out, QUARTERS * QUARTERED, &|start, out| {
            let mut there = [0.0; QUARTERED];
            for (i, out) in out.chunks_mut(QUARTERED).enumerate() {
                let (at, there) = (start + i * QUARTERED, &mut there[..out.len()]);
                (lanes.unquarter)(quarters(gate, at, out.len()), out);
                (lanes.unquarter)(quarters(up, at, out.len()), there);
                (lanes.gate)(act, out, there);
            }
        });
    }

    /// [`Cpu::gate_backward`] from what [`Cpu::quarter`] made of the inputs: `dy` becomes the gradient of the gate, `dup`
    /// that of the other.
    ///
    /// # Panics
    /// When the sizes do not fit each other.
    pub fn gate_quarters_backward(&self, act: Activation, gate: &[f32], up: &[f32], dy: &mut [f32], dup: &mut [f32]) {
        let lanes = &self.kernels.lanes;
        assert_eq!(gate.len(), Cpu::quarter_len(dy.len()), "a quarter of another size");
        assert!(gate.len() == up.len() && dy.len() == dup.len(), "gate and up differ in size");
        let dup = Disjoint::new(dup);
        self.elements(dy, QUARTERS * QUARTERED, &|start, dy| {
            let mut there = [0.0; QUARTERED];
            for (i, dy) in dy.chunks_mut(QUARTERED).enumerate() {
                let (at, dgate) = (start + i * QUARTERED, &mut there[..dy.len()]);
                // SAFETY: ranges are disjoint.
                let dup = unsafe { dup.slice(at..at + dy.len()) };
                (lanes.unquarter)(quarters(gate, at, dy.len()), dgate);
                (lanes.unquarter)(quarters(up, at, dy.len()), dup);
                (lanes.gate_backward)(act, dgate, dup, dy);
                dy.copy_from_slice(dgate);
            }
        });
    }
}

/// The blocks of `len` numbers from number `start` on.
fn quarters(x: &[f32], start: usize, len: usize) -> &[f32] {
    &x[start / QUARTERED * QUARTER..][..Cpu::quarter_len(len)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    fn numbers(len: usize) -> Vec<f32> {
        let mut state = 1u32;
        let each = (0..len).map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Runs of very different sizes, one of zeros.
            let size = [1.0, 1e-3, 0.0, 300.0, 1e20, 1e-35][i / 64 % 6];
            size * (state as i32 as f32 / 2f32.powi(31))
        });
        each.collect()
    }

    #[test]
    fn eight_bits_are_near_and_the_same_everywhere() {
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for threads in [1, 3] {
                let cpu = Cpu::new(threads, isa);
                let mut bits = Vec::new();
                for len in [1, 64, 1023, 1024, 5000, 50_000] {
                    let x = numbers(len);
                    let mut packed = vec![0.0; Cpu::quarter_len(len)];
                    let mut back = vec![f32::NAN; len];
                    cpu.quarter(&x, &mut packed);
                    cpu.unquarter(&packed, &mut back);
                    for (i, (x, back)) in x.chunks(64).zip(back.chunks(64)).enumerate() {
                        let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
                        for (x, back) in x.iter().zip(back) {
                            let near = if most < 1e-30 { most } else { 0.501 * most / 127.0 };
                            assert!((x - back).abs() <= near, "{isa:?} {len}, run {i}: {x} {back}");
                        }
                    }
                    bits.extend(packed.iter().chain(&back).map(|x| x.to_bits()));
                }
                assert!(first.get_or_insert(bits.clone()) == &bits, "{isa:?} {threads}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let cpu = Cpu::new(1, Isa::Scalar);
        for strange in [f32::NAN, f32::INFINITY] {
            let mut x = numbers(3000);
            x[70] = strange;
            let (mut packed, mut back) = (vec![0.0; Cpu::quarter_len(3000)], vec![0.0; 3000]);
            cpu.quarter(&x, &mut packed);
            cpu.unquarter(&packed, &mut back);
            assert!(!back[70].is_finite() && back[..64].iter().chain(&back[128..]).all(|x| x.is_finite()));
        }
    }

    #[test]
    fn gates_of_what_waits() {
        let cpu = Cpu::new(2, Isa::Scalar);
        let len = 70_001;
        let pack = |x: &[f32]| {
            let (mut packed, mut back) = (vec![0.0; Cpu::quarter_len(len)], vec![0.0; len]);
            cpu.quarter(x, &mut packed);
            cpu.unquarter(&packed, &mut back);
            (packed, back)
        };
        let x: Vec<f32> = (0..3 * len).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let ((gate, mut dgate), (up, mut dup)) = (pack(&x[..len]), pack(&x[len..2 * len]));
        let mut want = dgate.clone();
        cpu.gate(Activation::Silu, &mut want, &dup);
        let mut got = vec![0.0; len];
        cpu.gate_quarters(Activation::Silu, &gate, &up, &mut got);
        assert_eq!(got, want);
        let mut dy = x[2 * len..].to_vec();
        cpu.gate_backward(Activation::Silu, &mut dgate, &mut dup, &dy);
        let mut other = vec![0.0; len];
        cpu.gate_quarters_backward(Activation::Silu, &gate, &up, &mut dy, &mut other);
        assert_eq!((dy, other), (dgate, dup));
    }
}
