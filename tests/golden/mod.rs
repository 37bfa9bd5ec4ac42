//! Reference data and the comparison with it.
// Each test takes what it needs.
#![allow(dead_code)]

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

/// The reference's own arithmetic grows with the logits; so does what may be between it and ours.
fn room(case: &Json) -> f32 {
    let all = case["logits"].as_object().unwrap().values().flat_map(numbers);
    3e-4 * (all.fold(0.0, |most: f32, x| most.max(x.abs())) / 10.0).max(1.0)
}

/// Which rows the reference's numbers hold for when tokens come one by one.
#[derive(Clone, Copy, PartialEq)]
pub enum Steps {
    /// All of them.
    All,
    /// The last alone: what rows see, or how far they are turned, is another matter while the rest is not there.
    Last,
    /// None: what is in the cache stays as it was computed.
    None,
}

/// The cases of `golden`: the prompt token by token and at once, then the greedy continuation.
pub fn check(engine: &mut Engine, golden: &Path, steps: Steps) {
    let label = golden.display();
    for (i, case) in json(golden)["cases"].as_array().unwrap().iter().enumerate() {
        let (prompt, want, room) = (ids(&case["input_ids"]), case["logits"].as_object().unwrap(), room(case));
        let compare = |how: &str, position: usize, logits: &[f32]| {
            let Some(want) = want.get(&position.to_string()) else { return };
            let d = distance(logits, &numbers(want));
            assert!(d < room, "{label} case {i} {how} position {position}: off by {d}");
        };
        engine.truncate(0, 0);
        for (position, &id) in prompt.iter().enumerate() {
            let logits = engine.step(&[(0, id)]).unwrap();
            if steps == Steps::All || steps == Steps::Last && position + 1 == prompt.len() {
                compare("step", position, logits);
            }
        }
        engine.truncate(0, 0);
        let mut last = Vec::new();
        let mut seen = 0;
        engine
            .prompt_all(0, &prompt, &mut |position, logits| {
                compare("prompt", position, logits);
                last = logits.to_vec();
                seen += 1;
            })
            .unwrap();
        assert!(seen == prompt.len() && want.keys().all(|p| p.parse::<usize>().unwrap() < seen));
        // What a model with a cache says, where the reference has one that says otherwise.
        let greedy = case.get("greedy_continuation_cached").unwrap_or(&case["greedy_continuation"]);
        let margins = numbers(&case["greedy_margins"]);
        for (k, want) in ids(greedy).into_iter().enumerate() {
            assert!(best(&last) == want || margins[k] < 5e-3, "{label} case {i}: greedy token {k} is not {want}");
            last = engine.step(&[(0, want)]).unwrap().to_vec();
        }
    }
}
