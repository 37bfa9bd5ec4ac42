//! What a step does to the parameters.

use super::states8::{BLOCK, Codes};
use crate::train::params::{Gradients, Param, Params};
use rushlight_quant::buffer::Aligned;

/// Which rule changes the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// AdamW (Loshchilov & Hutter 2019), its states in f32
    Adamw,
    /// The same with states in 8 bits: a quarter of the memory
    Adamw8bit,
    /// Gradient descent with a momentum of 0.9
    Sgd,
}

impl Rule {
    /// Bytes of state for each trained number.
    pub fn bytes(self, count: u64) -> u64 {
        match self {
            Rule::Adamw => 8 * count,
            Rule::Adamw8bit => 2 * count + 8 * count.div_ceil(BLOCK as u64),
            Rule::Sgd => 4 * count,
        }
    }
}

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f32 = 1e-8;
const MOMENTUM: f32 = 0.9;
/// Numbers that a thread takes at a time: whole blocks.
const PIECE: usize = 64 * BLOCK;

/// The optimizer's memory of one parameter.
#[derive(Clone, Debug)]
pub enum State {
    /// Exponential means of the gradient and of its square.
    Adam {
        /// The first.
        first: Aligned<f32>,
        /// The second.
        second: Aligned<f32>,
    },
    /// The same in codes, with a scale for each block.
    Adam8 {
        /// The first.
        first: Aligned<u8>,
        /// The second.
        second: Aligned<u8>,
        /// Scales of the first.
        first_scales: Aligned<f32>,
        /// Scales of the second.
        second_scales: Aligned<f32>,
    },
    /// The running sum of gradients.
    Sgd {
        /// The sum.
        momentum: Aligned<f32>,
    },
}

/// Changes parameters by their gradients.
#[derive(Clone, Debug)]
pub struct Optimizer {
    rule: Rule,
    decay: f32,
    threads: usize,
    codes: (Codes, Codes),
    /// Updates made.
    pub updates: u64,
    /// Of each parameter: fewer where it was idle.
    counts: Vec<u64>,
    /// One for each parameter, in their order.
    pub states: Vec<State>,
}

impl Optimizer {
    /// For `params`, with decoupled weight decay `decay`.
    pub fn new(rule: Rule, params: &Params, decay: f64, threads: usize) -> Optimizer {
        let state = |p: &Param| {
            let n = p.values.len();
            let blocks = n.div_ceil(BLOCK);
            match rule {
                Rule::Adamw => State::Adam { first: Aligned::zeroed(n), second: Aligned::zeroed(n) },
                Rule::Adamw8bit => {
                    // Codes of 0: with scales of 0 any code means 0.
                    let (first, second) = (Aligned::zeroed(n), Aligned::zeroed(n));
                    let (first_scales, second_scales) = (Aligned::zeroed(blocks), Aligned::zeroed(blocks));
                    State::Adam8 { first, second, first_scales, second_scales }
                }
                Rule::Sgd => State::Sgd { momentum: Aligned::zeroed(n) },
            }
        };
        let states = params.list.iter().map(state).collect();
        let codes = (Codes::signed(), Codes::unsigned());
        Optimizer {
            rule,
            decay: decay as f32,
            threads: threads.max(1),
            codes,
            updates: 0,
            counts: vec![0; params.list.len()],
            states,
        }
    }

    /// One update with gradients times `scale`, at the learning rate `rate`.
    pub fn step(&mut self, params: &mut Params, gradients: &Gradients, scale: f32, rate: f64) {
        self.updates += 1;
        let threads = self.threads;
        let states = self.states.iter_mut().zip(&mut self.counts);
        for (i, (param, (state, count))) in params.list.iter_mut().zip(states).enumerate() {
            if param.idles && !gradients.met(i) {
                continue;
            }
            *count += 1;
            // As torch.optim.AdamW: the corrections in f64, the rest in the parameters' own precision.
            let correct = |beta: f64| 1.0 - beta.powf(*count as f64);
            let corrections = (correct(BETAS.0), correct(BETAS.1).sqrt());
            let gradient = &gradients[i];
            let rate = rate * f64::from(param.rate);
            let decay = if param.decay { self.decay } else { 0.0 };
            let each = Each {
                scale,
                decay: (1.0 - rate * f64::from(decay)) as f32,
                coupled: decay,
                rate: rate as f32,
                step: (rate / corrections.0) as f32,
                root: corrections.1 as f32,
                codes: &self.codes,
            };
            let values = param.values.chunks_mut(PIECE).zip(gradient.chunks(PIECE));
            match state {
                State::Adam { first, second } => {
                    let states = first.chunks_mut(PIECE).zip(second.chunks_mut(PIECE));
                    in_parallel(threads, values.zip(states), |((p, g), (m, v))| each.adam(p, g, m, v));
                }
                State::Adam8 { first, second, first_scales, second_scales } => {
                    let scales = first_scales.chunks_mut(PIECE / BLOCK).zip(second_scales.chunks_mut(PIECE / BLOCK));
                    let states = first.chunks_mut(PIECE).zip(second.chunks_mut(PIECE)).zip(scales);
                    in_parallel(threads, values.zip(states), |((p, g), ((m, v), (ms, vs)))| {
                        each.adam8(p, g, m, v, ms, vs)
                    });
                }
                State::Sgd { momentum } => {
                    in_parallel(threads, values.zip(momentum.chunks_mut(PIECE)), |((p, g), m)| each.sgd(p, g, m));
                }
            }
        }
    }

