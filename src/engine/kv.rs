//! The key/value cache: what attention remembers of each sequence.

use anyhow::{Result, bail};
use rushlight_models::rope::Rotary;
use rushlight_models::spec::Outline;
use rushlight_quant::Cpu;
use rushlight_quant::ops::Kv;
use std::ops::Range;

/// Keys or values of one layer, `[kv_heads, capacity, width]`, on a 64-byte boundary. Allocated as zero pages, which the
/// system hands out as they are first written: an unused context costs no memory.
enum Cells {
    F32(Vec<f32>, usize),
    F16(Vec<u16>, usize),
    /// Codes and scales of rows of a width.
    Q8(Vec<i8>, Vec<f32>, usize),
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// Single precision: what models of floats get by default.
    F32,
    /// Half precision: what quantized models get by default.
    F16,
    /// 8 bits with a scale for each 32: a little more than half of F16.
    Q8,
}

impl KvFormat {
    /// Bytes of a row of `width` values.
    fn row_bytes(self, width: usize) -> u64 {
        match self {
            KvFormat::F32 => 4 * width as u64,
            KvFormat::F16 => 2 * width as u64,
            KvFormat::Q8 => width as u64 + 4 * width.div_ceil(32) as u64,
        }
    }
}

impl Cells {
    fn new(format: KvFormat, rows: usize, width: usize) -> Cells {
        let len = rows * width;
        match format {
            KvFormat::F16 => {
                let cells = vec![0u16; len + 32];
                let start = cells.as_ptr().align_offset(64).min(32);
                Cells::F16(cells, start)
            }
            KvFormat::F32 => {
                let cells = vec![0f32; len + 16];
                let start = cells.as_ptr().align_offset(64).min(16);
                Cells::F32(cells, start)
            }
            KvFormat::Q8 => Cells::Q8(vec![0; len], vec![0.0; rows * width.div_ceil(32)], width),
        }
    }

    fn view(&self, len: usize) -> Kv<'_> {
        match self {
            Cells::F32(cells, start) => Kv::F32(&cells[*start..][..len]),
            Cells::F16(cells, start) => Kv::F16(&cells[*start..][..len]),
            Cells::Q8(codes, scales, width) => Kv::Q8 { codes, scales, width: *width },
        }
    }

    fn write(&mut self, cpu: &Cpu, at: usize, values: &[f32]) {
        match self {
            Cells::F32(cells, start) => cells[*start + at..][..values.len()].copy_from_slice(values),
            Cells::F16(cells, start) => cpu.store_f16(values, &mut cells[*start + at..][..values.len()]),
            Cells::Q8(codes, scales, width) => {
                let blocks = width.div_ceil(32);
                let rows = values.chunks_exact(*width).zip(codes[at..].chunks_exact_mut(*width));
                for ((values, codes), scales) in rows.zip(scales[at / *width * blocks..].chunks_exact_mut(blocks)) {
                    cpu.store_q8(values, codes, scales);
                }
            }
        }
    }

    fn read(&self, cpu: &Cpu, at: usize, out: &mut [f32]) {
        match self {
            Cells::F32(cells, start) => out.copy_from_slice(&cells[*start + at..][..out.len()]),
            Cells::F16(cells, start) => cpu.load_f16(&cells[*start + at..][..out.len()], out),
            Cells::Q8(codes, scales, width) => {
                let blocks = width.div_ceil(32);
                let rows = out.chunks_exact_mut(*width).zip(codes[at..].chunks_exact(*width));
                for ((out, codes), scales) in rows.zip(scales[at / *width * blocks..].chunks_exact(blocks)) {
                    cpu.load_q8(codes, scales, out);
                }
            }
        }
    }

    /// Takes over a range of `other`, which is of the same kind.
    fn copy_from(&mut self, other: &Cells, range: Range<usize>) {
        match (self, other) {
            (Cells::F32(cells, start), Cells::F32(others, from)) => {
                cells[*start + range.start..*start + range.end]
                    .copy_from_slice(&others[*from + range.start..*from + range.end]);
            }
            (Cells::F16(cells, start), Cells::F16(others, from)) => {
                cells[*start + range.start..*start + range.end]
                    .copy_from_slice(&others[*from + range.start..*from + range.end]);
            }
            _ => {}
        }
    }

    fn copy_within(&mut self, from: Range<usize>, to: usize) {
        match self {
            Cells::F32(cells, start) => cells.copy_within(*start + from.start..*start + from.end, *start + to),
            Cells::F16(cells, start) => cells.copy_within(*start + from.start..*start + from.end, *start + to),
            Cells::Q8(codes, scales, width) => {
                let block = |at: usize| at / *width * width.div_ceil(32);
                scales.copy_within(block(from.start)..block(from.end), block(to));
                codes.copy_within(from, to);
            }
        }
    }
}

