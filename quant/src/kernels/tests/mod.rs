//! Every table of kernels that this machine can run, against f64 arithmetic on the decoded weights.

mod shared_reads;
mod words;

use super::*;
use crate::buffer::Aligned;

/// All tables, with what to call them.
fn tables() -> Vec<(String, Kernels)> {
    let tables = Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| (isa.name().to_string(), isa.kernels()));
    #[cfg(target_arch = "aarch64")]
    let tables = tables.chain(
        neon::Level::ALL
            .into_iter()
            .filter(|level| level.available())
            .map(|level| (format!("neon {level:?}"), neon::kernels_at(level))),
    );
    let tables: Vec<_> = tables.collect();
    println!("{}", tables.iter().map(|t| t.0.as_str()).collect::<Vec<_>>().join(", "));
    tables
}

/// Numbers that are the same in every run (Knuth's 64-bit linear congruential generator).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// -1..1
    fn number(&mut self) -> f32 {
        self.bits() as i32 as f32 / 2f32.powi(31)
    }

    fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.number()).collect()
    }

    /// Packed rows of `cols` weights with every code and scales of both signs.
    fn rows(&mut self, format: Format, rows: usize, cols: usize) -> Vec<u8> {
        if format.is_float() {
            return self.floats(format, rows * cols);
        }
        let mut data: Vec<u8> =
            (0..rows * cols / format.block_len() * format.block_bytes()).map(|_| self.bits() as u8).collect();
        for block in data.chunks_exact_mut(format.block_bytes()) {
            let halves: &[usize] = match format {
                Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
                Format::Q2_K => &[80, 82],
                Format::Q3_K => &[108],
                Format::Q6_K => &[208],
                Format::MXFP4 | Format::Q8_F | Format::Q8_Z | Format::NF4 | Format::FP4 => &[],
                _ => &[0],
            };
            for &at in halves {
                block[at..at + 2].copy_from_slice(&half::f16::from_f32(self.number()).to_le_bytes());
            }
            if format == Format::MXFP4 {
                block[0] = 120 + self.bits() as u8 % 8;
            }
            if format == Format::Q4_Z {
                block[2] %= 17;
            }
            let wide = match format {
                Format::Q8_Z => 2,
                Format::Q8_F | Format::NF4 | Format::FP4 => 1,
                _ => 0,
            };
            for i in 0..wide {
                block[4 * i..4 * i + 4].copy_from_slice(&self.number().to_le_bytes());
            }
        }
        data
    }

    fn floats(&mut self, format: Format, len: usize) -> Vec<u8> {
        self.numbers(len)
            .into_iter()
            .flat_map(|x| match format {
                Format::F32 => x.to_le_bytes().to_vec(),
                Format::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            })
            .collect()
    }
}

/// Rows of 8-bit activations.
struct Activations {
    q: Aligned<i8>,
    d: Aligned<f32>,
    s16: Aligned<f32>,
    s32: Aligned<f32>,
    c16: Aligned<i32>,
    c32: Aligned<i32>,
    cols: usize,
}

impl Activations {
    fn new(kernels: &Kernels, x: &[f32], cols: usize) -> Self {
        let n = x.len();
        let mut a = Activations {
            q: Aligned::zeroed(n),
            d: Aligned::zeroed(n / 32),
            s16: Aligned::zeroed(n / 16),
            s32: Aligned::zeroed(n / 32),
            c16: Aligned::zeroed(n / 16),
            c32: Aligned::zeroed(n / 32),
            cols,
        };
        let all = QuantizedRowMut {
            q: &mut a.q,
            d: &mut a.d,
            s16: &mut a.s16,
            s32: &mut a.s32,
            c16: &mut a.c16,
            c32: &mut a.c32,
        };
        (kernels.quantize)(x, all);
        a
    }

    fn rows(&self) -> QuantizedRows<'_> {
        let all =
            QuantizedRow { q: &self.q, d: &self.d, s16: &self.s16, s32: &self.s32, c16: &self.c16, c32: &self.c32 };
        QuantizedRows { all, cols: self.cols }
    }

    /// What row `r` stands for.
    fn value(&self, r: usize) -> Vec<f64> {
        let at = r * self.cols;
        (at..at + self.cols).map(|i| f64::from(self.q[i]) * f64::from(self.d[i / 32])).collect()
    }
}

