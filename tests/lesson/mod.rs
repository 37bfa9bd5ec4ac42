//! What tests of training share: batches of the reference data, named gradients, an optimizer.
// Each test takes what it needs.
#![allow(dead_code)]

use rushlight::train::batch::Example;
use rushlight::train::params::{Gradients, Params};
use rushlight::train::tape::{Learner, Method};
use rushlight_models::checkpoint::{Checkpoint, safetensors};
use rushlight_models::families;
use rushlight_models::model::{Model, Weight};
use rushlight_quant::{Cpu, Isa};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::Path;

pub fn isa() -> Isa {
    Isa::from_env().unwrap()
}

pub fn learner(model: &Path, threads: usize, method: &Method) -> Learner {
    let model = Model::load(&Checkpoint::open(model).unwrap()).unwrap();
    Learner::new(model, Cpu::new(threads, isa()), method, 1).unwrap()
}

/// Puts weights of f32 in the place of all others.
pub fn in_floats(model: &mut Model) {
    let floats = |weight: &Weight| {
        let mut values = vec![0.0; weight.rows() * weight.cols()];
        let rows = values.chunks_exact_mut(weight.cols()).enumerate();
        rows.for_each(|(row, values)| weight.decode_row(row, values));
        Weight::from_f32(weight.rows(), weight.cols(), &values).unwrap()
    };
    model.embedding.weight = floats(&model.embedding.weight);
    let embedding = (model.embedding.id, model.embedding.weight.clone());
    for linear in model.linears_mut() {
        linear.weight = if linear.id == embedding.0 { embedding.1.clone() } else { floats(&linear.weight) };
    }
}

/// The rows of a padded batch: without its padding.
pub fn examples(batch: &Json) -> Vec<Example> {
    let numbers = |row: &Json| row.as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<i64>>();
    let rows = |key: &str| batch[key].as_array().unwrap().iter().map(numbers).collect::<Vec<_>>();
    let each = rows("input_ids").into_iter().zip(rows("labels")).zip(rows("attention_mask"));
    each.map(|((ids, labels), mask)| {
        let len = mask.iter().filter(|&&m| m == 1).count();
        let ids = ids[..len].iter().map(|&id| id as u32).collect();
        let labels: Vec<Option<u32>> = labels[..len].iter().map(|&l| u32::try_from(l).ok()).collect();
        Example::from_labels(ids, &labels)
    })
    .collect()
}

/// The tensors of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = safetensors::open(path).unwrap();
    file.tensors.into_iter().map(|t| (t.info.name, families::floats(t.info.format, &t.data).unwrap())).collect()
}

/// Gradients by the names of their parameters, `by` times as large.
pub fn named(params: &Params, gradients: &Gradients, by: f64) -> BTreeMap<String, Vec<f32>> {
    let each = params.list.iter().zip(gradients.iter());
    each.map(|(p, g)| (p.name.clone(), g.iter().map(|&x| (f64::from(x) * by) as f32).collect())).collect()
}

/// Distance of two vectors, relative to the second's length.
pub fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let all: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    if all == 0.0 { off.sqrt() } else { (off / all).sqrt() }
}

