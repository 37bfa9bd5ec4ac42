//! GGUF files as Hugging Face directories: the description and the tensors, for writers of such directories.

use super::huggingface::{adapt, factors};
use super::{Converted, Source};
use crate::checkpoint::{Checkpoint, Metadata};
use crate::families::{self, Naming, Role};
use crate::model::Model;
use crate::spec::{ModelSpec, RopeScaling};
use crate::{Error, Result};

/// What a Hugging Face directory of a GGUF file holds. Tokenizer and template are not part of it.
#[derive(Clone, Debug)]
pub struct Directory {
    /// config.json.
    pub config: serde_json::Value,
    /// The tensors under the names of the family's implementation, in the order of the file.
    pub tensors: Vec<Converted>,
}

/// What a Hugging Face directory of the GGUF file `checkpoint` holds: the inverse of [`super::to_gguf`].
///
/// # Errors
/// When `checkpoint` is a directory already, when its family is not known, or when config.json cannot say what its
/// metadata say.
pub fn to_huggingface(checkpoint: &Checkpoint) -> Result<Directory> {
    let path = checkpoint.path();
    let Some(architecture) = checkpoint.metadata().and_then(|m: &Metadata| m.str("general.architecture")) else {
        return Err(Error::file(path, "not a GGUF file: a Hugging Face directory needs no conversion"));
    };
    let Model { mut spec, .. } = Model::load(checkpoint)?;
    name_scaling(&mut spec, checkpoint)?;
    let (family, config, read) = families::configure(&spec, architecture, path)?;
    let mut tensors = Vec::with_capacity(checkpoint.tensors().len());
    for info in checkpoint.tensors() {
        let role = info.name.rsplit_once('.').and_then(|(stem, end)| Some((family.role(Naming::Gguf, stem)?, end)));
        // Loading has refused what is neither used nor known to be idle; factors are in the configuration.
        let Some(((role, layer), end)) = role else { continue };
        if role == Role::RopeFactors || (role == Role::Head && spec.tied_head) {
            continue;
        }
        let name = family
            .name(Naming::HuggingFace, role, layer)
            .ok_or_else(|| Error::file(path, format!("the family {} has no place for {}", family.name, info.name)))?;
        let mut tensor = Converted {
            name: format!("{name}.{end}"),
            format: info.format,
            shape: info.shape.clone(),
            role: Some((role, layer)),
            source: Source::Tensor { name: info.name.clone(), rows: None, offset: 0.0 },
        };
        adapt(&mut tensor, &spec, &read);
        tensors.push(tensor);
    }
    Ok(Directory { config, tensors })
}

/// Puts the rule behind stored rotary factors in their place: config.json has rules only. Llama 3's are the only ones in
/// use, with the numbers of 3.1 and 3.2 but for the factor, which the lowest frequency has whole.
fn name_scaling(spec: &mut ModelSpec, checkpoint: &Checkpoint) -> Result<()> {
    for rope in spec.ropes.iter_mut().filter(|r| r.scaling == RopeScaling::Stored) {
        let tensor = checkpoint.tensor("rope_freqs.weight")?;
        let stored = families::floats(tensor.info.format, &tensor.data).unwrap_or_default();
        rope.scaling = RopeScaling::Llama3 {
            factor: stored.last().copied().unwrap_or(1.0),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let rule = factors(rope);
        if rule.len() != stored.len() || rule.iter().zip(&stored).any(|(a, b)| (a - b).abs() > 1e-4 * b) {
            let what = "rope_freqs.weight holds factors that are not Llama 3's, which config.json has no field for";
            return Err(Error::file(checkpoint.path(), what));
        }
    }
    Ok(())
}
