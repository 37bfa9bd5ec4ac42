//! The same bytes on every instruction set.

use super::encode_with;
use crate::formats::Format;
use crate::kernels::Isa;

#[test]
fn every_instruction_set_gives_the_same_bytes() {
    // Heavy tails, grids and zeros: what makes candidates tie and sums cancel.
    let mut state = 12345u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut x: Vec<f32> = (0..8 * 1024).map(|_| next() + next() * next() * 4.0).collect();
    for v in &mut x[1024..2048] {
        *v = (*v * 12.0).round() / 8.0;
    }
    x[2048..2300].fill(0.0);
    for (i, v) in x[3072..4096].iter_mut().enumerate() {
        *v *= if i % 100 == 3 { 300.0 } else { 1e-3 };
    }
    let importance: Vec<f32> = (0..1024).map(|i| if i % 50 == 7 { 0.0 } else { (next() * 6.0).exp() }).collect();
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        let encode = |isa, importance| {
            let mut out = vec![0; 8 * format.row_bytes(1024).unwrap_or(0)];
            encode_with(isa, format, &x, 1024, importance, &mut out);
            out
        };
        for importance in [None, Some(&importance[..])] {
            let plain = encode(Isa::Scalar, importance);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let got = encode(isa, importance);
                let first = got.iter().zip(&plain).position(|(a, b)| a != b);
                assert_eq!(first, None, "{format}, {}: byte that differs", isa.name());
            }
        }
    }
}