/// A number in [-1, 1) that depends on `seed` and `i` alone.
pub fn noise(seed: u64, i: usize) -> f32 {
    let x = (seed ^ (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xD129_9D6D_3C5F_A5B5);
    let x = (x ^ (x >> 31)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((x ^ (x >> 29)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Sequences of tokens below `vocabulary` with a loss on most of them.
pub fn random_examples(lens: &[usize], vocabulary: usize, seed: u64) -> Vec<Example> {
    let token = |i: usize| ((noise(seed, i) + 1.0) / 2.0 * (vocabulary - 1) as f32) as u32;
    let each = lens.iter().enumerate().map(|(n, &len)| {
        let ids = (0..len).map(|i| token(n * 1000 + i)).collect();
        let targets = (0..len).map(|i| (i % 4 != 1).then(|| token(n * 1000 + 500 + i))).collect();
        Example { ids, targets }
    });
    each.collect()
}

/// Random numbers instead of what is zero at the start: the `B`s of adapters.
pub fn stir(learner: &mut Learner, size: f32) {
    for (n, p) in learner.params_mut().list.iter_mut().enumerate() {
        if p.name.contains(".lora_B") {
            p.values.iter_mut().enumerate().for_each(|(i, x)| *x = size * noise(n as u64, i));
        }
    }
}

/// Compares the gradient of each parameter with differences of the loss: along itself and a random direction together.
/// A difference may be off by `part` of what it should be and by `floor` times the length of all gradients.
pub fn check_gradients(learner: &mut Learner, batch: &[Example], label: &str, step: f64, part: f64, floor: f64) {
    check_some(learner, batch, label, |_| true, step, part, floor);
}

/// The same for the parameters whose names are `wanted`.
pub fn check_some(
    learner: &mut Learner,
    batch: &[Example],
    label: &str,
    wanted: impl Fn(&str) -> bool,
    step: f64,
    part: f64,
    floor: f64,
) {
    let mut gradients = learner.params().gradients();
    let loss = learner.backward(batch, 5, &mut gradients).unwrap();
    assert!(loss.sum.is_finite() && loss.tokens > 0, "{label}");
    let all = length(&gradients, 1.0);
    assert!(all.is_finite() && all > 0.0, "{label}");
    let names: Vec<String> = learner.params().list.iter().map(|p| p.name.clone()).collect();
    let mut spare = learner.params().gradients();
    for n in (0..gradients.len()).filter(|&n| wanted(&names[n])) {
        let gradient = &gradients[n];
        let own = length(&Gradients::from_iter([gradient.clone()]), 1.0);
        let random: Vec<f32> = (0..gradient.len()).map(|i| noise(77 + n as u64, i)).collect();
        let random_length = random.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let along = |i: usize| {
            let own = if own > 0.0 { f64::from(gradient[i]) / own } else { 0.0 };
            own + f64::from(random[i]) / random_length
        };
        let want: f64 = (0..gradient.len()).map(|i| along(i) * f64::from(gradient[i])).sum();
        let before = learner.params().list[n].values.clone();
        // Far enough for the loss to move, near enough for it to move in a line.
        let by = (step / want.abs().max(floor * all)).min(0.02 * (gradient.len() as f64).sqrt());
        let mut at = |by: f64| {
            let values = &mut learner.params_mut().list[n].values;
            (0..before.len()).for_each(|i| values[i] = (f64::from(before[i]) + by * along(i)) as f32);
            learner.backward(batch, 5, &mut spare).unwrap().sum
        };
        // A long step may turn a corner (another expert), a short one drown in rounding.
        let mut got = Vec::new();
        let fits = [1.0, 0.1, 5.0].into_iter().any(|times| {
            let by = by * times;
            got.push((at(by) - at(-by)) / (2.0 * by));
            got.last().is_some_and(|got| (got - want).abs() < part * want.abs() + floor * all)
        });
        learner.params_mut().list[n].values.copy_from_slice(&before);
        assert!(fits, "{label} {}: {got:?} by differences, {want} by the way back", names[n]);
    }
}

/// The length of all gradients together.
pub fn length(gradients: &Gradients, by: f64) -> f64 {
    let square = |x: &f32| (f64::from(*x) * by).powi(2);
    gradients.iter().flat_map(|g| g.iter()).map(square).sum::<f64>().sqrt()
}

/// AdamW (Loshchilov and Hutter 2019) with clipping, as the reference data were made with it.
#[derive(Default)]
pub struct Adam {
    pub lr: f64,
    pub decay: f64,
    pub clip: f64,
    step: i32,
    moments: Vec<Vec<[f64; 2]>>,
}

impl Adam {
    pub fn new(lr: f64, decay: f64, clip: f64) -> Adam {
        Adam { lr, decay, clip, ..Adam::default() }
    }

    /// One step with `by` times the gradients; returns their length before clipping.
    pub fn step(&mut self, params: &mut Params, gradients: &Gradients, by: f64) -> f64 {
        let norm = length(gradients, by);
        let by = by * (self.clip / (norm + 1e-6)).min(1.0);
        self.step += 1;
        self.moments.resize_with(gradients.len(), Vec::new);
        let (c1, c2) = (1.0 - 0.9f64.powi(self.step), 1.0 - 0.999f64.powi(self.step));
        for ((p, g), moments) in params.list.iter_mut().zip(gradients.iter()).zip(&mut self.moments) {
            moments.resize(g.len(), [0.0; 2]);
            for ((x, g), [m, v]) in p.values.iter_mut().zip(g.iter()).zip(moments) {
                let g = f64::from(*g) * by;
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let step = self.lr * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
                *x = (f64::from(*x) * (1.0 - self.lr * self.decay) - step) as f32;
            }
        }
        norm
    }
}
