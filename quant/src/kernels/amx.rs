//! AMX: the int8 matrix unit, for many rows; all else as AVX-512 does it.
//!
//! The intrinsics are not stable, so tiles are driven by inline assembly. Rust cannot name tile registers as operands:
//! one block of assembly loads, multiplies and stores, and leaves nothing in them. Only the configuration lasts from
//! block to block, within one call.

use super::{CodePanel, Isa, Kernels, PANEL, QuantizedRows, avx512};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Whether processor and system have AMX int8. The first call asks Linux for the permission that it grants a process.
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
        let tiles = 1 << 24;
        let int8 = 1 << 25;
        if enabled & (3 << 17) != 3 << 17 || leaf7.edx & tiles == 0 || leaf7.edx & int8 == 0 {
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
    Kernels {
        isa: Isa::Amx,
        biased_codes: false,
        pack_codes: avx512::pack_codes_flipped::<0>,
        mul_panels,
        ..avx512::kernels()
    }
}

/// Rows of a tile.
const ROWS: usize = 16;

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
    /// Tiles 0..4 are sums (16 x 16 i32), 4 and 5 activations (16 rows of `sub` bytes), 6 and 7 weights (`sub / 4` rows
    /// of 16 x 4 bytes).
    fn new(sub: usize) -> Config {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            config.row_bytes[tile] = if tile == 4 || tile == 5 { sub as u16 } else { 64 };
            config.rows[tile] = if tile >= 6 { (sub / 4) as u8 } else { ROWS as u8 };
        }
        config
    }
}

/// Products of two by two tiles: 32 rows, 2 panels.
#[repr(C, align(64))]
struct Products([[[i32; PANEL]; ROWS]; 4]);

fn mul_panels(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    // SAFETY: this table is handed out only where `available`; `inner` checks the sizes.
    unsafe { inner(panels, x, rows, out, stride) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn inner(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    let (cols, sub) = (x.cols, panels[0].sub);
    // With one panel the second tile of weights repeats the first and its products are left.
    let pair = [&panels[0], panels.get(1).unwrap_or(&panels[0])];
    for panel in pair {
        assert!(panel.codes.len() >= cols * PANEL && panel.scale.len() >= cols / sub * PANEL);
        assert!(panel.min.is_empty() || panel.min.len() >= cols / sub * PANEL);
    }
    assert!(x.all.q.len() >= rows.end * cols && x.all.d.len() >= rows.end * cols / 32);
    assert!(x.all.s32.len() >= rows.end * cols / 32 && x.all.s16.len() >= rows.end * cols / 16);
    assert!(rows.is_empty() || out.len() >= (rows.len() - 1) * stride + panels.len() * PANEL);
    let config = Config::new(sub);
    // SAFETY: the processor has AMX and the process the permission; `config` is 64 bytes in the layout of palette 1.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &config, options(nostack, preserves_flags)) };
    // Rows at the edge are multiplied from a copy, so that no tile reads beyond the activations.
    let mut edge = crate::buffer::Aligned::<i8>::default();
    let mut products = [const { Products([[[0; PANEL]; ROWS]; 4]) }; 2];
    let mut first = rows.start;
    while first < rows.end {
        let n = (rows.end - first).min(2 * ROWS);
        let mut q = x.all.q[first * cols..].as_ptr();
        if n < 2 * ROWS {
            edge = crate::buffer::Aligned::zeroed(2 * ROWS * cols);
            edge[..n * cols].copy_from_slice(&x.all.q[first * cols..(first + n) * cols]);
            q = edge.as_ptr();
        }
        let mut sums = [[_mm512_setzero_ps(); 2]; 2 * ROWS];
        let groups = cols / sub;
        for s in 0..=groups {
            if s < groups {
                // SAFETY: 32 rows of `cols` codes at `q`; `cols * 16` codes in each panel.
                unsafe {
                    let a = q.add(s * sub);
                    let w = [0, 1].map(|p| pair[p].codes.as_ptr().add(s * sub * PANEL));
                    multiply(a, a.add(ROWS * cols), cols, w, &mut products[s % 2]);
                }
            }
            if s > 0 {
                // The tiles of this step are at work meanwhile.
                let s = s - 1;
                let done = &products[s % 2];
                for p in 0..panels.len() {
                    // SAFETY: asserted above.
                    let scale = unsafe { _mm512_loadu_ps(pair[p].scale.as_ptr().add(s * PANEL)) };
                    let d = &x.all.d[first * cols / 32 + s * sub / 32..];
                    for r in 0..n {
                        // SAFETY: row `first + r` has a scale for this group; `done` holds 16 numbers a row.
                        unsafe {
                            let dots = _mm512_load_si512(done.0[(r / ROWS) * 2 + p][r % ROWS].as_ptr().cast());
                            let factor = _mm512_mul_ps(scale, _mm512_set1_ps(*d.as_ptr().add(r * cols / 32)));
                            sums[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, sums[r][p]);
                        }
                    }
                    if !pair[p].min.is_empty() {
                        // SAFETY: asserted above.
                        let min = unsafe { _mm512_loadu_ps(pair[p].min.as_ptr().add(s * PANEL)) };
                        let (all, each) = if sub == 16 { (x.all.s16, 16) } else { (x.all.s32, 32) };
                        let all = &all[first * cols / each + s..];
                        for r in 0..n {
                            // SAFETY: row `first + r` has a sum for this group.
                            let sum = unsafe { *all.as_ptr().add(r * cols / each) };
                            sums[r][p] = _mm512_fnmadd_ps(min, _mm512_set1_ps(sum), sums[r][p]);
                        }
                    }
                }
            }
        }
        for r in 0..n {
            for p in 0..panels.len() {
                // SAFETY: asserted above.
                unsafe {
                    let at = (first - rows.start + r) * stride + p * PANEL;
                    _mm512_storeu_ps(out.as_mut_ptr().add(at), sums[r][p])
                }
            }
        }
        first += n;
    }
    drop(edge);
    // SAFETY: nothing is left in the tiles.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Multiplies 2 x 16 rows of codes (at distance `stride`) by two panels' next columns.
///
/// # Safety
/// The tiles are configured by [`Config`] and every row that they read is there.
#[inline(always)]
unsafe fn multiply(a0: *const i8, a1: *const i8, stride: usize, w: [*const i8; 2], out: &mut Products) {
    let out = out.0.as_mut_ptr().cast::<u8>();
    // SAFETY: the caller's promise; each product is 16 rows of 64 bytes.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tileloadd tmm4, [{a0} + {stride}]",
            "tileloadd tmm6, [{w0} + {line}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {stride}]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            "tilestored [{out} + {line}], tmm0",
            "tilestored [{out} + {line} + 1024], tmm1",
            "tilestored [{out} + {line} + 2048], tmm2",
            "tilestored [{out} + {line} + 3072], tmm3",
            a0 = in(reg) a0,
            a1 = in(reg) a1,
            stride = in(reg) stride,
            w0 = in(reg) w[0],
            w1 = in(reg) w[1],
            line = in(reg) 64usize,
            out = in(reg) out,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}
