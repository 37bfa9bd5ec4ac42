//! Products per format and instruction set at the shape of a small model's feed-forward layer: generated tokens as
//! bytes of weights a second, prompts as operations a second; and encoding, as weights a second. `cargo bench -p rushlight-quant`.

use divan::counter::{BytesCount, ItemsCount};
use rushlight_quant::formats::Format;
use rushlight_quant::quantize::encode_with;
use rushlight_quant::{Cpu, Isa, Matrix, Phase};

fn main() {
    divan::main();
}

const ROWS: usize = 2048;
const COLS: usize = 2048;

fn cases() -> Vec<String> {
    let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.available()).collect();
    Format::ALL.iter().flat_map(|f| isas.iter().map(move |isa| format!("{f} {}", isa.name()))).collect()
}

fn parse(case: &str) -> (Format, Cpu) {
    let (format, isa) = case.split_once(' ').expect("a format and an instruction set");
    let format = Format::ALL.into_iter().find(|f| f.name() == format).expect("a format");
    let isa = Isa::ALL.into_iter().find(|i| i.name() == isa).expect("an instruction set");
    (format, Cpu::new(1, isa))
}

/// Bytes that are ordinary numbers wherever a format may keep a scale: half and single precision near 0.5, E8M0 near 1.
fn weights(format: Format) -> Vec<u8> {
    let bytes = ROWS * format.row_bytes(COLS).expect("whole blocks");
    (0..bytes).map(|i| 0x38 | ((i * 37 + i / 251) % 8) as u8).collect()
}

#[divan::bench(args = cases(), sample_count = 20)]
fn generate(bencher: divan::Bencher, case: &str) {
    let (format, cpu) = parse(case);
    let data = weights(format);
    let x: Vec<f32> = (0..COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut out = vec![0.0; ROWS];
    let matrix = Matrix::new(format, ROWS, COLS, &data).expect("whole rows");
    bencher
        .counter(BytesCount::new(data.len()))
        .bench_local(|| cpu.matmul(Phase::Generate, &x, 1, &[matrix], &mut [&mut out]));
}

#[divan::bench(args = cases(), sample_count = 5)]
fn prompt(bencher: divan::Bencher, case: &str) {
    let (format, cpu) = parse(case);
    let n = 256;
    let data = weights(format);
    let x: Vec<f32> = (0..n * COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut out = vec![0.0; n * ROWS];
    let matrix = Matrix::new(format, ROWS, COLS, &data).expect("whole rows");
    bencher
        .counter(ItemsCount::new(2 * n * ROWS * COLS))
        .bench_local(|| cpu.matmul(Phase::Prompt, &x, n, &[matrix], &mut [&mut out]));
}

#[divan::bench(args = cases(), sample_count = 5)]
fn encode(bencher: divan::Bencher, case: &str) {
    let (format, cpu) = parse(case);
    // Sums of uniform numbers, so nearly normal.
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let x: Vec<f32> = (0..128 * COLS).map(|_| 0.02 * (0..6).map(|_| uniform()).sum::<f32>()).collect();
    let mut out = vec![0; 128 * format.row_bytes(COLS).expect("whole blocks")];
    bencher.counter(ItemsCount::new(x.len())).bench_local(|| encode_with(cpu.isa(), format, &x, COLS, None, &mut out));
}
