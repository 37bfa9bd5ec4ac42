//! Configurations of many families: what they leave out, and what each says in its own way.

use rushlight_models::families::{Config, FAMILIES, Family};
use rushlight_models::spec::{ModelSpec, Placement, QkNorm, RopeScaling};
use rushlight_quant::ops::{Activation, RopeLayout};
use serde_json::{Value as Json, json};
use std::path::Path;

/// What the family's file makes of a configuration: llama's usual fields and `fields`, where null takes one away.
fn read(fields: Json) -> Result<ModelSpec, String> {
    read_in(fields, "checkpoint")
}

fn read_in(fields: Json, folder: &str) -> Result<ModelSpec, String> {
    let mut all = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
        "vocab_size": 320, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-6,
        "hidden_act": "silu",
    });
    for (key, value) in fields.as_object().unwrap() {
        match value {
            Json::Null if key == "rope_theta" => drop(all.as_object_mut().unwrap().remove(key)),
            value => all[key] = value.clone(),
        }
    }
    let path = Path::new(folder).join("config.json");
    let config = Config::new(&all, &path);
    let of = |f: &&&Family| f.model_types.contains(&all["model_type"].as_str().unwrap()) && (f.is)(&config);
    let family = FAMILIES.iter().find(of).unwrap();
    (family.from_config)(&config).map_err(|e| e.to_string())
}

