//! Every family, quantized: it runs, three steps of LoRA lower the loss, and the adapter comes back. What comes out is
//! docs/families.md.

mod golden;
mod lesson;

use golden::{ids, json, options, shared};
use lesson::{Adam, isa};
use rushlight::calibrate::gptq::named_layers;
use rushlight::engine::{Engine, Options};
use rushlight::quantize::plan::Plan;
use rushlight::quantize::types::{Target, Wishes};
use rushlight::quantize::write::{self, write};
use rushlight::train::batch::Example;
use rushlight::train::run::Lesson;
use rushlight::train::run::pupil::Pupil;
use rushlight::train::tape::{Learner, LoraConfig, Method};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::checkpoint::export::{Nf4Options, Original, write_nf4};
use rushlight_models::convert::to_gguf;
use rushlight_models::families::{FAMILIES, Family, recognise};
use rushlight_models::model::Model;
use rushlight_quant::Cpu;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// The GGUF file of `source` in `target`'s mix.
fn quantized(source: &Path, target: &str, file: &Path) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let plan = Plan::new(&checkpoint, Target::parse(target).unwrap(), &Wishes::default(), None).unwrap();
    let stop = AtomicBool::new(false);
    let options = write::Options { threads: 1, memory: 1 << 28, stop: &stop, scratch: None };
    write(&plan, &checkpoint, file, &options, &mut |_| {}).unwrap();
}

/// The directory of `source` with its linear layers in NF4.
fn in_nf4(source: &Path, target: &Path) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let original = Original::of(&checkpoint).unwrap();
    let layers = named_layers(&original, &Model::load(&checkpoint).unwrap());
    let names: Vec<String> = layers.into_iter().map(|l| l.name).collect();
    assert!(!names.is_empty());
    write_nf4(&original, target, &names, Nf4Options { double: true }, &mut |_| {}).unwrap();
}

fn one_thread(context: usize) -> Options {
    Options { threads: Some(1), slots: 1, context: Some(context), ..options(&[]) }
}

