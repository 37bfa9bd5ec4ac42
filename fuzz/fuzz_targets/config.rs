//! The JSON files of a Hugging Face directory: configuration and shard index.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rushlight_models::checkpoint::huggingface;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzz.json");
    if let Ok(config) = huggingface::parse_config(data, path) {
        assert!(config.is_object());
    }
    if let Ok(index) = huggingface::parse_index(data, path) {
        assert!(index.tensors.is_sorted() && index.shards.is_sorted());
        assert!(index.tensors.iter().all(|(_, shard)| (*shard as usize) < index.shards.len()));
    }
});
