//! Importance matrices in both forms: what is written is read, and damaged files are refused in one line.

mod builder;

use builder::RawGguf;
use rushlight_models::checkpoint::imatrix::{Entry, Imatrix};
use rushlight_models::checkpoint::{Bytes, gguf};
use std::collections::BTreeMap;
use std::path::Path;

fn sample() -> Imatrix {
    let plain = Entry { sums: vec![4.0, 0.0, 10.0, 1e6], counts: vec![8] };
    let experts = Entry { sums: vec![3.0, 6.0, 0.0, 0.0, 5.0, 15.0], counts: vec![3, 0, 5] };
    Imatrix {
        entries: BTreeMap::from([
            ("blk.0.attn_q.weight".to_string(), plain),
            ("blk.0.ffn_up_exps.weight".to_string(), experts),
        ]),
        datasets: vec!["calibration.txt".into()],
        chunks: 2,
        chunk_size: 4,
    }
}

fn parse(bytes: Vec<u8>) -> Result<Imatrix, String> {
    Imatrix::parse(Bytes::new(bytes), Path::new("x.imatrix")).map_err(|e| e.to_string())
}

fn bytes_of(name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    sample().write(&path).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn gguf_keeps_everything() {
    let bytes = bytes_of("a.gguf");
    assert_eq!(parse(bytes.clone()).unwrap(), sample());
    // As llama.cpp looks for it: matrices are GGUF's outer dimension.
    let file = gguf::parse(Bytes::new(bytes), Path::new("a.gguf")).unwrap();
    let shapes: BTreeMap<_, _> = file.tensors.iter().map(|t| (t.info.name.as_str(), t.info.shape.clone())).collect();
    assert_eq!(shapes["blk.0.ffn_up_exps.weight.in_sum2"], [3, 2]);
    assert_eq!(shapes["blk.0.ffn_up_exps.weight.counts"], [3, 1]);
    assert_eq!(file.metadata.str("general.type"), Some("imatrix"));
}

#[test]
fn importance_is_the_mean_square() {
    let means = |i: &Imatrix, name: &str| i.importance(name).unwrap();
    for name in ["a.gguf", "a.dat"] {
        let read = parse(bytes_of(name)).unwrap();
        assert_eq!(means(&read, "blk.0.attn_q.weight"), [0.5, 0.0, 1.25, 125_000.0], "{name}");
        // An expert that has seen nothing has columns that are all alike.
        assert_eq!(means(&read, "blk.0.ffn_up_exps.weight"), [1.0, 2.0, 1.0, 1.0, 1.0, 3.0], "{name}");
        assert_eq!(read.importance("blk.1.attn_q.weight"), None);
        assert_eq!((read.chunks, &read.datasets[..]), (2, &["calibration.txt".to_string()][..]));
    }
}

/// A `.dat` file of one entry.
fn dat(name: &[u8], calls: i32, len: i32, values: &[f32]) -> Vec<u8> {
    let mut out = [1, name.len() as i32].map(i32::to_le_bytes).concat();
    out.extend(name);
    out.extend([calls, len].map(i32::to_le_bytes).concat());
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    out
}

#[test]
fn the_oldest_files_end_with_the_entries() {
    let read = parse(dat(b"a.weight", 4, 2, &[2.0, 8.0])).unwrap();
    assert_eq!(read.importance("a.weight").unwrap(), [0.5, 2.0]);
    assert_eq!((read.chunks, read.datasets.len()), (0, 0));
}

#[test]
fn damaged_files_are_refused() {
    let error = |bytes: Vec<u8>| parse(bytes).unwrap_err();
    let has = |bytes: Vec<u8>, what: &str| {
        let e = error(bytes);
        assert!(e.contains(what) && e.contains("x.imatrix") && !e.contains('\n'), "{e}");
    };
    has(dat(b"a", 1, 2, &[1.0, f32::NAN]), "'a' has NaN for column 1");
    has(dat(b"a", 1, 2, &[-1.0, 1.0]), "'a' has -1 for column 0");
    has(dat(b"a", 1, 2, &[1.0]), "truncated");
    has(dat(b"a", 1, i32::MAX, &[1.0]), "truncated");
    has(dat(b"a", 1, 0, &[]), "no values");
    has(dat(b"a", -1, 1, &[1.0]), "is -1");
    has(dat(b"\xff", 1, 1, &[1.0]), "not a plain text");
    has(vec![0; 4], "0 entries");
    has(i32::MAX.to_le_bytes().to_vec(), "entries");
    has(b"some text that is long enough".to_vec(), "not an importance matrix");
    let entry = dat(b"a", 1, 1, &[1.0])[4..].to_vec();
    has([&[2, 0, 0, 0], &entry[..], &entry[..]].concat(), "'a' comes twice");

    has(RawGguf::new().build(), "no tensor is called NAME.in_sum2");
    let sums = |dims: &[u64], counts: &[u64]| {
        let raw = RawGguf::new().tensor("a.in_sum2", dims, 0, 0).tensor("a.counts", counts, 0, 64);
        raw.data(128)
    };
    has(RawGguf::new().tensor("a.in_sum2", &[4], 0, 0).data(32).build(), "4 sums and 0 counts");
    has(sums(&[4], &[3]).build(), "4 sums and 3 counts");
    has(RawGguf::new().tensor("a.in_sum2", &[4], 1, 0).data(32).build(), "is F16, not F32");
    let mut negative = sums(&[4], &[1]);
    negative.data = vec![0; 128];
    negative.data[64..68].copy_from_slice(&(-2.0f32).to_le_bytes());
    has(negative.build(), "the count -2");
}

#[test]
fn ten_thousand_damaged_files_do_no_harm() {
    let mut seed = 1u64;
    let mut below = |n: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % n as u64) as usize
    };
    for name in ["a.gguf", "a.dat"] {
        let whole = bytes_of(name);
        let mut read = 0;
        for _ in 0..10_000 {
            let mut bytes = whole.clone();
            for _ in 0..1 + below(4) {
                let at = below(bytes.len());
                match below(4) {
                    0 => bytes.truncate(at.max(1)),
                    1 => bytes[at] ^= 1 << below(8),
                    2 => bytes[at] = 0xff,
                    _ => {
                        let end = (at + 4).min(bytes.len());
                        let wrong = (below(1 << 20) as u32).to_le_bytes();
                        bytes[at..end].copy_from_slice(&wrong[..end - at]);
                    }
                }
            }
            match parse(bytes) {
                Ok(imatrix) => {
                    read += 1;
                    for entry in imatrix.entries.values() {
                        assert_eq!(entry.importance().len(), entry.sums.len());
                    }
                }
                Err(e) => assert!(e.len() < 2000 && !e.contains('\n'), "{e}"),
            }
        }
        assert!(read < 10_000, "{name}: nothing was damaged");
    }
}
