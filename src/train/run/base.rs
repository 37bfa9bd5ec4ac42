//! The frozen base in another form than its file's.

use super::super::tape::{module, ordinary};
use anyhow::{Result, anyhow, bail};
use rushlight_models::model::Model;
use rushlight_quant::formats::Format;

/// How the frozen weights are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Base {
    /// As their file has them.
    #[default]
    AsIs,
    /// 4 bits with doubly quantized magnitudes (QLoRA, Dettmers et al. 2023), made in memory.
    Nf4,
}

impl Base {
    /// Puts the linear layers of `model`, the head and routers aside, into this form. Gives back the bytes of `weights` that
    /// its tensors then take.
    ///
    /// # Errors
    /// When a weight is not a number, or there is nothing to be put so.
    pub fn apply(self, model: &mut Model, weights: u64) -> Result<u64> {
        if self == Base::AsIs {
            return Ok(weights);
        }
        let names: Vec<Option<String>> = model.linears().map(|l| module(model, l).map(|m| m.name)).collect();
        let coarse = model.linears().find(|l| ordinary(l.role) && !l.weight.format().is_float());
        if let Some(format) = coarse.map(|l| l.weight.format()).filter(|f| *f != Format::NF4) {
            tracing::warn!(
                "--base nf4 rounds weights once more that are {format} already: leave it out where memory allows"
            );
        }
        let (mut bytes, mut none) = (weights, true);
        for (linear, name) in model.linears_mut().zip(names) {
            if !ordinary(linear.role) || linear.weight.format() == Format::NF4 {
                continue;
            }
            let named = || name.unwrap_or_else(|| format!("{:?} of layer {}", linear.role, linear.layer));
            let nf4 = linear.weight.in_nf4().ok_or_else(|| {
                anyhow!(
                    "{}: it holds weights that are not numbers (NaN or infinite); download the model again",
                    named()
                )
            })?;
            bytes = bytes.saturating_sub(linear.weight.data().len() as u64) + nf4.data().len() as u64;
            linear.weight.data().release();
            linear.weight = nf4;
            none = false;
        }
        if none {
            bail!("--base nf4: this {} model has no linear layer that is not in NF4 already", model.family.name);
        }
        Ok(bytes)
    }
}
