//! Calibration on whole models: what the observer sees, and quantizing layer by layer.

mod chat_model;

use rushlight::calibrate::capture::{Capture, Observer};
use rushlight::calibrate::layers::{Job, Run, Target};
use rushlight::calibrate::text::{self, Own};
use rushlight::calibrate::{imatrix, layers};
use rushlight::engine::Engine;
use rushlight::engine::cpu::Activations;
use rushlight::quantize::scratch::{Fingerprint, Scratch};
use rushlight_models::backend::{Batch, Sequence};
use rushlight_models::checkpoint::{Bytes, Checkpoint};
use rushlight_models::decoder;
use rushlight_models::families::Role;
use rushlight_models::model::{Layer, Linear, Model, Weight};
use rushlight_models::tokenizer::Tokenizer;
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::{Seen, encode};
use rushlight_quant::{Cpu, Phase};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// The tiny model and its tokenizer.
fn tiny(dir: &Path) -> (Model, Tokenizer) {
    chat_model::write(dir);
    (Model::load(&Checkpoint::open(dir).unwrap()).unwrap(), Tokenizer::open(dir).unwrap())
}

/// Sequences of different lengths, enough that some are held out.
fn sequences() -> Vec<Vec<u32>> {
    (0..19u32).map(|i| (0..40 + 3 * i).map(|t| (i * 131 + t * t * 7 + t) % 256).collect()).collect()
}

fn name(linear: &Linear) -> String {
    format!("{:?}.{}", linear.role, linear.layer)
}

/// Q8_0 for every linear layer whose rows are whole blocks, with its rows turned round, and F16 for the others.
fn targets(model: &Model) -> HashMap<usize, Target> {
    let target = |l: &Linear| {
        let format = if l.weight.cols().is_multiple_of(32) { Format::Q4_0 } else { Format::F16 };
        let rows = (l.layer == 1).then(|| (0..l.weight.rows() as u32).rev().collect());
        (l.id, Target { name: name(l), format, groups: None, rows })
    };
    model.linears().map(target).collect()
}

fn floats(weight: &Weight) -> Vec<f32> {
    let mut values = vec![0.0; weight.rows() * weight.cols()];
    let rows = values.chunks_exact_mut(weight.cols()).enumerate();
    rows.for_each(|(r, out)| weight.format().decode(weight.row(r), out));
    values
}

fn rounded(format: Format, weights: &[f32], cols: usize) -> Vec<u8> {
    let mut out = vec![0; weights.len() / cols * format.row_bytes(cols).unwrap()];
    encode(format, weights, cols, None, &mut out);
    out
}

/// Rounds to nearest, and takes note of what went in: the sum of the squares of each column.
fn round(seen: &mut HashMap<String, Vec<f64>>, job: &Job<'_>) -> Vec<u8> {
    let held_out = job.held_out.unwrap().hessian;
    assert!(held_out.rows() > 0 && job.seen.hessian.rows() > 4 * held_out.rows());
    let sums = |h: &rushlight_quant::quantize::Hessian| -> Vec<f64> {
        h.diagonal().iter().map(|d| f64::from(*d) * h.rows() as f64 / 2.0).collect()
    };
    let all = sums(job.seen.hessian).iter().zip(sums(held_out)).map(|(a, b)| a + b).collect();
    seen.insert(job.target.name.clone(), all);
    rounded(job.target.format, job.weights, job.linear.weight.cols())
}

/// What a run leaves in its scratch folder.
fn results(model: &Model, scratch: &Scratch) -> Vec<Vec<u8>> {
    model.linears().map(|l| scratch.get(&name(l)).unwrap().unwrap().to_vec()).collect()
}

fn run(model: &Model, threads: usize, scratch: &Scratch, quantize: &mut layers::Quantize<'_>) -> anyhow::Result<u64> {
    let (sequences, targets) = (sequences(), targets(model));
    let (mut last, mut total) = (0, 0);
    let run = Run {
        model: model.clone(),
        threads: Some(threads),
        sequences: &sequences,
        targets: &targets,
        scratch,
        memory: 1 << 30,
        stop: &AtomicBool::new(false),
    };
    run.run(quantize, &mut |state| {
        assert!(state.done >= last && state.done <= state.total);
        (last, total) = (state.done, state.total);
    })?;
    assert!(last > total * 9 / 10, "{last} of {total}");
    Ok(total)
}

