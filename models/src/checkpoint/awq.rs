//! AWQ checkpoints in GEMM packing (AutoAWQ): like GPTQ's, but `qweight` is `[inputs, outputs / 8]`, eight 4-bit codes of
//! neighbouring outputs in a word, and zero points are stored as they are.

use super::gptq::{Grid, Packing, plain_groups};
use super::prequantized::{Fields, Layer, Layers};
use crate::Result;

/// What a configuration says of such weights.
#[derive(Debug)]
pub(super) struct Config {
    group: Option<usize>,
}

impl Config {
    pub fn read(config: &Fields<'_>) -> Result<Config> {
        let (bits, group) = config.grid()?;
        if bits != 4 {
            return Err(config.error(format!("AWQ weights of {bits} bits cannot be read; those of 4 can")));
        }
        let version = match config.str("version")? {
            Some(version) => version,
            None => config.str("format")?.unwrap_or("gemm"),
        };
        match version.eq_ignore_ascii_case("gemm") {
            true => Ok(Config { group }),
            false => Err(config.error(format!(
                "its AWQ weights are packed for '{version}', which cannot be read; those for gemm can"
            ))),
        }
    }
}

/// Finds every layer.
pub(super) fn find(layers: &mut Layers, config: &Config) -> Result<()> {
    for base in layers.parts.with_end(".qweight") {
        let layer = layer(layers, config, &base).map_err(|what| layers.error(what))?;
        layers.add(format!("{base}.weight"), layer);
    }
    Ok(())
}

fn layer(layers: &mut Layers, config: &Config, base: &str) -> Result<Layer, String> {
    let parts = &mut layers.parts;
    let qweight = parts.need(&format!("{base}.qweight"), &["I32"], None)?;
    let &[cols, words] = &qweight.shape[..] else {
        return Err(format!("tensor '{}' is {:?}, not a matrix", qweight.name, qweight.shape));
    };
    let group = config.group.unwrap_or(cols).min(cols).max(1);
    let groups = cols.div_ceil(group);
    let qzeros = parts.need(&format!("{base}.qzeros"), &["I32"], Some(&[groups, words]))?;
    let Some(rows) = words.checked_mul(8).filter(|_| cols > 0 && words > 0) else {
        return Err(format!("layer '{base}' has the impossible shape {:?}", qweight.shape));
    };
    let scales = parts.need(&format!("{base}.scales"), &["F16", "BF16", "F32"], Some(&[groups, rows]))?;
    let groups = plain_groups(cols, groups, Some(group)).unwrap_or_default();
    Grid { packing: Packing::Awq, bits: 4, zero_offset: 0, groups, qweight, qzeros, scales }.into_layer(rows)
}
