//! Small files for tests: right ones, and ones that lie where they are told to.
#![allow(dead_code)] // No test file uses all of it.

/// A GGUF file, field by field.
#[derive(Clone)]
pub struct RawGguf {
    pub version: u32,
    pub entries: Vec<u8>,
    pub entry_count: u64,
    pub infos: Vec<u8>,
    pub tensor_count: u64,
    pub data: Vec<u8>,
}

impl RawGguf {
    pub fn new() -> RawGguf {
        RawGguf { version: 3, entries: vec![], entry_count: 0, infos: vec![], tensor_count: 0, data: vec![] }
    }

    /// Adds a metadata entry of GGUF's type number `kind`, already encoded.
    pub fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> RawGguf {
        self.entries.extend(string(key));
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend(value);
        self.entry_count += 1;
        self
    }

    pub fn u32(self, key: &str, value: u32) -> RawGguf {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub fn u16(self, key: &str, value: u16) -> RawGguf {
        self.entry(key, 2, &value.to_le_bytes())
    }

    /// Adds a tensor's description; `dims` innermost first, as the file has them.
    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> RawGguf {
        self.infos.extend(string(name));
        self.infos.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| self.infos.extend(dim.to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    pub fn data(mut self, bytes: usize) -> RawGguf {
        self.data = (0..bytes).map(|i| i as u8).collect();
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.entry_count.to_le_bytes());
        out.extend(&self.entries);
        out.extend(&self.infos);
        if !self.data.is_empty() {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&self.data);
        }
        out
    }
}

/// A GGUF string: length and text.
pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A safetensors file with the header `json` and `data` bytes of data.
pub fn safetensors(json: &str, data: usize) -> Vec<u8> {
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json.as_bytes());
    out.extend((0..data).map(|i| i as u8));
    out
}

/// A safetensors file of F32 vectors of the given names and lengths.
pub fn vectors(tensors: &[(&str, usize)]) -> Vec<u8> {
    let mut at = 0;
    let entries = tensors.iter().map(|(name, len)| {
        let (begin, end) = (at, at + len * 4);
        at = end;
        format!(r#""{name}":{{"dtype":"F32","shape":[{len}],"data_offsets":[{begin},{end}]}}"#)
    });
    let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    safetensors(&json, at)
}
