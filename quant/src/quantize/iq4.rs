//! IQ4_NL and IQ4_XS, as ggml's reference quantizer encodes them.

use super::float::finite_f16;
use super::groups::{Lanes, clamp, groups, nearest, reciprocal, squares, sums, weighted};
use super::kquants::{largest, mean_square, store_scales};
use super::pack::put;
use super::search::{Found, Grid, Iq4, scale};
use crate::formats::Format;

/// Blocks of IQ4_NL and groups of IQ4_XS that are searched side by side.
const SIDE: usize = 8;
/// Weights of a group.
const GROUP: usize = 32;

/// Encodes one row of IQ4_NL.
#[inline(always)]
pub(super) fn encode_nl(row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, out)) in row.chunks(SIDE * GROUP).zip(out.chunks_mut(SIDE * 18)).enumerate() {
        let groups = groups::<GROUP, SIDE>(x);
        let squares = squares(&groups);
        let w = match importance {
            None => squares,
            Some(all) => {
                let spread = sums(&squares).map(|sum| sum * (2.0 / GROUP as f32));
                weighted(&all[SIDE * GROUP * b..][..x.len()], &groups, spread)
            }
        };
        let found: Found<GROUP, SIDE> = scale::<Iq4, GROUP, SIDE>(&groups, &w);
        let codes = levels(&groups, &found.scale);
        for (k, block) in out.as_chunks_mut::<18>().0.iter_mut().enumerate() {
            block[..2].copy_from_slice(&finite_f16(found.scale[k]).to_le_bytes());
            put(Format::IQ4_NL, block, 0, &codes[k]);
        }
    }
}

/// Encodes one row of IQ4_XS.
#[inline(always)]
pub(super) fn encode_xs(row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, block)) in row.as_chunks().0.iter().zip(out.as_chunks_mut::<136>().0).enumerate() {
        let groups = groups::<GROUP, SIDE>(x);
        let w = match importance {
            None => squares(&groups),
            Some(all) => weighted(&all[SIDE * GROUP * b..][..x.len()], &groups, [2.0 * mean_square(x); SIDE]),
        };
        let found = scale::<Iq4, GROUP, SIDE>(&groups, &w);
        let d = -largest(&found.scale) / 32.0;
        let small = found.scale.map(|s| nearest(clamp(reciprocal(d) * s, -32.0, 31.0)));
        store_scales(Format::IQ4_XS, block, finite_f16(d), &small.map(|s| s as i8));
        // By the block's scale as it was before f16 rounded it.
        for (g, codes) in levels(&groups, &small.map(|s| d * s)).iter().enumerate() {
            put(Format::IQ4_XS, block, g, codes);
        }
    }
}

/// The level nearest to each weight, group by group.
#[inline(always)]
fn levels(x: &[Lanes<SIDE>; GROUP], scale: &Lanes<SIDE>) -> [[i8; GROUP]; SIDE] {
    let inverse = scale.map(reciprocal);
    let mut levels = [[0; GROUP]; SIDE];
    for i in 0..GROUP {
        for k in 0..SIDE {
            levels[k][i] = Iq4::round(inverse[k] * x[i][k]) as i8;
        }
    }
    levels
}
