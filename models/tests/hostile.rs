//! Ten thousand damaged files of each kind, and files as greedy as the limits allow: no panic, no hang, and never
//! more memory than the file's size and 64 MB.

mod builder;

use builder::{RawGguf, safetensors as safetensors_file, string};
use rushlight_models::checkpoint::{
    Array, Bytes, Checkpoint, Metadata, Tensor, TensorInfo, Value, gguf, huggingface, safetensors,
};
use rushlight_quant::formats::Format;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

/// What a parser may hold beyond the size of its file, in bytes.
const ALLOWED: usize = 64 << 20;
const MUTANTS: usize = 10_000;

/// Counts the bytes that each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came; counting touches thread-local integers alone.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get() + layout.size() as isize);
        PEAK.set(PEAK.get().max(HELD.get()));
        // SAFETY: the caller's own promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: the caller's own promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `work` held at once beyond what was held before, checked against the allowance for a file of
/// `size` bytes; and it must not take long.
#[track_caller]
fn measured(size: usize, work: impl FnOnce()) -> usize {
    let before = HELD.get();
    PEAK.set(before);
    let start = Instant::now();
    work();
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    let peak = (PEAK.get() - before) as usize;
    assert!(peak <= size + ALLOWED, "{peak} bytes held for a file of {size}");
    peak
}

/// A small generator of pseudo-random numbers (xorshift), the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A number that parsers stumble over.
    fn awkward(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(5) {
            0 => power,
            1 => power.wrapping_sub(1),
            2 => power.wrapping_neg(),
            3 => self.below(300) as u64,
            _ => self.next(),
        }
    }
}

/// Damages `file` in one to four ways, taking from `other` too.
fn mutate(random: &mut Random, file: &mut Vec<u8>, other: &[u8], text: bool) {
    for _ in 0..1 + random.below(4) {
        let (at, len) = (random.below(file.len()), 1 + random.below(40));
        match random.below(8) {
            _ if file.is_empty() => return,
            0 => file[at] ^= 1 << random.below(8),
            1 => file[at] = random.next() as u8,
            2 => file.truncate(at),
            3 => drop(file.drain(at..(at + len).min(file.len()))),
            4 => {
                let from = random.below(other.len());
                let piece = other[from..(from + len).min(other.len())].to_vec();
                file.splice(at..at, piece);
            }
            5 => {
                let from = random.below(other.len());
                let piece = other[from..(from + len).min(other.len())].to_vec();
                let end = (at + piece.len()).min(file.len());
                file.splice(at..end, piece);
            }
            // An integer, as this kind of file spells it.
            6 if text => {
                let start = (at..file.len()).find(|&i| file[i].is_ascii_digit()).unwrap_or(at);
                let end = (start..file.len()).find(|&i| !file[i].is_ascii_digit()).unwrap_or(file.len());
                let number = random.awkward().to_string();
                file.splice(start..end, number.into_bytes());
            }
            _ => {
                let number = random.awkward().to_le_bytes();
                let wide = if random.below(2) == 0 { 4 } else { 8 };
                let at = if random.below(2) == 0 { at } else { at & !3 };
                number[..wide].iter().zip(&mut file[at..]).for_each(|(new, old)| *old = *new);
            }
        }
    }
}

/// Holds what was parsed to its word.
fn check(tensors: &[Tensor], size: usize) {
    let mut total = 0;
    for tensor in tensors {
        assert_eq!(Some(tensor.data.len()), tensor.info.bytes());
        assert!(tensor.info.elements().is_some());
        total += tensor.data.len();
    }
    assert!(total <= size, "tensors overlap");
}

fn check_error(error: &rushlight_models::Error) {
    let error = error.to_string();
    assert!(error.starts_with("mutant: ") && error.lines().count() == 1 && error.len() < 2000, "{error}");
}