/// A packed row decoded, and the size of what each weight is put together from (which bounds its rounding).
struct Decoded {
    weights: Vec<f64>,
    sizes: Vec<f64>,
}

impl Decoded {
    fn new(format: Format, row: &[u8], cols: usize) -> Self {
        let mut weights = vec![0f32; cols];
        format.decode(row, &mut weights);
        let mut sizes: Vec<f64> = weights.iter().map(|w| f64::from(w.abs())).collect();
        if format.is_coded() {
            for (g, sizes) in sizes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let group = format.group(row, g).expect("a group of the row");
                for i in 0..32 {
                    let step = group.scale[i / 16] * f32::from(group.codes[i]);
                    sizes[i] = f64::from(step.abs() + group.min[i / 16].abs());
                }
            }
        }
        Decoded { weights: weights.into_iter().map(f64::from).collect(), sizes }
    }

    fn rows(format: Format, data: &[u8], rows: usize, cols: usize) -> Vec<Self> {
        data.chunks_exact(data.len() / rows).map(|row| Self::new(format, row, cols)).collect()
    }

    /// The product with `x`, and the sum of the sizes of its terms.
    fn dot(&self, x: &[f64]) -> (f64, f64) {
        let (mut dot, mut size) = (0.0, 0.0);
        for ((w, s), x) in self.weights.iter().zip(&self.sizes).zip(x) {
            dot += w * x;
            size += s * x.abs();
        }
        (dot, size)
    }
}

fn assert_close(got: f32, (want, size): (f64, f64), what: std::fmt::Arguments<'_>) {
    assert!((f64::from(got) - want).abs() <= 4e-6 * size, "{what}: {got} is not {want} (terms: {size})");
}

fn coded() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|f| f.is_coded())
}

fn floats() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|f| !f.is_coded())
}

/// Row lengths to try: one block, an odd number of them, many.
fn lengths(format: Format) -> [usize; 3] {
    let len = format.block_len();
    [len, 3 * len, 1024]
}

#[test]
fn activations_are_rounded_alike() {
    let mut random = Random(1);
    let mut x = random.numbers(96 * 32);
    x[..32].fill(0.0);
    x[32..64].iter_mut().for_each(|x| *x *= 1e-30);
    x[64..96].iter_mut().for_each(|x| *x *= 1e30);
    let want = Activations::new(&scalar::kernels(), &x, 32);
    for (isa, kernels) in tables() {
        let got = Activations::new(&kernels, &x, 32);
        assert_eq!(got.q[..], want.q[..], "{isa}");
        assert_eq!(got.d[..], want.d[..], "{isa}");
        assert_eq!(got.s16[..], want.s16[..], "{isa}");
        assert_eq!(got.s32[..], want.s32[..], "{isa}");
        assert_eq!(got.c16[..], want.c16[..], "{isa}");
        assert_eq!(got.c32[..], want.c32[..], "{isa}");
    }
    for (i, x) in x.iter().enumerate() {
        let value = f32::from(want.q[i]) * want.d[i / 32];
        assert!((value - x).abs() <= want.d[i / 32] * 0.500_01, "{x} became {value}");
    }
}

#[test]
fn codes_meet_one_row() {
    for (isa, kernels) in tables() {
        let mut random = Random(2);
        for format in coded() {
            for cols in shared_reads::all_lengths(format) {
                let rows = 7;
                let data = random.rows(format, rows, cols);
                let x = Activations::new(&kernels, &random.numbers(cols), cols);
                let mut out = vec![f32::NAN; rows];
                (kernels.dot_codes)(format)(&data, x.rows().row(0), &mut out);
                for (r, row) in Decoded::rows(format, &data, rows, cols).iter().enumerate() {
                    assert_close(out[r], row.dot(&x.value(0)), format_args!("{isa} {format} {cols} row {r}"));
                }
            }
        }
    }
}

