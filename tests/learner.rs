//! Loss and gradients against PyTorch's.

mod golden;
mod lesson;

use golden::{json, shared};
use lesson::{Adam, examples, learner, length, named, relative, tensors};
use rushlight::train::batch::Loss;
use rushlight::train::tape::{Checkpointing, Learner, LoraConfig, Method};
use std::collections::BTreeMap;
use std::path::Path;

/// All projections, as the reference data have them.
fn lora(init: &Path) -> Method {
    Method::Lora(LoraConfig { rank: 4, alpha: 8.0, init: Some(init.to_path_buf()), ..LoraConfig::default() })
}

/// Names of parameters as PEFT and Hugging Face have them.
fn plain(name: &str) -> String {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    match name.strip_suffix(".weight") {
        Some(name) if name.contains(".lora_") => name.into(),
        _ => name.into(),
    }
}

fn compare(got: &BTreeMap<String, Vec<f32>>, golden: &Path) {
    let want = tensors(golden);
    let mut seen = 0;
    for (name, want) in want {
        let got = &got[&plain(&name)];
        let off = relative(got, &want);
        assert!(off < 1e-3, "{}: {name} is off by {off}", golden.display());
        seen += 1;
    }
    assert!(seen > 0);
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
