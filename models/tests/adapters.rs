//! Adapters written and read back.

use rushlight_models::adapter::attach;
use rushlight_models::adapter::write::{Description, Pair, Whole, write_gguf, write_peft, write_prefix};
use rushlight_models::checkpoint::{Checkpoint, TensorInfo, gguf, safetensors};
use rushlight_models::convert::to_gguf;
use rushlight_models::families::Role;
use rushlight_models::model::Model;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};

/// A checkpoint of the repository or of the reference data; `None`, with a word about it, where there is none.
fn fixture(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let places = ["tests/fixtures/families", "../shared/fixtures/families"].map(|p| root.join(p).join(name));
    let found = places.into_iter().find(|p| p.exists());
    if found.is_none() {
        println!("skipped: no checkpoint {name}");
    }
    found
}

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 2_654_435_761 + seed * 97) % 2003) as f32 / 1001.5 - 1.0).collect()
}

/// What was trained, owned.
struct Trained(Vec<One>);

/// Role, layer, A, B and magnitude.
type One = (Role, usize, Vec<f32>, Vec<f32>, Option<Vec<f32>>);

impl Trained {
    /// For every linear layer that `wanted` takes.
    fn of(model: &Model, rank: usize, dora: bool, wanted: impl Fn(Role) -> bool) -> Trained {
        let linears = model.linears().filter(|l| wanted(l.role)).enumerate();
        let each = linears.map(|(i, l)| {
            let (rows, cols) = (l.weight.rows(), l.weight.cols());
            let magnitude = dora.then(|| numbers(rows, i + 5).iter().map(|x| x + 2.0).collect());
            (l.role, l.layer, numbers(rank * cols, i), numbers(rows * rank, i + 1000), magnitude)
        });
        Trained(each.collect())
    }

    fn pairs(&self) -> Vec<Pair<'_>> {
        (self.0.iter())
            .map(|(role, layer, a, b, m)| Pair { role: *role, layer: *layer, a, b, magnitude: m.as_deref() })
            .collect()
    }
}

/// `scale * b * a` of what is attached to each layer.
fn changes(model: &Model) -> Vec<(Role, usize, Vec<f64>)> {
    let attached = model.linears().filter(|l| !l.adapters.is_empty());
    let change = |l: &rushlight_models::model::Linear| {
        let low = &l.adapters[0];
        let (rank, cols) = (low.a.rows(), low.a.cols());
        let (mut a, mut b) = (vec![0.0; rank * cols], vec![0.0; rank]);
        (0..rank).for_each(|r| low.a.decode_row(r, &mut a[r * cols..][..cols]));
        let mut out = Vec::new();
        for row in 0..low.b.rows() {
            low.b.decode_row(row, &mut b);
            let sum = |c: usize| (0..rank).map(|r| f64::from(b[r]) * f64::from(a[r * cols + c])).sum::<f64>();
            out.extend((0..cols).map(|c| f64::from(low.scale) * sum(c)));
        }
        (l.role, l.layer, out)
    };
    attached.map(change).collect()
}

fn expected(model: &Model, trained: &Trained, rank: usize, scale: f64) -> Vec<(Role, usize, Vec<f64>)> {
    let each = trained.0.iter().map(|(role, layer, a, b, _)| {
        let cols = model.linears().find(|l| (l.role, l.layer) == (*role, *layer)).unwrap().weight.cols();
        let sum =
            |row: &[f32], c: usize| (0..rank).map(|r| f64::from(row[r]) * f64::from(a[r * cols + c])).sum::<f64>();
        (*role, *layer, b.chunks(rank).flat_map(|row| (0..cols).map(move |c| scale * sum(row, c))).collect())
    });
    each.collect()
}

fn compare(got: &[(Role, usize, Vec<f64>)], want: &[(Role, usize, Vec<f64>)], label: &str) {
    assert_eq!(got.len(), want.len(), "{label}");
    for (g, w) in got.iter().zip(want) {
        assert_eq!((g.0, g.1), (w.0, w.1), "{label}");
        let worst = g.2.iter().zip(&w.2).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
        assert!(g.2.len() == w.2.len() && worst < 1e-6, "{label}: {:?} of layer {} is off by {worst:e}", g.0, g.1);
    }
}

