//! Hugging Face directories of quantized weights: GPTQ's integer codes and bitsandbytes' NF4.

use super::scratch::Scratch;
use crate::calibrate::groups::{Groups, Layer};
use anyhow::{Context, Result, bail};
use rushlight_models::checkpoint::Tensor;
use rushlight_models::checkpoint::export::{GptqGrid, GptqLayer, GptqVersion, GptqWriter, Original};
use rushlight_quant::Cpu;
use rushlight_quant::quantize::{Codes, round_groups};
use std::path::Path;

/// What a directory's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Integers of so many bits, in GPTQ's layout.
    Integers(u32),
    /// 4-bit normal floats with double quantization, in bitsandbytes' layout.
    Nf4,
}

impl Weights {
    /// The type called `name`.
    pub fn parse(name: &str) -> Option<Weights> {
        match name.to_ascii_lowercase().as_str() {
            "int2" => Some(Weights::Integers(2)),
            "int3" => Some(Weights::Integers(3)),
            "int4" => Some(Weights::Integers(4)),
            "int8" => Some(Weights::Integers(8)),
            "nf4" => Some(Weights::Nf4),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Weights::Integers(2) => "int2",
            Weights::Integers(3) => "int3",
            Weights::Integers(4) => "int4",
            Weights::Integers(_) => "int8",
            Weights::Nf4 => "nf4",
        }
    }
}

/// Fails where `output` cannot be a directory of `weights`.
pub fn check(weights: Weights, output: &Path) -> Result<()> {
    if output.extension().is_some_and(|ext| ext == "gguf") {
        bail!("{}: {} makes a directory, not a GGUF file: name one", output.display(), weights.name());
    }
    Ok(())
}

/// What `groups` are in GPTQ's terms. The first version of the layout cannot store a zero point of 0, which groups that
/// are not symmetric may have; and GPTQModel, which turns it into the second one when it loads, goes wrong with 3 bits.
pub fn gptq_grid(groups: Groups, act_order: bool) -> GptqGrid {
    let Groups { bits, group, symmetric } = groups;
    let version = if symmetric && bits != 3 { GptqVersion::V1 } else { GptqVersion::V2 };
    GptqGrid { bits, group: (group != usize::MAX).then_some(group), symmetric, act_order, version }
}

/// Writes what `scratch` has of `layers` into a directory that was begun by `writer`.
pub fn write_gptq(
    mut writer: GptqWriter<'_>,
    original: &Original<'_>,
    layers: &[String],
    groups: Groups,
    scratch: &Scratch,
) -> Result<()> {
    for name in layers {
        let (_, cols) = shape(original, name)?;
        let records = scratch.get(name)?.with_context(|| format!("{name} is not finished"))?;
        let layer = groups.layer(name, cols, &records, scratch)?;
        put(&mut writer, name, &layer)?;
    }
    Ok(writer.finish()?)
}

/// The same with weights rounded to nearest; `progress` is told the name of each layer once it is written.
pub fn write_rounded(
    mut writer: GptqWriter<'_>,
    original: &Original<'_>,
    layers: &[String],
    groups: Groups,
    cpu: &Cpu,
    progress: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    for name in layers {
        let (rows, cols) = shape(original, name)?;
        let Tensor { info, data } = original.tensor(&format!("{name}.weight"))?;
        let mut weights = vec![0.0; rows * cols];
        info.format.decode(&data, &mut weights);
        if weights.iter().any(|w| !w.is_finite()) {
            let source = original.checkpoint().path().display();
            bail!(
                "{source}: tensor '{}' holds weights that are not numbers (NaN or infinite): the file is damaged; download \
                 it again",
                info.name
            );
        }
        let Groups { bits, group, symmetric } = groups;
        let Codes::Groups { codes, scales, zeros, group_of: g_idx } =
            round_groups(cpu, &weights, cols, bits, group, symmetric)
        else {
            bail!("{name}: groups were rounded to blocks");
        };
        put(&mut writer, name, &Layer { codes, scales, zeros, g_idx })?;
        progress(name)?;
    }
    Ok(writer.finish()?)
}

fn put(writer: &mut GptqWriter<'_>, name: &str, layer: &Layer) -> Result<()> {
    let Layer { codes, scales, zeros, g_idx } = layer;
    let zeros: Vec<u16> = zeros.iter().map(|&z| z.into()).collect();
    Ok(writer.layer(name, &GptqLayer { codes, scales, zeros: &zeros, g_idx })?)
}