/// Small right files that our own writer made, of both versions.
fn gguf_seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.gguf");
    let mut seeds = Vec::new();
    let formats: Vec<Format> = Format::ALL.into_iter().filter(|f| !f.is_internal()).collect();
    for formats in formats.chunks(3) {
        let mut metadata = Metadata::default();
        let mut set = |key: &str, value| metadata.0.insert(key.to_owned(), value);
        set("general.architecture", Value::String("llama".into()));
        set("llama.block_count", Value::Unsigned(2));
        set("llama.rope.freq_base", Value::Float(1e4));
        set("tokenizer.ggml.add_bos_token", Value::Bool(true));
        set("tokenizer.ggml.eos_token_id", Value::Signed(-1));
        set("tokenizer.ggml.tokens", Value::Array(Array::of_strings(["<s>", "é", "", "▁the"])));
        set("tokenizer.ggml.scores", Value::Array(Array::of_f32(&[0.0, -1.0, 2.0, f32::NAN])));
        set("tokenizer.ggml.token_type", Value::Array(Array::of_i32(&[3, 1, 1, 6])));
        let infos: Vec<_> = formats
            .iter()
            .map(|&format| {
                let shape = if format.block_len() == 256 { vec![256] } else { vec![2, 32] };
                TensorInfo { name: format!("blk.0.{}.weight", format.name()), format, shape }
            })
            .collect();
        let mut writer = gguf::Writer::create(&path, &metadata, &infos).unwrap();
        infos.iter().for_each(|t| writer.write(&t.name, &vec![1; t.bytes().unwrap()]).unwrap());
        writer.finish().unwrap();
        seeds.push(std::fs::read(&path).unwrap());
    }
    seeds.push(RawGguf::new().u32("general.alignment", 8).tensor("w", &[2, 3], 0, 8).data(32).build());
    let mut version_2 = seeds[0].clone();
    version_2[4] = 2;
    seeds.push(version_2);
    seeds
}

fn safetensors_seeds() -> Vec<Vec<u8>> {
    let mixed = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,4],"data_offsets":[0,16]},"b.qweight":{"dtype":"I32","shape":[1,2],"data_offsets":[16,24]},"c":{"dtype":"F16","shape":[],"data_offsets":[24,26]}}   "#;
    vec![
        builder::vectors(&[("model.embed_tokens.weight", 8), ("lm_head.weight", 4), ("x", 0)]),
        safetensors_file(mixed, 26),
        safetensors_file("{}", 0),
    ]
}

const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":64,"rope_scaling":{"factor":8.0,"type":"linear"},"tie_word_embeddings":false,"x":null,"eos_token_id":[1,-2]}"#;
const INDEX: &str = r#"{"metadata":{"total_size":96},"weight_map":{"a.weight":"model-00001-of-00002.safetensors","b.weight":"model-00002-of-00002.safetensors"}}"#;

/// Not a test: leaves the seeds where `scripts/fuzz.sh` wants them.
#[test]
#[ignore = "writes the seeds of the fuzz targets"]
fn write_fuzz_seeds() {
    let texts = [CONFIG, INDEX].map(|text| text.as_bytes().to_vec()).to_vec();
    for (target, seeds) in [("gguf", gguf_seeds()), ("safetensors", safetensors_seeds()), ("config", texts)] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
        std::fs::create_dir_all(&dir).unwrap();
        for (i, seed) in seeds.iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{i}")), seed).unwrap();
        }
    }
}

#[test]
fn ten_thousand_damaged_gguf_files() {
    let seeds = gguf_seeds();
    for seed in &seeds {
        assert!(gguf::parse(Bytes::new(seed.clone()), Path::new("mutant")).is_ok());
    }
    let mut random = Random(0x5eed_0001);
    let (mut read, mut most) = (0, 0);
    for i in 0..MUTANTS {
        let mut file = seeds[i % seeds.len()].clone();
        mutate(&mut random, &mut file, &seeds[(i * 7 + 3) % seeds.len()], false);
        let size = file.len();
        let bytes = Bytes::new(file);
        let held = measured(size, || match gguf::parse(bytes, Path::new("mutant")) {
            Ok(file) => {
                check(&file.tensors, size);
                for value in file.metadata.0.values() {
                    if let Value::Array(array) = value {
                        let walked = array.strings().count() + array.ints().count() + array.floats().len();
                        assert!(walked == array.count || array.count == 0, "{array:?}");
                    }
                }
                read += 1;
            }
            Err(error) => check_error(&error),
        });
        most = most.max(held);
    }
    println!("{read} of {MUTANTS} were still right; at most {most} bytes held");
    // Were all of them refused at the first byte, this would test nothing; were none, neither.
    assert!((MUTANTS / 50..MUTANTS * 9 / 10).contains(&read), "{read}");
}

#[test]
fn ten_thousand_damaged_safetensors_files() {
    let seeds = safetensors_seeds();
    let mut random = Random(0x5eed_0002);
    let (mut read, mut most) = (0, 0);
    for i in 0..MUTANTS {
        let seed = &seeds[i % seeds.len()];
        // Every other time the header's length is put right again, so that the damage reaches what comes after.
        let header = u64::from_le_bytes(*seed.first_chunk().unwrap()) as usize;
        let mut file = seed.clone();
        let other = &seeds[(i * 7 + 1) % seeds.len()];
        if i % 2 == 0 {
            mutate(&mut random, &mut file, other, true);
        } else {
            let mut text = seed[8..8 + header].to_vec();
            mutate(&mut random, &mut text, &other[8..], true);
            file = [&(text.len() as u64).to_le_bytes()[..], &text, &seed[8 + header..]].concat();
        }
        let size = file.len();
        let bytes = Bytes::new(file);
        let held = measured(size, || match safetensors::parse(bytes, Path::new("mutant")) {
            Ok(file) => {
                check(&file.tensors, size);
                read += 1;
            }
            Err(error) => check_error(&error),
        });
        most = most.max(held);
    }
    println!("{read} of {MUTANTS} were still right; at most {most} bytes held");
    assert!((MUTANTS / 50..MUTANTS * 9 / 10).contains(&read), "{read}");
}

