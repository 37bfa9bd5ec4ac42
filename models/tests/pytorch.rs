//! PyTorch's own files: read without running anything, or refused.

use rushlight_models::checkpoint::pytorch::{self, Pytorch};
use rushlight_models::checkpoint::{Bytes, Checkpoint};
use std::path::Path;

/// A zip archive of stored entries.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    let le = |n: usize, bytes: usize| n.to_le_bytes()[..bytes].to_vec();
    for (name, data) in entries {
        // Flags, method, time, date, checksum, sizes, lengths: what both headers have in common.
        let common = [vec![0; 12], le(data.len(), 4), le(data.len(), 4), le(name.len(), 2), vec![0; 2]].concat();
        directory.extend([b"PK\x01\x02\0\0\0\0".to_vec(), common.clone(), vec![0; 10], le(file.len(), 4)].concat());
        directory.extend(name.as_bytes());
        file.extend([b"PK\x03\x04\0\0".to_vec(), common, name.as_bytes().to_vec(), data.to_vec()].concat());
    }
    let (start, n) = (file.len(), entries.len());
    file.extend(&directory);
    file.extend(
        [b"PK\x05\x06\0\0\0\0".to_vec(), le(n, 2), le(n, 2), le(directory.len(), 4), le(start, 4), vec![0; 2]].concat(),
    );
    file
}

/// `{"w": tensor}` of `elements` halves in storage 0, seen as `shape` with `stride` from `offset` on.
fn pickle(class: &str, elements: u8, offset: u8, shape: [u8; 2], stride: [u8; 2]) -> Vec<u8> {
    let mut code = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n".to_vec();
    code.extend(class.as_bytes());
    code.extend(b"\nX\x01\0\0\x000X\x03\0\0\0cpu");
    code.extend([b'K', elements, b't', b'Q', b'K', offset, b'K', shape[0], b'K', shape[1], 0x86]);
    code.extend([b'K', stride[0], b'K', stride[1], 0x86, 0x89, b'N', b't', b'R', b's', b'.']);
    code
}

fn parse(file: Vec<u8>) -> Result<Pytorch, String> {
    pytorch::parse(Bytes::new(file), Path::new("m.bin")).map_err(|e| e.to_string())
}

fn with(code: &[u8]) -> Result<Pytorch, String> {
    parse(zip(&[("a/data.pkl", code), ("a/data/0", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])]))
}

#[test]
fn a_part_of_a_storage_is_a_tensor() {
    let file = with(&pickle("HalfStorage", 6, 2, [2, 2], [2, 1])).unwrap();
    let tensor = &file.tensors[0];
    assert_eq!((&tensor.info.name[..], &tensor.info.shape[..]), ("w", &[2, 2][..]));
    assert_eq!(tensor.data[..], [5, 6, 7, 8, 9, 10, 11, 12]);
    let file = with(&pickle("IntStorage", 3, 0, [1, 3], [9, 1])).unwrap();
    assert_eq!((&file.raw[0].dtype[..], file.raw[0].data.len()), ("I32", 12));
}

#[test]
fn what_is_refused() {
    let good = pickle("HalfStorage", 6, 0, [3, 2], [2, 1]);
    let replaced = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        with(&[&good[..at], to.as_bytes(), &good[at + from.len()..]].concat()).unwrap_err()
    };
    let system = "cos\nsystem\n(X\x02\0\0\0lstR";
    assert!(replaced("}", system).contains("would run os.system when loaded"));
    assert!(replaced("torch._utils\n_rebuild_tensor_v2", "builtins\neval").contains("builtins.eval"));
    assert!(replaced("ctorch\nHalf", "ctorch\nPhantom").contains("PhantomStorage"));
    assert!(replaced("storage", "stirage").contains("not understood"));
    assert!(replaced("}", "]").contains("damaged"));
    for (code, why) in [
        (pickle("HalfStorage", 6, 0, [2, 3], [1, 2]), "contiguous"),
        (pickle("HalfStorage", 6, 3, [2, 2], [2, 1]), "beyond its storage"),
        (pickle("HalfStorage", 7, 0, [3, 2], [2, 1]), "should hold 7 elements"),
        (b"\x80\x02K\x01.".to_vec(), "not a dictionary"),
        (b"\x80\x02}X\x01\0\0\0wK\x01s.".to_vec(), "'w' is not a tensor"),
        (b"\x80\x02i".to_vec(), "instruction 0x69"),
        (b"\x80\x02h\x05.".to_vec(), "not kept"),
    ] {
        let error = with(&code).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    assert!(parse(zip(&[("a/data.pkl", &good)])).unwrap_err().contains("storage is not in the file"));
    assert!(parse(zip(&[("a/weights", &good)])).unwrap_err().contains("no data.pkl"));
    let big = zip(&[("a/data.pkl", &good), ("a/byteorder", b"big")]);
    assert!(parse(big).unwrap_err().contains("big-endian"));
    assert!(parse(b"\x80\x02\x8a\x0a".to_vec()).unwrap_err().contains("before 1.6"));
    assert!(parse(Vec::new()).unwrap_err().contains("damaged"));
}

/// Cut anywhere, and with any byte changed, the answer is tensors or an error.
#[test]
fn no_damage_brings_it_down() {
    let good = zip(&[("a/data.pkl", &pickle("HalfStorage", 6, 0, [3, 2], [2, 1])), ("a/data/0", &[0; 12])]);
    for len in 0..good.len() {
        assert!(parse(good[..len].to_vec()).is_err());
    }
    for at in 0..good.len() {
        for byte in [0, 1, 0x28, 0x52, 0x7f, 0x80, 0x85, 0xff] {
            let mut bad = good.clone();
            bad[at] = byte;
            if let Ok(file) = parse(bad) {
                assert!(file.tensors.iter().all(|t| t.info.bytes() == Some(t.data.len())));
            }
        }
    }
}

#[test]
fn the_reference_file() {
    let shared = std::env::var_os("RUSHLIGHT_SHARED").map(std::path::PathBuf::from);
    let shared = shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"));
    let (old, safe) = ("llama-torchbin", "llama-sharded-f16");
    let open = |name: &str| Checkpoint::open(&shared.join("fixtures/families").join(name)).unwrap();
    if !shared.join("fixtures/families").join(old).exists() {
        println!("skipped: no reference data");
        return;
    }
    let (old, safe) = (open(old), open(safe));
    assert_eq!(old.tensors().len(), safe.tensors().len());
    for info in safe.tensors() {
        let (a, b) = (old.tensor(&info.name).unwrap(), safe.tensor(&info.name).unwrap());
        assert!(a.info == b.info && a.data[..] == b.data[..], "{}", info.name);
    }
}
