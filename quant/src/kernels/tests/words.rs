//! 16-bit activations and the panels they meet.

use super::*;

/// Rows of 16-bit activations.
struct Rows {
    q: Vec<i16>,
    d: Vec<f32>,
    s16: Vec<f32>,
    s32: Vec<f32>,
    cols: usize,
}

impl Rows {
    fn new(words: &WordKernels, x: &[f32], cols: usize) -> Self {
        let n = x.len();
        let (q, d) = (vec![0; n], vec![0.0; n / 32]);
        let mut rows = Rows { q, d, s16: vec![0.0; n / 16], s32: vec![0.0; n / 32], cols };
        let out = WordRowMut { q: &mut rows.q, d: &mut rows.d, s16: &mut rows.s16, s32: &mut rows.s32 };
        (words.round)(x, out);
        rows
    }

    fn view(&self) -> WordRows<'_> {
        WordRows { q: &self.q, d: &self.d, s16: &self.s16, s32: &self.s32, cols: self.cols }
    }

    /// What row `r` stands for.
    fn value(&self, r: usize) -> Vec<f64> {
        (r * self.cols..(r + 1) * self.cols).map(|i| f64::from(self.q[i]) * f64::from(self.d[i / 32])).collect()
    }
}

struct Panel {
    codes: Vec<i16>,
    scale: Vec<f32>,
    min: Vec<f32>,
    sub: usize,
}

impl Panel {
    fn new(words: &WordKernels, format: Format, data: &[u8], rows: usize, cols: usize) -> Self {
        let bytes = super::Panel::new(&scalar::kernels(), format, data, rows, cols);
        // What was there before must not shine through.
        let mut panel = Panel {
            codes: vec![77; cols * PANEL],
            scale: vec![77.0; bytes.scale.len()],
            min: vec![77.0; bytes.min.len()],
            sub: bytes.sub,
        };
        (words.pack)(format)(data, rows, cols, &mut panel.codes, &mut panel.scale, &mut panel.min);
        // The same numbers as in bytes, in another order.
        for c in 0..cols {
            for r in 0..PANEL {
                let want = bytes.codes[(c / 4 * PANEL + r) * 4 + c % 4];
                assert_eq!(
                    panel.codes[(c / 2 * PANEL + r) * 2 + c % 2],
                    i16::from(want),
                    "{format} row {r} column {c}"
                );
            }
        }
        assert_eq!(panel.scale[..], bytes.scale[..], "{format}");
        assert_eq!(panel.min[..], bytes.min[..], "{format}");
        panel
    }

    fn view(&self) -> WordPanel<'_> {
        WordPanel { codes: &self.codes, scale: &self.scale, min: &self.min, sub: self.sub }
    }
}

fn with_words() -> impl Iterator<Item = (String, WordKernels)> {
    tables().into_iter().filter_map(|(isa, kernels)| Some((isa, kernels.words?)))
}

#[test]
fn activations_are_rounded_to_words_alike() {
    let mut random = Random(21);
    let mut x = random.numbers(96 * 32);
    x[..32].fill(0.0);
    x[32..64].iter_mut().for_each(|x| *x *= 1e-30);
    x[64..96].iter_mut().for_each(|x| *x *= 1e30);
    let want = Rows::new(&scalar::kernels().words.expect("plain words"), &x, 32);
    for (isa, words) in with_words() {
        let got = Rows::new(&words, &x, 32);
        assert_eq!(got.q, want.q, "{isa}");
        assert_eq!((got.d, got.s16, got.s32), (want.d.clone(), want.s16.clone(), want.s32.clone()), "{isa}");
    }
    for (i, x) in x.iter().enumerate() {
        let value = f32::from(want.q[i]) * want.d[i / 32];
        assert!((value - x).abs() <= want.d[i / 32] * 0.51, "{x} became {value}");
    }
}

/// A number that is none must be seen in the result, not lost in the rounding.
#[test]
fn what_is_no_number_stays_none() {
    for (isa, words) in with_words() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1f32; 64];
            x[40] = bad;
            let x = Rows::new(&words, &x, 64);
            let panel = Panel::new(&words, Format::Q8_0, &Random(22).rows(Format::Q8_0, PANEL, 64), PANEL, 64);
            let mut out = [0f32; PANEL];
            (words.mul)(&[panel.view()], x.view(), 0..1, &mut out, PANEL);
            assert!(out.iter().all(|x| x.is_nan()), "{isa}: {out:?}");
        }
    }
}

#[test]
fn panels_of_words_meet_many_rows() {
    for (isa, words) in with_words() {
        let mut random = Random(23);
        for format in coded() {
            for (cols, (count, used)) in lengths(format).into_iter().zip([(1, 16), (2, 13), (2, 1)]) {
                let weights: Vec<Vec<u8>> = (0..count).map(|_| random.rows(format, used, cols)).collect();
                let panels: Vec<Panel> = weights.iter().map(|w| Panel::new(&words, format, w, used, cols)).collect();
                let views: Vec<WordPanel<'_>> = panels.iter().map(Panel::view).collect();
                let x = Rows::new(&words, &random.numbers(21 * cols), cols);
                for rows in [0..1, 2..6, 0..21] {
                    let stride = count * PANEL + 3;
                    let mut out = vec![f32::NAN; rows.len() * stride];
                    (words.mul)(&views, x.view(), rows.clone(), &mut out, stride);
                    for (at, r) in rows.clone().enumerate() {
                        let value = x.value(r);
                        for (p, w) in weights.iter().enumerate() {
                            for (o, row) in Decoded::rows(format, w, used, cols).iter().enumerate() {
                                let what =
                                    format_args!("{isa} {format} {cols} {rows:?}: row {r}, panel {p}, output {o}");
                                assert_close(out[at * stride + p * PANEL + o], row.dot(&value), what);
                            }
                        }
                        assert!(out[at * stride..][count * PANEL..stride].iter().all(|x| x.is_nan()), "{isa}: gap");
                    }
                }
                // A row's numbers do not depend on the rows beside it.
                let (mut all, mut one) = (vec![0f32; 21 * PANEL], [0f32; PANEL]);
                (words.mul)(&views[..1], x.view(), 0..21, &mut all, PANEL);
                for r in 0..21 {
                    (words.mul)(&views[..1], x.view(), r..r + 1, &mut one, PANEL);
                    assert_eq!(one[..], all[r * PANEL..][..PANEL], "{isa} {format} row {r}");
                }
            }
        }
    }
}
