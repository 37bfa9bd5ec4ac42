//! GGUF files that lie, stop short or do not belong together: each is refused in one line that names the fault.

mod builder;

use builder::{RawGguf, string};
use rushlight_models::checkpoint::{Bytes, Checkpoint, Metadata, TensorInfo, Value, gguf};
use rushlight_quant::formats::Format;
use std::path::Path;

fn parse(bytes: Vec<u8>) -> Result<gguf::Gguf, String> {
    gguf::parse(Bytes::new(bytes), Path::new("m.gguf")).map_err(|error| error.to_string())
}

/// Asserts that `file` is refused in one line that has all of `words` and names the file.
#[track_caller]
fn refused(file: &RawGguf, words: &[&str]) {
    let error = parse(file.build()).unwrap_err();
    assert!(error.starts_with("m.gguf: ") && error.lines().count() == 1, "{error}");
    for word in words {
        assert!(error.contains(word), "'{word}' is not in: {error}");
    }
}

/// A right file: two tensors and an entry of each kind.
fn right() -> RawGguf {
    let words = [1u64.to_le_bytes().to_vec(), string("x")].concat();
    RawGguf::new()
        .entry("general.architecture", 8, &string("llama"))
        .u32("llama.block_count", 1)
        .entry("a.float", 6, &1.5f32.to_le_bytes())
        .entry("a.bool", 7, &[1])
        .entry("a.signed", 11, &(-3i64).to_le_bytes())
        .entry("a.words", 9, &[&8u32.to_le_bytes()[..], &words].concat())
        .tensor("a", &[32, 2], 8, 0)
        .tensor("b", &[4], 0, 96)
        .data(112)
}

#[test]
fn a_right_file_is_read() {
    for version in [2, 3] {
        let file = parse(RawGguf { version, ..right() }.build()).unwrap();
        assert_eq!(file.metadata.str("general.architecture"), Some("llama"));
        assert_eq!(file.metadata.f32("a.float"), Some(1.5));
        assert_eq!(file.metadata.bool("a.bool"), Some(true));
        assert!(matches!(file.metadata.get("a.signed"), Some(Value::Signed(-3))));
        assert_eq!(file.metadata.array("a.words").unwrap().strings().collect::<Vec<_>>(), ["x"]);
        let [a, b] = &file.tensors[..] else { panic!() };
        assert_eq!(a.info, TensorInfo { name: "a".into(), format: Format::Q8_0, shape: vec![2, 32] });
        assert_eq!((a.data.len(), a.data[0]), (68, 0));
        assert_eq!((&b.info.shape[..], &b.data[..2]), (&[4][..], &[96, 97][..]));
    }
}

