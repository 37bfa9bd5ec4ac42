//! What a GGUF file made of a checkpoint holds.

use rushlight_models::checkpoint::gguf::Writer;
use rushlight_models::checkpoint::{Checkpoint, Metadata, TensorInfo, Value};
use rushlight_models::convert::{Conversion, to_gguf};
use rushlight_models::families::Role;
use rushlight_quant::formats::Format;
use std::path::Path;

/// Writes what `conversion` says to `path`, every tensor as the checkpoint stores it.
fn write(conversion: &Conversion, checkpoint: &Checkpoint, path: &Path) {
    let infos: Vec<TensorInfo> = conversion.tensors.iter().map(|t| t.info()).collect();
    let mut writer = Writer::create(path, &conversion.metadata, &infos).unwrap();
    for tensor in &conversion.tensors {
        writer.write(&tensor.name, &tensor.data(checkpoint).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_gguf_file_stays_as_it_is_and_a_split_one_becomes_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut metadata = Metadata::default();
    let mut set = |key: &str, value: Value| drop(metadata.0.insert(key.into(), value));
    set("general.architecture", Value::String("llama".into()));
    set("general.name", Value::String("Split".into()));
    set("general.file_type", Value::Unsigned(7));
    set("split.count", Value::Unsigned(2));
    set("split.tensors.count", Value::Unsigned(3));
    let info = |name: &str, format, shape: &[usize]| TensorInfo { name: name.into(), format, shape: shape.to_vec() };
    let parts = [
        vec![info("token_embd.weight", Format::F16, &[3, 4]), info("blk.1.attn_q.bias", Format::F32, &[4])],
        vec![info("odd", Format::Q8_0, &[2, 32])],
    ];
    for (i, infos) in parts.iter().enumerate() {
        metadata.0.insert("split.no".into(), Value::Unsigned(i as u64));
        let path = dir.path().join(format!("m-0000{}-of-00002.gguf", i + 1));
        let mut writer = Writer::create(&path, &metadata, infos).unwrap();
        infos.iter().for_each(|t| writer.write(&t.name, &vec![i as u8 + 1; t.bytes().unwrap()]).unwrap());
        writer.finish().unwrap();
    }
    let source = Checkpoint::open(&dir.path().join("m-00001-of-00002.gguf")).unwrap();
    let conversion = to_gguf(&source).unwrap();
    let roles: Vec<_> = conversion.tensors.iter().map(|t| t.role).collect();
    assert_eq!(roles, [Some((Role::Embedding, 0)), Some((Role::Q, 1)), None]);
    let path = dir.path().join("whole.gguf");
    write(&conversion, &source, &path);
    let whole = Checkpoint::open(&path).unwrap();
    assert_eq!(whole.tensors(), parts.concat());
    for info in whole.tensors() {
        assert_eq!(whole.tensor(&info.name).unwrap().data[..], source.tensor(&info.name).unwrap().data[..]);
    }
    let keys: Vec<&str> = whole.metadata().unwrap().0.keys().map(String::as_str).collect();
    assert_eq!(keys, ["general.architecture", "general.name"]);
}
