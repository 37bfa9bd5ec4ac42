//! AMX: the matrix unit, in bf16 for many rows of activations, in int8 for several sequences that are generated
//! ([`batch`]); all else as AVX-512 does it.
//!
//! Weights and activations are rounded to bf16 (to nearest even, 8 significant bits each) and their products summed in
//! f32 over all columns, without stopping for the scales of groups: faster here than int8 tiles, whose sums must be
//! scaled every 32 columns, and several times closer to the exact product than activations of 8 bits.
//!
//! What is to be nearly as exact as f32 goes through the same tiles in two parts ([`super::HalfKernels`]): three passes,
//! each as fast as any, where f32 has a sixteenth of the unit's rate.
//!
//! The intrinsics are not stable, so tiles are driven by inline assembly. Rust cannot name tile registers as operands:
//! one block of assembly loads, multiplies and stores, and leaves nothing in them. Only the configuration lasts from
//! block to block, within one call.

mod batch;

use super::bf16::{self, ROWS, STEP};
use super::{HalfRows, Isa, Kernels, PANEL, ROW_BLOCK, avx512, peaks};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Whether processor and system have AMX, for bf16 and int8. The first call asks Linux for the permission that it grants a process.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| on_this_machine() || emulated())
}

fn on_this_machine() -> bool {
    let leaf1 = __cpuid(1);
    if leaf1.ecx & (1 << 27) == 0 || __cpuid(0).eax < 7 {
        return false;
    }
    // SAFETY: OSXSAVE, tested above, means that XGETBV is there.
    let enabled = unsafe { read_xcr0() };
    let leaf7 = __cpuid_count(7, 0);
    // Of bf16, tiles and int8.
    let wanted = 1 << 22 | 1 << 24 | 1 << 25;
    if enabled & (3 << 17) != 3 << 17 || leaf7.edx & wanted != wanted || !bf16::available() {
        return false;
    }
    ask_permission()
}

/// Tests do without the processor: unit tests everywhere, and others built with the feature where `RUSHLIGHT_ISA` asks.
#[cfg(all(target_os = "linux", any(test, feature = "emulate-amx")))]
fn emulated() -> bool {
    (cfg!(test) || std::env::var_os("RUSHLIGHT_ISA").is_some_and(|isa| isa == "amx")) && super::tiles::emulate()
}

#[cfg(not(all(target_os = "linux", any(test, feature = "emulate-amx"))))]
fn emulated() -> bool {
    false
}

#[target_feature(enable = "xsave")]
fn read_xcr0() -> u64 {
    // SAFETY: the caller has seen OSXSAVE.
    unsafe { _xgetbv(0) }
}

#[cfg(target_os = "linux")]
fn ask_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: arch_prctl with these arguments only changes what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask_permission() -> bool {
    false
}

pub(super) fn kernels() -> Kernels {
    Kernels {
        isa: Isa::Amx,
        dot_batch: batch::dot_batch,
        half: Some(bf16::kernels::<1>(mul::<1>, Some(mul_to::<1>))),
        half_columns: Some(bf16::COLUMNS),
        split: Some(bf16::kernels::<2>(mul::<2>, Some(mul_to::<2>))),
        peaks: peaks::amx(),
        ..avx512::kernels()
    }
}

/// The shapes of the eight tiles, as LDTILECFG reads them.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// All tiles have 16 rows of 64 bytes.
    fn new() -> Config {
        Config::of([(ROWS as u8, 64); 8])
    }

    /// Rows and bytes of a row of each tile.
    fn of(tiles: [(u8, u16); 8]) -> Config {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in tiles.into_iter().enumerate() {
            (config.rows[i], config.row_bytes[i]) = (rows, row_bytes);
        }
        config
    }
}

fn mul<const PARTS: usize>(panels: &[&[u16]], x: HalfRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    assert!(rows.is_empty() || out.len() >= (rows.len() - 1) * stride + panels.len() * PANEL);
    // SAFETY: asserted above.
    unsafe { mul_to::<PARTS>(panels, x, rows, out.as_mut_ptr(), stride) }
}

