//! What tests of training share: batches of the reference data, named gradients, an optimizer.
// Each test takes what it needs.
#![allow(dead_code)]

use rushlight::train::batch::Example;
use rushlight::train::params::{Gradients, Params};
use rushlight::train::tape::{Learner, Method};
use rushlight_models::checkpoint::{Checkpoint, safetensors};
use rushlight_models::families;
use rushlight_models::model::Model;
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
    let each = params.list.iter().zip(gradients);
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
        for ((p, g), moments) in params.list.iter_mut().zip(gradients).zip(&mut self.moments) {
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