#[test]
fn magic_version_and_byte_order() {
    for (start, word) in [
        (&b"nope"[..], "GGUF"),
        (b"tjgg1234", "before GGUF"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04abc", "PyTorch"),
        (b"GGUF", "ends inside the version"),
        (b"", "GGUF"),
    ] {
        let error = parse(start.to_vec()).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    refused(&RawGguf { version: 1, ..right() }, &["version 1"]);
    refused(&RawGguf { version: 4, ..right() }, &["version 4"]);
    refused(&RawGguf { version: 3u32.swap_bytes(), ..right() }, &["big-endian"]);
}

#[test]
fn every_truncation_is_refused() {
    let whole = right().build();
    for len in 0..whole.len() {
        let error = parse(whole[..len].to_vec()).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let error = parse(whole[..whole.len() - 1].to_vec()).unwrap_err();
    for word in ["'b'", "download it again", &whole.len().to_string(), &(whole.len() - 1).to_string()] {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn inflated_counts_and_lengths() {
    for count in [3, 1 << 20, 1 << 32, 1 << 62, u64::MAX] {
        refused(&RawGguf { tensor_count: count, ..right() }, &[]);
        refused(&RawGguf { entry_count: count.max(9), ..right() }, &[]);
    }
    refused(&RawGguf { tensor_count: u64::MAX, ..right() }, &["18446744073709551615 tensors", "download it again"]);
    refused(&RawGguf { entry_count: 1 << 40, ..right() }, &["metadata entries", "download it again"]);
    for len in [200, 1 << 31, 1 << 63, u64::MAX] {
        // A string value, a key, a tensor's name, a string in an array.
        refused(&RawGguf::new().entry("k", 8, &len.to_le_bytes()), &["k", "truncated or corrupt"]);
        let file = RawGguf::new();
        refused(
            &RawGguf { entries: [&len.to_le_bytes()[..], &[0; 40]].concat(), entry_count: 1, ..file.clone() },
            &["key"],
        );
        refused(&RawGguf { infos: [&len.to_le_bytes()[..], &[0; 40]].concat(), tensor_count: 1, ..file }, &["name"]);
        let array = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &len.to_le_bytes()].concat();
        refused(&RawGguf::new().entry("k", 9, &array), &["k", "truncated or corrupt"]);
        // The length of an array of every element type.
        for kind in (0u32..=12).filter(|&kind| kind != 9) {
            let array = [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
            refused(&RawGguf::new().entry("k", 9, &array), &["k", "truncated or corrupt"]);
        }
    }
}

#[test]
fn metadata_that_is_not_what_it_says() {
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &4u32.to_le_bytes(), &0u64.to_le_bytes()].concat();
    refused(&RawGguf::new().entry("k", 9, &nested), &["'k'", "array of arrays"]);
    refused(&RawGguf::new().u32("k", 1).u32("k", 1), &["'k'", "twice"]);
    refused(&RawGguf::new().entry("k", 13, &[0; 8]), &["'k'", "type 13"]);
    refused(&RawGguf::new().entry("k", 9, &[13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), &["'k'", "type 13"]);
    refused(&RawGguf::new().entry("", 4, &[0; 12]), &["key", "0 bytes"]);
    refused(&RawGguf::new().entry(&"k".repeat(70_000), 4, &[0; 4]), &["key", "70000 bytes"]);
    let not_text = [&1u64.to_le_bytes()[..], &[0xff]].concat();
    refused(&RawGguf::new().entry("k", 8, &not_text), &["k", "UTF-8"]);
    let array = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &not_text].concat();
    refused(&RawGguf::new().entry("k", 9, &array), &["k", "UTF-8"]);
    // An array of another type than expected reads as empty, never as other bytes.
    let bytes = [&0u32.to_le_bytes()[..], &3u64.to_le_bytes(), &[1, 2, 3]].concat();
    let file = parse(RawGguf::new().entry("k", 9, &bytes).u32("n", 7).build()).unwrap();
    let array = file.metadata.array("k").unwrap();
    assert!(array.floats().is_empty() && array.strings().next().is_none());
    assert_eq!(array.ints().collect::<Vec<_>>(), [1, 2, 3]);
    assert!(
        file.metadata.str("n").is_none() && file.metadata.array("n").is_none() && file.metadata.bool("n").is_none()
    );
}

#[test]
fn alignments() {
    for alignment in [0, 1, 3, 4, 48, 1 << 21, 1 << 31, u32::MAX] {
        refused(&right().u32("general.alignment", alignment), &["general.alignment", &alignment.to_string()]);
    }
    refused(&right().entry("general.alignment", 10, &32u64.to_le_bytes()), &["general.alignment", "U64"]);
    refused(&right().entry("general.alignment", 8, &string("32")), &["general.alignment", "String"]);
    refused(&right().u32("general.alignment", 64), &["'b'", "not a multiple of 64"]);
    // Data that begin after padding which the file does not have.
    refused(
        &RawGguf::new().u32("general.alignment", 1 << 20).tensor("a", &[4], 0, 0).data(64),
        &["'a'", "1048592 bytes"],
    );
    let file = parse(RawGguf::new().u32("general.alignment", 8).tensor("a", &[2], 0, 8).data(16).build()).unwrap();
    assert_eq!(file.tensors[0].data[0], 8, "data begin at a multiple of 8, here also of 32");
}

#[test]
fn shapes() {
    let with = |dims: &[u64], kind| RawGguf::new().tensor("w", dims, kind, 0).data(64);
    for dims in
        [&[u64::MAX][..], &[1 << 32, 1 << 32], &[1 << 63, 2], &[1 << 16; 4], &[32, u64::MAX / 32, 3], &[1 << 61]]
    {
        refused(&with(dims, 0), &["'w'"]);
        refused(&with(dims, 8), &["'w'"]);
    }
    refused(&with(&[1 << 32, 1 << 32], 0), &["'w'", "impossible shape"]);
    refused(&with(&[4, 0], 0), &["'w'", "dimension of 0"]);
    refused(&with(&[], 0), &["'w'", "0 dimensions"]);
    refused(&with(&[1; 5], 0), &["'w'", "5 dimensions"]);
    let mut many = with(&[], 0);
    let at = many.infos.len() - 16;
    many.infos[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    refused(&many, &["'w'", "4294967295 dimensions"]);
    refused(&with(&[31, 2], 2), &["'w'", "blocks of 32 weights of Q4_0"]);
    refused(&with(&[128, 2], 12), &["'w'", "blocks of 256 weights of Q4_K"]);
}

#[test]
fn types() {
    let with = |kind| RawGguf::new().tensor("blk.0.w", &[256], kind, 0).data(1024);
    refused(&with(16), &["'blk.0.w'", "IQ2_XXS", "16", "Q4_K_M"]);
    refused(&with(34), &["'blk.0.w'", "TQ1_0", "34"]);
    refused(&with(4), &["'blk.0.w'", "Q4_2"]);
    refused(&with(777), &["'blk.0.w'", "unknown", "777"]);
    refused(&with(u32::MAX), &["'blk.0.w'", "unknown"]);
    for format in Format::ALL {
        let Some(number) = gguf::number(format) else {
            assert!(format.is_internal());
            continue;
        };
        let file = parse(with(number).build()).unwrap();
        assert_eq!(file.tensors[0].info.format, format);
        assert_eq!(gguf::format(number), Some(format));
    }
}

#[test]
fn places() {
    let with = |offset| RawGguf::new().tensor("w", &[8], 0, offset).data(64);
    assert!(parse(with(32).build()).is_ok());
    for offset in [64, 1 << 40, 1 << 63, u64::MAX - 31] {
        refused(&with(offset), &["'w'"]);
    }
    refused(&with(64), &["'w'", "beyond the end", "download it again"]);
    refused(&with(u64::MAX - 31), &["'w'", "impossible offset"]);
    refused(&with(8), &["'w'", "offset 8", "multiple of 32"]);
    let two = |at| RawGguf::new().tensor("a", &[16], 0, 0).tensor("b", &[8], 0, at).data(128);
    assert!(parse(two(64).build()).is_ok());
    refused(&two(32), &["'a'", "'b'", "overlap"]);
    refused(&two(0), &["'a'", "'b'", "overlap"]);
    refused(&RawGguf::new().tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64), &["'a'", "twice"]);
}

#[test]
fn metadata_is_readable_where_tensors_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, right().tensor("c", &[256], 16, 0).build()).unwrap();
    assert_eq!(gguf::read_metadata(&path).unwrap().str("general.architecture"), Some("llama"));
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("IQ2_XXS") && error.contains("m.gguf"), "{error}");
}

#[test]
fn what_is_not_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(open(&dir.path().join("none.gguf")).contains("none.gguf: No such file"));
    std::fs::write(dir.path().join("empty.gguf"), "").unwrap();
    assert!(open(&dir.path().join("empty.gguf")).contains("empty"));
    assert!(gguf::read_metadata(dir.path()).unwrap_err().to_string().contains("not a regular file"));
    if cfg!(unix) {
        assert!(open(Path::new("/dev/zero")).contains("not a regular file"));
    }
    std::fs::write(dir.path().join("m.gguf"), right().build()).unwrap();
    assert!(open(dir.path()).contains("a directory of GGUF files: name one"));
    let checkpoint = Checkpoint::open(&dir.path().join("m.gguf")).unwrap();
    let error = checkpoint.tensor("none").unwrap_err().to_string();
    assert!(error.contains("'none'") && error.contains("m.gguf"), "{error}");
    assert_eq!(checkpoint.bytes(), 68 + 16);
}

