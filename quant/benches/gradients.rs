//! Training's products at the shapes of real layers, forward and backward, in operations a second of processor time
//! (the best of several runs) and as a share of this machine's peak. `cargo bench -p rushlight-quant --bench gradients [-- FILTER]`; the
//! variables THREADS, ROWS and RUSHLIGHT_ISA choose.

use rushlight_quant::formats::Format;
use rushlight_quant::ops::{Attention, AttentionGradients, AttentionRows};
use rushlight_quant::{Cpu, Isa, Matrix, Phase};
use std::time::{Duration, Instant};

/// Time that this process was given a processor: on a machine with other work, all that can be compared.
fn busy() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists and `time` is there to be written.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

const SHAPES: [(usize, usize); 7] =
    [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048), (2048, 5632)];
const FORMATS: [Format; 7] =
    [Format::Q4_K, Format::Q6_K, Format::Q8_0, Format::Q4_0, Format::NF4, Format::BF16, Format::F32];

fn number(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(otherwise)
}

struct Report {
    cpu: Cpu,
    peak: f64,
    filter: String,
}

impl Report {
    fn time(&self, name: &str, operations: usize, mut work: impl FnMut()) {
        if !name.contains(&self.filter) {
            return;
        }
        let (begin, mut best) = (Instant::now(), Duration::MAX);
        let mut runs = 0;
        while runs < 3 || (begin.elapsed() < Duration::from_millis(400) && runs < 40) {
            let start = busy();
            work();
            best = best.min(busy() - start);
            runs += 1;
        }
        let speed = operations as f64 / best.as_secs_f64();
        println!(
            "{name:44} {:9.3} ms {:8.1} Gop/s {:6.1} %",
            1e3 * best.as_secs_f64(),
            speed / 1e9,
            100.0 * speed / self.peak
        );
    }
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + i / 251) % 17) as f32 * 0.1 - 0.8).collect()
}

/// Bytes that are ordinary numbers wherever a format may keep a scale: half and single precision near 0.5.
fn weights(format: Format, rows: usize, cols: usize) -> Option<Vec<u8>> {
    let bytes = rows * format.row_bytes(cols)?;
    Some((0..bytes).map(|i| 0x38 | ((i * 37 + i / 251) % 8) as u8).collect())
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    let cpu = Cpu::new(number("THREADS", 1), Isa::from_env().expect("an instruction set"));
    let peaks = cpu.peak_arithmetic();
    let (f32, bf16) = (peaks.f32.unwrap_or(f64::NAN), peaks.bf16.unwrap_or(f64::NAN));
    println!(
        "{} with {} threads: at most {:.1} Gop/s in f32, {:.1} in bf16; shares are of the larger",
        cpu.isa().name(),
        cpu.threads(),
        f32 / 1e9,
        bf16 / 1e9
    );
    let peak = f32.max(bf16);
    let report = Report { cpu, peak, filter };
    let cpu = &report.cpu;
    let half = &Cpu::new(cpu.threads(), cpu.isa()).with_half_attention(true);
    let n = number("ROWS", 512);
    for (rows, cols) in SHAPES {
        let (x, dy) = (numbers(n * cols), numbers(n * rows));
        let (mut y, mut dx) = (vec![0.0; n * rows], vec![0.0; n * cols]);
        for format in FORMATS {
            let Some(data) = weights(format, rows, cols) else { continue };
            let matrix = Matrix::new(format, rows, cols, &data).expect("whole rows");
            let operations = 2 * n * rows * cols;
            let name = |what: &str| format!("{what} {format} {rows}x{cols}");
            report.time(&name("forward"), operations, || cpu.matmul(Phase::Prompt, &x, n, &[matrix], &mut [&mut y]));
            report.time(&name("backward"), operations, || cpu.matmul_backward(&[&dy], n, &[matrix], &mut dx));
        }
        for rank in [8, 16, 64] {
            let (a, low) = (numbers(rank * cols), numbers(n * rank));
            let b = numbers(rank * rows);
            let (mut da, mut db, mut dlow) = (vec![0.0; a.len()], vec![0.0; b.len()], vec![0.0; low.len()]);
            let name = |what: &str| format!("rank {rank} {what} {rows}x{cols}");
            let (wide, high) = (2 * n * rank * cols, 2 * n * rank * rows);
            report.time(&name("x.A"), wide, || cpu.floats_matmul(&x, n, &a, rank, cols, 1.0, &mut dlow));
            report.time(&name("low.B"), high, || cpu.floats_matmul(&low, n, &b, rows, rank, 1.0, &mut y));
            report.time(&name("dlow"), high, || cpu.floats_backward(&dy, n, &b, rows, rank, 1.0, &mut dlow));
            report.time(&name("dx"), wide, || cpu.floats_backward(&low, n, &a, rank, cols, 1.0, &mut dx));
            report.time(&name("dA"), wide, || cpu.weight_gradient(&low, &x, n, rank, cols, 1.0, &mut da));
            report.time(&name("dB"), high, || cpu.weight_gradient(&dy, &low, n, rows, rank, 1.0, &mut db));
        }
        let (w, mut dw) = (numbers(rows * cols), vec![0.0; rows * cols]);
        let operations = 2 * n * rows * cols;
        let name = |what: &str| format!("full {what} {rows}x{cols}");
        report.time(&name("x.W"), operations, || cpu.floats_matmul(&x, n, &w, rows, cols, 1.0, &mut y));
        report.time(&name("dx"), operations, || cpu.floats_backward(&dy, n, &w, rows, cols, 1.0, &mut dx));
        report.time(&name("dW"), operations, || cpu.weight_gradient(&dy, &x, n, rows, cols, 1.0, &mut dw));
    }
    for (heads, kv_heads, dim, count, length) in [(9, 3, 64, 4, 256), (32, 4, 64, 1, 512), (12, 2, 128, 1, 512)] {
        let spec = Attention {
            heads,
            kv_heads,
            head_dim: dim,
            value_dim: dim,
            scale: 0.125,
            softcap: None,
            window: None,
            slopes: None,
            rounded_slopes: None,
            sinks: None,
        };
        let rows = count * length;
        let sequences: Vec<_> = (0..count)
            .map(|i| i * length..(i + 1) * length)
            .map(|r| AttentionRows { queries: r.clone(), keys: r, context: 0 })
            .collect();
        let (q, k, v) = (numbers(rows * heads * dim), numbers(rows * kv_heads * dim), numbers(rows * kv_heads * dim));
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; rows * heads]);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
        // What lies under the diagonal, twice: scores and sums; backward, five products.
        let product = rows * length * heads * dim;
        let name = |what: &str| format!("attention {what} {count}x{length} {heads}/{kv_heads}x{dim}");
        for (kind, cpu) in [("", cpu), (" bf16", half)] {
            report.time(&(name("forward") + kind), 2 * product, || {
                cpu.attention_train(&spec, &sequences, &q, &k, &v, &mut out, &mut lse)
            });
            let (dout, out) = (numbers(q.len()), out.clone());
            report.time(&(name("backward") + kind), 5 * product, || {
                let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv, dsinks: None };
                cpu.attention_backward(&spec, &sequences, [&q, &k, &v], &out, &lse, &dout, gradients)
            });
        }
    }
    let vocabulary = 49152;
    let mut logits = numbers(64 * vocabulary);
    let targets = [Some(7); 64];
    report.time("cross entropy 64x49152", logits.len(), || {
        cpu.cross_entropy(&mut logits, &targets);
    });
}
