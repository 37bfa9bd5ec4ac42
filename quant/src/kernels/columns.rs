//! Blocks of columns of packed weights as panels, for products that sum over weight rows: gradients go back through a
//! matrix by its columns. Written once in plain Rust and compiled for each instruction set.

use super::{PANEL, scalar};
use crate::formats::{BlockFormat, Format, TableFormat, table};
use std::marker::PhantomData;
use std::ops::Range;

/// Unpacks `columns`, which begin with a group of 32, of `rows` packed weight rows, `row_bytes` apart, into panels
/// `[rows][16]` of f32 at distance `ldb`. Columns of a panel behind the last are zeros.
pub type PackColumns =
    fn(data: &[u8], row_bytes: usize, rows: usize, columns: Range<usize>, ldb: usize, out: &mut [f32]);

/// The same as bf16, pairs of rows interleaved, `[rows / 2][16][2]`, with rows of zeros up to a multiple of 32.
pub type PackHalfColumns =
    fn(data: &[u8], row_bytes: usize, rows: usize, columns: Range<usize>, ldb: usize, out: &mut [u16]);

/// A format as groups of 32 weights.
pub(super) trait Weights: 'static {
    /// Weights `32 g .. 32 g + 32` of a packed row; zeros behind its end.
    fn group(row: &[u8], g: usize) -> [f32; 32];
}

/// Integer codes with scales.
pub(super) struct Coded<F>(PhantomData<F>);

impl<F: BlockFormat> Weights for Coded<F> {
    #[inline(always)]
    fn group(row: &[u8], g: usize) -> [f32; 32] {
        let mut out = [0.0; 32];
        F::group(&row[g / F::GROUPS * F::BYTES..][..F::BYTES], g % F::GROUPS).decode(&mut out);
        out
    }
}

/// Codes into a table.
pub(super) struct Table<T>(PhantomData<T>);

impl<T: TableFormat> Weights for Table<T> {
    #[inline(always)]
    fn group(row: &[u8], g: usize) -> [f32; 32] {
        let mut out = [0.0; 32];
        table::block::<T>(&row[g * table::BYTES..][..table::BYTES], &mut out);
        out
    }
}

macro_rules! floats {
    ($($name:ident)*) => {$(
        pub(super) struct $name;

        impl Weights for $name {
            #[inline(always)]
            fn group(row: &[u8], g: usize) -> [f32; 32] {
                let row = &row[32 * g * Format::$name.block_bytes()..];
                let mut out = [0.0; 32];
                if row.len() >= 32 * Format::$name.block_bytes() {
                    // Of known length: a few moves.
                    (0..32).for_each(|i| out[i] = scalar::float_at(Format::$name, row, i));
                } else {
                    let left = row.len() / Format::$name.block_bytes();
                    (0..left).for_each(|i| out[i] = scalar::float_at(Format::$name, row, i));
                }
                out
            }
        }
    )*};
}
floats!(F32 F16 BF16);

#[inline(always)]
pub(super) fn pack<W: Weights>(
    data: &[u8],
    row_bytes: usize,
    rows: usize,
    columns: Range<usize>,
    ldb: usize,
    out: &mut [f32],
) {
    let panels = columns.len().div_ceil(PANEL);
    for r in 0..rows {
        let row = &data[r * row_bytes..][..row_bytes];
        for p in (0..panels).step_by(2) {
            let weights = W::group(row, columns.start / 32 + p / 2);
            for (h, half) in weights.as_chunks::<PANEL>().0.iter().enumerate().take(panels - p) {
                out[(p + h) * ldb + r * PANEL..][..PANEL].copy_from_slice(half);
            }
        }
    }
}

/// Hands out, for a format, the entry of a table of functions generic over [`Weights`].
macro_rules! by_weights {
    ($fn_type:ty, $format:expr, $function:ident) => {{
        use $crate::formats::{BlockFormat, FP4, Format, NF4, Visitor};
        use $crate::kernels::columns::{BF16, Coded, F16, F32, Table};
        struct Pick;
        impl Visitor for Pick {
            type Out = $fn_type;
            fn visit<F: BlockFormat>(self) -> $fn_type {
                $function::<Coded<F>>
            }
        }
        match $format {
            Format::F32 => $function::<F32> as $fn_type,
            Format::F16 => $function::<F16>,
            Format::BF16 => $function::<BF16>,
            Format::NF4 => $function::<Table<NF4>>,
            Format::FP4 => $function::<Table<FP4>>,
            _ => $format.visit(Pick).expect("a block format"),
        }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use by_weights;

/// [`pack`] for every format, as the target's baseline compiles it.
pub(super) fn plain(format: Format) -> PackColumns {
    by_weights!(PackColumns, format, pack)
}

/// [`pack`] for every format, compiled with the target features `$features`.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_columns {
    ($features:literal) => {{
        use std::ops::Range;
        use $crate::kernels::columns::{PackColumns, Weights, by_weights, pack};
        #[target_feature(enable = $features)]
        fn compiled<W: Weights>(
            data: &[u8],
            row_bytes: usize,
            rows: usize,
            columns: Range<usize>,
            ldb: usize,
            out: &mut [f32],
        ) {
            pack::<W>(data, row_bytes, rows, columns, ldb, out)
        }
        fn entry<W: Weights>(
            data: &[u8],
            row_bytes: usize,
            rows: usize,
            columns: Range<usize>,
            ldb: usize,
            out: &mut [f32],
        ) {
            // SAFETY: a table with this entry is handed out only on a processor that has these features.
            unsafe { compiled::<W>(data, row_bytes, rows, columns, ldb, out) }
        }
        |format| by_weights!(PackColumns, format, entry)
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use compiled_columns;
