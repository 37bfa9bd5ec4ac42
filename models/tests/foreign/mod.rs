//! Directories as other tools write them, packed here by plain loops.
#![allow(dead_code)] // No test file uses all of it.

use rushlight_quant::formats::{f16_to_f32, f32_to_f16};
use serde_json::{Value, json};
use std::path::PathBuf;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// -1..1
    pub fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// A directory of one safetensors file.
pub struct Dir {
    dir: tempfile::TempDir,
    tensors: Vec<(String, String, Vec<usize>, Vec<u8>)>,
}

impl Dir {
    pub fn new() -> Dir {
        Dir { dir: tempfile::tempdir().unwrap(), tensors: Vec::new() }
    }

    pub fn path(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    pub fn add(&mut self, name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) {
        self.tensors.push((name.into(), dtype.into(), shape.into(), data));
    }

    pub fn floats(&mut self, name: &str, values: &[f32]) {
        self.add(name, "F32", &[values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }

    pub fn remove(&mut self, name: &str) {
        self.tensors.retain(|t| t.0 != name);
    }

    pub fn change(&mut self, name: &str, at: usize, bytes: &[u8]) {
        let tensor = self.tensors.iter_mut().find(|t| t.0 == name).unwrap();
        tensor.3[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Other bytes, another shape of the same size, or another type of the same width.
    pub fn damage(&mut self, name: &str, random: &mut Random) {
        let (_, dtype, shape, data) = self.tensors.iter_mut().find(|t| t.0 == name).unwrap();
        match random.below(4) {
            0 => shape.reverse(),
            1 => *shape = vec![shape.iter().product()],
            2 if dtype == "I32" => *dtype = "F32".into(),
            2 if dtype == "F16" => *dtype = "BF16".into(),
            _ => {
                for _ in 0..4 {
                    let at = random.below(data.len() as u64) as usize;
                    data[at] = random.below(256) as u8;
                }
            }
        }
    }

    /// Writes the directory with this `quantization_config` (null: none).
    pub fn write(&self, quantization: &Value) -> PathBuf {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let begin = data.len();
            data.extend(bytes);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        std::fs::write(self.dir.path().join("model.safetensors"), file).unwrap();
        let config = json!({"model_type": "llama", "quantization_config": quantization});
        std::fs::write(self.dir.path().join("config.json"), config.to_string()).unwrap();
        self.dir.path().to_owned()
    }
}

/// A layer on an integer grid, as GPTQ tools keep it.
pub struct Gptq {
    pub bits: u32,
    pub v2: bool,
    pub group: i64,
    pub sym: bool,
    pub act: bool,
    pub dtype: &'static str,
    pub rows: usize,
    pub cols: usize,
    /// `[rows, cols]`
    pub codes: Vec<u8>,
    /// `[rows, groups]`
    pub zeros: Vec<u16>,
    /// `[rows, groups]`
    pub scales: Vec<f32>,
    pub g_idx: Vec<u32>,
}

impl Gptq {
    pub fn random(
        random: &mut Random,
        bits: u32,
        v2: bool,
        group: i64,
        sym: bool,
        act: bool,
        dtype: &'static str,
        rows: usize,
        cols: usize,
    ) -> Gptq {
        let size = if group == -1 { cols } else { group as usize };
        let groups = cols.div_ceil(size);
        let mut g_idx: Vec<u32> = (0..cols).map(|i| (i / size) as u32).collect();
        if act {
            random.shuffle(&mut g_idx);
        }
        let zeros = (0..rows * groups).map(|_| match sym {
            true => 1 << (bits - 1),
            // Version 1 has no zero, and one more at the top.
            false => random.below(1 << bits) as u16 + u16::from(!v2),
        });
        let zeros = zeros.collect();
        let scales = (0..rows * groups).map(|_| {
            let scale = random.number() * 0.01;
            match dtype {
                "F16" => f16_to_f32(f32_to_f16(scale)),
                "BF16" => f32::from_bits((scale * 1e-4).to_bits() & 0xffff_0000),
                _ => scale,
            }
        });
        let scales = scales.collect();
        let codes = (0..rows * cols).map(|_| random.below(1 << bits) as u8).collect();
        Gptq { bits, v2, group, sym, act, dtype, rows, cols, codes, zeros, scales, g_idx }
    }

    pub fn groups(&self) -> usize {
        self.scales.len() / self.rows
    }

    pub fn config(&self) -> Value {
        json!({
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group, "sym": self.sym, "desc_act": self.act,
            "checkpoint_format": if self.v2 { "gptq_v2" } else { "gptq" }, "pack_dtype": "int32"
        })
    }

    pub fn weights(&self) -> Vec<f32> {
        let at = |i: usize| {
            let g = i / self.cols * self.groups() + self.g_idx[i % self.cols] as usize;
            self.scales[g] * (f32::from(self.codes[i]) - f32::from(self.zeros[g]))
        };
        (0..self.rows * self.cols).map(at).collect()
    }

    /// `qweight`, `qzeros` and `scales`.
    pub fn packed(&self) -> [Vec<u8>; 3] {
        let (rows, cols, groups) = (self.rows, self.cols, self.groups());
        let words = cols * self.bits as usize / 32;
        let mut qweight = vec![0u32; words * rows];
        for o in 0..rows {
            // The codes of an output's inputs, bit after bit, in a column of words.
            for bit in 0..words * 32 {
                let code = self.codes[o * cols + bit / self.bits as usize];
                qweight[bit / 32 * rows + o] |= u32::from(code >> (bit % self.bits as usize) & 1) << (bit % 32);
            }
        }
        let zero_words = rows * self.bits as usize / 32;
        let mut qzeros = vec![0u32; groups * zero_words];
        for g in 0..groups {
            for bit in 0..zero_words * 32 {
                let zero = self.zeros[bit / self.bits as usize * groups + g] - u16::from(!self.v2);
                qzeros[g * zero_words + bit / 32] |= u32::from(zero >> (bit % self.bits as usize) & 1) << (bit % 32);
            }
        }
        let mut scales = Vec::new();
        for g in 0..groups {
            for o in 0..rows {
                let scale = self.scales[o * groups + g];
                match self.dtype {
                    "F16" => scales.extend(f32_to_f16(scale).to_le_bytes()),
                    "BF16" => scales.extend(((scale.to_bits() >> 16) as u16).to_le_bytes()),
                    _ => scales.extend(scale.to_le_bytes()),
                }
            }
        }
        let bytes = |words: Vec<u32>| words.into_iter().flat_map(|w| w.to_le_bytes()).collect();
        [bytes(qweight), bytes(qzeros), scales]
    }

    pub fn put(&self, dir: &mut Dir, base: &str, g_idx: bool) {
        let [qweight, qzeros, scales] = self.packed();
        let (rows, cols, bits, groups) = (self.rows, self.cols, self.bits as usize, self.groups());
        dir.add(&format!("{base}.qweight"), "I32", &[cols * bits / 32, rows], qweight);
        dir.add(&format!("{base}.qzeros"), "I32", &[groups, rows * bits / 32], qzeros);
        dir.add(&format!("{base}.scales"), self.dtype, &[groups, rows], scales);
        if g_idx {
            let indices = self.g_idx.iter().flat_map(|g| g.to_le_bytes()).collect();
            dir.add(&format!("{base}.g_idx"), "I32", &[cols], indices);
        }
    }
}

/// The tables that bitsandbytes stores beside its weights.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];
pub const FP4: [f32; 16] = [
    0.0,
    0.0052083335,
    0.6666667,
    1.0,
    0.33333334,
    0.5,
    0.16666667,
    0.25,
    -0.0,
    -0.0052083335,
    -0.6666667,
    -1.0,
    -0.33333334,
    -0.5,
    -0.16666667,
    -0.25,
];
