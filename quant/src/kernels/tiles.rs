//! AMX in software, for tests on processors without it: the kernel's own instructions run, each through a signal.
//!
//! Such a processor meets an AMX instruction as an invalid one. The handler here decodes it, does what the manual says
//! (Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, TDPBF16PS and others) on tiles of
//! its own, and goes on behind it.

use super::bf16;
use libc::{REG_R8, REG_RAX, REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RIP, REG_RSI, REG_RSP};
use libc::{c_int, c_void, siginfo_t, ucontext_t};
use std::cell::UnsafeCell;
use std::sync::OnceLock;

/// Rows of a tile.
const ROWS: usize = 16;
/// Bytes of a tile's row.
const LINE: usize = 64;

/// What a thread has in its tiles.
struct Tiles {
    /// Rows and bytes of a row, as LDTILECFG gave them; `None` before that and after TILERELEASE.
    shapes: Option<[(u8, u16); 8]>,
    data: [[[u8; LINE]; ROWS]; 8],
}

thread_local! {
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(Tiles { shapes: None, data: [[[0; LINE]; ROWS]; 8] }) };
}

/// Makes this process take AMX instructions, and says whether it could: the vector part of the kernels must be there.
pub(super) fn emulate() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        if !bf16::available() {
            return false;
        }
        // SAFETY: `handler` has the signature of a handler with information.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) == 0
        }
    })
}

extern "C" fn handler(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the system hands over the interrupted thread's registers, and only this thread has its tiles.
    let stepped = unsafe {
        let context = &mut *context.cast::<ucontext_t>();
        TILES.with(|tiles| step(&mut context.uc_mcontext.gregs, &mut *tiles.get()))
    };
    if stepped.is_none() {
        // Some other invalid instruction: it is met once more, and ends the process as it would have.
        // SAFETY: the default action is always allowed.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
    }
}

/// An instruction with three bytes of VEX: `C4`, then opcode map and registers' high bits, then prefix and second source.
struct Instruction<'a> {
    bytes: &'a [u8; 16],
}

impl Instruction<'_> {
    fn reg(&self) -> usize {
        usize::from(self.bytes[4] >> 3 & 7)
    }

    fn rm(&self) -> usize {
        usize::from(self.bytes[4] & 7)
    }

    /// The register operand of VEX itself.
    fn second(&self) -> usize {
        usize::from(!(self.bytes[2] >> 3) & 15)
    }

    /// The address without its index, what the index holds (shifted), and the length of the instruction.
    fn memory(&self, gregs: &[i64; 23]) -> Option<(u64, u64, usize)> {
        let [index_high, base_high] = [6, 5].map(|bit| usize::from(!(self.bytes[1] >> bit) & 1) << 3);
        let mode = self.bytes[4] >> 6;
        let (base, index, at) = match self.rm() {
            4 => {
                let sib = self.bytes[5];
                let index = usize::from(sib >> 3 & 7) | index_high;
                let index = if index == 4 { 0 } else { register(gregs, index) << (sib >> 6) };
                (usize::from(sib & 7) | base_high, index, 6)
            }
            base => (base | base_high, 0, 5),
        };
        let (offset, length) = match mode {
            // No base, or one relative to the instruction: the kernel has neither.
            0 if base & 7 == 5 => return None,
            0 => (0, at),
            1 => (i64::from(self.bytes[at] as i8), at + 1),
            2 => (i64::from(i32::from_le_bytes(self.bytes[at..at + 4].try_into().ok()?)), at + 4),
            _ => return None,
        };
        Some((register(gregs, base).wrapping_add_signed(offset), index, length))
    }
}

/// General register `number`, in the order that instructions count them in.
fn register(gregs: &[i64; 23], number: usize) -> u64 {
    const FIRST: [c_int; 8] = [REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI];
    let place = if number < 8 { FIRST[number] as usize } else { REG_R8 as usize + number - 8 };
    gregs[place] as u64
}