    /// The updates of each parameter, where they are not all alike; else nothing.
    pub fn uneven(&self) -> Vec<u64> {
        if self.counts.iter().all(|n| *n == self.updates) { Vec::new() } else { self.counts.clone() }
    }

    /// Takes up where `updates` were made, and `uneven` ones of each parameter. False: there are not so many parameters.
    #[must_use]
    pub fn resume(&mut self, updates: u64, uneven: &[u64]) -> bool {
        self.updates = updates;
        self.counts.fill(updates);
        if uneven.is_empty() {
            return true;
        }
        let fits = uneven.len() == self.counts.len();
        if fits {
            self.counts.copy_from_slice(uneven);
        }
        fits
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }
}

/// What a step is for every number of a parameter.
struct Each<'a> {
    scale: f32,
    decay: f32,
    coupled: f32,
    rate: f32,
    step: f32,
    root: f32,
    codes: &'a (Codes, Codes),
}

impl Each<'_> {
    fn adam(&self, values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let (b1, b2) = (BETAS.0 as f32, BETAS.1 as f32);
        let (c1, c2) = ((1.0 - BETAS.0) as f32, (1.0 - BETAS.1) as f32);
        for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * self.scale;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = *p * self.decay - self.step * (*m / (v.sqrt() / self.root + EPSILON));
        }
    }

    fn adam8(
        &self,
        values: &mut [f32],
        gradient: &[f32],
        first: &mut [u8],
        second: &mut [u8],
        first_scales: &mut [f32],
        second_scales: &mut [f32],
    ) {
        let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
        let blocks = first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK));
        let scales = first_scales.iter_mut().zip(second_scales);
        let numbers = values.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
        for (((p, g), (first, second)), (ms, vs)) in numbers.zip(blocks).zip(scales) {
            let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
            self.codes.0.decode(first, *ms, m);
            self.codes.1.decode(second, *vs, v);
            self.adam(p, g, m, v);
            *ms = self.codes.0.encode(m, first);
            *vs = self.codes.1.encode(v, second);
        }
    }

    /// As torch.optim.SGD: the decay is part of the gradient.
    fn sgd(&self, values: &mut [f32], gradient: &[f32], momentum: &mut [f32]) {
        for ((p, g), m) in values.iter_mut().zip(gradient).zip(momentum) {
            *m = MOMENTUM * *m + (g * self.scale + self.coupled * *p);
            *p -= self.rate * *m;
        }
    }
}

/// Does `work` on every piece; each number is computed alone, so that threads change nothing.
fn in_parallel<T: Send>(threads: usize, pieces: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
    let pieces: Vec<T> = pieces.collect();
    // Threads take a moment to start.
    if threads == 1 || pieces.len() < 8 {
        return pieces.into_iter().for_each(work);
    }
    let queue = std::sync::Mutex::new(pieces.into_iter());
    let next = || queue.lock().unwrap_or_else(|e| e.into_inner()).next();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(piece) = next() {
                    work(piece);
                }
            });
        }
    });
}

