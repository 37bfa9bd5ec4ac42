//! Every format against blocks that the PyPI package `gguf` decoded (`tests/fixtures/formats/make.py`).

use proptest::prelude::*;
use rushlight_quant::formats::{BlockFormat, FP4, Format, NF4, TableFormat, Visitor, groups};

/// Packed blocks and the weights they stand for.
fn golden(format: Format) -> (Vec<u8>, Vec<f32>) {
    let path = format!("{}/../tests/fixtures/formats/{format}.bin", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let blocks = bytes.len() / (format.block_bytes() + 4 * format.block_len());
    assert!(blocks >= 12, "{path}");
    let (packed, weights) = bytes.split_at(blocks * format.block_bytes());
    let weights = weights.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    (packed.to_vec(), weights)
}

/// The block formats that files have.
fn coded() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|f| f.is_coded() && !f.is_internal())
}

/// Traits of a format and the codes that it can hold.
struct Traits {
    format: Format,
    has_min: bool,
    halves: bool,
    bytes: usize,
    groups: usize,
}

struct ReadTraits;

impl Visitor for ReadTraits {
    type Out = Traits;
    fn visit<F: BlockFormat>(self) -> Traits {
        Traits { format: F::FORMAT, has_min: F::HAS_MIN, halves: F::HALVES, bytes: F::BYTES, groups: F::GROUPS }
    }
}

fn codes(format: Format) -> Vec<i8> {
    match format {
        Format::Q4_0 => (-8..8).collect(),
        Format::Q4_1 | Format::Q4_K => (0..16).collect(),
        Format::Q5_0 => (-16..16).collect(),
        Format::Q5_1 | Format::Q5_K => (0..32).collect(),
        Format::Q8_0 => (i8::MIN..=i8::MAX).collect(),
        Format::Q2_K => (0..4).collect(),
        Format::Q3_K => (-4..4).collect(),
        Format::Q6_K => (-32..32).collect(),
        Format::IQ4_NL | Format::IQ4_XS => {
            vec![-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
        }
        Format::MXFP4 => vec![-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12],
        _ => unreachable!("{format} is not among the golden ones"),
    }
}

#[test]
fn decodes_to_the_reference_bit_for_bit() {
    for format in Format::ALL.into_iter().filter(|&f| f != Format::F32 && !f.is_internal()) {
        let (packed, want) = golden(format);
        let mut got = vec![f32::NAN; want.len()];
        format.decode(&packed, &mut got);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.to_bits(), want.to_bits(), "{format} weight {i}: {got} is not {want}");
        }
    }
}

#[test]
fn f32_is_copied() {
    let want = [0.0f32, -0.0, 1.5, f32::MIN_POSITIVE / 2.0, f32::MAX, f32::NEG_INFINITY];
    let packed: Vec<u8> = want.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut got = [f32::NAN; 6];
    Format::F32.decode(&packed, &mut got);
    assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits));
}

#[test]
fn groups_hold_the_weights_and_every_code() {
    for format in coded() {
        let (packed, want) = golden(format);
        let mut seen = std::collections::BTreeSet::new();
        for (g, want) in want.as_chunks::<32>().0.iter().enumerate() {
            let group = format.group(&packed, g).expect("a group of the row");
            seen.extend(group.codes);
            let mut got = [0.0; 32];
            group.decode(&mut got);
            assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{format} group {g}");
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), codes(format), "{format}");
        assert_eq!(format.group(&packed, want.len() / 32), None, "{format}: past the end");
        assert_eq!(format.group(&packed, usize::MAX), None, "{format}: far past the end");
    }
    assert!(Format::F16.group(&[0; 64], 0).is_none());
}

#[test]
fn traits_say_what_groups_look_like() {
    for format in coded() {
        let traits = format.visit(ReadTraits).expect("a block format");
        assert_eq!(traits.format, format);
        assert_eq!((traits.bytes, traits.groups), (format.block_bytes(), format.block_len() / 32));
        let (packed, want) = golden(format);
        let all: Vec<_> = (0..want.len() / 32).map(|g| format.group(&packed, g).expect("a group")).collect();
        assert_eq!(all.iter().any(|g| g.min != [0.0; 2]), traits.has_min, "{format}");
        assert_eq!(all.iter().any(|g| g.scale[0] != g.scale[1]), traits.halves, "{format}");
        assert!(traits.halves || all.iter().all(|g| g.min[0] == g.min[1]), "{format}");
    }
    assert!(Format::BF16.visit(ReadTraits).is_none());
}

