//! Gradients against differences of the loss: every switch of a model, every kind of weight, every kind of adapter.

mod golden;
mod lesson;

use golden::{options, shared};
use lesson::{check_gradients, isa, learner, random_examples, stir};
use rushlight::engine::{Engine, Options};
use rushlight::train::batch::Example;
use rushlight::train::params::Gradients;
use rushlight::train::tape::{Checkpointing, Learner, LoraConfig, Method};
use rushlight_models::checkpoint::{Bytes, Checkpoint};
use rushlight_models::families::Role;
use rushlight_models::model::{Model, Weight};
use rushlight_models::rope::Rotary;
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::encode;
use rushlight_quant::{Cpu, Isa};
use std::path::Path;

fn lora(config: LoraConfig) -> Method {
    Method::Lora(LoraConfig { rank: 3, alpha: 6.0, ..config })
}

/// The loss by the engine's logits.
fn loss(engine: &mut Engine, examples: &[Example]) -> f64 {
    let mut sum = 0.0;
    for e in examples {
        engine.truncate(0, 0);
        let mut each = |position: usize, logits: &[f32]| {
            if let Some(target) = e.targets[position] {
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
                sum += total.ln() + f64::from(most - logits[target as usize]);
            }
        };
        engine.prompt_all(0, &e.ids, &mut each).unwrap();
    }
    sum
}

/// Loss as the engine has it, and gradients of adapters and of all weights by differences, for all of these checkpoints.
fn check_families(names: &str) {
    for name in names.split_whitespace() {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let mut engine = Engine::open(&dir, &Options { context: Some(64), ..options(&[]) }).unwrap();
        let mut batch = random_examples(&[19, 7], engine.vocab_size(), 12);
        // Where a context is seen whole, have one: the token that ends it stands in the first example.
        if let rushlight_models::spec::Context::Before { start, .. } = engine.spec().context {
            batch[0].ids[6] = start;
        }
        let want = loss(&mut engine, &batch);
        let mut adapters = learner(&dir, 2, &lora(LoraConfig::default()));
        let got = adapters.loss(&batch).unwrap();
        assert!((got.sum - want).abs() < 2e-3, "{name}: {} {want}", got.sum);
        stir(&mut adapters, 0.1);
        check_gradients(&mut adapters, &batch, name, 0.05, 0.02, 2e-4);
        let mut whole = learner(&dir, 2, &Method::Full);
        check_gradients(&mut whole, &batch, name, 0.05, 0.02, 2e-4);
    }
}

#[test]
fn llama_and_its_kin() {
    check_families(
        "llama llama-rope3 llama-tied-bias llama-yarn llama-sharded-bf16 llama-sharded-f16 mistral smollm3 granite \
         helium ernie4_5 olmo olmo2 stablelm",
    );
}

#[test]
fn qwen_and_gemma() {
    check_families("qwen-7b qwen2-tied qwen3 gemma gemma2 gemma3");
}

#[test]
fn experts() {
    check_families("mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss");
}

#[test]
fn phi_cohere_and_glm() {
    check_families(
        "phi phi3 phi3-longrope cohere glm glm4 chatglm2-6b chatglm2-6b-ptuning chatglm-6b chatglm-6b-ptuning",
    );
}

#[test]
fn gpt_and_others_of_its_time() {
    check_families(
        "baichuan-7b baichuan-13b baichuan2-7b internlm-7b internlm2 internlm2-bias-dynntk gpt2 gpt_bigcode \
         gpt_bigcode-mha gpt_neox gptj starcoder2 bloom falcon-7b-style falcon-40b-style falcon-rw-alibi",
    );
}