/// # Safety
/// At `out` is a row of sums for each of `rows`, each `stride` behind the one before.
unsafe fn mul_to<const PARTS: usize>(
    panels: &[&[u16]],
    x: HalfRows<'_>,
    rows: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    let (cols, padded, width) = (x.cols, x.padded, panels.len() * PANEL);
    // With one panel the second tile of weights repeats the first and its products are left.
    let pair = [panels[0], panels.get(1).copied().unwrap_or(panels[0])];
    // A panel that is no longer than this has one part.
    let part = cols * PANEL;
    let parts = if PARTS == 2 && pair[0].len() > part { 2 } else { 1 };
    assert!(cols.is_multiple_of(STEP) && pair.iter().all(|p| p.len() >= parts * part));
    assert!(rows.start.is_multiple_of(ROW_BLOCK) && rows.end <= padded && padded.is_multiple_of(ROW_BLOCK));
    assert!(x.all.len() >= PARTS * padded * cols);
    let config = Config::new();
    // SAFETY: the processor has AMX and the process the permission; `config` is 64 bytes in the layout of palette 1.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &config, options(nostack, preserves_flags)) };
    let mut edge = Products([0.0; ROW_BLOCK * 2 * PANEL]);
    for first in rows.clone().step_by(ROW_BLOCK) {
        let used = ROW_BLOCK.min(rows.end - first);
        let whole = used == ROW_BLOCK && panels.len() == 2;
        // SAFETY: 32 rows of `cols` numbers from `first` on, `cols * 16` numbers in each panel, in as many parts as are
        // said (asserted above), and 32 rows of 32 sums: the edge's own, or the caller's. Of the edge are copied as many
        // as the caller has.
        unsafe {
            let out = out.add((first - rows.start) * stride);
            let (to, distance) = if whole { (out, stride) } else { (edge.0.as_mut_ptr(), 2 * PANEL) };
            multiply::<PARTS>(x.all.as_ptr().add(first * cols * PARTS), cols, pair, parts, to, distance);
            for r in if whole { 0..0 } else { 0..used } {
                std::ptr::copy_nonoverlapping(edge.0.as_ptr().add(r * 2 * PANEL), out.add(r * stride), width);
            }
        }
    }
    // SAFETY: nothing is left in the tiles.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Sums of a block at the edge, of which not all are used.
#[repr(C, align(64))]
struct Products([f32; ROW_BLOCK * 2 * PANEL]);

/// Two blocks of 16 rows of `cols` activations in `PARTS` parts at `x` times two panels in `parts`, into 32 rows of 32 sums
/// at distance `stride`.
///
/// # Safety
/// The tiles are configured by [`Config`] and all of these numbers are there; `cols` is a positive multiple of 32.
#[inline(always)]
unsafe fn multiply<const PARTS: usize>(
    x: *const u16,
    cols: usize,
    panels: [&[u16]; 2],
    parts: usize,
    out: *mut f32,
    stride: usize,
) {
    // Where the next pass goes on, seen from the end of this one, in activations and in weights: behind first parts lie
    // second ones.
    let part = (cols * 2 * ROWS) as isize;
    let moves = [[0, -part], [-2 * part, 0], [0, 0]];
    let passes = PARTS + parts - 1;
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "mov {n}, {steps}",
            "2:",
            "tileloadd tmm4, [{a0} + {line}]",
            "tileloadd tmm6, [{w0} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {n}",
            "jnz 2b",
            "add {a0}, [{moves}]",
            "add {a1}, [{moves}]",
            "add {w0}, [{moves} + 8]",
            "add {w1}, [{moves} + 8]",
            "add {moves}, 16",
            "dec {passes}",
            "jnz 3b",
            "tilestored [{o0} + {to}], tmm0",
            "tilestored [{o0} + {to} + 64], tmm1",
            "tilestored [{o1} + {to}], tmm2",
            "tilestored [{o1} + {to} + 64], tmm3",
            a0 = inout(reg) x => _,
            a1 = inout(reg) x.add(PARTS * ROWS * cols) => _,
            w0 = inout(reg) panels[0].as_ptr() => _,
            w1 = inout(reg) panels[1].as_ptr() => _,
            line = in(reg) 64usize,
            steps = in(reg) cols / STEP,
            n = out(reg) _,
            moves = inout(reg) moves.as_ptr() => _,
            passes = inout(reg) passes => _,
            o0 = in(reg) out,
            o1 = in(reg) out.add(ROWS * stride),
            to = in(reg) 4 * stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Keeps the matrix unit busy with tiles that are already there.
pub(super) fn peak(steps: u64) -> u64 {
    let config = Config::new();
    let rounds = steps / 256;
    for _ in 0..rounds {
        // SAFETY: the processor has AMX and the process the permission; the tiles hold nothing that is used.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &config,
                n = inout(reg) 64u64 => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
    rounds * 64 * 4 * (2 * 16 * 16 * STEP as u64)
}
