//! Loss and gradients against PyTorch's.

mod golden;
mod lesson;

use golden::{json, shared};
use lesson::{Adam, examples, learner, length, named, relative, tensors};
use rushlight::train::batch::{Example, Loss};
use rushlight::train::tape::{Checkpointing, Learner, LoraConfig, Method, memory};
use rushlight_models::checkpoint::Checkpoint;
use rushlight_models::model::Model;
use rushlight_quant::Cpu;
use std::collections::BTreeMap;
use std::path::Path;

/// All projections, as the reference data have them.
fn lora(init: &Path) -> Method {
    Method::Lora(LoraConfig { rank: 4, alpha: 8.0, init: Some(init.to_path_buf()), ..LoraConfig::default() })
}

/// Names of parameters as PEFT and Hugging Face have them.
fn plain(name: &str) -> String {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    if name.contains(".lora_") { name.replace(".weight", "") } else { name.into() }
}

/// Every tensor of `golden` that is among `got`; at least half of them are.
fn compare(got: &BTreeMap<String, Vec<f32>>, golden: &Path) {
    let want = tensors(golden);
    let (mut seen, all) = (0, want.len());
    for (name, want) in want {
        let Some(got) = got.get(&plain(&name)) else { continue };
        let off = relative(got, &want);
        assert!(off < 1e-3, "{}: {name} is off by {off}", golden.display());
        seen += 1;
    }
    assert!(2 * seen >= all);
}

#[test]
fn gradients_of_a_tiny_llama() {
    let Some(dir) = shared("fixtures/tiny_llama_train") else { return };
    let golden = json(&dir.join("golden.json"));
    let batches: Vec<_> = golden["data"]["sft_batches"].as_array().unwrap().iter().map(examples).collect();
    let check = |method: &Method, set: &dyn Fn(&mut Learner), key: &str, at: usize, grads: &str| {
        for checkpointing in [Checkpointing::None, Checkpointing::All, Checkpointing::Layers(1)] {
            let mut learner = learner(&dir.join("checkpoint"), 2, method);
            set(&mut learner);
            learner.set_checkpointing(checkpointing);
            let mut gradients = learner.params().gradients();
            let loss = learner.backward(&batches[at % 2], 0, &mut gradients).unwrap();
            if at == 0 {
                let want = golden[key]["loss_f64"][0].as_f64().unwrap();
                assert!((loss.mean() - want).abs() < 1e-4, "{key}: {} {want}", loss.mean());
                let norm = length(&gradients, 1.0 / loss.tokens as f64);
                let want = golden[key]["grad_norm_f64"][0].as_f64().unwrap();
                assert!((norm / want - 1.0).abs() < 1e-4, "{key}: {norm} {want}");
            }
            let got = named(learner.params(), &gradients, 1.0 / loss.tokens as f64);
            compare(&got, &dir.join(grads));
        }
    };
    check(&lora(&dir.join("lora_initial_adapter")), &|_| {}, "lora_sft", 0, "lora_grads_step1.safetensors");
    check(&lora(&dir.join("lora_final_adapter")), &|_| {}, "lora_sft", 20, "lora_grads_at_final.safetensors");
    check(&Method::Full, &|_| {}, "full_ft", 0, "full_grads_step1.safetensors");
    let last = tensors(&dir.join("full_final.safetensors"));
    let put = |learner: &mut Learner| {
        for p in &mut learner.params_mut().list {
            p.values.copy_from_slice(&last[&p.name]);
        }
    };
    check(&Method::Full, &put, "full_ft", 10, "full_grads_at_final.safetensors");
}

/// The first steps of a run, as `accept.py` asks for them of the command.
fn curve(dir: &Path, method: &Method, key: &str, decay: f64) {
    let golden = json(&dir.join("golden.json"));
    let batches: Vec<_> = golden["data"]["sft_batches"].as_array().unwrap().iter().map(examples).collect();
    let golden = &golden[key];
    let mut learner = learner(&dir.join("checkpoint"), 2, method);
    let mut adam = Adam::new(golden["lr"].as_f64().unwrap(), decay, 1.0);
    for step in 0..golden["steps"].as_u64().unwrap() as usize {
        let mut gradients = learner.params().gradients();
        let loss = learner.backward(&batches[step % 2], step as u64, &mut gradients).unwrap();
        let norm = adam.step(learner.params_mut(), &gradients, 1.0 / loss.tokens as f64);
        let want = |what: &str| golden[what][step].as_f64().unwrap();
        assert!((loss.mean() - want("loss_f64")).abs() < 1e-3, "{key} {step}: {} {}", loss.mean(), want("loss_f64"));
        assert!((norm / want("grad_norm_f64") - 1.0).abs() < 5e-3, "{key} {step}: {norm}");
    }
}