/// The logits of every position.
fn logits(engine: &mut Engine, ids: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    engine.truncate(0, 0);
    engine.prompt_all(0, ids, &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

/// How far `got` is from `want`, relative to its length.
fn off(got: &[f32], want: &[f32]) -> f64 {
    lesson::relative(got, want)
}

/// What a checkpoint has shown: its family, and what it was quantized as.
type Shown = (&'static str, Vec<&'static str>);

fn show(name: &str, dir: &Path, room: &Path) -> Shown {
    let golden = json(&dir.join("golden.json"));
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (family, _) = recognise(&checkpoint).unwrap();
    let conversion = to_gguf(&checkpoint);
    // What GGUF files cannot say of long texts does not matter to the short one.
    let long = conversion.as_ref().map_or(true, |c| c.notes.is_empty());
    let ids = ids(&golden["cases"][usize::from(long)]["input_ids"]);
    let whole = logits(&mut Engine::open(dir, &one_thread(ids.len())).unwrap(), &ids);
    // How far off logits of random weights may be: less does not tell a mistake from rounding.
    let mut bases: Vec<(PathBuf, &'static str, f64)> = Vec::new();
    if conversion.is_ok() {
        for (target, most) in [("Q4_K_M", 0.5), ("Q8_0", 0.06)] {
            let file = room.join(format!("{name}-{target}.gguf"));
            quantized(dir, target, &file);
            bases.push((file, target, most));
        }
    } else {
        let folder = room.join(format!("{name}-nf4"));
        in_nf4(dir, &folder);
        bases.push((folder, "NF4", 0.6));
    }
    for (base, _, most) in &bases {
        let got = logits(&mut Engine::open(base, &one_thread(ids.len())).unwrap(), &ids);
        let off = off(&got, &whole);
        assert!(off < *most, "{}: off by {off}", base.display());
    }

    // Trained on the smaller one.
    let base = &bases[0].0;
    let targets = ids[1..].iter().map(|&id| Some(id)).chain([None]).collect();
    let batch = [Example { ids: ids.clone(), targets }];
    let method = Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() });
    let open = || Checkpoint::open(base).unwrap();
    let mut learner = Learner::new(Model::load(&open()).unwrap(), Cpu::new(1, isa()), &method, 1).unwrap();
    let before = learner.loss(&batch).unwrap().mean();
    let mut adam = Adam::new(1e-2, 0.0, 1.0);
    for step in 0..3 {
        let mut gradients = learner.params().gradients();
        let loss = learner.backward(&batch, step, &mut gradients).unwrap();
        adam.step(learner.params_mut(), &gradients, 1.0 / loss.tokens as f64);
    }
    let after = learner.loss(&batch).unwrap().mean();
    assert!(after.is_finite() && after < before, "{name}: the loss went from {before} to {after}");
    let trained = learner.model_with_adapter().unwrap();
    let want = logits(&mut Engine::from_model(open(), trained, &one_thread(ids.len())).unwrap(), &ids);
    let run = room.join(format!("{name}-run"));
    let mut pupil = Pupil::new(learner, method, base, false, Arc::new(AtomicBool::new(false))).unwrap();
    pupil.save(&run, true).unwrap();
    let with = Options { adapters: vec![(pupil.result(&run), 1.0)], ..one_thread(ids.len()) };
    let got = logits(&mut Engine::open(base, &with).unwrap(), &ids);
    let apart = off(&got, &want);
    assert!(apart < 1e-5, "{name}: the adapter comes back off by {apart}");
    (family.name, bases.into_iter().map(|(_, target, _)| target).collect())
}

fn code(names: &[&str]) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

/// A family's row: what the registry says before and after what was shown.
fn row(family: &Family) -> (String, String) {
    let gguf = family.gguf.map_or("none".into(), |g| code(&[g.architecture]));
    (
        format!("| {} | {} | {gguf} | ", family.name, code(family.model_types)),
        format!(" | {} |\n", code(&family.targets())),
    )
}

const HEAD: &str = "\
# Families

Every family of models that Rushlight reads, from Hugging Face directories and, where an architecture is named, from GGUF.
[adding-a-family.md](adding-a-family.md) says how to add one. Adapters name the linear layers as the family's own files do.

This table is written by a test (`tests/families_table.rs`) from the list in `models/src/families/mod.rs` and from what it
finds on the reference checkpoints: so many of each family were quantized to the types named (with what each type falls back
to where rows are too short), gave the logits of the whole weights but for rounding, and were trained on the first of these
types; three steps of LoRA lowered the loss, and the adapter, written and read again, gave the trained model's logits.

| family | `model_type` | GGUF architecture | checkpoints | quantized, run and trained as | linear layers |
| --- | --- | --- | --- | --- | --- |
";

#[test]
fn every_family_quantizes_trains_and_comes_back() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/families.md");
    let there = std::fs::read_to_string(&page).unwrap();
    let again = "write it anew: RUSHLIGHT_WRITE_DOCS=1 cargo test --test families_table";
    let Some(root) = shared("fixtures/families") else {
        // What the registry says can be compared all the same.
        let mut lines = there.strip_prefix(HEAD).expect(again).lines();
        for (line, (before, after)) in lines.by_ref().zip(FAMILIES.iter().map(|f| row(f))) {
            assert!(line.starts_with(&before) && format!("{line}\n").ends_with(&after), "{line}: {again}");
        }
        return;
    };
    let room = tempfile::tempdir().unwrap();
    let mut names: Vec<String> =
        std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| root.join(name).join("golden.json").exists());
    names.sort();
    let work = Mutex::new(names.iter());
    let (shown, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(name) = work.lock().unwrap().next() else { return };
                    let one = || show(name, &root.join(name), room.path());
                    match std::panic::catch_unwind(one) {
                        Ok(result) => shown.lock().unwrap().push(result),
                        Err(_) => failed.lock().unwrap().push(name),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{failed:?}");
    let shown = shown.into_inner().unwrap();
    let mut text = String::from(HEAD);
    for family in FAMILIES {
        let own = || shown.iter().filter(|(name, _)| *name == family.name);
        let types: BTreeSet<&str> = own().flat_map(|(_, types)| types).copied().collect();
        assert!(!types.is_empty(), "no reference checkpoint is of the family {}", family.name);
        // The smallest first, as they are trained.
        let order = ["Q4_K_M", "Q8_0", "NF4"].into_iter().filter(|t| types.contains(t)).collect::<Vec<_>>().join(", ");
        let (before, after) = row(family);
        text += &format!("{before}{} | {order}{after}", own().count());
    }
    if std::env::var_os("RUSHLIGHT_WRITE_DOCS").is_some() {
        std::fs::write(&page, &text).unwrap();
        return;
    }
    assert_eq!(there, text, "{again}");
}