#[test]
fn every_step_sees_the_quantized_ones_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, _) = tiny(&dir.path().join("tiny"));
    let scratch = Scratch::open(&dir.path().join("out"), &Fingerprint::default()).unwrap();
    let mut seen = HashMap::new();
    run(&model, 2, &scratch, &mut |_: &Cpu, job: &Job<'_>| Ok(round(&mut seen, job))).unwrap();
    let (targets, original) = (targets(&model), model.clone());

    // The same without any of the machinery: quantize one linear layer after another, and run the whole model over the
    // text before each.
    let steps: Vec<Vec<usize>> = {
        let steps = model.layers.iter().flat_map(|l| {
            let gate = l.mlp.as_ref().unwrap().gate.as_ref().unwrap();
            [
                vec![l.q.id, l.k.id, l.v.id],
                vec![l.o.id],
                vec![gate.id, l.mlp.as_ref().unwrap().up.id],
                vec![l.mlp.as_ref().unwrap().down.id],
            ]
        });
        steps.chain([vec![model.head.id]]).collect()
    };
    for step in steps {
        let first = step[0];
        let joined = model.layers.iter().any(|l| first == l.o.id || first == l.mlp.as_ref().unwrap().down.id);
        let inputs = observe(&model, first, Place::Input);
        let weights = if joined { weights(&observe(&original, first, Place::Sum)) } else { vec![1.0; inputs.len()] };
        for linear in model.linears_mut().filter(|l| step.contains(&l.id)) {
            let Target { name, format, rows, .. } = &targets[&linear.id];
            let mut want = vec![0.0; linear.weight.cols()];
            for (row, weight) in inputs.iter().zip(&weights) {
                want.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2) * weight);
            }
            for (want, got) in want.iter().zip(&seen[name]) {
                // Where that is faster, products are of bf16, which is off by up to 1 in 256.
                assert!((want - got).abs() <= 2e-3 * want.abs() + 1e-9, "{name}: {got} instead of {want}");
            }
            let (r, cols) = (linear.weight.rows(), linear.weight.cols());
            let packed = rounded(*format, &floats(&linear.weight), cols);
            linear.weight = Weight::new(*format, r, cols, Bytes::new(packed)).unwrap();
            // The output has its rows in its own order.
            let kept = scratch.get(name).unwrap().unwrap();
            let order: Vec<usize> = match rows {
                Some(rows) => rows.iter().map(|&r| r as usize).collect(),
                None => (0..r).collect(),
            };
            assert_eq!(kept[..], linear.weight.with_rows(&order).data()[..], "{name}");
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Place {
    Input,
    Output,
    /// What the output is added in.
    Sum,
}

/// What is seen at a place of one linear layer, row by row.
struct Watch {
    id: usize,
    place: Place,
    found: bool,
    rows: Vec<Vec<f32>>,
}

impl Watch {
    fn keep(&mut self, x: &Activations) {
        self.rows.extend((0..x.rows()).map(|r| x.row(r).to_vec()));
    }
}

impl Observer for Watch {
    fn input(&mut self, _: &Cpu, x: &Activations, layers: &[&Linear]) -> ControlFlow<()> {
        if self.place == Place::Input && layers.iter().any(|l| l.id == self.id) {
            self.keep(x);
        }
        ControlFlow::Continue(())
    }

    fn output(&mut self, _: &Cpu, _: &Activations, layers: &[&Linear], ys: &[Activations]) -> ControlFlow<()> {
        match (layers.iter().position(|l| l.id == self.id), self.place) {
            (Some(i), Place::Output) => self.keep(&ys[i]),
            (Some(_), Place::Sum) => self.found = true,
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn sum(&mut self, _: &Cpu, sum: &Activations) -> ControlFlow<()> {
        if std::mem::take(&mut self.found) {
            self.keep(sum);
        }
        ControlFlow::Continue(())
    }
}

fn observe(model: &Model, id: usize, place: Place) -> Vec<Vec<f32>> {
    let mut watch = Watch { id, place, found: false, rows: Vec::new() };
    for ids in sequences() {
        let mut backend = text::backend(model, Some(1), 1, 128, model.layers.len()).unwrap();
        let sequence = Sequence { slot: 0, start: 0, len: ids.len(), outline: model.outline(&ids) };
        let batch = Batch { ids: &ids, sequences: &[sequence], phase: Phase::Prompt };
        let mut capture = Capture::new(&mut backend, &mut watch);
        // The head is behind the hidden states.
        let _ = capture.run(|b| {
            let hidden = decoder::hidden(model, b, &batch)?;
            decoder::logits(model, b, &hidden)
        });
    }
    watch.rows
}

/// What rows of the residual stream count: one over their mean square.
fn weights(stream: &[Vec<f32>]) -> Vec<f64> {
    let square = |row: &Vec<f32>| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    stream.iter().map(|row| 1.0 / square(row)).collect()
}

#[test]
fn every_step_sees_what_its_outputs_lack() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = tiny(&dir.path().join("tiny"));
    let scratch = Scratch::open(&dir.path().join("out"), &Fingerprint::default()).unwrap();
    let mut lacking: HashMap<String, f64> = HashMap::new();
    let mut others = 0.0;
    run(&model, 2, &scratch, &mut |cpu: &Cpu, job: &Job<'_>| {
        let sum = |seen: Seen<'_>| seen.lacking(cpu, job.weights).iter().sum::<f64>();
        let held_out = job.held_out.unwrap();
        if let (Some((_, 0)), Some((_, 0))) = (job.seen.drift, held_out.drift) {
            let (n, m) = (job.seen.hessian.rows() as f64, held_out.hessian.rows() as f64);
            lacking.insert(job.target.name.clone(), (sum(job.seen) * n + sum(held_out) * m) / (n + m));
            others += sum(held_out);
        }
        Ok(rounded(job.target.format, job.weights, job.linear.weight.cols()))
    })
    .unwrap();
    assert!(others > 0.0);

    let (targets, mut quantized) = (targets(&model), model.clone());
    let ids = |l: &Layer| {
        let mlp = l.mlp.as_ref().unwrap();
        [(l.q.id, false), (l.o.id, true), (mlp.up.id, false), (mlp.down.id, true)]
    };
    let steps: Vec<(usize, bool)> = model.layers.iter().flat_map(ids).collect();
    for (id, sum) in steps {
        let place = if sum { Place::Sum } else { Place::Output };
        let (wanted, got) = (observe(&model, id, place), observe(&quantized, id, place));
        let weights = if sum { weights(&wanted) } else { vec![1.0; wanted.len()] };
        let square = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let squares = wanted.iter().zip(&got).zip(weights).map(|((a, b), w)| square(a, b) * w).sum::<f64>();
        let want = squares / sequences().concat().len() as f64;
        let name = &targets[&id].name;
        assert!((lacking[name] - want).abs() <= 5e-3 * want + 1e-12, "{name}: {} instead of {want}", lacking[name]);
        // All layers of the step follow it.
        let of = quantized.linears().find(|l| l.id == id).map(|l| (l.layer, l.role)).unwrap();
        let step: &[Role] = match of.1 {
            Role::Q => &[Role::Q, Role::K, Role::V],
            Role::Up => &[Role::Gate, Role::Up],
            ref role => std::slice::from_ref(role),
        };
        for linear in quantized.linears_mut().filter(|l| l.layer == of.0 && step.contains(&l.role)) {
            let (r, cols, format) = (linear.weight.rows(), linear.weight.cols(), targets[&linear.id].format);
            let packed = rounded(format, &floats(&linear.weight), cols);
            linear.weight = Weight::new(format, r, cols, Bytes::new(packed)).unwrap();
        }
    }
    assert!(!lacking.keys().any(|name| name.starts_with("Head")));
}

#[test]
fn a_run_that_was_killed_goes_on_to_the_same_result() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = tiny(&dir.path().join("tiny"));
    let scratch = |name: &str| Scratch::open(&dir.path().join(name), &Fingerprint::default()).unwrap();
    // The bytes depend on what was seen, so that a pass in the wrong state would show.
    let weighted = |job: &Job<'_>| {
        let cols = job.linear.weight.cols();
        let mut out = vec![0; job.rows.len() * job.target.format.row_bytes(cols).unwrap()];
        encode(job.target.format, job.weights, cols, Some(&job.seen.hessian.diagonal()), &mut out);
        out
    };
    let whole = scratch("whole");
    let mut calls = 0;
    run(&model, 1, &whole, &mut |_: &Cpu, job: &Job<'_>| {
        calls += 1;
        Ok(weighted(job))
    })
    .unwrap();
    assert_eq!(calls, model.linears().count());
    let want = results(&model, &whole);

    let again = scratch("threads");
    run(&model, 3, &again, &mut |_: &Cpu, job: &Job<'_>| Ok(weighted(job))).unwrap();
    assert!(results(&model, &again) == want);

    for stop in 0..calls {
        let scratch = scratch(&format!("stopped-{stop}"));
        let mut left = stop;
        let stopped = run(&model, 2, &scratch, &mut |_: &Cpu, job: &Job<'_>| {
            anyhow::ensure!(left > 0, "no more");
            left -= 1;
            Ok(weighted(job))
        });
        assert_eq!(stopped.unwrap_err().to_string(), "no more");
        let mut more = 0;
        run(&model, 2, &scratch, &mut |_: &Cpu, job: &Job<'_>| {
            more += 1;
            Ok(weighted(job))
        })
        .unwrap();
        assert_eq!(stop + more, calls);
        assert!(results(&model, &scratch) == want, "stopped after {stop}");
    }
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, _) = tiny(&dir.path().join("tiny"));
    let up = &mut model.layers[1].mlp.as_mut().unwrap().up;
    let mut weights = floats(&up.weight);
    weights[77] = f32::NAN;
    up.weight = Weight::from_f32(up.weight.rows(), up.weight.cols(), &weights).unwrap();
    let scratch = Scratch::open(&dir.path().join("out"), &Fingerprint::default()).unwrap();
    let error = run(&model, 1, &scratch, &mut |_: &Cpu, job: &Job<'_>| {
        Ok(rounded(job.target.format, job.weights, job.linear.weight.cols()))
    });
    assert!(error.unwrap_err().to_string().starts_with("Up.1 holds weights that are not numbers"));
}