fn description(rank: usize, rslora: bool) -> Description {
    Description { base: "base".into(), rank, alpha: 8.0, dropout: 0.0, rslora }
}

/// The checkpoint as GGUF.
fn gguf_of(source: &Path, path: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(source).unwrap();
    let mut conversion = to_gguf(&checkpoint).unwrap();
    let infos: Vec<TensorInfo> = conversion.tensors.iter().map(|t| t.info()).collect();
    conversion.metadata.0.retain(|key, _| !key.starts_with("tokenizer"));
    let mut writer = gguf::Writer::create(path, &conversion.metadata, &infos).unwrap();
    for tensor in &conversion.tensors {
        writer.write(&tensor.name, &tensor.data(&checkpoint).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(path).unwrap()
}

#[test]
fn what_was_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    // Plain, packed one behind the other and in groups, stored the other way, latent vectors, experts.
    for name in [
        "llama",
        "qwen2",
        "phi3",
        "chatglm2-6b",
        "baichuan-7b",
        "gpt2",
        "gpt_neox",
        "internlm2",
        "deepseek_v2",
        "mixtral",
    ] {
        let Some(source) = fixture(name) else { continue };
        let mut model = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
        for (rslora, scale) in [(false, 4.0), (true, 8.0 / 2f64.sqrt())] {
            let mut trained = Trained::of(&model, 2, false, |role| !matches!(role, Role::Head | Role::Router));
            if rslora {
                // As training does it: what the files hold as one matrix has one A.
                for i in 1..trained.0.len() {
                    if (trained.0[i].1, trained.0[i].2.len()) == (trained.0[i - 1].1, trained.0[i - 1].2.len()) {
                        trained.0[i].2 = trained.0[i - 1].2.clone();
                    }
                }
            }
            let out = dir.path().join(format!("{name}-{rslora}"));
            write_peft(&out, &model, &description(2, rslora), &trained.pairs(), &[]).unwrap();
            attach(&mut model, &[(out.clone(), 1.0)]).unwrap_or_else(|e| panic!("{name}: {e}"));
            let want = expected(&model, &trained, 2, scale);
            compare(&changes(&model), &want, name);
        }
    }
}

#[test]
fn dora_and_whole_matrices_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "phi3"] {
        let Some(source) = fixture(name) else { continue };
        let mut model = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
        let trained = Trained::of(&model, 2, true, |role| role != Role::Head);
        let head = numbers(model.head.weight.rows() * model.head.weight.cols(), 3);
        let table = numbers(head.len(), 4);
        let wholes = [
            Whole { role: Role::Head, layer: 0, values: &head },
            Whole { role: Role::Embedding, layer: 0, values: &table },
        ];
        let out = dir.path().join(name);
        write_peft(&out, &model, &description(2, false), &trained.pairs(), &wholes).unwrap();
        attach(&mut model, &[(out, 1.0)]).unwrap();
        compare(&changes(&model), &expected(&model, &trained, 2, 4.0), name);
        let row = |w: &rushlight_models::model::Weight, r: usize| {
            let mut row = vec![0.0; w.cols()];
            w.decode_row(r, &mut row);
            row
        };
        let cols = model.head.weight.cols();
        assert_eq!(row(model.head.weight(), 5), head[5 * cols..][..cols]);
        assert_eq!(row(model.embedding.weight(), 7), table[7 * cols..][..cols]);
        // The gain is magnitude over the norm of the changed row.
        for ((_, _, _, _, magnitude), linear) in trained.0.iter().zip(model.linears()) {
            let mut w = row(&linear.weight, 1);
            let low = &linear.adapters[0];
            let b = row(&low.b, 1);
            for (r, b) in b.iter().enumerate() {
                w.iter_mut().zip(row(&low.a, r)).for_each(|(w, a)| *w += low.scale * b * a);
            }
            let norm = w.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
            let gain = f64::from(low.gain.as_ref().unwrap()[1]);
            assert!((gain * norm - f64::from(magnitude.as_ref().unwrap()[1])).abs() < 1e-4);
        }
    }
}

