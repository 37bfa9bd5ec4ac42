//! A model that learns: the tape's learner, and what is made of what it has learned.

use super::Lesson;
use crate::engine::session::{Ask, Message, Session};
use crate::engine::settings::Sampling;
use crate::engine::{Engine, Options};
use crate::train::batch::{Example, Loss};
use crate::train::params::{Gradients, Params};
use crate::train::tape::{Learner, LoraConfig, Method};
use anyhow::{Context, Result, bail};
use rushlight_models::adapter::write::{self, Description, Pair, Whole, write_gguf, write_peft, write_prefix};
use rushlight_models::checkpoint::export::write_trained;
use rushlight_models::checkpoint::{Checkpoint, Kind};
use rushlight_models::families::Role;
use rushlight_models::tokenizer::{ChatTemplate, Specials, Tokenizer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Most tokens of a sample answer.
const ANSWER: usize = 160;
/// Positions for a sample: the question and the answer.
const CONTEXT: usize = 2048;

/// A model that learns.
pub struct Pupil {
    learner: Learner,
    method: Method,
    /// The base model's file or directory.
    base: PathBuf,
    /// Whether the adapter is written in llama.cpp's form too.
    gguf: bool,
    threads: Option<usize>,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Arc<ChatTemplate>>,
    stop: Arc<AtomicBool>,
}

impl Pupil {
    /// Makes `learner` a pupil; `base` is what it was loaded from.
    ///
    /// # Errors
    /// When what is to be learned could not be written in the end.
    pub fn new(learner: Learner, method: Method, base: &Path, gguf: bool, stop: Arc<AtomicBool>) -> Result<Pupil> {
        let pupil = Pupil {
            learner,
            method,
            base: base.to_owned(),
            gguf,
            threads: None,
            tokenizer: None,
            template: None,
            stop,
        };
        match &pupil.method {
            Method::Lora(config) => pupil.check(config)?,
            _ if gguf => bail!("--gguf writes LoRA adapters; {} has none", pupil.name()),
            _ => {}
        }
        Ok(pupil)
    }

    /// What sample answers are made with.
    pub fn speaking(
        self,
        tokenizer: Option<Arc<Tokenizer>>,
        template: Option<Arc<ChatTemplate>>,
        threads: usize,
    ) -> Pupil {
        Pupil { tokenizer, template, threads: Some(threads), ..self }
    }

    fn name(&self) -> &'static str {
        match self.method {
            Method::Lora(_) => "LoRA",
            Method::Full => "full fine-tuning",
            Method::Prefix { .. } => "prefix-tuning",
        }
    }

    /// Where the result goes in the folder of a run.
    pub fn result(&self, dir: &Path) -> PathBuf {
        match (&self.method, self.base.is_dir()) {
            (Method::Full, true) => dir.join("model"),
            (Method::Full, false) => dir.join("model.gguf"),
            _ => dir.join("adapter"),
        }
    }

    /// An adapter's files hold linear layers and embeddings, and llama.cpp's not even those as a whole.
    fn check(&self, config: &LoraConfig) -> Result<()> {
        let (model, sites) = (self.learner.model(), self.learner.sites());
        let mut vectors = model.clone();
        if vectors.vectors_mut().any(|v| sites.vector(v).is_some())
            || model.positions.as_ref().is_some_and(|table| sites.table(table).is_some())
        {
            bail!("--train-full: adapters can hold linear layers and the embedding, not norms or positions");
        }
        write::check_wholes(Path::new("--train-full"), model, &self.wholes())?;
        if self.gguf {
            let whole = model.linears().any(|l| sites.linear(l).weight.is_some());
            if config.dora || whole || sites.table(&model.embedding).is_some() {
                bail!(
                    "--gguf: llama.cpp's adapters have neither DoRA nor matrices trained in full; leave it out and merge the adapter into the model"
                );
            }
            let (pairs, path) = (self.pairs(), Path::new("adapter.gguf"));
            if pairs.iter().any(|p| p.role.expert().is_some()) || model.family.gguf.is_none() {
                bail!("--gguf: {}: this model's adapter has no form in GGUF; leave it out", path.display());
            }
            if model.spec.tied_head && pairs.iter().any(|p| p.role == Role::Head) {
                bail!(
                    "--gguf: the head is the embedding's matrix, which takes no adapter in GGUF; leave it out of --targets"
                );
            }
        }
        Ok(())
    }

    fn values(&self, param: usize) -> &[f32] {
        &self.learner.params().list[param].values
    }

    fn pairs(&self) -> Vec<Pair<'_>> {
        let each = self.learner.model().linears().filter_map(|linear| {
            let lora = self.learner.sites().linear(linear).lora?;
            let magnitude = lora.magnitude.map(|m| self.values(m));
            let (a, b) = (self.values(lora.a), self.values(lora.b));
            Some(Pair { role: linear.role, layer: linear.layer, a, b, magnitude })
        });
        each.collect()
    }

    fn wholes(&self) -> Vec<Whole<'_>> {
        let (model, sites) = (self.learner.model(), self.learner.sites());
        let linears = model.linears().filter_map(|l| {
            let values = self.values(sites.linear(l).weight?);
            Some(Whole { role: l.role, layer: l.layer, values })
        });
        let table =
            sites.table(&model.embedding).map(|p| Whole { role: Role::Embedding, layer: 0, values: self.values(p) });
        linears.chain(table).collect()
    }

    /// The base as PEFT is to find it: where it came from if its configuration says so, or else where it is.
    fn base_name(&self) -> String {
        let own = Checkpoint::open(&self.base).ok().and_then(|c| match c.kind() {
            Kind::HuggingFace { config, .. } => config
                .get("_name_or_path")
                .and_then(|v| v.as_str())
                .filter(|name| name.contains('/'))
                .map(str::to_owned),
            Kind::Gguf(_) => None,
        });
        let path =
            || std::path::absolute(&self.base).unwrap_or_else(|_| self.base.clone()).to_string_lossy().into_owned();
        own.unwrap_or_else(path)
    }

    fn engine(&mut self) -> Result<Engine> {
        let model = self.learner.model_with_adapter()?;
        let context = model.spec.context_length.min(CONTEXT);
        let options = Options { threads: self.threads, context: Some(context), slots: 1, ..Options::default() };
        Engine::from_model(Checkpoint::open(&self.base)?, model, &options)
    }
}