#[test]
fn every_kind_of_adapter() {
    for name in ["llama", "phi3", "falcon-40b-style"] {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let batch = random_examples(&[19, 7], 300, 4);
        for config in [
            LoraConfig { rslora: true, dropout: 0.3, ..LoraConfig::default() },
            LoraConfig { train_full: vec![".*norm.*".into(), ".*embed.*|lm_head".into()], ..LoraConfig::default() },
        ] {
            let config = match name {
                "falcon-40b-style" => LoraConfig { train_full: Vec::new(), ..config },
                _ => config,
            };
            let mut learner = learner(&dir, 2, &lora(config));
            stir(&mut learner, 0.1);
            check_gradients(&mut learner, &batch, name, 0.05, 0.02, 2e-4);
        }
        let mut learner = learner(&dir, 2, &Method::Prefix { tokens: 5 });
        check_gradients(&mut learner, &batch, name, 0.05, 0.02, 2e-4);
    }
}

/// All gradients, for these threads and this way to keep activations.
fn gradients(learner: &mut Learner, batch: &[Example]) -> (f64, Gradients) {
    let mut gradients = learner.params().gradients();
    let loss = learner.backward(batch, 9, &mut gradients).unwrap();
    (loss.sum, gradients)
}

fn bits(gradients: &Gradients) -> Vec<u32> {
    gradients.iter().flat_map(|g| g.iter().map(|x| x.to_bits())).collect()
}

#[test]
fn threads_and_checkpointing_change_no_bit() {
    for name in ["llama", "qwen2_moe", "deepseek_v2", "gpt_oss", "gemma2"] {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let batch = random_examples(&[40, 7, 23], 300, 6);
        for method in [lora(LoraConfig { dropout: 0.2, dora: true, ..LoraConfig::default() }), Method::Full] {
            let mut first: Option<(f64, Vec<u32>)> = None;
            for threads in [1, 2, 3] {
                for checkpointing in [Checkpointing::None, Checkpointing::Layers(1), Checkpointing::All] {
                    let mut learner = learner(&dir, threads, &method);
                    stir(&mut learner, 0.1);
                    learner.set_checkpointing(checkpointing);
                    learner.set_neftune(Some(5.0));
                    let (loss, gradients) = gradients(&mut learner, &batch);
                    let got = (loss, bits(&gradients));
                    assert!(first.get_or_insert(got.clone()) == &got, "{name} {threads} {checkpointing:?}");
                }
            }
        }
    }
}

/// DoRA takes the norm in its gain for a constant: the gradients are those of an ordinary adapter on rows multiplied by
/// the gain, and the magnitudes' are the slope of the loss.
#[test]
fn weight_decomposition() {
    let Some(dir) = shared("fixtures/families/phi3") else { return };
    let batch = random_examples(&[19, 7], 300, 8);
    let mut dora = learner(&dir, 2, &lora(LoraConfig { dora: true, ..LoraConfig::default() }));
    let magnitudes = |l: &Learner| l.params().list.iter().filter(|p| p.name.contains("magnitude")).count();
    assert_eq!(magnitudes(&dora), 2 * 7);
    // With B zero, the gain is 1.
    let mut plain = learner(&dir, 2, &lora(LoraConfig::default()));
    let off = dora.loss(&batch).unwrap().sum - plain.loss(&batch).unwrap().sum;
    assert!(off.abs() < 1e-3, "{off}");
    stir(&mut dora, 0.1);
    for p in dora.params_mut().list.iter_mut().filter(|p| p.name.contains("magnitude")) {
        p.values.iter_mut().enumerate().for_each(|(i, m)| *m *= 1.0 + 0.3 * lesson::noise(3, i));
    }
    let (_, got) = gradients(&mut dora, &batch);
    let model = dora.model_with_adapter().unwrap();
    let mut folded = dora.model().clone();
    lesson::in_floats(&mut folded);
    for (linear, trained) in folded.linears_mut().zip(model.linears()) {
        let Some(gain) = trained.adapters.first().and_then(|a| a.gain.as_ref()) else { continue };
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_exact_mut(cols).enumerate() {
            linear.weight.decode_row(row, values);
            values.iter_mut().for_each(|w| *w *= gain[row]);
        }
        linear.weight = Weight::from_f32(rows, cols, &values).unwrap();
    }
    let mut plain = Learner::new(folded, Cpu::new(2, isa()), &lora(LoraConfig::default()), 1).unwrap();
    let gains: Vec<Vec<f32>> = model.linears().filter_map(|l| l.adapters.first()?.gain.clone()).collect();
    let of_dora: Vec<usize> = (0..got.len()).filter(|&n| !dora.params().list[n].name.contains("magnitude")).collect();
    let mut gain = gains.iter();
    let mut by: Vec<Option<&Vec<f32>>> = Vec::new();
    for (n, &from) in of_dora.iter().enumerate() {
        let gain = dora.params().list[from].name.contains("lora_B").then(|| gain.next().unwrap());
        let values = dora.params().list[from].values.clone();
        let into = &mut plain.params_mut().list[n].values;
        into.copy_from_slice(&values);
        if let Some(gain) = gain {
            into.chunks_exact_mut(3).zip(gain).for_each(|(row, g)| row.iter_mut().for_each(|x| *x *= g));
        }
        by.push(gain);
    }
    let (_, want) = gradients(&mut plain, &batch);
    for (n, &from) in of_dora.iter().enumerate() {
        let mut want = want[n].to_vec();
        if let Some(gain) = by[n] {
            want.chunks_exact_mut(3).zip(gain).for_each(|(row, g)| row.iter_mut().for_each(|x| *x *= g));
        }
        let off = lesson::relative(&got[from], &want);
        assert!(off < 1e-3, "{}: {off}", dora.params().list[from].name);
    }
    lesson::check_some(&mut dora, &batch, "magnitudes", |name| name.contains("magnitude"), 0.05, 0.02, 2e-4);
}