#[test]
fn ten_thousand_damaged_configurations() {
    let mut random = Random(0x5eed_0003);
    for _ in 0..MUTANTS {
        for (seed, other) in [(CONFIG, INDEX), (INDEX, CONFIG)] {
            let mut text = seed.as_bytes().to_vec();
            mutate(&mut random, &mut text, other.as_bytes(), true);
            let path = Path::new("mutant");
            measured(text.len(), || {
                let _ = huggingface::parse_config(&text, path).inspect_err(check_error);
                let _ = huggingface::parse_index(&text, path).inspect_err(check_error);
            });
        }
    }
}

/// The `i`th of many short names.
fn short(i: usize) -> String {
    let letter = |n: usize| char::from(b'A' + (n % 50) as u8);
    [letter(i), letter(i / 50), letter(i / 2500), letter(i / 125_000)].iter().collect::<String>().replace('\\', "~")
}

#[test]
fn files_as_greedy_as_the_limits_allow() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = RawGguf::new();
    for i in 0..100_000u64 {
        file = file.tensor(&short(i as usize), &[1], 0, i * 32);
    }
    let file = file.data(100_000 * 32).build();
    // What the header alone takes is measured against the header alone: the data cost nothing to claim.
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, &file).unwrap();
    measured(file.len() - 100_000 * 32, || assert_eq!(Checkpoint::open(&path).unwrap().tensors().len(), 100_000));

    let mut file = RawGguf::new();
    for i in 0..65_536 {
        file = file.entry(&short(i), 8, &string("a"));
    }
    let file = file.build();
    measured(file.len(), || {
        let size = file.len();
        let read = gguf::parse(Bytes::new(file), Path::new("m.gguf")).unwrap();
        assert_eq!((read.metadata.0.len(), size > 1 << 20), (65_536, true));
    });

    std::fs::write(dir.path().join("config.json"), format!("{{\"a\":[{}0]}}", "0,".repeat(99_990))).unwrap();
    // All the limits at once, from here on.
    std::fs::copy(dir.path().join("config.json"), dir.path().join("generation_config.json")).unwrap();
    let path = dir.path().join("config.json");
    measured(200_000, || assert!(huggingface::read_config(&path).unwrap()["a"].is_array()));

    for dtype in ["U8", "F16"] {
        let bytes = if dtype == "U8" { 0 } else { 2 };
        let entries = (0..100_000).map(|i| {
            let shape = if bytes == 0 { "[0]" } else { "[]" };
            let (begin, end) = (i * bytes, (i + 1) * bytes);
            format!(r#""{}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#, short(i))
        });
        let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
        std::fs::write(dir.path().join("model.safetensors"), safetensors_file(&json, 100_000 * bytes)).unwrap();
        measured(json.len(), || {
            let opened = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(opened.tensors().len() + opened.raw_tensors().len(), 100_000);
        });
    }

    let places = (0..300_000).map(|i| format!(r#""{}{i}":"s{}""#, short(i), i % 10_000));
    let text = format!("{{\"weight_map\":{{{}}}}}", places.collect::<Vec<_>>().join(","));
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, &text).unwrap();
    measured(text.len(), || {
        assert_eq!(huggingface::parse_index(text.as_bytes(), &index).unwrap().tensors.len(), 300_000)
    });
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    measured(text.len(), || assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("s0")));

    for dtype in ["I32", "F32"] {
        let mut size = 0;
        for shard in 0..3 {
            let entries = (0..100_000).map(|i| {
                let (name, begin, end) = (shard * 100_000 + i, i * 4, i * 4 + 4);
                format!(r#""{name}":{{"dtype":"{dtype}","shape":[1],"data_offsets":[{begin},{end}]}}"#)
            });
            let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
            size += json.len();
            std::fs::write(dir.path().join(format!("s{shard}")), safetensors_file(&json, 400_000)).unwrap();
        }
        let places = (0..300_000).map(|i| format!(r#""{i}":"s{}""#, i / 100_000));
        let text = format!("{{\"weight_map\":{{{}}}}}", places.collect::<Vec<_>>().join(","));
        std::fs::write(&index, &text).unwrap();
        let held = measured(size + text.len(), || drop(Checkpoint::open(dir.path()).unwrap()));
        println!("{held} bytes held to open three shards whose headers have {size}");
    }
}