/// A part of a split set with one tensor called `name`.
fn part(number: u16, count: u16, name: &str) -> RawGguf {
    RawGguf::new()
        .u16("split.no", number)
        .u16("split.count", count)
        .entry("split.tensors.count", 5, &3i32.to_le_bytes())
        .tensor(name, &[8], 0, 0)
        .data(32)
}

#[test]
fn split_sets() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let put = |name: &str, part: RawGguf| std::fs::write(file(name), part.build()).unwrap();
    let open = |name: &str| Checkpoint::open(&file(name)).map_err(|error| error.to_string());
    let (one, two, three) = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf");
    put(one, part(0, 3, "a"));
    put(three, part(2, 3, "c"));
    assert!(open(one).unwrap_err().contains("m-00002-of-00003.gguf"));
    put(two, part(1, 3, "b"));
    let whole = open(one).unwrap();
    assert_eq!(whole.tensors().iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(whole.tensor("c").unwrap().data.len(), 32);
    let error = open(two).unwrap_err();
    assert!(error.contains("part 2 of 3") && error.contains(one), "{error}");

    // Parts that do not belong together.
    put(two, part(2, 3, "b"));
    assert!(open(one).unwrap_err().contains("part 2 of 3"));
    put(two, RawGguf::new());
    assert!(open(one).unwrap_err().contains(two));
    put(two, part(1, 3, "a"));
    assert!(open(one).unwrap_err().contains("'a' comes twice"));
    put(two, part(1, 3, "b").tensor("d", &[8], 0, 32).data(64));
    assert!(open(one).unwrap_err().contains("4 tensors of 3"));
    put(two, RawGguf { data: vec![], ..part(1, 3, "b") });
    assert!(open(one).unwrap_err().contains(two));

    // Names and numbers from which the others cannot be found.
    put("renamed.gguf", part(0, 3, "a"));
    assert!(open("renamed.gguf").unwrap_err().contains("-00001-of-00003.gguf"));
    put("n-00001-of-65535.gguf", part(0, 65535, "a"));
    assert!(open("n-00001-of-65535.gguf").unwrap_err().contains("n-00002-of-65535.gguf"));
    let huge = RawGguf::new().entry("split.no", 10, &u64::MAX.to_le_bytes());
    put("h.gguf", huge.clone().entry("split.count", 10, &u64::MAX.to_le_bytes()));
    assert!(open("h.gguf").unwrap_err().contains("split.no"));
    put("h.gguf", RawGguf::new().u16("split.count", 3));
    assert!(open("h.gguf").unwrap_err().contains("split.no"));
}