/// The loss of a learner, and the engine's with what was learnt attached.
fn check_attached(learner: &mut Learner, dir: &Path, label: &str) {
    let batch = random_examples(&[19, 7], 300, 4);
    let here = learner.loss(&batch).unwrap().sum;
    let model = learner.model_with_adapter().unwrap();
    let mut engine = Engine::from_model(Checkpoint::open(dir).unwrap(), model, &options(&[])).unwrap();
    let there = loss(&mut engine, &batch);
    assert!((here - there).abs() < 2e-3, "{label}: {here} {there}");
}

#[test]
fn what_was_learnt_is_attached_for_the_engine() {
    for name in ["llama", "phi3", "gpt2", "baichuan-7b", "deepseek_v2", "olmo2"] {
        let Some(dir) = shared(&format!("fixtures/families/{name}")) else { return };
        let config = LoraConfig { dora: true, train_full: vec![".*norm.*|ln_.".into()], ..LoraConfig::default() };
        let mut methods = vec![lora(config), Method::Full];
        if name != "deepseek_v2" {
            methods.push(Method::Prefix { tokens: 3 });
        }
        for method in methods {
            let mut learner = learner(&dir, 2, &method);
            for (n, p) in learner.params_mut().list.iter_mut().enumerate() {
                p.values.iter_mut().enumerate().for_each(|(i, x)| *x += 0.1 * lesson::noise(n as u64, i));
            }
            check_attached(&mut learner, &dir, &format!("{name} {method:?}"));
        }
    }
}