#[test]
fn importance_is_the_sum_of_squared_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = tiny(&dir.path().join("tiny"));
    let mut engine = Engine::open(&dir.path().join("tiny"), &rushlight::engine::Options::default()).unwrap();
    let texts = [vec![1, 2, 3], vec![4, 5]];
    let (loaded, backend) = engine.parts();
    let squares = imatrix::collect(loaded, backend, &texts, false, &mut |_| ()).unwrap();
    // What goes into the first queries is the normed embedding.
    let cols = model.spec.hidden_size;
    let weight = model.layers[0].attention_norm.as_ref().unwrap().weight.as_ref().unwrap();
    let mut want = vec![0.0; cols];
    for id in texts.concat() {
        let mut row = vec![0f32; cols];
        model.embedding.weight.format().decode(model.embedding.weight.row(id as usize), &mut row);
        let mean = row.iter().map(|x| f64::from(x * x)).sum::<f64>() / cols as f64;
        let by = 1.0 / (mean + f64::from(model.spec.norm.eps)).sqrt();
        for c in 0..cols {
            want[c] += (f64::from(row[c]) * by * f64::from(weight.values[c])).powi(2);
        }
    }
    for linear in [&model.layers[0].q, &model.layers[0].k, &model.layers[0].v] {
        let inputs = squares.of(linear.id).unwrap();
        assert_eq!(inputs.rows, 5);
        inputs.sums.iter().zip(&want).for_each(|(a, b)| assert!((a - b).abs() < 1e-4 * b, "{a} {b}"));
    }
    assert!(squares.of(model.head.id).is_none());
    assert_eq!(
        imatrix::gguf_name(&model, &model.layers[1].mlp.as_ref().unwrap().down).unwrap(),
        "blk.1.ffn_down.weight"
    );
}

