//! What a family's own files call the parts of a model: the names by which adapters are attached.

use anyhow::{Result, anyhow, bail};
use regex::Regex;
use rushlight_models::families::{Naming, Role};
use rushlight_models::model::{Layer, Linear, Model, NormWeights};

/// The module of a family's implementation that a weight belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Which part of it the weight is, where the module holds several as one.
    pub part: Option<Role>,
}

/// The module of `linear`; `None` where it is no linear layer there (experts that are one tensor).
pub fn module(model: &Model, linear: &Linear) -> Option<Module> {
    let (role, name) = model.module(Naming::HuggingFace, linear.role, linear.layer)?;
    let part = (role != linear.role).then_some(linear.role);
    (!model.family.stacked(Naming::HuggingFace, role)).then_some(Module { name, part })
}

/// Whether `all-linear` means this layer.
pub fn ordinary(role: Role) -> bool {
    !matches!(role, Role::Head | Role::Router | Role::SharedRouter)
}

/// The linear layers that `targets` name, each with its module.
///
/// # Errors
/// When a name fits no layer.
pub fn targeted<'m>(model: &'m Model, targets: &[String]) -> Result<Vec<(&'m Linear, Module)>> {
    let known = || model.family.targets().join(", ");
    if targets.is_empty() {
        bail!("no target modules are named; say all-linear or some of {}", known());
    }
    let named = |module: &Module, target: &str| {
        module.name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let all: Vec<(&Linear, Module)> = model.linears().filter_map(|l| Some((l, module(model, l)?))).collect();
    for target in targets.iter().filter(|t| *t != "all-linear") {
        if !all.iter().any(|(_, module)| named(module, target)) {
            bail!(
                "--targets: no linear layer of this {} model is called '{target}'; say all-linear or some of {}",
                model.family.name,
                known()
            );
        }
    }
    let wanted = |linear: &Linear, module: &Module| {
        targets.iter().any(|t| if t == "all-linear" { ordinary(linear.role) } else { named(module, t) })
    };
    let found: Vec<_> = all.into_iter().filter(|(linear, module)| wanted(linear, module)).collect();
    if found.is_empty() {
        bail!("--targets: this {} model has no linear layer that an adapter could be attached to", model.family.name);
    }
    Ok(found)
}

/// Every norm of a model, with its role and layer.
pub fn norms(model: &Model) -> Vec<(Role, usize, &NormWeights)> {
    const OF_LAYER: [Role; 8] = [
        Role::AttentionNorm,
        Role::QLatentNorm,
        Role::KvLatentNorm,
        Role::QNorm,
        Role::KNorm,
        Role::AttentionPostNorm,
        Role::MlpNorm,
        Role::MlpPostNorm,
    ];
    let layers = model
        .layers
        .iter()
        .enumerate()
        .flat_map(|(i, layer)| OF_LAYER.into_iter().filter_map(move |role| Some((role, i, norm(layer, role)?))));
    let first = model.embedding_norm.iter().map(|n| (Role::EmbeddingNorm, 0, n));
    first.chain(layers).chain([(Role::FinalNorm, 0, &model.final_norm)]).collect()
}

fn norm(layer: &Layer, role: Role) -> Option<&NormWeights> {
    match role {
        Role::AttentionNorm => layer.attention_norm.as_ref(),
        Role::QLatentNorm => layer.latent.as_ref()?.query.as_ref().map(|(_, norm)| norm),
        Role::KvLatentNorm => layer.latent.as_ref().map(|l| &l.norm),
        Role::QNorm => layer.q_norm.as_ref(),
        Role::KNorm => layer.k_norm.as_ref(),
        Role::AttentionPostNorm => layer.attention_post_norm.as_ref(),
        Role::MlpNorm => layer.mlp_norm.as_ref(),
        Role::MlpPostNorm => layer.mlp_post_norm.as_ref(),
        _ => None,
    }
}

/// The family's name for a tensor, or a plain one where it has none.
pub fn name(model: &Model, role: Role, layer: usize) -> String {
    model.family.name(Naming::HuggingFace, role, layer).unwrap_or_else(|| format!("{role:?}.{layer}"))
}

/// The patterns of `--train-full`, each with whether it has been of use.
pub struct Patterns(Vec<(String, Regex, bool)>);

impl Patterns {
    /// # Errors
    /// When one is not a regular expression.
    pub fn new(patterns: &[String]) -> Result<Patterns> {
        let each = patterns.iter().map(|p| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{p})$"));
            let regex = regex.map_err(|_| anyhow!("--train-full '{p}' is not a regular expression"))?;
            Ok((p.clone(), regex, false))
        });
        Ok(Patterns(each.collect::<Result<_>>()?))
    }

    /// Whether one of them means the module `name`.
    pub fn mean(&mut self, name: &str) -> bool {
        let mut found = false;
        for (_, regex, used) in &mut self.0 {
            if regex.is_match(name) {
                (*used, found) = (true, true);
            }
        }
        found
    }

    /// # Errors
    /// When one of them has meant nothing.
    pub fn verdict(&self, model: &Model) -> Result<()> {
        match self.0.iter().find(|(.., used)| !used) {
            None => Ok(()),
            Some((pattern, ..)) => bail!(
                "--train-full '{pattern}' is the end of no module's name; some are {}, {} and {}",
                name(model, Role::Embedding, 0),
                name(model, Role::Head, 0),
                name(model, Role::FinalNorm, 0)
            ),
        }
    }
}