/// Adapters that PEFT made, taken to go on from: the loss is the engine's with them.
#[test]
fn going_on_from_an_adapter() {
    for name in [
        "baichuan-7b/adapters/lora-wpack",
        "baichuan-7b/adapters/lora-rslora",
        "baichuan2-13b/adapters/lora-wpack",
        "chatglm2-6b/adapters/lora-qkv",
        "internlm2/adapters/lora-wqkv",
        "llama/adapters/dora",
        "llama/adapters/lora-qv",
        "llama/adapters/lora-rslora-all",
        "qwen2/adapters/lora-qkvo",
    ] {
        let Some(adapter) = shared(&format!("fixtures/families/{name}")) else { return };
        let dir = adapter.parent().unwrap().parent().unwrap();
        let peft = golden::json(&adapter.join("adapter_config.json"));
        let config = LoraConfig {
            rank: peft["r"].as_u64().unwrap() as usize,
            alpha: peft["lora_alpha"].as_f64().unwrap() as f32,
            rslora: peft["use_rslora"].as_bool().unwrap_or(false),
            dora: peft["use_dora"].as_bool().unwrap_or(false),
            targets: peft["target_modules"].as_array().unwrap().iter().map(|t| t.as_str().unwrap().into()).collect(),
            init: Some(adapter.clone()),
            ..LoraConfig::default()
        };
        let mut learner = learner(dir, 2, &Method::Lora(config.clone()));
        let batch = random_examples(&[19, 7], 300, 4);
        let here = learner.loss(&batch).unwrap().sum;
        let mut engine = Engine::open(dir, &options(&[&adapter])).unwrap();
        let there = loss(&mut engine, &batch);
        assert!((here - there).abs() < 2e-3, "{name}: {here} {there}");
        check_attached(&mut learner, dir, name);
        // Asked for otherwise than it is.
        let model = || Model::load(&Checkpoint::open(dir).unwrap()).unwrap();
        let refused = |config: LoraConfig| {
            let learner = Learner::new(model(), Cpu::new(1, isa()), &Method::Lora(config), 1);
            learner.err().expect("refused").to_string()
        };
        assert!(refused(LoraConfig { rank: 2, ..config.clone() }).contains("--lora-r"));
        assert!(refused(LoraConfig { dora: !config.dora, ..config.clone() }).contains("DoRA"));
    }
}

#[test]
fn modules_are_called_as_the_family_calls_them() {
    let names = |name: &str, targets: &[&str]| -> Option<Result<Vec<String>, String>> {
        let dir = shared(&format!("fixtures/families/{name}"))?;
        let model = Model::load(&Checkpoint::open(&dir).unwrap()).unwrap();
        let targets = targets.iter().map(|t| t.to_string()).collect();
        let method = lora(LoraConfig { targets, ..LoraConfig::default() });
        let learner = Learner::new(model, Cpu::new(1, isa()), &method, 1).map_err(|e| e.to_string());
        let first = |l: Learner| {
            let all = l.params().list.iter().map(|p| p.name.clone());
            all.filter(|n| n.contains("layers.0.") || n.contains("h.0.") || n.contains("head")).collect()
        };
        Some(learner.map(first))
    };
    for (family, targets, want) in [
        (
            "llama",
            vec!["q_proj"],
            vec!["model.layers.0.self_attn.q_proj.lora_A", "model.layers.0.self_attn.q_proj.lora_B"],
        ),
        ("llama", vec!["lm_head"], vec!["lm_head.lora_A", "lm_head.lora_B"]),
        (
            "baichuan-7b",
            vec!["W_pack"],
            vec![
                "model.layers.0.self_attn.W_pack.lora_A",
                "model.layers.0.self_attn.W_pack.lora_B.Q",
                "model.layers.0.self_attn.W_pack.lora_B.K",
                "model.layers.0.self_attn.W_pack.lora_B.V",
            ],
        ),
        (
            "deepseek_v2",
            vec!["kv_a_proj_with_mqa"],
            vec![
                "model.layers.0.self_attn.kv_a_proj_with_mqa.lora_A",
                "model.layers.0.self_attn.kv_a_proj_with_mqa.lora_B.K",
                "model.layers.0.self_attn.kv_a_proj_with_mqa.lora_B.V",
            ],
        ),
        ("gpt2", vec!["attn.c_proj"], vec!["transformer.h.0.attn.c_proj.lora_A", "transformer.h.0.attn.c_proj.lora_B"]),
    ] {
        let Some(got) = names(family, &targets) else { return };
        assert_eq!(got.unwrap(), want);
    }
    let all = names("mixtral", &["all-linear"]).unwrap().unwrap();
    assert!(all.iter().any(|n| n.contains("experts.3.w2")) && !all.iter().any(|n| n.contains("moe.gate")));
    assert!(names("mixtral", &["gate"]).unwrap().unwrap().iter().all(|n| n.contains("block_sparse_moe.gate")));
    let error = names("llama", &["q_proj", "c_attn"]).unwrap().unwrap_err();
    assert!(error.contains("'c_attn'") && error.contains("q_proj, k_proj"), "{error}");
}