#[test]
fn a_base_in_gguf_gives_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "qwen2", "phi3"] {
        let Some(source) = fixture(name) else { continue };
        let mut plain = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
        let trained = Trained::of(&plain, 2, false, |role| role != Role::Head);
        let path = |end: &str| dir.path().join(format!("{name}{end}"));
        write_peft(&path("-1"), &plain, &description(2, false), &trained.pairs(), &[]).unwrap();
        write_gguf(&path("-1.gguf"), &plain, &description(2, false), &trained.pairs()).unwrap();
        // What a GGUF base has attached, in its own order of rows, writes the same.
        let mut packed = Model::load(&gguf_of(&source, &path("-base.gguf"))).unwrap();
        attach(&mut packed, &[(path("-1.gguf"), 1.0)]).unwrap();
        let from_gguf = changes(&packed);
        attach(&mut packed, &[(path("-1"), 1.0)]).unwrap();
        compare(&from_gguf, &changes(&packed), name);
        attach(&mut plain, &[(path("-1.gguf"), 1.0)]).unwrap();
        compare(&changes(&plain), &expected(&plain, &trained, 2, 4.0), name);
        if name == "phi3" {
            continue; // Its ranks grow when what was read is written again.
        }
        let own = packed.linears().filter(|l| !l.adapters.is_empty()).map(|l| {
            let low = &l.adapters[0];
            let all = |w: &rushlight_models::model::Weight| {
                let mut out = vec![0.0; w.rows() * w.cols()];
                (0..w.rows()).for_each(|r| w.decode_row(r, &mut out[r * w.cols()..][..w.cols()]));
                out
            };
            (l.role, l.layer, all(&low.a), all(&low.b), None)
        });
        let own = Trained(own.collect());
        write_peft(&path("-2"), &packed, &description(2, false), &own.pairs(), &[]).unwrap();
        write_gguf(&path("-2.gguf"), &packed, &description(2, false), &own.pairs()).unwrap();
        let read = |file: PathBuf| std::fs::read(file).unwrap();
        let weights = "adapter_model.safetensors";
        assert_eq!(read(path("-1").join(weights)), read(path("-2").join(weights)), "{name}");
        assert_eq!(read(path("-1.gguf")), read(path("-2.gguf")), "{name}");
    }
}

#[test]
fn a_prefix_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let Some(source) = fixture("llama") else { return };
    let plain = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
    let packed = Model::load(&gguf_of(&source, &dir.path().join("base.gguf"))).unwrap();
    for (i, mut model) in [plain, packed].into_iter().enumerate() {
        let width = model.spec.kv_width();
        let own: Vec<_> =
            (0..model.spec.layers.len()).map(|l| (numbers(3 * width, l), numbers(3 * width, l + 9))).collect();
        let slices: Vec<_> = own.iter().map(|(k, v)| (k.as_slice(), v.as_slice())).collect();
        let out = dir.path().join(i.to_string());
        write_prefix(&out, &model, "base", 3, &slices).unwrap();
        attach(&mut model, &[(out, 1.0)]).unwrap();
        assert_eq!(model.prefix.unwrap().layers, own);
    }
}

