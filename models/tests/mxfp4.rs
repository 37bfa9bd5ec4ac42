//! Experts in MXFP4, as gpt-oss is published: every weight, and what is refused.

mod foreign;

use foreign::{Dir, Random};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_quant::formats::Format;
use serde_json::json;

/// What opening `dir` says.
fn refused(dir: &Dir, config: &serde_json::Value) -> String {
    let error = Checkpoint::open(&dir.write(config)).expect_err("it must be refused").to_string();
    assert_eq!(error.lines().count(), 1);
    error
}

/// Two experts of two rows of 64 weights, and beside them a norm.
fn experts(random: &mut Random) -> Dir {
    let mut dir = Dir::new();
    dir.add("e.up_blocks", "U8", &[2, 2, 2, 16], (0..128).map(|_| random.below(256) as u8).collect());
    dir.add("e.up_scales", "U8", &[2, 2, 2], (0..8).map(|_| random.below(255) as u8).collect());
    dir.floats("norm.weight", &[1.0; 4]);
    dir
}

#[test]
fn codes_and_scales_stay() {
    let (mut random, config) = (Random(10), json!({"quant_method": "mxfp4", "modules_to_not_convert": ["norm"]}));
    let checkpoint = Checkpoint::open(&experts(&mut random).write(&config)).unwrap();
    let tensor = checkpoint.tensor("e.up").unwrap();
    assert_eq!((tensor.info.format, &tensor.info.shape[..]), (Format::MXFP4, &[2, 2, 64][..]));
    assert!(checkpoint.find("norm.weight").is_some() && checkpoint.raw_tensors().is_empty());
    // The same again, from the files' own bytes.
    let mut random = Random(10);
    let blocks: Vec<u8> = (0..128).map(|_| random.below(256) as u8).collect();
    let scales: Vec<u8> = (0..8).map(|_| random.below(255) as u8).collect();
    let levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let want = |i: usize| {
        let code = usize::from(blocks[i / 2] >> (4 * (i % 2)) & 15);
        let sign = if code < 8 { 1.0 } else { -1.0 };
        (sign * levels[code % 8] * 2f64.powi(i32::from(scales[i / 32]) - 127)) as f32
    };
    let mut got = vec![f32::NAN; 256];
    tensor.info.format.decode(&tensor.data, &mut got);
    (0..256).for_each(|i| assert_eq!(got[i], want(i), "weight {i}"));
    // Windows and chosen rows, before and after the whole has been made.
    let all = tensor.data.to_vec();
    let row = tensor.data.len() / 4;
    for fresh in [checkpoint.tensor("e.up").unwrap().data, tensor.data] {
        assert_eq!(fresh.slice(row + 3..3 * row - 5).unwrap()[..], all[row + 3..3 * row - 5]);
        let second = fresh.slice(row..4 * row).unwrap();
        assert_eq!(second.slice(row..2 * row).unwrap()[..], all[2 * row..3 * row]);
        let chosen = second.rows(row, &[2, 0]);
        assert_eq!(chosen[..], [&all[3 * row..], &all[row..2 * row]].concat());
        assert_eq!(chosen.slice(row..2 * row).unwrap().passing()[..], all[row..2 * row]);
        assert!(fresh.slice(0..0).unwrap().is_empty() && fresh.slice(0..4 * row + 1).is_none());
    }
}

#[test]
fn what_does_not_fit_together() {
    let config = json!({"quant_method": "mxfp4"});
    for (name, dtype, shape, parts) in [
        ("e.up_blocks", "", &[0usize][..], &["'e.up_blocks' is missing"][..]),
        ("e.up_scales", "", &[0], &["'e.up_scales' is missing"]),
        ("e.up_blocks", "U8", &[2, 2, 32], &["'e.up_blocks'", "[experts, rows, groups, 16]", "[2, 2, 32]"]),
        ("e.up_blocks", "U8", &[2, 2, 2, 32], &["'e.up_blocks'", "[2, 2, 2, 32]"]),
        ("e.up_blocks", "U8", &[16], &["'e.up_blocks'", "[16]"]),
        ("e.up_blocks", "U8", &[2, 0, 2, 16], &["'e.up_blocks' is empty"]),
        ("e.up_blocks", "F16", &[2, 2, 2, 16], &["'e.up_blocks' should be U8 but is F16"]),
        ("e.up_scales", "U8", &[2, 2, 3], &["'e.up_scales' should be U8 [2, 2, 2] but is U8 [2, 2, 3]"]),
        ("e.up_scales", "F32", &[2, 2, 2], &["'e.up_scales'", "F32"]),
        ("e.up", "F32", &[2, 2, 64], &["'e.up'", "both quantized and not"]),
    ] {
        let mut dir = experts(&mut Random(11));
        dir.remove(name);
        if !dtype.is_empty() {
            let size = ["U8", "F16", "", "F32"].iter().position(|t| *t == dtype).unwrap() + 1;
            dir.add(name, dtype, shape, vec![0; shape.iter().product::<usize>() * size]);
        }
        let error = refused(&dir, &config);
        for part in parts {
            assert!(error.contains(part), "{name} {shape:?}: {error}");
        }
    }
    let mut dir = experts(&mut Random(11));
    dir.change("e.up_scales", 5, &[255]);
    let error = refused(&dir, &config);
    assert!(error.contains("'e.up_scales'") && error.contains("row 2, group 1"), "{error}");
    for name in ["e.up_blocks", "e.up_scales"] {
        dir.remove(name);
    }
    assert!(refused(&dir, &config).contains("mxfp4, but no tensor is"));
}
