//! A safetensors file: its header and the places of tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rushlight_models::checkpoint::{Bytes, safetensors};
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = safetensors::parse(Bytes::new(data.to_vec()), Path::new("fuzz.safetensors")) else { return };
    let mut total = file.raw.iter().map(|t| t.data.len()).sum::<usize>();
    for tensor in &file.tensors {
        assert_eq!(Some(tensor.data.len()), tensor.info.bytes());
        total += tensor.data.len();
    }
    assert!(total <= data.len());
});