impl Lesson for Pupil {
    fn params(&self) -> &Params {
        self.learner.params()
    }

    fn params_mut(&mut self) -> &mut Params {
        self.learner.params_mut()
    }

    fn backward(&mut self, examples: &[Example], noise: u64, gradients: &mut Gradients) -> Result<Loss> {
        self.learner.backward(examples, noise, gradients)
    }

    fn losses(&mut self, examples: &[Example]) -> Result<Vec<Loss>> {
        self.learner.losses(examples)
    }

    fn answers(&mut self, prompts: &[String]) -> Result<Vec<String>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let tokenizer = self.tokenizer.clone().context("sample answers need a tokenizer, and the model has none")?;
        self.learner.rest();
        let mut engine = self.engine()?;
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let ask = Ask { sampling, max_tokens: Some(ANSWER), ..Ask::default() };
        let mut answers = Vec::new();
        for prompt in prompts {
            let mut session = Session::new(tokenizer.clone(), self.template.clone(), 0);
            let reply = match &self.template {
                Some(_) => {
                    session.messages().push(Message::new("user", prompt.as_str()));
                    session.reply(&mut engine, &ask, &self.stop, &mut |_| {})?
                }
                None => {
                    let mut ids = tokenizer.prefix();
                    ids.extend(tokenizer.encode(prompt, Specials::AsText)?);
                    session.complete(&mut engine, ids, &ask, &self.stop, &mut |_| {})?
                }
            };
            session.clear_cache(&mut engine);
            answers.push(reply.text);
        }
        Ok(answers)
    }

    fn save(&mut self, dir: &Path, finished: bool) -> Result<()> {
        self.learner.rest();
        let result = self.result(dir);
        let base = self.base_name();
        match &self.method {
            Method::Lora(config) => {
                let description = Description {
                    base,
                    rank: config.rank,
                    alpha: config.alpha,
                    dropout: config.dropout,
                    rslora: config.rslora,
                };
                let (model, pairs) = (self.learner.model(), self.pairs());
                write_peft(&result, model, &description, &pairs, &self.wholes())?;
                if self.gguf {
                    write_gguf(&dir.join("adapter.gguf"), model, &description, &pairs)?;
                }
            }
            Method::Prefix { tokens } => {
                let site = self.learner.sites().prefix.as_ref().context("there is no prefix")?;
                let layers: Vec<_> = site.layers.iter().map(|&(k, v)| (self.values(k), self.values(v))).collect();
                write_prefix(&result, self.learner.model(), &base, *tokens, &layers)?;
            }
            // All of a model takes its time: not for a run that goes on later.
            Method::Full if finished => {
                let model = self.learner.model_with_adapter()?;
                if result.is_dir() {
                    std::fs::remove_dir_all(&result).with_context(|| result.display().to_string())?;
                }
                write_trained(&Checkpoint::open(&self.base)?, &model, &result)?;
            }
            Method::Full => {}
        }
        Ok(())
    }
}