/// The length of all gradients together: f64 sums of pieces, added in order.
pub fn norm(gradients: &Gradients) -> f64 {
    let piece = |values: &[f32]| {
        // Eight sums at once, which become vector code.
        let mut sums = [0f64; 8];
        for eight in values.chunks(8) {
            sums.iter_mut().zip(eight).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        sums.iter().sum::<f64>()
    };
    let squares: f64 = gradients.iter().flat_map(|g| g.chunks(PIECE)).map(piece).sum();
    squares.sqrt()
}

/// What gradients of length `norm` are multiplied by so that they are at most `limit` long, as torch's clip_grad_norm_.
pub fn clip(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(values: &[f32], rate: f32, decay: bool) -> Param {
        let mut aligned = Aligned::zeroed(values.len());
        aligned.copy_from_slice(values);
        Param { name: "p".into(), shape: vec![values.len()], values: aligned, rate, decay, idles: false }
    }

    fn gradients(list: &[&[f32]]) -> Gradients {
        list.iter().map(|g| param(g, 1.0, true).values).collect()
    }

    #[test]
    fn adamw_is_pytorchs() {
        // torch.optim.AdamW([0.5, -1.0, 2.0], lr=0.1, weight_decay=0.01), gradients as below, in f64.
        let reference = |gs: &[[f64; 3]]| {
            let (mut p, mut m, mut v) = ([0.5, -1.0, 2.0f64], [0.0; 3], [0.0; 3]);
            for (t, g) in gs.iter().enumerate() {
                let t = t as i32 + 1;
                for i in 0..3 {
                    p[i] *= 1.0 - 0.1 * 0.01;
                    m[i] = 0.9 * m[i] + 0.1 * g[i];
                    v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
                    let denominator = v[i].sqrt() / (1.0 - 0.999f64.powi(t)).sqrt() + 1e-8;
                    p[i] -= 0.1 / (1.0 - 0.9f64.powi(t)) * m[i] / denominator;
                }
            }
            p
        };
        let steps = [[0.1, -0.2, 0.3], [0.4, 0.0, -0.1], [-0.3, 0.2, 0.05]];
        let mut params = Params { list: vec![param(&[0.5, -1.0, 2.0], 1.0, true)] };
        let mut optimizer = Optimizer::new(Rule::Adamw, &params, 0.01, 2);
        for g in steps {
            optimizer.step(&mut params, &gradients(&[&g.map(|x| x as f32)]), 1.0, 0.1);
        }
        for (p, want) in params.list[0].values.iter().zip(reference(&steps)) {
            assert!((f64::from(*p) - want).abs() < 1e-6, "{p} {want}");
        }
        // The first step goes as far as the learning rate, whatever the gradient's size; and a tensor's own rate counts.
        let mut params = Params { list: vec![param(&[0.0], 1.0, true), param(&[0.0], 16.0, false)] };
        Optimizer::new(Rule::Adamw, &params, 0.0, 1).step(&mut params, &gradients(&[&[7.0], &[-7.0]]), 0.01, 0.1);
        assert!((params.list[0].values[0] + 0.1).abs() < 1e-6 && (params.list[1].values[0] - 1.6).abs() < 1e-5);
    }

    #[test]
    fn what_idles_is_left_alone_and_counts_its_own_steps() {
        let idle = |values: &[f32]| Param { idles: true, ..param(values, 1.0, true) };
        let mut params = Params { list: vec![idle(&[1.0]), param(&[1.0], 1.0, true)] };
        let mut optimizer = Optimizer::new(Rule::Adamw, &params, 0.1, 1);
        let mut g = gradients(&[&[0.0], &[0.0]]);
        optimizer.step(&mut params, &g, 1.0, 0.1);
        // No decay; the other one has some.
        assert_eq!((params.list[0].values[0], params.list[1].values[0]), (1.0, 0.99));
        assert_eq!(optimizer.uneven(), [0, 1]);
        let again = |params: &Params| {
            let mut other = Optimizer::new(Rule::Adamw, params, 0.1, 1);
            assert!(other.resume(1, &[0, 1]) && !other.clone().resume(1, &[1]));
            other
        };
        let mut resumed = (params.clone(), again(&params));
        g.meet(0)[0] = 3.0;
        optimizer.step(&mut params, &g, 1.0, 0.1);
        resumed.1.step(&mut resumed.0, &g, 1.0, 0.1);
        // Its first step goes as far as a first step does.
        assert!((params.list[0].values[0] - (0.99 - 0.1)).abs() < 1e-6);
        assert_eq!(params.list[0].values[0], resumed.0.list[0].values[0]);
    }

    #[test]
    fn eight_bits_find_the_same_minimum() {
        let count = 3000;
        let target = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
        let end = |rule| {
            let mut params = Params { list: vec![param(&vec![0.0; count], 1.0, true)] };
            let mut optimizer = Optimizer::new(rule, &params, 0.0, 2);
            for step in 0..300 {
                let g: Vec<f32> = params.list[0].values.iter().enumerate().map(|(i, p)| p - target(i)).collect();
                optimizer.step(&mut params, &gradients(&[&g]), 1.0, 0.05 * (1.0 - step as f64 / 300.0));
            }
            let errors = params.list[0].values.iter().enumerate().map(|(i, p)| (p - target(i)).abs());
            errors.fold(0.0, f32::max)
        };
        for (rule, most) in [(Rule::Adamw, 0.01), (Rule::Adamw8bit, 0.03), (Rule::Sgd, 0.01)] {
            let error = end(rule);
            assert!(error < most, "{rule:?} {error}");
        }
    }

    #[test]
    fn threads_change_nothing() {
        for rule in [Rule::Adamw, Rule::Adamw8bit, Rule::Sgd] {
            let run = |threads| {
                let mut params = Params { list: vec![param(&vec![0.5; 20 * PIECE + 77], 1.0, true)] };
                let g: Vec<f32> = (0..20 * PIECE + 77).map(|i| ((i * 31 % 1009) as f32 - 500.0) / 1e3).collect();
                let mut optimizer = Optimizer::new(rule, &params, 0.1, threads);
                (0..2).for_each(|_| optimizer.step(&mut params, &gradients(&[&g]), 0.3, 0.01));
                params.list[0].values.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(run(1), run(3), "{rule:?}");
        }
    }

    #[test]
    fn clipping_is_pytorchs() {
        let g = gradients(&[&[3.0, 0.0], &[4.0]]);
        assert_eq!(norm(&g), 5.0);
        assert_eq!(clip(5.0, Some(1.0)), 1.0 / 5.000001);
        assert_eq!((clip(0.5, Some(1.0)), clip(5.0, None)), (1.0, 1.0));
    }
}
