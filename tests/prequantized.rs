//! Directories that GPTQModel, AutoAWQ and bitsandbytes have quantized, run as they are on every instruction set.

use rushlight_models::checkpoint::safetensors;
use rushlight_quant::Isa;
use serde_json::Value;
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

/// The reference's token ids and logits, `[ids, vocabulary]`.
fn expected(dir: &Path) -> (Vec<u32>, Vec<f32>) {
    let file = safetensors::open(&dir.join("expected.safetensors")).unwrap();
    let ids = &file.raw.iter().find(|t| t.name == "input_ids").unwrap().data;
    let logits = &file.tensors.iter().find(|t| t.info.name == "logits").unwrap().data;
    (
        ids.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
        logits.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    )
}

/// The logits of all of `ids` by the program itself.
fn logits(dir: &Path, isa: Isa, ids: &[u32], more: &[&str]) -> Vec<f32> {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    let out = Command::new(env!("CARGO_BIN_EXE_rushlight"))
        .env("RUSHLIGHT_ISA", isa.name())
        .args(["logits", dir.to_str().unwrap(), "--ids", &ids.join(","), "--all", "--json"])
        .args(more)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out: Value = serde_json::from_slice(&out.stdout).unwrap();
    let rows = out["positions"].as_array().unwrap().iter();
    rows.flat_map(|row| row["logits"].as_array().unwrap()).map(|x| x.as_f64().unwrap() as f32).collect()
}

fn furthest(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max)
}

const DIRECTORIES: [&str; 8] = [
    "gptq_b4_g32_sym",
    "gptq_b4_g32_sym_act",
    "gptq_b8_g32_sym",
    "gptq_b8_g64_sym_act",
    "gptq_v2_b4_g32_asym",
    "awq_gemm_b4_g32",
    "bnb_nf4",
    "bnb_nf4_dq",
];

#[test]
fn logits_are_the_references() {
    let Some(root) = shared("fixtures/gptq_ckpt_tiny") else { return };
    for name in DIRECTORIES {
        let dir = root.join(name);
        let (ids, want) = expected(&dir);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let off = furthest(&logits(&dir, isa, &ids, &[]), &want);
            assert!(off < 1e-2, "{name} on {}: off by {off}", isa.name());
            let off = furthest(&logits(&dir, isa, &ids, &["--step"]), &want);
            assert!(off < 1e-2, "{name} on {} step by step: off by {off}", isa.name());
        }
    }
}