/// Does the instruction that RIP is at and moves RIP behind it; `None` where it is not one of AMX.
///
/// # Safety
/// The registers are those of a thread that met an invalid instruction, and its memory operands may be used.
unsafe fn step(gregs: &mut [i64; 23], tiles: &mut Tiles) -> Option<()> {
    let rip = REG_RIP as usize;
    // SAFETY: an instruction of 9 bytes at most is there; reading on to 16 stays in the function that it is of, as the
    // kernel's ends are farther away.
    let bytes = unsafe { &*(gregs[rip] as *const [u8; 16]) };
    // VEX with the opcode map 0F38, 128 bits and W = 0.
    if bytes[0] != 0xC4 || bytes[1] & 0x1F != 2 || bytes[2] & 0x84 != 0 {
        return None;
    }
    let (prefix, opcode, direct) = (bytes[2] & 3, bytes[3], bytes[4] >= 0xC0);
    let instruction = Instruction { bytes };
    let length = match (prefix, opcode, direct) {
        // LDTILECFG
        (0, 0x49, false) => {
            let (address, index, length) = instruction.memory(gregs)?;
            // SAFETY: the caller's promise.
            let config = unsafe { &*(address.wrapping_add(index) as *const [u8; 64]) };
            assert_eq!((config[0], config[1]), (1, 0), "palette and start row");
            let bytes = |i: usize| u16::from_le_bytes([config[16 + 2 * i], config[17 + 2 * i]]);
            let shapes = std::array::from_fn(|i| (config[48 + i], bytes(i)));
            assert!(shapes.iter().all(|(rows, bytes)| *rows <= 16 && *bytes <= 64), "a tile is too large");
            *tiles = Tiles { shapes: Some(shapes), data: [[[0; LINE]; ROWS]; 8] };
            length
        }
        // TILERELEASE
        (0, 0x49, true) => {
            tiles.shapes = None;
            5
        }
        // TILEZERO
        (3, 0x49, true) => {
            tiles.shapes.expect("no configuration");
            tiles.data[instruction.reg()] = [[0; LINE]; ROWS];
            5
        }
        // TILELOADD
        (3, 0x4B, false) => {
            let (address, stride, length) = instruction.memory(gregs)?;
            let (rows, bytes) = tiles.shapes.expect("no configuration")[instruction.reg()];
            let tile = &mut tiles.data[instruction.reg()];
            *tile = [[0; LINE]; ROWS];
            for r in 0..usize::from(rows) {
                let from = address.wrapping_add(stride.wrapping_mul(r as u64)) as *const u8;
                // SAFETY: the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(from, tile[r].as_mut_ptr(), bytes.into()) };
            }
            length
        }
        // TILESTORED
        (2, 0x4B, false) => {
            let (address, stride, length) = instruction.memory(gregs)?;
            let (rows, bytes) = tiles.shapes.expect("no configuration")[instruction.reg()];
            let tile = &tiles.data[instruction.reg()];
            for r in 0..usize::from(rows) {
                let to = address.wrapping_add(stride.wrapping_mul(r as u64)) as *mut u8;
                // SAFETY: the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(tile[r].as_ptr(), to, bytes.into()) };
            }
            length
        }
        // TDPBF16PS
        (2, 0x5C, true) => {
            let (to, a, b) = (instruction.reg(), instruction.rm(), instruction.second());
            let shapes = tiles.shapes.expect("no configuration");
            assert!([to, a, b].iter().all(|&t| shapes[t] == (ROWS as u8, LINE as u16)), "shapes that no kernel uses");
            let sums = product(&tiles.data[a], &tiles.data[b]);
            for (row, sums) in tiles.data[to].iter_mut().zip(&sums) {
                for (bytes, sum) in row.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                    *bytes = (f32::from_le_bytes(*bytes) + sum).to_le_bytes();
                }
            }
            5
        }
        // TDPBSUD
        (2, 0x5E, true) => {
            let (to, a, b) = (instruction.reg(), instruction.rm(), instruction.second());
            let shapes = tiles.shapes.expect("no configuration");
            let ((m, n), (_, k)) = (shapes[to], shapes[a]);
            assert!(shapes[a].0 == m && shapes[b] == ((k / 4) as u8, n), "shapes that do not fit together");
            let (a, b) = (tiles.data[a], tiles.data[b]);
            for (sums, a) in tiles.data[to][..usize::from(m)].iter_mut().zip(&a) {
                for (i, sum) in sums[..usize::from(n)].as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let products =
                        (0..usize::from(k)).map(|c| i32::from(a[c] as i8) * i32::from(b[c / 4][4 * i + c % 4]));
                    *sum = (i32::from_le_bytes(*sum) + products.sum::<i32>()).to_le_bytes();
                }
            }
            5
        }
        _ => return None,
    };
    gregs[rip] += length as i64;
    Some(())
}

/// 16 rows of 32 numbers times 16 pairs of rows of 16: even and odd products are summed apart, then together.
fn product(a: &[[u8; LINE]; ROWS], b: &[[u8; LINE]; ROWS]) -> [[f32; 16]; ROWS] {
    let wide = |bytes: &[u8; LINE], i: usize| {
        f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])) << 16)
    };
    let b: [[[f32; 16]; 2]; ROWS] =
        std::array::from_fn(|k| [0, 1].map(|odd| std::array::from_fn(|n| wide(&b[k], 2 * n + odd))));
    std::array::from_fn(|m| {
        let mut sums = [[0f32; 16]; 2];
        for (k, b) in b.iter().enumerate() {
            for odd in 0..2 {
                let x = wide(&a[m], 2 * k + odd);
                for n in 0..16 {
                    sums[odd][n] = x.mul_add(b[odd][n], sums[odd][n]);
                }
            }
        }
        std::array::from_fn(|n| sums[0][n] + sums[1][n])
    })
}
