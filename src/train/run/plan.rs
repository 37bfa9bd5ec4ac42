//! The plan of a run: what it will take of memory and time, and what was chosen so that it fits.

use super::optimizer::Rule;
use super::report::duration;
use crate::cli::size;
use crate::train::tape::{Checkpointing, MemoryEstimate, Method, memory};
use anyhow::{Result, bail};
use rushlight_models::model::Model;
use serde::Serialize;

/// Tokens that go through the model together at most: more fill the processor no better.
const MOST_ROWS: usize = 2048;
/// The fewest that still fill it: rather than fewer, layers are computed twice.
const FULL: usize = 512;
/// What the program itself takes, as measured on several models: its code, the tokenizer, buffers of threads, the data.
const PROGRAM: u64 = 48 << 20;

/// What a run is to be planned for.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The optimizer.
    pub rule: Rule,
    /// Bytes that may be used.
    pub limit: u64,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Most tokens of a step.
    pub step: usize,
    /// Tokens that go through the model together, where a run that goes on has chosen already.
    pub rows: Option<usize>,
    /// Bytes of the model's tensors.
    pub weights: u64,
}

/// Where memory goes, in bytes, and what was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The base's weights, mapped from its file: the system may share and drop them.
    pub weights: u64,
    /// Trained numbers.
    pub params: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizer's states.
    pub optimizer: u64,
    /// Activations that are kept, and those of the moment, logits among them.
    pub activations: u64,
    /// The program.
    pub program: u64,
    /// What may be used.
    pub limit: u64,
    /// Tokens that go through the model together.
    pub rows: usize,
    /// Layers that are computed twice to save memory.
    pub twice: usize,
    /// Layers.
    pub layers: usize,
}

impl Plan {
    fn of(model: &Model, method: &Method, wish: &Wish, rows: usize, twice: usize) -> Result<Plan> {
        let layers = model.layers.len();
        let estimate = memory(model, method, rows, checkpointing(twice, layers))?;
        let MemoryEstimate { params, gradients, .. } = estimate;
        Ok(Plan {
            // Weights that are trained themselves are read once, to begin with.
            weights: wish.weights,
            params,
            gradients,
            optimizer: wish.rule.bytes(params / 4),
            activations: estimate.pass(),
            program: PROGRAM,
            limit: wish.limit,
            rows,
            twice,
            layers,
        })
    }

    /// The fastest that fits: fewer rows at a time as long as they fill the processor, then as few layers computed twice as
    /// can be, then all of them with one sequence at a time.
    ///
    /// # Errors
    /// When nothing fits: the message says what would.
    pub fn choose(model: &Model, method: &Method, wish: &Wish) -> Result<Plan> {
        let layers = model.layers.len();
        let most = wish.step.min(MOST_ROWS).max(wish.longest).max(1);
        let few = FULL.min(most).max(wish.longest);
        let fits = |rows: usize, twice: usize| -> Result<Option<Plan>> {
            let plan = Plan::of(model, method, wish, rows, twice)?;
            Ok(Some(plan).filter(|plan| plan.total() <= wish.limit))
        };
        let mut rows = wish.rows.unwrap_or(most);
        let least = wish.rows.unwrap_or(few);
        loop {
            if let Some(plan) = fits(rows, 0)? {
                return Ok(plan);
            }
            if rows == least {
                break;
            }
            rows = (rows / 2).max(least);
        }
        for rows in if wish.rows.is_some() { vec![rows] } else { vec![few, wish.longest.max(1)] } {
            if fits(rows, layers)?.is_none() {
                continue;
            }
            // From the first on memory falls with every layer more.
            let (mut low, mut high) = (0, layers);
            while high - low > 1 {
                let middle = (low + high) / 2;
                if fits(rows, middle)?.is_some() { high = middle } else { low = middle }
            }
            return Plan::of(model, method, wish, rows, high);
        }
        Plan::refuse(model, method, wish)
    }