#[test]
fn written_files_read_back() {
    use rushlight_models::checkpoint::Array;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.gguf");
    let mut metadata = Metadata::default();
    let mut set = |key: &str, value| metadata.0.insert(key.to_owned(), value);
    set("general.architecture", Value::String("llama".into()));
    set("general.alignment", Value::Unsigned(8));
    set("a.first", Value::Unsigned(u64::MAX));
    set("b.signed", Value::Signed(-5));
    set("b.wide", Value::Signed(i64::MIN));
    set("c.float", Value::Float(0.5));
    set("d.bool", Value::Bool(true));
    set("e.words", Value::Array(Array::of_strings(["", "é", "x y"])));
    set("e.ints", Value::Array(Array::of_i32(&[1, -2])));
    set("e.floats", Value::Array(Array::of_f32(&[1.5, -2.5])));
    let info = |name: &str, format, shape: &[usize]| TensorInfo { name: name.into(), format, shape: shape.to_vec() };
    let infos = [
        info("z", Format::Q4_K, &[3, 256]),
        info("a", Format::F32, &[5]),
        info("s", Format::F16, &[]),
        info("b", Format::BF16, &[2, 2, 4]),
    ];
    let bytes = |t: &TensorInfo, salt: usize| (0..t.bytes().unwrap()).map(|i| (i * 7 + salt) as u8).collect::<Vec<_>>();

    let mut writer = gguf::Writer::create(&path, &metadata, &infos).unwrap();
    for (i, t) in infos.iter().enumerate() {
        bytes(t, i).chunks(100).for_each(|rows| writer.write(&t.name, rows).unwrap());
        assert!(!path.exists());
    }
    writer.finish().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let file = std::fs::read(&path).unwrap();
    assert_eq!(&file[32..52], b"general.architecture", "told first");
    let read = Checkpoint::open(&path).unwrap();
    for (i, t) in infos.iter().enumerate() {
        let tensor = read.tensor(&t.name).unwrap();
        assert_eq!(tensor.data[..], bytes(t, i)[..]);
        assert_eq!(tensor.info.shape, if t.shape.is_empty() { vec![1] } else { t.shape.clone() });
        assert!((tensor.data.as_ptr() as usize).is_multiple_of(32), "mapped files begin on a page");
    }
    let m = read.metadata().unwrap();
    assert!(m.get("general.alignment").is_none());
    assert_eq!((m.u64("a.first"), m.f32("c.float"), m.bool("d.bool")), (Some(u64::MAX), Some(0.5), Some(true)));
    assert!(matches!((m.get("b.signed"), m.get("b.wide")), (Some(Value::Signed(-5)), Some(Value::Signed(i64::MIN)))));
    assert_eq!(m.array("e.words").unwrap().strings().collect::<Vec<_>>(), ["", "é", "x y"]);
    assert_eq!(m.array("e.ints").unwrap().ints().collect::<Vec<_>>(), [1, -2]);
    assert_eq!(m.array("e.floats").unwrap().floats(), [1.5, -2.5]);

    // The same again over what was read gives the same file.
    let mut again = gguf::Writer::create(&path, m, read.tensors()).unwrap();
    read.tensors().iter().for_each(|t| again.write(&t.name, &read.tensor(&t.name).unwrap().data).unwrap());
    again.finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), file);
}