/// Outputs and inputs of the layer `name`.
pub fn shape(original: &Original<'_>, name: &str) -> Result<(usize, usize)> {
    match original.find(&format!("{name}.weight")).map(|info| &info.shape[..]) {
        Some(&[rows, cols]) => Ok((rows, cols)),
        _ => bail!("{name} is not a matrix"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::scratch::Fingerprint;
    use rushlight_models::checkpoint::Checkpoint;
    use rushlight_models::checkpoint::safetensors::{Entry, Writer};
    use rushlight_models::model::Weight;
    use rushlight_quant::Isa;
    use serde_json::{Value, json};

    const LAYER: &str = "model.layers.0.mlp.up_proj";

    /// Small numbers of no pattern.
    fn weights(n: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| (next() + next() - 0.9) * 0.1).collect()
    }

    /// A directory with one layer.
    fn source(dir: &Path, rows: usize, cols: usize) -> Checkpoint {
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("config.json"), json!({"model_type": "llama"}).to_string()).unwrap();
        let entry = Entry { name: format!("{LAYER}.weight"), dtype: "F32".into(), shape: vec![rows, cols] };
        let mut writer = Writer::create(&dir.join("model.safetensors"), &[entry]).unwrap();
        let bytes: Vec<u8> = weights(rows * cols).iter().flat_map(|w| w.to_le_bytes()).collect();
        writer.write(&format!("{LAYER}.weight"), &bytes).unwrap();
        writer.finish().unwrap();
        Checkpoint::open(dir).unwrap()
    }

    fn decoded(weight: &Weight) -> Vec<f32> {
        let mut out = vec![0.0; weight.rows() * weight.cols()];
        out.chunks_exact_mut(weight.cols()).enumerate().for_each(|(r, out)| weight.decode_row(r, out));
        out
    }

    /// The layer in the directory `dir` as it is read back, and what config.json says of it.
    fn read(dir: &Path, rows: usize, cols: usize) -> (Vec<f32>, Value) {
        let again = Checkpoint::open(dir).unwrap();
        let name = format!("{LAYER}.weight");
        let tensor = again.tensor(&name).unwrap();
        let weight = Weight::new(tensor.info.format, rows, cols, tensor.data).unwrap();
        let weight = match again.column_order(&name) {
            None => weight,
            Some(order) => weight.with_order(order).unwrap(),
        };
        let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        (decoded(&weight), config["quantization_config"].clone())
    }

    #[test]
    fn codes_of_every_kind_are_read_back_as_they_were_chosen() {
        let (rows, cols) = (64, 160);
        let place = tempfile::tempdir().unwrap();
        let checkpoint = source(&place.path().join("source"), rows, cols);
        let original = Original::of(&checkpoint).unwrap();
        let layers = [LAYER.to_owned()];
        let cpu = Cpu::new(2, Isa::Scalar);
        let mut cases = 0;
        for bits in [2, 3, 4, 8] {
            for (group, symmetric) in
                [(32, true), (64, false), (128, true), (usize::MAX, false), (usize::MAX, true), (20, false), (48, true)]
            {
                let groups = Groups { bits, group, symmetric };
                let made = round_groups(&cpu, &weights(rows * cols), cols, bits, group, symmetric);
                let Codes::Groups { codes, scales, zeros, mut group_of } = made else {
                    panic!("groups were asked for")
                };
                let per_row = scales.len() / rows;
                for act_order in [false, true] {
                    let out = place.path().join(format!("{cases}"));
                    cases += 1;
                    let grid = gptq_grid(groups, act_order);
                    let writer = GptqWriter::create(&original, &out, &layers, grid).unwrap();
                    let label = format!("{groups:?}, act-order {act_order}");
                    if act_order {
                        // Groups of inputs that are not neighbours: any will do.
                        (0..cols).for_each(|i| group_of.swap(i, i * 37 % cols));
                        let scratch = Scratch::open(&out, &Fingerprint::default().with("case", &label)).unwrap();
                        let (codes, scales, zeros) = (codes.clone(), scales.clone(), zeros.clone());
                        let all = Codes::Groups { codes, scales, zeros, group_of: group_of.clone() };
                        let records = groups.records(LAYER, &all, &scratch).unwrap();
                        scratch.put(LAYER, &records).unwrap();
                        let running = groups.weight(LAYER, cols, &records, &scratch).unwrap();
                        write_gptq(writer, &original, &layers, groups, &scratch).unwrap();
                        // What the layers behind it were calibrated with is what a reader gets.
                        assert_eq!(decoded(&running), read(&out, rows, cols).0, "{label}");
                        scratch.remove().unwrap();
                    } else {
                        write_rounded(writer, &original, &layers, groups, &cpu, &mut |_| Ok(())).unwrap();
                    }
                    let (got, config) = read(&out, rows, cols);
                    for (i, got) in got.iter().enumerate() {
                        let unit = i / cols * per_row + group_of[i % cols] as usize;
                        let want = scales[unit] * (f32::from(codes[i]) - f32::from(zeros[unit]));
                        // A minimum that is added and taken off again is off by its last bit.
                        assert!((got - want).abs() <= 1e-6 * want.abs() + 2e-6 * scales[unit], "{label}: {i}");
                    }
                    let size = if group == usize::MAX { -1 } else { group as i64 };
                    let version = if symmetric && bits != 3 { "gptq" } else { "gptq_v2" };
                    for (field, want) in [
                        ("bits", json!(bits)),
                        ("group_size", json!(size)),
                        ("sym", json!(symmetric)),
                        ("desc_act", json!(act_order)),
                        ("checkpoint_format", json!(version)),
                        ("quant_method", json!("gptq")),
                        ("lm_head", json!(false)),
                    ] {
                        assert_eq!(config[field], want, "{label}: {field}");
                    }
                }
            }
        }
    }
}