    fn refuse(model: &Model, method: &Method, wish: &Wish) -> Result<Plan> {
        let layers = model.layers.len();
        let smallest = Plan::of(model, method, wish, wish.rows.unwrap_or(wish.longest.max(1)), layers)?;
        let needed = size(smallest.total() + smallest.total() / 50);
        let mut advice = vec![format!("--memory {}", needed.replace(' ', ""))];
        if let Some(rows) = wish.rows {
            bail!(
                "this run has begun with {rows} tokens at a time, and needs {needed}, but {} may be used: {} allows it",
                size(wish.limit),
                advice[0]
            );
        }
        let shorter = (0..).map(|i| wish.longest >> i).take_while(|&n| n >= 64).skip(1);
        for rows in shorter {
            if Plan::of(model, method, wish, rows, layers)?.total() <= wish.limit {
                advice.push(format!("--max-seq-len {rows}"));
                break;
            }
        }
        if wish.rule == Rule::Adamw {
            let other = Wish { rule: Rule::Adamw8bit, ..*wish };
            if Plan::of(model, method, &other, wish.longest.max(1), layers)?.total() <= wish.limit {
                advice.push("--optimizer adamw8bit".into());
            }
        }
        if *method == Method::Full {
            advice.push("--method lora".into());
        }
        bail!(
            "training needs {needed} with sequences of {} tokens, but {} may be used: {}{}",
            wish.longest,
            size(wish.limit),
            advice.join(", or "),
            if advice.len() > 1 { " would make it fit" } else { " would allow it" }
        )
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.params + self.gradients + self.optimizer + self.activations + self.program
    }

    /// Which layers are computed twice.
    pub fn checkpointing(&self) -> Checkpointing {
        checkpointing(self.twice, self.layers)
    }

    /// Lines for people.
    pub fn lines(&self) -> Vec<String> {
        let trained = format!("{} numbers", grouped(self.params / 4));
        let mut lines = vec![format!(
            "memory   {} of {}: weights {} (mapped), trained {} ({trained}), gradients {}, optimizer {}, activations {}",
            size(self.total()),
            size(self.limit),
            size(self.weights),
            size(self.params),
            size(self.gradients),
            size(self.optimizer),
            size(self.activations)
        )];
        lines.push(format!(
            "chosen   {} tokens at a time, {}",
            self.rows,
            match self.twice {
                0 => "every layer computed once".into(),
                n if n == self.layers => "every layer computed twice to save memory".into(),
                n => format!("{n} of {} layers computed twice to save memory", self.layers),
            }
        ));
        lines
    }
}

fn checkpointing(twice: usize, layers: usize) -> Checkpointing {
    match twice {
        0 => Checkpointing::None,
        n if n >= layers => Checkpointing::All,
        n => Checkpointing::Layers(n),
    }
}

/// A number with its thousands apart.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    groups.join(" ")
}

/// When something that takes so many seconds from now will be done: `in 5 h 12 min (at 06:40)`.
pub fn ends(seconds: f64, now: u64, offset: Option<i64>) -> String {
    let at = now as i64 + seconds.clamp(0.0, 1e9) as i64 + offset.unwrap_or(0);
    let days = at.div_euclid(86_400) - (now as i64 + offset.unwrap_or(0)).div_euclid(86_400);
    let day = match days {
        0 => String::new(),
        1 => "tomorrow ".into(),
        n => format!("{n} days on "),
    };
    let zone = if offset.is_none() { " UTC" } else { "" };
    let of_day = at.rem_euclid(86_400);
    format!("in {} ({day}at {:02}:{:02}{zone})", duration(seconds), of_day / 3600, of_day / 60 % 60)
}