#[test]
fn a_model_writes_the_same_texts_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let (model, tokenizer) = tiny(&dir.path().join("tiny"));
    let own = Own { lanes: 3, steps: 300, seed: 5 };
    let write = |threads, memory, own| text::own(&model, &tokenizer, Some(threads), memory, own, &mut |_| ()).unwrap();
    let texts = write(1, u64::MAX, own);
    // One at a time where memory is short.
    assert!(texts == write(3, 1, own));
    assert!(texts != write(1, u64::MAX, Own { seed: 6, ..own }));
    let length = text::length(&model);
    assert!(texts.iter().all(|t| t[0] == tokenizer.bos().unwrap() && (2..=length).contains(&t.len())));
    // Each step writes a token in each lane; those that end a text are not kept, and each text begins with one more.
    let tokens: usize = texts.iter().map(|t| t.len() - 1).sum();
    assert!((700..=900).contains(&tokens), "{tokens}");
}

#[test]
fn texts_are_cut_into_sequences() {
    let dir = tempfile::tempdir().unwrap();
    let (_, tokenizer) = tiny(&dir.path().join("tiny"));
    let built_in = text::sequences(&tokenizer, text::BUILT_IN, "the built-in text", 256).unwrap();
    assert_eq!(built_in.concat().len(), text::MOST.min(text::BUILT_IN.len()));
    let error = text::sequences(&tokenizer, "too short", "a.txt", 256).unwrap_err().to_string();
    assert!(error.starts_with("a.txt has 9 tokens") && error.contains("at least 4096"), "{error}");
    // A long text is read here and there, from its beginning to near its end.
    let long: String = (0..400_000u32).map(|i| char::from(b'a' + (i / 16000) as u8)).collect();
    let some = text::sequences(&tokenizer, &long, "long", 512).unwrap();
    assert_eq!(some.concat().len(), text::MOST);
    assert_eq!((some[0][0], some[some.len() - 1][0]), (u32::from(b'a'), u32::from(b'y')));

    let all = text::interleave(vec![vec![1]; 4], vec![vec![2]; 2]);
    assert_eq!(all.concat(), [1, 2, 1, 1, 2, 1]);
}
