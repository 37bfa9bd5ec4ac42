//! What is trained, and how memory is traded for time.

use std::path::PathBuf;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// Low-rank adapters on linear layers.
    Lora(LoraConfig),
    /// Every weight, in f32.
    Full,
    /// Keys and values of so many positions before every sequence, in each layer (p-tuning v2, Liu et al. 2022).
    Prefix {
        /// How many.
        tokens: usize,
    },
}

/// Adapters as PEFT describes them.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub rank: usize,
    /// The change is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// How much of an adapter's input is left out at each step, in [0, 1).
    pub dropout: f32,
    /// The change is multiplied by `alpha / sqrt(rank)` instead (Kalajdzievski 2023).
    pub rslora: bool,
    /// Magnitudes of the rows are trained apart from their directions (DoRA, Liu et al. 2024).
    pub dora: bool,
    /// How many times faster than A B learns (LoRA+, Hayou et al. 2024).
    pub lora_plus: Option<f32>,
    /// Modules as the family's own files call them (the end of the name is enough), or `all-linear`: all linear layers
    /// but the head and routers.
    pub targets: Vec<String>,
    /// Regular expressions for the end of modules' names: these are trained as a whole, in f32 (PEFT's
    /// `modules_to_save`).
    pub train_full: Vec<String>,
    /// An adapter to begin with instead of random numbers.
    pub init: Option<PathBuf>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            rslora: false,
            dora: false,
            lora_plus: None,
            targets: vec!["all-linear".into()],
            train_full: Vec::new(),
            init: None,
        }
    }
}

impl LoraConfig {
    /// What the change is multiplied by.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// Which layers are computed a second time on the way back instead of having what they made kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// None: the fastest.
    #[default]
    None,
    /// All: the smallest.
    All,
    /// The first so many.
    Layers(usize),
}

impl Checkpointing {
    /// Whether layer `i` is computed a second time.
    pub fn again(self, i: usize) -> bool {
        match self {
            Checkpointing::None => false,
            Checkpointing::All => true,
            Checkpointing::Layers(n) => i < n,
        }
    }
}