#[test]
fn floats_meet_one_row() {
    for (isa, kernels) in tables() {
        let mut random = Random(3);
        for format in floats() {
            for cols in [1, 4, 15, 16, 17, 32, 64, 96, 100, 1024, 1031] {
                if cols % format.block_len() != 0 {
                    continue;
                }
                let rows = 5;
                let data = random.rows(format, rows, cols);
                let x = random.numbers(cols);
                let mut out = vec![f32::NAN; rows];
                (kernels.dot_floats)(format)(&data, &x, &mut out);
                let x: Vec<f64> = x.into_iter().map(f64::from).collect();
                for (r, row) in Decoded::rows(format, &data, rows, cols).iter().enumerate() {
                    assert_close(out[r], row.dot(&x), format_args!("{isa} {format} {cols} row {r}"));
                }
            }
        }
    }
}

/// A panel in memory of its own.
struct Panel {
    codes: Aligned<i8>,
    scale: Aligned<f32>,
    min: Aligned<f32>,
    sub: usize,
    has_min: bool,
}

impl Panel {
    fn new(kernels: &Kernels, format: Format, data: &[u8], rows: usize, cols: usize) -> Self {
        let sub = if matches!(format, Format::Q2_K | Format::Q3_K | Format::Q6_K) { 16 } else { 32 };
        let has_min =
            matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q2_K | Format::Q4_K | Format::Q5_K | Format::Q8_Z);
        let mut panel = Panel {
            codes: Aligned::zeroed(cols * PANEL),
            scale: Aligned::zeroed(cols / sub * PANEL),
            min: Aligned::zeroed(if has_min { cols / sub * PANEL } else { 0 }),
            sub,
            has_min,
        };
        // What was there before must not shine through.
        panel.codes.fill(77);
        panel.scale.fill(77.0);
        panel.min.fill(77.0);
        (kernels.pack_codes)(format)(data, rows, cols, &mut panel.codes, &mut panel.scale, &mut panel.min);
        panel
    }

    fn view(&self) -> CodePanel<'_> {
        CodePanel {
            codes: &self.codes,
            scale: &self.scale,
            min: if self.has_min { &self.min } else { &[] },
            sub: self.sub,
        }
    }
}

#[test]
fn codes_are_packed_alike() {
    for (isa, kernels) in tables() {
        let mut random = Random(4);
        for format in coded() {
            for (cols, rows) in lengths(format).into_iter().zip([16, 13, 1]) {
                let data = random.rows(format, rows, cols);
                let want = Panel::new(&scalar::kernels(), format, &data, rows, cols);
                let got = Panel::new(&kernels, format, &data, rows, cols);
                let flip = if kernels.biased_codes { 0x80 } else { 0 };
                let codes: Vec<i8> = got.codes.iter().map(|c| (*c as u8 ^ flip) as i8).collect();
                assert_eq!(codes[..], want.codes[..], "{isa} {format}");
                assert_eq!(got.scale[..], want.scale[..], "{isa} {format}");
                assert_eq!(got.min[..], want.min[..], "{isa} {format}");
            }
        }
    }
}

#[test]
fn panels_meet_many_rows() {
    for (isa, kernels) in tables() {
        let mut random = Random(5);
        for format in coded() {
            for (cols, count) in lengths(format).into_iter().zip([1, 2, 2]) {
                let weights: Vec<Vec<u8>> = (0..count).map(|_| random.rows(format, PANEL, cols)).collect();
                let panels: Vec<Panel> = weights.iter().map(|w| Panel::new(&kernels, format, w, PANEL, cols)).collect();
                let panels: Vec<CodePanel<'_>> = panels.iter().map(Panel::view).collect();
                let decoded: Vec<Decoded> =
                    weights.iter().flat_map(|w| Decoded::rows(format, w, PANEL, cols)).collect();
                for rows in [0..1, 0..4, 0..21] {
                    let x = Activations::new(&kernels, &random.numbers(21 * cols), cols);
                    let stride = count * PANEL + 3;
                    let mut out = vec![f32::NAN; rows.len() * stride];
                    (kernels.mul_panels)(&panels, x.rows(), rows.clone(), &mut out, stride);
                    for (at, r) in rows.clone().enumerate() {
                        let value = x.value(r);
                        for o in 0..count * PANEL {
                            let want = decoded[o].dot(&value);
                            assert_close(
                                out[at * stride + o],
                                want,
                                format_args!("{isa} {format} {cols} {rows:?}: row {r}, output {o}"),
                            );
                        }
                        assert!(out[at * stride..][count * PANEL..stride].iter().all(|x| x.is_nan()), "{isa}: gap");
                    }
                }
            }
        }
    }
}

