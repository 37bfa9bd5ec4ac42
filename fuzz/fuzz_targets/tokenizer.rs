//! A tokenizer: the vocabulary in a GGUF file, a tokenizer.json, a SentencePiece model or a tiktoken file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rushlight_models::checkpoint::{Bytes, gguf};
use rushlight_models::tokenizer::{Specials, Tokenizer};
use std::path::Path;

const TEXT: &str = "Hello  wörld <|im_end|></s> 1234\n\n\tab 你好 🚀\0<0x0A>\u{fb01}";

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzz");
    let tokenizer = match gguf::parse(Bytes::new(data.to_vec()), path) {
        Ok(file) => Tokenizer::from_gguf(&file.metadata, path),
        Err(_) => Tokenizer::from_bytes(data, path),
    };
    let Ok(tokenizer) = tokenizer else { return };
    for specials in [Specials::AsText, Specials::Native, Specials::Parse] {
        let Ok(ids) = tokenizer.encode(TEXT, specials) else { continue };
        let mut stream = tokenizer.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        assert_eq!(text, tokenizer.decode_continued(&ids, true));
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    }
    for id in tokenizer.end_of_turn().chain(tokenizer.bos()).chain(tokenizer.eos()) {
        assert!(tokenizer.piece(id).is_some());
    }
});
