//! AMX: the int8 matrix unit, for many rows; all else as AVX-512 does it.
//!
//! The intrinsics are not stable, so tiles are driven by inline assembly. Rust cannot name tile registers as operands:
//! one block of assembly loads, multiplies and stores, and leaves nothing in them. Only the configuration lasts from
//! block to block, within one call.

use super::{CodePanel, Isa, Kernels, PANEL, QuantizedRows, ROW_BLOCK, avx512};
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
        peak_int8: Some(peak_int8),
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

/// Scale groups that are multiplied before their products are added up: so many fit in the nearest cache twice, and
/// each sum is loaded and stored once for them all.
const STEPS: usize = 4;

/// Rows whose sums are added up together, in registers.
const STRIP: usize = ROW_BLOCK / STEPS;

/// Products of two by two tiles: 32 rows, 2 panels.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Products([[[i32; PANEL]; ROWS]; 4]);

fn mul_panels(panels: &[CodePanel<'_>], x: QuantizedRows<'_>, rows: Range<usize>, out: &mut [f32], stride: usize) {
    let with_min = panels.iter().any(|p| !p.min.is_empty());
    // SAFETY: this table is handed out only where `available`; `inner` checks the sizes.
    unsafe {
        match (panels[0].sub, with_min) {
            (16, false) => inner::<16, false>(panels, x, rows, out, stride),
            (16, true) => inner::<16, true>(panels, x, rows, out, stride),
            (_, false) => inner::<32, false>(panels, x, rows, out, stride),
            (_, true) => inner::<32, true>(panels, x, rows, out, stride),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn inner<const SUB: usize, const MIN: bool>(
    panels: &[CodePanel<'_>],
    x: QuantizedRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    let (cols, padded) = (x.cols, x.padded);
    let groups = cols / SUB;
    // With one panel the second tile of weights repeats the first and its products are left.
    let pair = [&panels[0], panels.get(1).unwrap_or(&panels[0])];
    for panel in pair {
        assert!(panel.sub == SUB && panel.codes.len() >= cols * PANEL && panel.scale.len() >= groups * PANEL);
        assert!(!MIN || panel.min.len() >= groups * PANEL);
    }
    assert!(rows.start.is_multiple_of(ROW_BLOCK) && rows.end <= padded && padded.is_multiple_of(ROW_BLOCK));
    assert!(x.all.q.len() >= padded * cols && x.d.len() >= padded * cols / 32);
    assert!(x.s32.len() >= padded * cols / 32 && x.s16.len() >= padded * cols / 16);
    assert!(rows.is_empty() || out.len() >= (rows.len() - 1) * stride + panels.len() * PANEL);
    let config = Config::new(SUB);
    // SAFETY: the processor has AMX and the process the permission; `config` is 64 bytes in the layout of palette 1.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &config, options(nostack, preserves_flags)) };
    let mut products = [[Products([[[0; PANEL]; ROWS]; 4]); STEPS]; 2];
    let mut sums = [[_mm512_setzero_ps(); 2]; ROW_BLOCK];
    for first in rows.clone().step_by(ROW_BLOCK) {
        sums.fill([_mm512_setzero_ps(); 2]);
        let chunks = groups.div_ceil(STEPS);
        for chunk in 0..=chunks {
            // While the tiles multiply one chunk, the vector units add up the one before.
            let (multiplied, added) = products.split_at_mut(1);
            let (multiplied, added) =
                if chunk % 2 == 0 { (&mut multiplied[0], &added[0]) } else { (&mut added[0], &multiplied[0]) };
            for step in 0..STEPS {
                let s = chunk * STEPS + step;
                if s < groups {
                    // SAFETY: 32 rows of `cols` codes from row `first` on; `cols * 16` codes in each panel.
                    unsafe {
                        let a = x.all.q.as_ptr().add(first * cols + s * SUB);
                        let at = s * SUB * PANEL;
                        let w = [pair[0].codes.as_ptr().add(at), pair[1].codes.as_ptr().add(at)];
                        multiply(a, a.add(ROWS * cols), cols, w, &mut multiplied[step]);
                    }
                }
                if chunk > 0 {
                    let from = (chunk - 1) * STEPS;
                    let at = first + step * STRIP;
                    let strip = &mut sums[step * STRIP..(step + 1) * STRIP];
                    // SAFETY: scales and minimums of `groups` groups, activations' of `padded` rows (asserted above).
                    unsafe { add_up::<SUB, MIN>(pair, &x, from, STEPS.min(groups - from), at, step, added, strip) };
                }
            }
        }
        for r in 0..ROW_BLOCK.min(rows.end - first) {
            for p in 0..panels.len() {
                // SAFETY: asserted above.
                unsafe {
                    let at = (first - rows.start + r) * stride + p * PANEL;
                    _mm512_storeu_ps(out.as_mut_ptr().add(at), sums[r][p])
                }
            }
        }
    }
    // SAFETY: nothing is left in the tiles.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Adds the products of `steps` groups, from group `from` on, to the sums of the `strip`-th eight rows, which are
/// activations `row` and on.
///
/// # Safety
/// AVX-512; the panels have these groups and the activations these rows.
#[inline(always)]
unsafe fn add_up<const SUB: usize, const MIN: bool>(
    pair: [&CodePanel<'_>; 2],
    x: &QuantizedRows<'_>,
    from: usize,
    steps: usize,
    row: usize,
    strip: usize,
    products: &[Products; STEPS],
    sums: &mut [[__m512; 2]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; STRIP];
        acc.copy_from_slice(sums);
        for step in 0..steps {
            let s = from + step;
            let tiles = &products[step].0;
            let (half, start) = (strip * STRIP / ROWS, strip * STRIP % ROWS);
            let d = x.d.as_ptr().add(s * SUB / 32 * x.padded + row);
            for p in 0..2 {
                let scale = _mm512_loadu_ps(pair[p].scale.as_ptr().add(s * PANEL));
                let dots = tiles[half * 2 + p].as_ptr().add(start);
                for r in 0..STRIP {
                    let factor = _mm512_mul_ps(scale, _mm512_set1_ps(*d.add(r)));
                    let dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots.add(r).cast()));
                    acc[r][p] = _mm512_fmadd_ps(dot, factor, acc[r][p]);
                }
                if MIN {
                    let min = _mm512_loadu_ps(pair[p].min.as_ptr().add(s * PANEL));
                    let sum = (if SUB == 16 { x.s16 } else { x.s32 }).as_ptr().add(s * x.padded + row);
                    for r in 0..STRIP {
                        acc[r][p] = _mm512_fnmadd_ps(min, _mm512_set1_ps(*sum.add(r)), acc[r][p]);
                    }
                }
            }
        }
        sums.copy_from_slice(&acc);
    }
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

fn peak_int8(steps: u64) -> u64 {
    let config = Config::new(64);
    for _ in 0..steps / 256 {
        // SAFETY: the processor has AMX and the process the permission; the tiles hold nothing that is used.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "2:",
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
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
    steps / 256 * 64 * 4 * (2 * 16 * 16 * 64)
}