/// A row's numbers do not depend on the rows beside it.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    for (isa, kernels) in tables() {
        let mut random = Random(6);
        for format in coded() {
            let cols = 512;
            let panel = Panel::new(&kernels, format, &random.rows(format, PANEL, cols), PANEL, cols);
            let x = Activations::new(&kernels, &random.numbers(19 * cols), cols);
            let mut all = vec![0f32; 19 * PANEL];
            (kernels.mul_panels)(&[panel.view()], x.rows(), 0..19, &mut all, PANEL);
            for r in 0..19 {
                let mut some = vec![0f32; (r + 1) * PANEL];
                (kernels.mul_panels)(&[panel.view()], x.rows(), 0..r + 1, &mut some, PANEL);
                assert_eq!(some[r * PANEL..], all[r * PANEL..][..PANEL], "{isa} {format} row {r}");
            }
        }
    }
}

#[test]
fn floats_are_packed_alike() {
    for (isa, kernels) in tables() {
        let mut random = Random(7);
        for format in floats() {
            for (rows, cols) in [(16, 64), (16, 37), (9, 16), (9, 32), (1, 3), (1, 96)] {
                if cols % format.block_len() != 0 {
                    continue;
                }
                let data = random.rows(format, rows, cols);
                let (mut want, mut got) = (vec![77f32; cols * PANEL], vec![77f32; cols * PANEL]);
                (scalar::kernels().pack_floats)(format)(&data, rows, cols, &mut want);
                (kernels.pack_floats)(format)(&data, rows, cols, &mut got);
                assert_eq!(got, want, "{isa} {format} {rows} x {cols}");
            }
        }
    }
}

#[test]
fn products_of_floats() {
    for (isa, kernels) in tables() {
        let mut random = Random(8);
        for (m, n, k) in [(1, 16, 64), (4, 32, 33), (7, 40, 128), (13, 5, 3), (3, 17, 1), (30, 48, 200)] {
            let shape = GemmShape { m, n, k, lda: k + 2, ldb: (k + 1) * PANEL, ldc: n + 3, add: false };
            let a = random.numbers(m * shape.lda);
            let b = random.numbers(n.div_ceil(PANEL) * shape.ldb);
            let start = random.numbers(m * shape.ldc);
            for add in [false, true] {
                let mut c = start.clone();
                (kernels.gemm)(GemmShape { add, ..shape }, &a, &b, &mut c);
                for r in 0..m {
                    for j in 0..shape.ldc {
                        let (mut dot, mut size) = (0f64, 1e-30);
                        let before = start[r * shape.ldc + j];
                        if add || j >= n {
                            dot = f64::from(before);
                            size = dot.abs();
                        }
                        for k in 0..if j < n { k } else { 0 } {
                            let x = f64::from(a[r * shape.lda + k]);
                            let term = x * f64::from(b[j / PANEL * shape.ldb + k * PANEL + j % PANEL]);
                            dot += term;
                            size += term.abs();
                        }
                        let got = c[r * shape.ldc + j];
                        assert_close(got, (dot, size), format_args!("{isa} {shape:?} add {add}: [{r}, {j}]"));
                    }
                }
            }
        }
    }
}