/// Seconds that the local clock is ahead of UTC, as the system's `date` says; `None` where it has none.
pub fn clock_offset() -> Option<i64> {
    let said = std::process::Command::new("date").arg("+%z").output().ok().filter(|o| o.status.success())?;
    let said = String::from_utf8(said.stdout).ok()?;
    let (sign, digits) = said.trim().split_at_checked(1)?;
    let n: i64 = digits.parse().ok().filter(|_| digits.len() == 4)?;
    Some((n / 100 * 3600 + n % 100 * 60) * if sign == "-" { -1 } else { 1 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tape::LoraConfig;
    use rushlight_models::checkpoint::Checkpoint;
    use std::path::Path;

    fn model() -> Model {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama");
        Model::load(&Checkpoint::open(&dir).unwrap()).unwrap()
    }

    #[test]
    fn the_fastest_that_fits_is_chosen() {
        let (model, method) = (model(), Method::Lora(LoraConfig::default()));
        let wish = |limit| Wish { rule: Rule::Adamw, limit, longest: 256, step: 4096, rows: None, weights: 1 << 20 };
        let free = Plan::choose(&model, &method, &wish(1 << 40)).unwrap();
        assert_eq!((free.rows, free.twice), (MOST_ROWS, 0));
        let (mut before, mut seen) = (free, vec![(free.rows, free.twice)]);
        let smallest = Plan::of(&model, &method, &wish(0), 256, model.layers.len()).unwrap().total();
        let mut limit = free.total();
        while limit >= smallest {
            let plan = Plan::choose(&model, &method, &wish(limit)).unwrap();
            assert!(plan.total() <= limit && plan.rows <= before.rows, "{plan:?}");
            // Rows go first, then layers.
            assert!(plan.twice == 0 || plan.rows <= FULL);
            if seen.last() != Some(&(plan.rows, plan.twice)) {
                seen.push((plan.rows, plan.twice));
            }
            before = plan;
            limit -= 64 << 10;
        }
        assert_eq!(seen[..3], [(2048, 0), (1024, 0), (512, 0)]);
        let twice = |rows: usize| seen.iter().any(|&(r, twice)| r == rows && twice > 0);
        assert!(twice(512) && twice(256) && seen.is_sorted_by_key(|s| std::cmp::Reverse(s.0)), "{seen:?}");
        // A run that goes on keeps its rows.
        let kept = Plan::choose(&model, &method, &Wish { rows: Some(777), ..wish(1 << 40) }).unwrap();
        assert_eq!(kept.rows, 777);
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let model = model();
        let wish = Wish { rule: Rule::Adamw, limit: 64 << 20, longest: 4096, step: 4096, rows: None, weights: 1 << 20 };
        let error = Plan::choose(&model, &Method::Lora(LoraConfig::default()), &wish).unwrap_err().to_string();
        let limit = error.split("--memory ").nth(1).unwrap().split(',').next().unwrap().to_string();
        let limit = crate::quantize::memory::parse_size(limit.split(' ').next().unwrap()).unwrap();
        Plan::choose(&model, &Method::Lora(LoraConfig::default()), &Wish { limit, ..wish }).unwrap();
        let shorter: usize =
            error.split("--max-seq-len ").nth(1).unwrap().split([' ', ',']).next().unwrap().parse().unwrap();
        let wish = Wish { longest: shorter, step: shorter, ..wish };
        Plan::choose(&model, &Method::Lora(LoraConfig::default()), &wish).unwrap();
    }

    #[test]
    fn hours_as_people_say_them() {
        // 2026-01-01 22:30 UTC.
        let now = 1_767_306_600;
        assert_eq!(ends(3600.0, now, Some(0)), "in 1 h 0 min (at 23:30)");
        assert_eq!(ends(5400.0, now, None), "in 1 h 30 min (tomorrow at 00:00 UTC)");
        assert_eq!(ends(60.0, now, Some(3600)), "in 1 min 0 s (at 23:31)");
        assert_eq!([0, 999, 1000, 12_345_678].map(grouped), ["0", "999", "1 000", "12 345 678"]);
    }
}
