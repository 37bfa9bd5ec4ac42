//! AMX: the bf16 matrix unit, for many rows of activations and block formats; all else as AVX-512 does it.
//!
//! Weights and activations are rounded to bf16 (to nearest even, 8 significant bits each) and their products summed in
//! f32 over all columns, without stopping for the scales of groups: faster here than int8 tiles, whose sums must be
//! scaled every 32 columns, and several times closer to the exact product than activations of 8 bits.
//!
//! The intrinsics are not stable, so tiles are driven by inline assembly. Rust cannot name tile registers as operands:
//! one block of assembly loads, multiplies and stores, and leaves nothing in them. Only the configuration lasts from
//! block to block, within one call.

use super::{HalfKernels, HalfRows, Isa, Kernels, PANEL, PackHalf, ROW_BLOCK, avx512};
use crate::formats::{BlockFormat, Format, Visitor};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Whether processor and system have AMX bf16. The first call asks Linux for the permission that it grants a process.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let leaf1 = __cpuid(1);
        if leaf1.ecx & (1 << 27) == 0 || __cpuid(0).eax < 7 {
            return false;
        }
        // SAFETY: OSXSAVE, tested above, means that XGETBV is there.
        let enabled = unsafe { read_xcr0() };
        let leaf7 = __cpuid_count(7, 0);
        let (bf16, tiles) = (1 << 22, 1 << 24);
        let vector_bf16 = is_x86_feature_detected!("avx512bf16");
        if enabled & (3 << 17) != 3 << 17 || leaf7.edx & tiles == 0 || leaf7.edx & bf16 == 0 || !vector_bf16 {
            return false;
        }
        ask_permission()
    })
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
    Kernels { isa: Isa::Amx, half: Some(HalfKernels { round, pack, mul }), peak: Some(peak), ..avx512::kernels() }
}

/// Rows of a tile.
const ROWS: usize = 16;
/// Columns that one multiplication of tiles takes.
const STEP: usize = 32;

/// The shapes of the eight tiles, as LDTILECFG reads them: all are 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    fn new() -> Config {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(ROWS as u8);
        config
    }
}

fn round(x: &[f32], out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn inner(x: &[f32], out: &mut [u16]) {
        for (x, out) in x.as_chunks::<STEP>().0.iter().zip(out.as_chunks_mut::<STEP>().0) {
            // SAFETY: 32 numbers each.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), both)
            }
        }
    }
    assert!(x.len() == out.len() && x.len().is_multiple_of(STEP));
    // SAFETY: this table is handed out only where `available`.
    unsafe { inner(x, out) }
}

fn pack(format: Format) -> PackHalf {
    struct Pick;
    impl Visitor for Pick {
        type Out = PackHalf;
        fn visit<F: BlockFormat>(self) -> PackHalf {
            pack_entry::<F>
        }
    }
    format.visit(Pick).expect("a block format")
}

fn pack_entry<F: BlockFormat>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
    // SAFETY: this table is handed out only where `available`.
    unsafe { pack_of::<F>(data, rows, cols, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn pack_of<F: BlockFormat>(data: &[u8], rows: usize, cols: usize, out: &mut [u16]) {
    let (len, bytes) = (F::FORMAT.block_len(), F::FORMAT.block_bytes());
    let row_bytes = cols / len * bytes;
    assert!(rows <= PANEL && data.len() >= rows * row_bytes && out.len() >= cols * PANEL);
    if rows < PANEL {
        out.fill(0);
    }
    // Pairs of columns of one weight row are 64 bytes apart: 16 rows share a line.
    let places = _mm512_mullo_epi32(
        _mm512_set1_epi32(PANEL as i32),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    );
    for r in 0..rows {
        let row = &data[r * row_bytes..(r + 1) * row_bytes];
        for (b, block) in row.chunks_exact(bytes).enumerate() {
            for i in 0..len / STEP {
                let mut weights = [0f32; STEP];
                F::group(block, i).decode(&mut weights);
                let at = (b * (len / STEP) + i) * STEP * PANEL + 2 * r;
                // SAFETY: 32 numbers; the last pair of this group and row is written at `at + 15 * 32 + 1`, which is
                // inside the group's `32 * 16` numbers (asserted above for all groups).
                unsafe {
                    let (low, high) = (_mm512_loadu_ps(weights.as_ptr()), _mm512_loadu_ps(weights.as_ptr().add(16)));
                    let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                    _mm512_i32scatter_epi32::<4>(out.as_mut_ptr().add(at).cast(), places, pairs);
                }
            }
        }
    }
}

fn mul(panels: &[&[u16]], x: HalfRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    let (cols, padded) = (x.cols, x.padded);
    // With one panel the second tile of weights repeats the first and its products are left.
    let pair = [panels[0], panels.get(1).copied().unwrap_or(panels[0])];
    assert!(cols.is_multiple_of(STEP) && pair.iter().all(|p| p.len() >= cols * PANEL));
    assert!(rows.start.is_multiple_of(ROW_BLOCK) && rows.end <= padded && padded.is_multiple_of(ROW_BLOCK));
    assert!(x.all.len() >= padded * cols);
    assert!(rows.is_empty() || out.len() >= (rows.len() - 1) * stride + panels.len() * PANEL);
    let config = Config::new();
    // SAFETY: the processor has AMX and the process the permission; `config` is 64 bytes in the layout of palette 1.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &config, options(nostack, preserves_flags)) };
    let mut edge = Products([0.0; ROW_BLOCK * 2 * PANEL]);
    for first in rows.clone().step_by(ROW_BLOCK) {
        let used = ROW_BLOCK.min(rows.end - first);
        let whole = used == ROW_BLOCK && panels.len() == 2;
        let out = &mut out[(first - rows.start) * stride..];
        let (to, distance) = if whole { (out.as_mut_ptr(), stride) } else { (edge.0.as_mut_ptr(), 2 * PANEL) };
        // SAFETY: 32 rows of `cols` numbers from `first` on, `cols * 16` numbers in each panel, and 32 rows of 32 sums
        // at `to`: asserted above, or the edge's own size.
        unsafe { multiply(x.all.as_ptr().add(first * cols), cols, pair, to, distance) };
        if !whole {
            for r in 0..used {
                let width = panels.len() * PANEL;
                out[r * stride..][..width].copy_from_slice(&edge.0[r * 2 * PANEL..][..width]);
            }
        }
    }
    // SAFETY: nothing is left in the tiles.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Sums of a block at the edge, of which not all are used.
#[repr(C, align(64))]
struct Products([f32; ROW_BLOCK * 2 * PANEL]);

/// 32 rows of `cols` activations at `x` times two panels, into 32 rows of 32 sums at distance `stride`.
///
/// # Safety
/// The tiles are configured by [`Config`] and all of these numbers are there; `cols` is a positive multiple of 32.
#[inline(always)]
unsafe fn multiply(x: *const u16, cols: usize, panels: [&[u16]; 2], out: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a0} + {row}]",
            "tileloadd tmm6, [{w0} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{o0} + {to}], tmm0",
            "tilestored [{o0} + {to} + 64], tmm1",
            "tilestored [{o1} + {to}], tmm2",
            "tilestored [{o1} + {to} + 64], tmm3",
            a0 = inout(reg) x => _,
            a1 = inout(reg) x.add(ROWS * cols) => _,
            row = in(reg) 2 * cols,
            w0 = inout(reg) panels[0].as_ptr() => _,
            w1 = inout(reg) panels[1].as_ptr() => _,
            line = in(reg) 64usize,
            steps = inout(reg) cols / STEP => _,
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
fn peak(steps: u64) -> u64 {
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