/// Sizes of a cache.
#[derive(Clone, Copy, Debug)]
pub struct KvShape {
    /// Sequences held at once.
    pub slots: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Key and value heads of a layer.
    pub kv_heads: usize,
    /// Width of a head of keys.
    pub head_dim: usize,
    /// Width of a head of values.
    pub value_dim: usize,
    /// Positions of a sequence.
    pub capacity: usize,
    /// How they are kept.
    pub format: KvFormat,
}

impl KvShape {
    /// Bytes that one position of one sequence takes.
    pub fn bytes_per_token(&self) -> u64 {
        let rows = self.layers as u64 * self.kv_heads as u64;
        rows * (self.format.row_bytes(self.head_dim) + self.format.row_bytes(self.value_dim))
    }

    /// Bytes of the whole cache when full; `None` where they overflow.
    pub fn bytes(&self) -> Option<u64> {
        self.bytes_per_token().checked_mul(self.capacity as u64)?.checked_mul(self.slots as u64)
    }
}

/// Keys and values of every slot and layer.
pub struct KvCache {
    shape: KvShape,
    /// Keys and values, slot by slot, layer by layer.
    cells: Vec<(Cells, Cells)>,
    /// Positions held in each slot.
    lens: Vec<usize>,
}

impl KvCache {
    /// An empty cache.
    pub fn new(shape: KvShape) -> Result<KvCache> {
        // Asking the system for the whole of it first, without touching it, is how a size it cannot give becomes an
        // error instead of an abort.
        let bytes = shape.bytes().and_then(|b| usize::try_from(b).ok());
        if bytes.is_none_or(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_err()) {
            bail!(
                "a context of {} tokens for {} conversation(s) takes {} of memory, more than there is; \
                 ask for {}",
                shape.capacity,
                shape.slots,
                bytes.map_or("far too much".into(), |b| format!("{:.1} GB", b as f64 / 1e9)),
                if shape.slots > 1 { "fewer or shorter ones" } else { "a shorter one with --ctx" }
            );
        }
        let rows = shape.kv_heads * shape.capacity;
        let cells = |width: usize| Cells::new(shape.format, rows, width);
        let new = || (cells(shape.head_dim), cells(shape.value_dim));
        let cells = (0..shape.slots * shape.layers).map(|_| new()).collect();
        Ok(KvCache { shape, cells, lens: vec![0; shape.slots] })
    }

    /// The sizes it was made with.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Positions held in `slot`.
    pub fn len(&self, slot: usize) -> usize {
        self.lens[slot]
    }

    /// Says how many positions `slot` holds: more after a forward pass, fewer to forget the last ones.
    pub fn set_len(&mut self, slot: usize, len: usize) {
        self.lens[slot] = len.min(self.shape.capacity);
    }