#[test]
fn the_configuration_is_what_peft_expects() {
    let dir = tempfile::tempdir().unwrap();
    let Some(source) = fixture("llama") else { return };
    let model = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
    let trained = Trained::of(&model, 4, false, |role| role == Role::Q || role == Role::Down);
    write_peft(dir.path(), &model, &description(4, false), &trained.pairs(), &[]).unwrap();
    let config: Json = serde_json::from_slice(&std::fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(["down_proj", "q_proj"]));
    assert_eq!((config["r"].as_u64(), config["lora_alpha"].as_f64()), (Some(4), Some(8.0)));
    assert_eq!(config["rank_pattern"], serde_json::json!({}));
    let file = safetensors::open(&dir.path().join("adapter_model.safetensors")).unwrap();
    let names: Vec<&str> = file.tensors.iter().map(|t| t.info.name.as_str()).collect();
    assert!(names.contains(&"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"), "{names:?}");
    assert_eq!(names.len(), 2 * 2 * model.spec.layers.len());
    // One layer alone: the end of its name would say too much.
    let one: Vec<_> = trained.pairs().into_iter().filter(|p| p.layer == 1 && p.role == Role::Q).collect();
    write_peft(dir.path(), &model, &description(4, false), &one, &[]).unwrap();
    let config: Json = serde_json::from_slice(&std::fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(["model.layers.1.self_attn.q_proj"]));
    // A wrong size is an error.
    let wrong = [Pair { a: &[1.0], ..one[0] }];
    assert!(write_peft(dir.path(), &model, &description(4, false), &wrong, &[]).is_err());
}

/// Every matrix in force and every vector of the model, in f32.
fn everything(model: &Model) -> Vec<Vec<f32>> {
    let all = |w: &rushlight_models::model::Weight| {
        let mut out = vec![0.0; w.rows() * w.cols()];
        (0..w.rows()).for_each(|r| w.decode_row(r, &mut out[r * w.cols()..][..w.cols()]));
        out
    };
    let mut list: Vec<Vec<f32>> = model.linears().map(|l| all(l.weight())).collect();
    list.extend(model.linears().filter_map(|l| Some(l.bias.as_ref()?.values.clone())));
    list.extend([&model.embedding].into_iter().chain(&model.positions).map(|t| all(t.weight())));
    list.extend(model.clone().vectors_mut().map(|v| v.values.clone()));
    list
}

#[test]
fn a_model_that_was_changed_is_read_back() {
    use rushlight_models::checkpoint::export::write_trained;
    use rushlight_models::model::Weight;
    let dir = tempfile::tempdir().unwrap();
    let change = |w: &Weight, seed| Weight::from_f32(w.rows(), w.cols(), &numbers(w.rows() * w.cols(), seed)).unwrap();
    let names = "llama qwen2-tied phi3 chatglm2-6b gpt2 gpt_neox gpt_bigcode bloom gemma2 deepseek_v2 mixtral qwen3_moe gpt_oss falcon-7b";
    for name in names.split_whitespace() {
        let Some(source) = fixture(name) else { continue };
        let packed = dir.path().join(format!("{name}-base.gguf"));
        let mut sources = vec![Checkpoint::open(&source).unwrap()];
        if ["llama", "phi3", "qwen3_moe"].contains(&name) {
            sources.push(gguf_of(&source, &packed));
        }
        for (i, source) in sources.iter().enumerate() {
            let mut model = Model::load(source).unwrap();
            let tied = model.spec.tied_head;
            for (i, linear) in model.linears_mut().enumerate() {
                linear.replacement = Some(change(&linear.weight, i));
                if let Some(bias) = &mut linear.bias {
                    bias.values = numbers(bias.values.len(), i + 50);
                }
            }
            model.embedding.replacement = Some(change(&model.embedding.weight, 77));
            if tied {
                model.head.replacement = model.embedding.replacement.clone();
            }
            if let Some(positions) = &mut model.positions {
                positions.replacement = Some(change(&positions.weight, 78));
            }
            for (i, vector) in model.vectors_mut().enumerate() {
                vector.values = numbers(vector.values.len(), i + 100);
            }
            let out = dir.path().join(format!("{name}-{i}{}", if i == 1 { ".gguf" } else { "" }));
            write_trained(source, &model, &out).unwrap_or_else(|e| panic!("{name}: {e}"));
            let back = Model::load(&Checkpoint::open(&out).unwrap()).unwrap();
            let (got, want) = (everything(&back), everything(&model));
            assert_eq!(got.len(), want.len());
            for (k, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(g == w, "{name} {i}: number {k} differs");
            }
        }
    }
}