#[test]
fn exponentials_and_their_sum() {
    let mut random = Random(12);
    for (isa, kernels) in tables() {
        for len in (0..70).chain([256, 1000]) {
            let most = random.number() * 20.0;
            // Most are near the largest, some beyond what a float holds the exponential of.
            let mut x: Vec<f32> = (0..len).map(|i| most - random.number().abs() * [1.0, 20.0, 130.0][i % 3]).collect();
            if len > 3 {
                (x[1], x[2]) = (f32::NEG_INFINITY, most);
            }
            let want: Vec<f64> = x.iter().map(|x| f64::from(x - most).exp()).collect();
            let mut plain = x.clone();
            let plain_sum = lanes::exp_sum(most, &mut plain);
            let sum = (kernels.lanes.exp_sum)(most, &mut x);
            assert_eq!((&x, sum), (&plain, plain_sum), "{isa} {len}: not the bits of the plain function");
            for (got, want) in x.iter().zip(&want) {
                // Two units in the last place, or of the smallest numbers.
                let near = (f64::from(*got) - want).abs() <= want * 2f64.powi(-22) + 2f64.powi(-148);
                assert!(near, "{isa} {len}: {got:e} {want:e}");
            }
            let want: f64 = want.iter().sum();
            assert!((f64::from(sum) - want).abs() <= want * 1e-6, "{isa} {len}: {sum} {want}");
        }
        let mut x = [0.0, f32::NAN, -1.0];
        assert!((kernels.lanes.exp_sum)(0.0, &mut x).is_nan() && x[1].is_nan() && x[0] == 1.0, "{isa}");
    }
}

#[test]
fn halves_to_floats_and_back() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let mut random = Random(9);
    // Any numbers, those near the halves' range, and the points half-way between two halves.
    let mut floats: Vec<f32> = (0..20_000).map(|_| f32::from_bits(random.bits())).collect();
    floats.extend((0..20_001).map(|_| random.number() * 2f32.powi((random.bits() % 45) as i32 - 28)));
    floats.extend(all.iter().map(|h| f32::from_bits(half::f16::from_bits(*h).to_f32().to_bits() | 0x1000)));
    for (isa, kernels) in tables() {
        let mut wide = vec![0f32; all.len()];
        (kernels.f16_to_f32)(&all, &mut wide);
        for (h, got) in all.iter().zip(&wide) {
            let want = half::f16::from_bits(*h).to_f32();
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{isa} {h:#06x}");
        }
        let mut narrow = vec![0u16; floats.len()];
        (kernels.f32_to_f16)(&floats, &mut narrow);
        for (x, got) in floats.iter().zip(&narrow) {
            let want = half::f16::from_f32(*x);
            let got = half::f16::from_bits(*got);
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{isa} {x:e}: {got} {want}");
        }
        let mut few = [0f32; 3];
        (kernels.f16_to_f32)(&[0x3c00, 0xc000, 0x0001], &mut few);
        assert_eq!(few, [1.0, -2.0, 2f32.powi(-24)], "{isa}");
    }
}

/// The three levels differ in how they multiply integers, which is exact.
#[cfg(target_arch = "aarch64")]
#[test]
fn neon_levels_give_the_same_bits() {
    let cols = 768;
    for format in coded() {
        let mut random = Random(10);
        let data = random.rows(format, PANEL, cols);
        let x = random.numbers(11 * cols);
        let mut seen: Option<(Vec<u32>, Vec<u32>)> = None;
        for level in neon::Level::ALL.into_iter().filter(|l| l.available()) {
            let kernels = neon::kernels_at(level);
            let x = Activations::new(&kernels, &x, cols);
            let panel = Panel::new(&kernels, format, &data, PANEL, cols);
            let (mut few, mut many) = (vec![0f32; PANEL], vec![0f32; 11 * PANEL]);
            (kernels.dot_codes)(format)(&data, x.rows().row(0), &mut few);
            (kernels.mul_panels)(&[panel.view()], x.rows(), 0..11, &mut many, PANEL);
            let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect();
            let got: (Vec<u32>, Vec<u32>) = (bits(few), bits(many));
            if let Some(want) = &seen {
                assert_eq!(&got, want, "{format} {level:?}");
            }
            seen = Some(got);
        }
    }
}