    /// Writes the keys and values of `rows` positions from `start` on, `[rows, kv_heads * width of a head]`.
    pub fn store(&mut self, cpu: &Cpu, slot: usize, layer: usize, start: usize, keys: &[f32], values: &[f32]) {
        let KvShape { kv_heads, head_dim, value_dim, capacity, layers, .. } = self.shape;
        let (key_cells, value_cells) = &mut self.cells[slot * layers + layer];
        for (cells, source, width) in [(key_cells, keys, head_dim), (value_cells, values, value_dim)] {
            for (row, source) in source.chunks_exact(kv_heads * width).enumerate() {
                for (head, source) in source.chunks_exact(width).enumerate() {
                    cells.write(cpu, (head * capacity + start + row) * width, source);
                }
            }
        }
    }

    /// Gives the slot `to` the first `len` positions of the slot `from`.
    pub fn copy(&mut self, from: usize, to: usize, len: usize) {
        let KvShape { kv_heads, head_dim, value_dim, capacity, layers, .. } = self.shape;
        let len = len.min(capacity);
        for layer in 0..layers {
            let Ok([source, target]) = self.cells.get_disjoint_mut([from * layers + layer, to * layers + layer]) else {
                return;
            };
            for head in 0..kv_heads {
                let at = |width: usize| head * capacity * width..(head * capacity + len) * width;
                target.0.copy_from(&source.0, at(head_dim));
                target.1.copy_from(&source.1, at(value_dim));
            }
        }
        self.lens[to] = len;
    }

    /// Keys and values of a layer, `[kv_heads, capacity, width of a head]`.
    pub fn view(&self, slot: usize, layer: usize) -> (Kv<'_>, Kv<'_>) {
        let rows = self.shape.kv_heads * self.shape.capacity;
        let (keys, values) = &self.cells[slot * self.shape.layers + layer];
        (keys.view(rows * self.shape.head_dim), values.view(rows * self.shape.value_dim))
    }

    /// Drops the positions `range` of `slot` and moves what follows down. Keys carry their position as a rotation, so
    /// those that move are turned back by the width of the gap; `rotary` gives each layer's rotation.
    pub fn forget<'r>(
        &mut self,
        cpu: &Cpu,
        slot: usize,
        range: Range<usize>,
        outline: &Outline,
        rotary: impl Fn(usize) -> Option<&'r Rotary>,
    ) {
        const ROWS: usize = 256;
        let KvShape { kv_heads, head_dim, value_dim, capacity, layers, .. } = self.shape;
        let (gap, moved) = (range.len(), self.lens[slot] - range.end);
        let mut rows = vec![0.0; ROWS * head_dim];
        for layer in 0..layers {
            let (keys, values) = &mut self.cells[slot * layers + layer];
            let angles = rotary(layer).map(|rotary| {
                let half = rotary.dim() / 2;
                let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
                rotary.shift(-(gap as isize), outline, &mut cos, &mut sin);
                (rotary, cos.repeat(ROWS), sin.repeat(ROWS))
            });
            for head in 0..kv_heads {
                let value_at = |position: usize| (head * capacity + position) * value_dim;
                values.copy_within(value_at(range.end)..value_at(range.end + moved), value_at(range.start));
                let at = |position: usize| (head * capacity + position) * head_dim;
                keys.copy_within(at(range.end)..at(range.end + moved), at(range.start));
                let Some((rotary, cos, sin)) = &angles else { continue };
                for start in (0..moved).step_by(ROWS) {
                    let n = ROWS.min(moved - start);
                    let rows = &mut rows[..n * head_dim];
                    keys.read(cpu, at(range.start + start), rows);
                    let angles = n * rotary.dim() / 2;
                    let (cos, sin) = (&cos[..angles], &sin[..angles]);
                    cpu.rope(rows, head_dim, head_dim, cos, sin, rotary.first, rotary.dim(), rotary.layout);
                    keys.write(cpu, at(range.start + start), rows);
                }
            }
        }
        self.lens[slot] -= gap;
    }
}