/// What the formats that are in memory only decode to, by their definitions.
#[test]
fn formats_in_memory_only_decode_as_they_say() {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let nibbles: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    let block = |parts: &[&[u8]]| parts.concat();
    let bytes: Vec<u8> = (0..32).map(|i| (i * 8) as u8).collect();
    let (d, m) = (0.1f32, -3.7f32);
    for (format, block, want) in [
        (Format::Q4_Z, block(&[&half(0.5), &[11], &nibbles]), (|i, _| 0.5 * (i - 11.0)) as fn(f32, f32) -> f32),
        (Format::Q8_F, block(&[&d.to_le_bytes(), &bytes]), |_, b| 0.1 * b),
        (Format::Q8_Z, block(&[&d.to_le_bytes(), &m.to_le_bytes(), &bytes]), |_, b| 0.1 * b + 3.7),
        (Format::NF4, block(&[&d.to_le_bytes(), &nibbles]), |i, _| NF4::TABLE[i as usize] * 0.1),
        (Format::FP4, block(&[&d.to_le_bytes(), &nibbles]), |i, _| FP4::TABLE[i as usize] * 0.1),
    ] {
        assert!(format.is_internal() && !format.is_float());
        let mut got = [f32::NAN; 64];
        format.decode(&[&block[..], &block[..]].concat(), &mut got);
        for (i, got) in got.into_iter().enumerate() {
            let i = i % 32;
            let nibble = if i < 16 { i } else { 31 - i };
            assert_eq!(got, want(nibble as f32, f32::from(bytes[i] as i8)), "{format} {i}");
        }
        assert_eq!(format.group(&block, 0).is_some(), format.is_coded());
        assert_eq!(format.group(&block, 1), None);
        assert_eq!(
            format.visit(ReadTraits).map(|t| (t.format, t.has_min, t.bytes)),
            match format.is_coded() {
                true => Some((format, format == Format::Q8_Z, format.block_bytes())),
                false => None,
            }
        );
    }
    // E2M1 with its smallest step at 1/16 rather than 1/2, over the largest.
    assert_eq!(FP4::TABLE[3], 1.0);
    assert_eq!(FP4::TABLE[9], -0.005_208_333_4);
}

struct Walk<'a>(&'a [u8]);

impl Visitor for Walk<'_> {
    type Out = Vec<rushlight_quant::formats::Group>;
    fn visit<F: BlockFormat>(self) -> Self::Out {
        groups::<F>(self.0).collect()
    }
}

#[test]
fn walking_a_row_gives_its_groups_in_order() {
    for format in coded() {
        let (packed, want) = golden(format);
        let walked = format.visit(Walk(&packed)).expect("a block format");
        assert_eq!(walked.len(), want.len() / 32);
        for (g, walked) in walked.iter().enumerate() {
            assert_eq!(Some(*walked), format.group(&packed, g), "{format} group {g}");
        }
        let cut = format.visit(Walk(&packed[..packed.len() - 1])).expect("a block format");
        assert_eq!(cut.len(), walked.len() - format.block_len() / 32, "{format}: the cut block is left out");
    }
}

#[test]
#[should_panic(expected = "Q4_K: 256 weights")]
fn sizes_that_disagree_are_refused() {
    Format::Q4_K.decode(&[0; 143], &mut [0.0; 256]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes at all: infinite and NaN scales too.
    #[test]
    fn any_block_decodes(bytes in proptest::collection::vec(any::<u8>(), 256)) {
        for format in Format::ALL.into_iter().filter(|f| f.is_coded()) {
            let mut out = vec![0.0; format.block_len()];
            format.decode(&bytes[..format.block_bytes()], &mut out);
            let last = format.group(&bytes[..format.block_bytes()], format.block_len() / 32 - 1).expect("a group");
            let mut want = [0.0; 32];
            last.decode(&mut want);
            for (got, want) in out[format.block_len() - 32..].iter().zip(want) {
                prop_assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{format}");
            }
        }
    }
}