#[test]
fn curves_of_a_tiny_llama() {
    let Some(dir) = shared("fixtures/tiny_llama_train") else { return };
    curve(&dir, &lora(&dir.join("lora_initial_adapter")), "lora_sft", 0.0);
    curve(&dir, &Method::Full, "full_ft", 0.1);
}

#[test]
fn a_shared_embedding_gets_the_gradients_of_both_its_uses() {
    let Some(dir) = shared("fixtures/tiny_llama_train") else { return };
    let golden = json(&dir.join("golden.json"));
    let tied = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("checkpoint/model.safetensors"), tied.path().join("model.safetensors")).unwrap();
    let mut config = json(&dir.join("checkpoint/config.json"));
    config["tie_word_embeddings"] = true.into();
    std::fs::write(tied.path().join("config.json"), config.to_string()).unwrap();
    let mut learner = learner(tied.path(), 2, &Method::Full);
    let mut gradients = learner.params().gradients();
    let loss = learner.backward(&examples(&golden["data"]["sft_batches"][0]), 0, &mut gradients).unwrap();
    let want = &golden["tied_step1"];
    assert!((loss.mean() - want["loss"].as_f64().unwrap()).abs() < 1e-4);
    let by = 1.0 / loss.tokens as f64;
    let norm = length(&gradients, by);
    assert!((norm / want["total_grad_norm"].as_f64().unwrap() - 1.0).abs() < 1e-4, "{norm}");
    let shared = &named(learner.params(), &gradients, by)["model.embed_tokens.weight"];
    for row in [2, 3] {
        let first = &want[format!("embed_grad_row{row}_first8")];
        assert!(relative(&shared[row * 64..row * 64 + 8], &golden::numbers(first)) < 1e-3);
    }
    assert_eq!(learner.params().list.len(), 20, "one matrix for both uses");
}

#[test]
fn micro_batches_are_weighed_by_their_tokens() {
    let Some(dir) = shared("fixtures/tiny_llama_train") else { return };
    let golden = json(&dir.join("golden.json"));
    let want = &golden["grad_accum_2"];
    let mut learner = learner(&dir.join("checkpoint"), 2, &lora(&dir.join("lora_final_adapter")));
    let mut gradients = learner.params().gradients();
    let (mut loss, mut tokens) = (Loss::default(), Vec::new());
    for batch in golden["data"]["sft_batches"].as_array().unwrap() {
        let one = learner.backward(&examples(batch), 0, &mut gradients).unwrap();
        assert_eq!(learner.loss(&examples(batch)).unwrap(), one);
        tokens.push(one.tokens as u64);
        loss += one;
    }
    assert_eq!(serde_json::json!(tokens), want["n_tokens"]);
    assert!((loss.mean() - want["loss"].as_f64().unwrap()).abs() < 1e-4);
    let norm = length(&gradients, 1.0 / loss.tokens as f64);
    assert!((norm / want["grad_norm"].as_f64().unwrap() - 1.0).abs() < 1e-3, "{norm}");
}

