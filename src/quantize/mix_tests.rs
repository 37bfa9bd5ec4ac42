use super::*;
use serde_json::Value as Json;

/// Every mix gives every tensor the type that llama.cpp's quantizer gave it (`tests/fixtures/mixes/make.py`).
#[test]
fn mixes_are_llama_cpps() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mixes/types.json");
    let golden: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let letters: Vec<&str> = golden["letters"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
    let models = golden["models"].as_array().unwrap();
    assert_eq!(models.len(), 8);
    for model in models {
        let number = |key: &str| model[key].as_u64().unwrap();
        let traits = Traits {
            architecture: model["architecture"].as_str().unwrap().into(),
            layers: number("layers") as usize,
            heads: number("heads"),
            kv_heads: number("kv_heads"),
            experts: number("experts"),
        };
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        for (name, shape) in model["tensors"].as_object().unwrap() {
            let shape: Vec<usize> = shape.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
            let layers = if name.contains("{}") { traits.layers } else { 1 };
            tensors.extend((0..layers).map(|i| (name.replace("{}", &i.to_string()), shape.clone())));
        }
        let given: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
        for (mix, types) in model["types"].as_object().unwrap() {
            let target = Target::parse(&mix.to_lowercase()).unwrap();
            let chosen = choose(target, &Wishes::default(), &traits, false, &given).unwrap();
            let types = types.as_str().unwrap().as_bytes();
            assert_eq!(types.len(), chosen.len());
            for ((name, _), (chosen, letter)) in given.iter().zip(chosen.iter().zip(types)) {
                let want = letters[usize::from(letter - b'a')];
                // What is not quantized is f32 in these models.
                let got = chosen.format.unwrap_or(Format::F32).name();
                assert_eq!(got, want, "{mix} of {}: {name}", model["name"]);
            }
        }
    }
}

fn small() -> (Traits, Vec<(String, Vec<usize>)>) {
    let traits = Traits { architecture: "llama".into(), layers: 16, heads: 8, kv_heads: 8, experts: 0 };
    let mut tensors = vec![("token_embd.weight".to_string(), vec![100, 256]), ("output_norm.weight".into(), vec![256])];
    for i in 0..16 {
        let matrix = |name: &str| (format!("blk.{i}.{name}.weight"), vec![256, 256]);
        tensors.extend(["attn_v", "attn_output", "ffn_up", "ffn_down"].map(matrix));
        tensors.push((format!("blk.{i}.attn_norm.weight"), vec![256]));
    }
    (traits, tensors)
}

fn formats(target: &str, wishes: &Wishes, imatrix: bool) -> impl Fn(&str) -> Option<Format> + use<> {
    let (traits, tensors) = small();
    let given: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
    let chosen = choose(Target::parse(target).unwrap(), wishes, &traits, imatrix, &given).unwrap();
    let names: Vec<String> = tensors.iter().map(|t| t.0.clone()).collect();
    move |name| chosen[names.iter().position(|n| n == name).unwrap()].format
}

#[test]
fn wishes_come_before_the_mix() {
    let keep = |text| Keep::parse(text).unwrap();
    let wishes = Wishes {
        keep: vec![keep("blk\\.3\\.ffn_down=f16"), keep("ffn_down=q8_0")],
        output: Some(Format::Q5_K),
        embedding: None,
        pure: false,
    };
    let of = formats("Q4_K_M", &wishes, false);
    assert_eq!(of("blk.3.ffn_down.weight"), Some(Format::F16));
    assert_eq!(of("blk.0.ffn_down.weight"), Some(Format::Q8_0));
    assert_eq!(of("blk.0.attn_v.weight"), Some(Format::Q6_K));
    // The embedding is the output matrix too.
    assert_eq!(of("token_embd.weight"), Some(Format::Q5_K));
    assert_eq!(of("output_norm.weight"), None);
    let of = formats("Q4_K_M", &Wishes { embedding: Some(Format::BF16), ..wishes }, false);
    assert_eq!(of("token_embd.weight"), Some(Format::BF16));
    let of = formats("Q4_K_S", &Wishes { pure: true, ..Wishes::default() }, false);
    for name in ["token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"] {
        assert_eq!(of(name), Some(Format::Q4_K));
    }
    let (traits, tensors) = small();
    let given: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
    let unknown = Wishes { keep: vec![keep("attn_norm=F32")], ..Wishes::default() };
    let error = choose(Target::ALL[0], &unknown, &traits, false, &given).unwrap_err().to_string();
    assert!(error.contains("--keep 'attn_norm'"), "{error}");
}

#[test]
fn an_imatrix_changes_what_the_first_layers_get() {
    let first = "blk.1.ffn_down.weight";
    for (target, without, with) in [
        ("Q4_0", Format::Q4_0, Format::Q4_1),
        ("Q5_0", Format::Q5_0, Format::Q5_1),
        ("IQ4_XS", Format::Q5_K, Format::IQ4_XS),
        ("Q4_K_M", Format::Q6_K, Format::Q6_K),
    ] {
        assert_eq!(formats(target, &Wishes::default(), false)(first), Some(without), "{target}");
        assert_eq!(formats(target, &Wishes::default(), true)(first), Some(with), "{target}");
    }
}
