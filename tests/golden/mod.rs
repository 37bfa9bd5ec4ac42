//! Reference data and the comparison with it.

use rushlight::engine::{Engine, Options};
use serde_json::Value as Json;
use std::path::{Path, PathBuf};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name)
}

/// A checkpoint of the reference data; `None`, with a word about it, where there is none.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let path = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join(path);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

pub fn options(adapters: &[&Path]) -> Options {
    let adapters = adapters.iter().map(|p| (p.to_path_buf(), 1.0)).collect();
    Options { threads: Some(2), slots: 3, adapters, ..Options::default() }
}

pub fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn numbers(list: &Json) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

pub fn ids(list: &Json) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Largest difference after each row's mean is taken away.
pub fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let mean = |x: &[f32]| x.iter().sum::<f32>() / x.len() as f32;
    let (mg, mw) = (mean(got), mean(want));
    got.iter().zip(want).map(|(g, w)| ((g - mg) - (w - mw)).abs()).fold(0.0, f32::max)
}

pub fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// Runs every case of `golden`: the whole prompt at once, token by token, and the greedy continuation.
pub fn check_golden(engine: &mut Engine, golden: &Path, label: &str) {
    for (i, case) in json(golden)["cases"].as_array().unwrap().iter().enumerate() {
        let (prompt, greedy) = (ids(&case["input_ids"]), ids(&case["greedy_continuation"]));
        let want = case["logits"].as_object().unwrap();
        let mut seen = 0;
        let mut compare = |how: &str, position: usize, logits: &[f32]| {
            if let Some(want) = want.get(&position.to_string()) {
                let d = distance(logits, &numbers(want));
                assert!(d < 3e-4, "{label} case {i} {how} position {position}: off by {d}");
                seen += 1;
            }
        };
        engine.truncate(0, 0);
        engine.prompt_all(0, &prompt, &mut |p, logits| compare("prompt", p, logits)).unwrap();
        engine.truncate(0, 0);
        let mut last = Vec::new();
        for (p, &id) in prompt.iter().enumerate() {
            last = engine.step(&[(0, id)]).unwrap().to_vec();
            compare("step", p, &last);
        }
        assert_eq!(seen, 2 * want.len());
        engine.truncate(0, 0);
        let at_once = engine.prompt(0, &prompt, &mut |_| true).unwrap().to_vec();
        assert!(distance(&at_once, &last) < 1e-4);
        let mut told = Vec::new();
        for _ in &greedy {
            told.push(best(&last));
            last = engine.step(&[(0, best(&last))]).unwrap().to_vec();
        }
        assert_eq!(told, greedy, "{label} case {i}");
    }
}