#[test]
fn whole_matrices_have_the_names_and_shapes_of_their_base() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "llama",
        "qwen2",
        "phi3",
        "gpt2",
        "gpt_neox",
        "gpt_bigcode",
        "falcon-7b-style",
        "bloom",
        "deepseek_v2",
        "deepseek_v3",
        "glm4",
        "gptj",
        "mixtral",
        "qwen2_moe",
        "internlm2",
        "starcoder2",
    ] {
        let Some(source) = fixture(name) else { continue };
        let base = Checkpoint::open(&source).unwrap();
        let mut model = Model::load(&base).unwrap();
        // A tied head is no tensor of its own.
        let skipped = |role: Role| role == Role::Head && model.spec.tied_head;
        let trained: Vec<(Role, usize, Vec<f32>)> = (model.linears().enumerate())
            .filter(|(_, l)| !skipped(l.role))
            .map(|(i, l)| (l.role, l.layer, numbers(l.weight.rows() * l.weight.cols(), i)))
            .collect();
        let wholes: Vec<_> =
            trained.iter().map(|(role, layer, values)| Whole { role: *role, layer: *layer, values }).collect();
        let out = dir.path().join(name);
        write_peft(&out, &model, &description(2, false), &[], &wholes).unwrap();
        let file = safetensors::open(&out.join("adapter_model.safetensors")).unwrap();
        for tensor in file.tensors.iter().map(|t| &t.info) {
            let own = tensor.name.strip_prefix("base_model.model.").unwrap();
            let there = base.find(own).unwrap_or_else(|| panic!("{name} has no {own}"));
            assert_eq!(tensor.shape, there.shape, "{name}: {own}");
        }
        attach(&mut model, &[(out, 1.0)]).unwrap();
        for (role, layer, values) in &trained {
            let linear = model.linears().find(|l| (l.role, l.layer) == (*role, *layer)).unwrap();
            let (weight, mut read) = (linear.replacement.as_ref().unwrap(), vec![0.0; values.len()]);
            weight.format().decode(weight.data(), &mut read);
            assert!(read == *values && linear.own_bias.is_none(), "{name}: {role:?} of layer {layer}");
        }
    }
}

#[test]
fn a_bias_that_an_adapter_brings_is_used_and_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let Some(source) = fixture("qwen2") else { return };
    let mut model = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
    let mut other = model.clone();
    let bias = |model: &Model| model.layers[0].q.bias.as_ref().unwrap().values.clone();
    let own = bias(&model);
    other.linears_mut().filter_map(|l| l.bias.as_mut()).for_each(|b| b.values.iter_mut().for_each(|x| *x += 1.0));
    let q = numbers(model.layers[0].q.weight.rows() * model.layers[0].q.weight.cols(), 1);
    let whole = Whole { role: Role::Q, layer: 0, values: &q };
    write_peft(dir.path(), &other, &description(2, false), &[], &[whole]).unwrap();
    attach(&mut model, &[(dir.path().to_owned(), 1.0)]).unwrap();
    assert_eq!(bias(&model), bias(&other));
    assert!(model.layers[0].q.own_bias.is_some() && model.layers[0].k.own_bias.is_none());
    attach(&mut model, &[]).unwrap();
    assert_eq!(bias(&model), own);
    // PEFT is told of the one module alone, as another ends with the same letters.
    let config: Json = serde_json::from_slice(&std::fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["modules_to_save"], serde_json::json!(["model.layers.0.self_attn.q_proj"]));
}

#[test]
fn experts_of_a_mixtral_in_gguf_have_their_own_names() {
    let dir = tempfile::tempdir().unwrap();
    let Some(source) = fixture("mixtral") else { return };
    let model = Model::load(&gguf_of(&source, &dir.path().join("m.gguf"))).unwrap();
    assert_eq!(model.family.name, "mixtral");
    let trained = Trained::of(&model, 2, false, |role| role != Role::Head);
    write_peft(dir.path(), &model, &description(2, false), &trained.pairs(), &[]).unwrap();
    let mut base = Model::load(&Checkpoint::open(&source).unwrap()).unwrap();
    attach(&mut base, &[(dir.path().to_owned(), 1.0)]).unwrap();
    assert!(base.linears().filter(|l| l.role != Role::Head).all(|l| l.adapters.len() == 1));
}