#[test]
fn what_configurations_leave_out_is_what_the_reference_takes() {
    let thetas =
        [("llama", 1e4), ("mixtral", 1e6), ("smollm3", 2e6), ("ernie4_5", 5e5), ("helium", 1e5), ("gemma3_text", 1e6)];
    for (family, theta) in thetas {
        let spec = read(json!({"model_type": family, "num_local_experts": 4, "num_experts_per_tok": 2})).unwrap();
        assert_eq!(spec.ropes[0].theta, theta, "{family}");
    }
    let windows = |spec: &ModelSpec| spec.layers.iter().map(|l| l.window).collect::<Vec<_>>();
    let gemma = read(json!({"model_type": "gemma2"})).unwrap();
    assert_eq!((gemma.attention_softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!(windows(&gemma), [Some(4096), None, Some(4096), None]);
    let caps = json!({"model_type": "gemma2", "attn_logit_softcapping": null, "final_logit_softcapping": null,
        "sliding_window": null, "hidden_activation": "gelu"});
    let gemma = read(caps).unwrap();
    assert_eq!((gemma.attention_softcap, gemma.logit_softcap, gemma.layers[0].window), (None, None, None));
    let activation = |spec: &ModelSpec| spec.layers[0].mlp.as_ref().unwrap().activation;
    assert_eq!(activation(&gemma), Activation::Gelu);
    // The first Gemma's configurations say gelu and mean its approximation.
    assert_eq!(activation(&read(json!({"model_type": "gemma", "hidden_act": "gelu"})).unwrap()), Activation::GeluTanh);
    // The third has a field that its code does not go by.
    let gemma =
        read(json!({"model_type": "gemma3_text", "attn_logit_softcapping": 3.0, "attention_bias": true})).unwrap();
    assert!(gemma.bias.qkv && gemma.bias.output && !gemma.bias.up);
    assert_eq!((gemma.attention_softcap, gemma.ropes[1].theta), (None, 1e4));
    assert!(gemma.layers.iter().all(|l| l.window == Some(4096) && l.rope == Some(1)));
    assert!(read(json!({"model_type": "glm"})).unwrap().bias.qkv);
    let oss = json!({"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2});
    assert!(read(oss.clone()).unwrap_err().contains("rope_scaling is missing"));
    let limit = |limit: f32| {
        let mut fields = oss.clone();
        fields["rope_scaling"] = Json::Null;
        fields["swiglu_limit"] = json!(limit);
        read(fields)
    };
    assert!(limit(7.0).is_ok() && limit(6.0).unwrap_err().contains("swiglu_limit = 6"));
}

#[test]
fn rotary_positions_by_kind_of_layer() {
    let linear = json!({"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5});
    let parameters = |local: Json| json!({"full_attention": linear, "sliding_attention": local});
    let plain = json!({"rope_type": "default", "rope_theta": 2e4});
    let gemma = |p: Json| read(json!({"model_type": "gemma3_text", "rope_parameters": p}));
    let spec = gemma(parameters(plain.clone())).unwrap();
    assert_eq!((spec.ropes[0].theta, spec.ropes[1].theta), (5e5, 2e4));
    assert_eq!(spec.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(spec.ropes[1].scaling, RopeScaling::None);
    assert!(gemma(parameters(linear.clone())).unwrap_err().contains("scaled in layers with a window"));
    let llama = |p: Json| read(json!({"model_type": "llama", "rope_parameters": p}));
    assert!(llama(parameters(plain)).unwrap_err().contains("differ between layers"));
    assert_eq!(llama(parameters(linear.clone())).unwrap().ropes[0].theta, 5e5);
    let long =
        json!({"rope_type": "longrope", "factor": 4.0, "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8]});
    let spec = llama(long).unwrap();
    let RopeScaling::Long { original_context, .. } = &spec.ropes[0].scaling else { panic!("{:?}", spec.ropes) };
    assert_eq!(*original_context, spec.context_length);
    let neox = json!({"model_type": "gpt_neox", "hidden_act": "gelu_python", "rope_parameters": {"partial_rotary_factor": 0.5}});
    assert_eq!(read(neox).unwrap().ropes[0].dim, 8);
    // As in Python, where 16 * 0.7 is 11.2.
    let partial = |p: f64| read(json!({"model_type": "phi", "partial_rotary_factor": p})).unwrap().ropes[0].dim;
    assert_eq!((partial(0.5), partial(0.3), partial(0.25)), (8, 4, 4));
}

#[test]
fn what_families_say_each_in_their_own_way() {
    let internlm = |rotary: Json| read(json!({"model_type": "internlm", "rotary": rotary}));
    let spec = internlm(json!({"base": 20000, "type": "dynamic", "scaling_factor": 2.0})).unwrap();
    assert_eq!(spec.ropes[0].theta, 2e4);
    assert_eq!(spec.ropes[0].scaling, RopeScaling::Dynamic { factor: 2.0, original_context: 128 });
    assert_eq!(internlm(json!({"base": 10000, "type": "origin"})).unwrap().ropes[0].scaling, RopeScaling::None);
    assert!(internlm(json!({"base": 10000, "type": "spiral"})).unwrap_err().contains("spiral"));
    let glm = |folder: &str| {
        let fields = json!({"model_type": "chatglm", "padded_vocab_size": 320, "num_layers": 2, "seq_length": 64,
            "ffn_hidden_size": 96, "kv_channels": 16, "layernorm_epsilon": 1e-5, "rope_ratio": 4,
            "multi_query_attention": true, "multi_query_group_num": 2});
        read_in(fields, folder).unwrap().ropes[0].clone()
    };
    assert_eq!((glm("chatglm3-6b-32k").theta, glm("chatglm3-6b-32k").scaling), (4e4, RopeScaling::None));
    assert_eq!(
        (glm("chatglm2-6b-32k").theta, glm("chatglm2-6b-32k").scaling),
        (1e4, RopeScaling::Linear { factor: 4.0 })
    );
    let apart = json!({"model_type": "chatglm", "padded_vocab_size": 320, "num_layers": 2, "seq_length": 64,
        "ffn_hidden_size": 96, "kv_channels": 16, "layernorm_epsilon": 1e-5});
    assert!(read(apart).unwrap_err().contains("multi_query_attention = false"));
    let deepseek = |fields: Json| {
        let mut all = json!({"model_type": "deepseek_v3", "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "kv_lora_rank": 16});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        read(all)
    };
    assert_eq!(deepseek(json!({})).unwrap().ropes[0].layout, RopeLayout::Interleaved);
    assert_eq!(deepseek(json!({"rope_interleave": false})).unwrap().ropes[0].layout, RopeLayout::Half);
    assert!(deepseek(json!({"scoring_func": "softmax"})).unwrap_err().contains("scoring_func"));
    assert!(deepseek(json!({"topk_method": "greedy"})).unwrap_err().contains("topk_method"));
    assert!(
        deepseek(json!({"model_type": "deepseek_v2", "norm_topk_prob": true})).unwrap_err().contains("norm_topk_prob")
    );
    let mixture = |family: &str, first: usize| {
        read(json!({"model_type": family, "use_sliding_window": true, "sliding_window": 8, "max_window_layers": first,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}))
    };
    assert!(mixture("qwen2_moe", 1).unwrap_err().contains("max_window_layers"));
    assert!(mixture("qwen2_moe", 0).unwrap().layers.iter().all(|l| l.window == Some(8)));
    assert!(mixture("qwen3_moe", 3).unwrap().layers.iter().all(|l| l.window == Some(8)));
    let gpt2 = |scaled: bool| {
        let fields = json!({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 128,
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": scaled});
        read(fields).unwrap().layers.iter().map(|l| l.attention_scale).collect::<Vec<_>>()
    };
    assert_eq!((gpt2(false), gpt2(true)), (vec![1.0; 4], vec![1.0, 0.5, 1.0 / 3.0, 0.25]));
    let bloom = |behind: bool| {
        let fields = json!({"model_type": "bloom", "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-5,
            "apply_residual_connection_post_layernorm": behind});
        read(fields).unwrap().placement
    };
    assert_eq!((bloom(false), bloom(true)), (Placement::Before, Placement::Stream));
    assert_eq!(read(json!({"model_type": "phi", "qk_layernorm": true})).unwrap().qk_norm, QkNorm::Head);
    let smollm = json!({"model_type": "smollm3", "use_sliding_window": true, "sliding_window": 8});
    let windows: Vec<_> = read(smollm).unwrap().layers.iter().map(|l| (l.window, l.rope)).collect();
    assert_eq!(windows[2..], [(None, Some(0)), (Some(8), None)]);
}