#[test]
fn unfinished_files_are_never_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.gguf");
    std::fs::write(&path, "before").unwrap();
    let infos = [TensorInfo { name: "a".into(), format: Format::F32, shape: vec![2] }];
    let create = |infos: &[TensorInfo]| gguf::Writer::create(&path, &Metadata::default(), infos);
    let say = |error: rushlight_models::Error| error.to_string();

    let mut writer = create(&infos).unwrap();
    assert!(say(writer.write("b", &[0; 4]).unwrap_err()).contains("'b' was written, a was due"));
    assert!(say(writer.write("a", &[0; 9]).unwrap_err()).contains("more than its 8 bytes"));
    writer.write("a", &[0; 4]).unwrap();
    assert!(say(writer.finish().unwrap_err()).contains("'a' was not written whole"));
    drop(create(&infos).unwrap());
    let mut writer = create(&infos).unwrap();
    writer.write("a", &[0; 8]).unwrap();
    assert!(say(writer.write("a", &[0]).unwrap_err()).contains("no further tensor was due"));
    drop(writer);
    assert!(say(create(&[infos.clone(), infos.clone()].concat()).unwrap_err()).contains("twice"));
    let long = TensorInfo { name: "n".repeat(64), ..infos[0].clone() };
    assert!(say(create(&[long]).unwrap_err()).contains("cannot hold"));
    let ragged = TensorInfo { format: Format::Q4_0, ..infos[0].clone() };
    assert!(say(create(&[ragged]).unwrap_err()).contains("'a'"));

    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let error = gguf::Writer::create(dir.path(), &Metadata::default(), &[]).unwrap_err();
    assert!(say(error).contains("is a directory"));
    let error = gguf::Writer::create(&dir.path().join("none/w.gguf"), &Metadata::default(), &[]).unwrap_err();
    assert!(say(error).contains("w.gguf: No such file"));
}

/// A file limit stands in for a full disk: the write fails half way in the same manner.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    if let Some(dir) = std::env::var_os("RUSHLIGHT_TEST_FULL_DISK") {
        let path = Path::new(&dir).join("w.gguf");
        let infos = [TensorInfo { name: "a".into(), format: Format::F32, shape: vec![1 << 20] }];
        let mut writer = gguf::Writer::create(&path, &Metadata::default(), &infos).unwrap();
        let mut whole = (0..16).map(|_| writer.write("a", &[1; 1 << 18]));
        let error = whole.find_map(Result::err).or_else(|| writer.finish().err());
        println!("said: {}", error.unwrap());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let run = std::process::Command::new("sh")
        .arg("-c")
        .arg("trap '' XFSZ; ulimit -f 2048; exec \"$0\" --exact a_full_disk_leaves_nothing --nocapture")
        .arg(std::env::current_exe().unwrap())
        .env("RUSHLIGHT_TEST_FULL_DISK", dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("w.gguf: File too large"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_stands_beside_a_model_is_told_from_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (kind, word) in
        [("adapter", "--adapter"), ("imatrix", "--imatrix"), ("mmproj", "the model itself"), ("model", "")]
    {
        std::fs::write(&path, right().entry("general.type", 8, &string(kind)).build()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let error = checkpoint.expect_model().err().map(|e| e.to_string());
        assert_eq!(error.is_some(), kind != "model");
        assert!(error.is_none_or(|e| e.contains("m.gguf: ") && e.contains(word)));
        let error = rushlight_models::model::Model::load(&checkpoint).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
