//! A GGUF file: headers, metadata and the places of tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rushlight_models::checkpoint::{Bytes, Value, gguf};
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = gguf::parse(Bytes::new(data.to_vec()), Path::new("fuzz.gguf")) else { return };
    for tensor in &file.tensors {
        assert_eq!(Some(tensor.data.len()), tensor.info.bytes());
        assert!(tensor.info.elements().is_some());
    }
    for value in file.metadata.0.values() {
        if let Value::Array(array) = value {
            let walked = array.strings().count() + array.ints().count() + array.floats().len();
            assert_eq!(walked, array.count);
        }
    }
});
