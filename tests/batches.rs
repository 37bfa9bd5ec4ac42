//! A sequence's tokens are its own: the same bits with any number of threads and any company, weights of every kind.

use rushlight::engine::{Engine, Options};
use std::path::{Path, PathBuf};
use std::process::Command;

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED").map(PathBuf::from);
    let path = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join(path);
    if !path.exists() {
        println!("skipped: no reference data at {}", path.display());
        return None;
    }
    Some(path)
}

const TOKENS: usize = 12;

/// Greedy tokens of `batch` sequences and the bits of their last logits.
fn run(model: &Path, threads: usize, batch: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let options = Options { threads: Some(threads), slots: batch, context: Some(512), ..Options::default() };
    let mut engine = Engine::open(model, &options).unwrap();
    let vocabulary = engine.vocab_size();
    let greedy = |logits: &[f32]| -> u32 {
        (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a))).unwrap() as u32
    };
    let mut next: Vec<(usize, u32)> = (0..batch)
        .map(|slot| {
            // One prompt is so long that generation shares its context among tasks.
            let len = if slot == 0 { 300 } else { 5 + 7 * slot };
            let ids: Vec<u32> = (0..len).map(|i| ((i * 97 + slot * 31 + 5) % 1000) as u32).collect();
            (slot, greedy(engine.prompt(slot, &ids, &mut |_| true).unwrap()))
        })
        .collect();
    let mut answers = vec![(Vec::new(), Vec::new()); batch];
    for _ in 0..TOKENS {
        let logits = engine.step(&next).unwrap();
        for ((slot, id), logits) in next.iter_mut().zip(logits.chunks_exact(vocabulary)) {
            answers[*slot].0.push(*id);
            *id = greedy(logits);
            answers[*slot].1 = logits.iter().map(|x| x.to_bits()).collect();
        }
    }
    answers
}

#[test]
fn tokens_do_not_depend_on_threads_or_company() {
    let Some(original) = shared("models/stories15M-hf") else { return };
    let dir = tempfile::tempdir().unwrap();
    for kind in ["Q4_0", "Q5_1", "Q8_0"] {
        let model = dir.path().join(format!("{kind}.gguf"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
        command.args(["quantize", "--quiet", "--type", kind, "-o"]).arg(&model).arg(&original);
        assert!(command.output().unwrap().status.success(), "quantizing to {kind}");
        let alone = run(&model, 1, 1).remove(0);
        let sixteen = run(&model, 1, 16);
        assert!(sixteen.iter().any(|(tokens, _)| *tokens != alone.0), "{kind}: every sequence says the same");
        for (threads, batch) in [(1, 3), (1, 16), (2, 1), (2, 3), (4, 1), (4, 16)] {
            let answers = run(&model, threads, batch);
            assert!(answers[0] == alone, "{kind}: {threads} threads, {batch} sequences: not as alone on one thread");
            for (slot, answer) in answers.iter().enumerate() {
                assert!(*answer == sixteen[slot], "{kind}: sequence {slot} on {threads} threads beside {batch}");
            }
        }
    }
}