/// SmolLM2 in f32, ten steps, where `RUSHLIGHT_SMOLLM2` names its Q4_1 file (that of the quick start).
#[test]
fn ten_steps_of_a_real_model() {
    let Some(dir) = shared("fixtures/lora_golden") else { return };
    let Some(path) = std::env::var_os("RUSHLIGHT_SMOLLM2") else {
        println!("skipped: RUSHLIGHT_SMOLLM2 names no file");
        return;
    };
    let golden = json(&dir.join("golden.json"));
    let method = Method::Lora(LoraConfig {
        rank: 4,
        alpha: 8.0,
        targets: vec!["q_proj".into(), "v_proj".into()],
        init: Some(dir.join("initial_adapter")),
        ..LoraConfig::default()
    });
    let mut model = Model::load(&Checkpoint::open(Path::new(&path)).unwrap()).unwrap();
    lesson::in_floats(&mut model);
    let mut learner = Learner::new(model, Cpu::new(2, lesson::isa()), &method, 1).unwrap();
    let batch = examples(&golden);
    let mut adam = Adam::new(1e-3, 0.0, 1.0);
    for step in 0..=10 {
        let mut gradients = learner.params().gradients();
        let loss = learner.backward(&batch, 0, &mut gradients).unwrap();
        let want = |what: &str| golden[what][step].as_f64().unwrap();
        assert_eq!(loss.tokens as u64, golden["n_loss_tokens"].as_u64().unwrap());
        assert!((loss.mean() - want("loss_f64")).abs() < 2e-3, "{step}: {} {}", loss.mean(), want("loss_f64"));
        let norm = length(&gradients, 1.0 / loss.tokens as f64);
        assert!((norm / want("grad_norm_f64") - 1.0).abs() < 1e-3, "{step}: {norm}");
        let file = ["grads_step1", "grads_step2"].get(step).or((step == 10).then_some(&"grads_at_final"));
        if let Some(file) = file {
            let got = named(learner.params(), &gradients, 1.0 / loss.tokens as f64);
            // The file has the rows of queries and keys in another order than the reference: compare what has not.
            let got = got.into_iter().filter(|(name, _)| !name.ends_with("q_proj.lora_B")).collect();
            compare(&got, &dir.join(format!("{file}.safetensors")));
        }
        adam.step(learner.params_mut(), &gradients, 1.0 / loss.tokens as f64);
    }
}

/// What a step takes is what the plan says, within a tenth.
#[test]
fn memory_is_as_planned() {
    let Some(dir) = shared("models/stories15M-hf") else { return };
    for method in [Method::Lora(LoraConfig::default()), Method::Full] {
        for checkpointing in [Checkpointing::None, Checkpointing::Layers(3), Checkpointing::All] {
            for lens in [&[40, 40][..], &[128]] {
                let model = Model::load(&Checkpoint::open(&dir).unwrap()).unwrap();
                let rows = lens.iter().sum();
                let plan = memory(&model, &method, rows, checkpointing).unwrap();
                let mut learner = Learner::new(model, Cpu::new(2, lesson::isa()), &method, 1).unwrap();
                learner.set_checkpointing(checkpointing);
                let mut batch = lesson::random_examples(lens, 32000, 1);
                batch.iter_mut().for_each(|e| e.targets = e.ids.iter().map(|&id| Some(id)).collect());
                let mut gradients = learner.params().gradients();
                for _ in 0..2 {
                    learner.backward(&batch, 0, &mut gradients).unwrap();
                }
                let got = learner.scratch() as f64 / plan.pass() as f64;
                println!("{checkpointing:?} {rows}: {got} {plan:?}");
                assert!((0.9..1.1).contains(&got), "{checkpointing:?} {rows}: {got} of the plan");
                assert_eq!(plan.params, 4 * learner.params().count() as u64);
            }
        }
    }
}

#[test]
fn gradients_know_which_experts_were_met() {
    let Some(dir) = shared("fixtures/families/mixtral") else { return };
    for method in [Method::Lora(LoraConfig::default()), Method::Full] {
        let mut learner = learner(&dir, 1, &method);
        let mut gradients = learner.params().gradients();
        // Two tokens choose four experts of a layer at most.
        let batch = [Example::from_labels(vec![5, 9], &[None, Some(9)])];
        learner.backward(&batch, 0, &mut gradients).unwrap();
        let (mut met, mut idle) = (0, 0);
        for (i, param) in learner.params().list.iter().enumerate() {
            let zero = gradients[i].iter().all(|g| *g == 0.0);
            assert_eq!(param.idles, param.name.contains(".experts."), "{}", param.name);
            match (param.idles, gradients.met(i)) {
                (true, true) => met += 1,
                (true, false) => (idle, _) = (idle + 1, assert!(zero)),
                (false, is_met) => assert!(is_met, "{}", param.name),
            }
        }
        assert!(met > 0 && idle > 0, "{met} {idle}");
        gradients.clear();
        assert!((0..gradients.len()).all(|i| !gradients.met(i)));
    }
}