/// A llama whose rows are whole blocks of every format.
fn wide_llama(dir: &Path) -> Model {
    const WIDTH: usize = 256;
    let mut model = Model::load(&Checkpoint::open(dir).unwrap()).unwrap();
    model.layers.truncate(1);
    let spec = &mut model.spec;
    spec.layers.truncate(1);
    (spec.hidden_size, spec.vocab_size) = (WIDTH, 96);
    (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim) = (4, 2, 64, 64);
    (spec.attention_scale, spec.ropes[0].dim) = (0.125, 64);
    spec.layers[0].mlp.as_mut().unwrap().width = WIDTH;
    model.rotaries = vec![Rotary::new(&spec.ropes[0], None)];
    let random = |id: usize, rows: usize| {
        let values: Vec<f32> = (0..rows * WIDTH).map(|i| 0.15 * lesson::noise(id as u64, i)).collect();
        Weight::from_f32(rows, WIDTH, &values).unwrap()
    };
    model.embedding.weight = random(1000, 96);
    for linear in model.linears_mut() {
        let rows = match linear.role {
            Role::Head => 96,
            Role::K | Role::V => 128,
            _ => WIDTH,
        };
        linear.weight = random(linear.id, rows);
    }
    for vector in model.vectors_mut() {
        vector.values = (0..WIDTH).map(|i| 1.0 + 0.2 * lesson::noise(vector.id as u64, i)).collect();
    }
    model
}

/// Gradients through the packed blocks are those through the same weights in f32, as far as activations are rounded.
fn check_packed(model: &Model, label: &str) {
    let mut floats = model.clone();
    lesson::in_floats(&mut floats);
    let batch = random_examples(&[33, 9], model.spec.vocab_size, 2);
    let method = lora(LoraConfig::default());
    let learner = |model: &Model, isa: Isa| {
        let mut learner = Learner::new(model.clone(), Cpu::new(2, isa), &method, 1).unwrap();
        stir(&mut learner, 0.1);
        learner
    };
    let (want_loss, want) = gradients(&mut learner(&floats, isa()), &batch);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        // Activations wait in bf16 and 8 bits, and are multiplied in bf16 where a processor does that fast.
        let near = if matches!(isa, Isa::Amx | Isa::Avx512) { 0.04 } else { 0.03 };
        let mut packed = learner(model, isa);
        let (loss, got) = gradients(&mut packed, &batch);
        assert!((loss / want_loss - 1.0).abs() < near, "{label} {isa:?}: {loss} {want_loss}");
        for (n, (got, want)) in got.iter().zip(want.iter()).enumerate() {
            let off = lesson::relative(got, want);
            assert!(off < near, "{label} {isa:?} {}: {off}", packed.params().list[n].name);
        }
    }
}

#[test]
fn every_format() {
    let Some(dir) = shared("fixtures/families/llama") else { return };
    for format in Format::ALL.into_iter().filter(|f| !f.is_internal()) {
        let mut model = wide_llama(&dir);
        for linear in model.linears_mut() {
            let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
            let mut values = vec![0.0; rows * cols];
            values.chunks_exact_mut(cols).enumerate().for_each(|(r, v)| linear.weight.decode_row(r, v));
            let mut data = vec![0; format.row_bytes(cols).unwrap() * rows];
            encode(format, &values, cols, None, &mut data);
            linear.weight = Weight::new(format, rows, cols, Bytes::new(data)).unwrap();
        }
        check_packed(&model, format.name());
    }
}

/// The formats of other tools, one of them with its columns in another order.
#[test]
fn every_format_of_other_tools() {
    for name in "awq_gemm_b4_g32 bnb_nf4 bnb_nf4_dq gptq_b4_g32_sym gptq_b4_g32_sym_act gptq_b8_g32_sym \
                 gptq_b8_g64_sym_act gptq_v2_b4_g32_asym"
        .split_whitespace()
    {
        let Some(dir) = shared(&format!("fixtures/gptq_ckpt_tiny/{name}")) else { return };
        check_packed(&Model::load(&Checkpoint::open(&dir).unwrap()).unwrap(), name);
    }
}
