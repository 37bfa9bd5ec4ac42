//! Element-wise operations and short reductions, written once in plain Rust with explicit lanes and compiled for each
//! instruction set. Sums run over 16 lanes in a fixed order, so every instruction set gives the same bits.

mod backward;
mod half;
mod quarter;

use crate::ops::Activation;
pub use backward::{activate_backward, gate_backward, scale_columns, soft_cap_backward, softmax, softmax_backward};
pub use half::{HALF, halve, unhalve};
pub use quarter::{QUARTER, QUARTERED, quarter, unquarter};

const LANES: usize = 16;

/// See [`Lanes::rotate`].
pub type Rotate = fn(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]);

/// See [`Lanes::across`].
pub type Across = fn(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [f32]);
/// Queries of a tile of attention whose scores are held with a row for each key.
pub const QUERIES: usize = 64;

/// See [`Lanes::softmax`].
pub type Softmax =
    fn(s: &mut [f32], most: &mut [f32; QUERIES], total: &mut [f32; QUERIES], shrink: &mut [f32; QUERIES]);
/// See [`Lanes::softmax_backward`].
pub type SoftmaxBackward = fn(lse: &[f32], delta: &[f32], s: &mut [f32], dp: &mut [f32]);

/// The compiled functions; see each one's plain version below.
#[derive(Clone, Copy)]
pub struct Lanes {
    pub sum_squares: fn(&[f32]) -> f32,
    pub sum: fn(&[f32]) -> f32,
    pub dot: fn(&[f32], &[f32]) -> f32,
    pub max: fn(&[f32]) -> f32,
    /// `y += a * x`
    pub axpy: fn(f32, &[f32], &mut [f32]),
    /// `x *= a`
    pub scale: fn(f32, &mut [f32]),
    /// `y += x`
    pub add: fn(&[f32], &mut [f32]),
    /// `out = x * a * (w + offset)`
    pub scale_by: fn(&[f32], f32, &[f32], f32, &mut [f32]),
    /// `x = exp(x - max)`, returns the sum
    pub exp_sum: fn(f32, &mut [f32]) -> f32,
    /// `x = act(x)`
    pub activate: fn(Activation, &mut [f32]),
    /// `gate = act(gate) * up`
    pub gate: fn(Activation, &mut [f32], &[f32]),
    /// rotates pairs `(a[i], b[i])` by the angles whose cosines and sines are given
    pub rotate: Rotate,
    /// `x = cap * tanh(x / cap)`
    pub soft_cap: fn(f32, &mut [f32]),
    /// `out[i] = q . keys[i]` for the rows of `keys`
    pub scores: fn(&[f32], &[f32], &mut [f32]),
    /// `out += sum_i p[i] * values[i]` for the rows of `values`
    pub mix: fn(&[f32], &[f32], &mut [f32]),
    /// `out = scale * code`, a scale for each 32 codes
    pub widen: fn(&[i8], &[f32], &mut [f32]),
    /// up to 16 rows of `len` numbers, `stride` apart, as a panel `[len][16]`, where absent rows become zeros
    pub across: Across,
    /// `dy *= act'(x)`
    pub activate_backward: fn(Activation, &[f32], &mut [f32]),
    /// twice [`HALF`] numbers after twice as many (the last may be fewer), rounded to bf16, become `HALF` in whose bits two
    /// lie each
    pub halve: fn(&[f32], &mut [f32]),
    /// the numbers again
    pub unhalve: fn(&[f32], &mut [f32]),
    /// [`QUARTERED`] numbers after as many (the last may be fewer) become 8-bit codes and scales in [`QUARTER`] words
    pub quarter: fn(&[f32], &mut [f32]),
    /// the numbers again, as far as 8 bits hold them
    pub unquarter: fn(&[f32], &mut [f32]),
    /// the inputs of [`Lanes::gate`] become their gradients, given that of its output
    pub gate_backward: fn(Activation, &mut [f32], &mut [f32], &[f32]),
    /// `dy *= 1 - (y / cap)^2`
    pub soft_cap_backward: fn(f32, &[f32], &mut [f32]),
    /// each column of `s` becomes `e^(s - most)`, where `most` is raised to the column's largest score and `total`, the
    /// sum so far, is first multiplied by `shrink`, as all that was measured from the old `most` must be
    pub softmax: Softmax,
    /// each column of `x` times its number
    pub scale_columns: fn(&[f32; QUERIES], x: &mut [f32]),
    /// rows of `QUERIES`: `s` becomes the probabilities `e^(s - lse)`, and their gradients `dp` those of `s`: `p * (dp - delta)`
    pub softmax_backward: SoftmaxBackward,
}

/// e^x within 2 units in the last place; 0 far below, infinite far above, NaN for NaN. No branches and no conversions
/// to integers, neither of which compilers make vector code of.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // e^x = 2^n e^r with |r| <= ln 2 / 2; the polynomial is the Taylor series of e^r with its tail rebalanced (Cephes).
    // Beyond these bounds the powers of two below overflow and underflow by themselves.
    let x = if x > 100.0 { 100.0 } else { x };
    let x = if x < -110.0 { -110.0 } else { x };
    // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let power = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_6e-1;
    let p = p * r + 5e-1;
    let y = p * (r * r) + r + 1.0;
    // 2^n in two steps, as n may be beyond the exponents of normal numbers.
    let half = power >> 1;
    let rest = power.wrapping_sub(half);
    let two = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
    y * two(half) * two(rest)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Exact to f32 near zero, where 1 - 2/(e^2x + 1) would cancel.
    let square = x * x;
    let small = x
        * (1.0
            + square * (-0.333_333_34 + square * (0.133_333_34 + square * (-0.053_968_254 + square * 0.021_869_488))));
    let large = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if square < 0.09 { small } else { large }
}

/// The error function within 2e-7 (Abramowitz and Stegun 7.1.26 has 1.5e-7; here with the f32 exponential).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let square = x * x;
    // Series near zero, where the formula below cancels.
    let small = x
        * (std::f32::consts::FRAC_2_SQRT_PI)
        * (1.0
            + square
                * (-1.0 / 3.0
                    + square * (1.0 / 10.0 + square * (-1.0 / 42.0 + square * (1.0 / 216.0 - square / 1320.0)))));
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_72 + t * (1.421_413_8 + t * (-1.453_152_1 + t * 1.061_405_4))));
    let large = (1.0 - p * exp(-square)).copysign(x);
    if square < 0.25 { small } else { large }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh(0.797_884_6 * (x + 0.044_715 * x * x * x)))
}

#[inline(always)]
fn clamped_silu(x: f32) -> f32 {
    let x = if x > 7.0 { 7.0 } else { x };
    x / (1.0 + exp(-1.702 * x))
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn fold(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub fn sum_squares(x: &[f32]) -> f32 {
    dot(x, x)
}

#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut acc = [0f32; LANES];
    for c in chunks {
        for i in 0..LANES {
            acc[i] += c[i];
        }
    }
    for (i, v) in tail.iter().enumerate() {
        acc[i] += v;
    }
    fold(acc, |a, b| a + b)
}

#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let (cx, tx) = x.as_chunks::<LANES>();
    let (cy, ty) = y.as_chunks::<LANES>();
    let mut acc = [0f32; LANES];
    for (a, b) in cx.iter().zip(cy) {
        for i in 0..LANES {
            acc[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in tx.iter().zip(ty).enumerate() {
        acc[i] += a * b;
    }
    fold(acc, |a, b| a + b)
}

/// `x`, or `than` if that is not less or `x` is NaN: one instruction, where `f32::max` is several.
#[inline(always)]
fn greater(x: f32, than: f32) -> f32 {
    if x > than { x } else { than }
}

#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut acc = [f32::NEG_INFINITY; LANES];
    for c in chunks {
        for i in 0..LANES {
            acc[i] = greater(c[i], acc[i]);
        }
    }
    for (i, &v) in tail.iter().enumerate() {
        acc[i] = greater(v, acc[i]);
    }
    fold(acc, greater)
}

#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

#[inline(always)]
pub fn scale(a: f32, x: &mut [f32]) {
    for x in x {
        *x *= a;
    }
}

#[inline(always)]
pub fn add(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

#[inline(always)]
pub fn scale_by(x: &[f32], a: f32, w: &[f32], offset: f32, out: &mut [f32]) {
    for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
        *o = x * a * (w + offset);
    }
}

#[inline(always)]
pub fn exp_sum(max: f32, x: &mut [f32]) -> f32 {
    for v in x.iter_mut() {
        *v = exp(*v - max);
    }
    sum(x)
}

/// Runs `$body` with `$f` standing for the activation `$kind`: a loop for each, so that each is a straight line of
/// vector code. (No closures: they would not take on the target features of their caller.)
macro_rules! with_activation {
    ($kind:expr, $f:ident => $body:expr) => {
        match $kind {
            Activation::Silu => {
                use silu as $f;
                $body
            }
            Activation::Gelu => {
                use gelu as $f;
                $body
            }
            Activation::GeluTanh => {
                use gelu_tanh as $f;
                $body
            }
            Activation::Relu => {
                use relu as $f;
                $body
            }
            Activation::ClampedSilu => {
                use clamped_silu as $f;
                $body
            }
        }
    };
}

#[inline(always)]
pub fn activate(kind: Activation, x: &mut [f32]) {
    with_activation!(kind, f => for v in x {
        *v = f(*v);
    })
}

#[inline(always)]
pub fn gate(kind: Activation, gate: &mut [f32], up: &[f32]) {
    if kind == Activation::ClampedSilu {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = clamped_silu(*g) * (u.clamp(-7.0, 7.0) + 1.0);
        }
        return;
    }
    with_activation!(kind, f => for (g, u) in gate.iter_mut().zip(up) {
        *g = f(*g) * u;
    })
}

#[inline(always)]
pub fn rotate(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let (x, y) = (*a, *b);
        *a = x * c - y * s;
        *b = x * s + y * c;
    }
}

#[inline(always)]
pub fn soft_cap(cap: f32, x: &mut [f32]) {
    for v in x {
        *v = cap * tanh(*v / cap);
    }
}

#[inline(always)]
pub fn scores(q: &[f32], keys: &[f32], out: &mut [f32]) {
    for (o, key) in out.iter_mut().zip(keys.chunks_exact(q.len())) {
        *o = dot(q, key);
    }
}

#[inline(always)]
pub fn mix(p: &[f32], values: &[f32], out: &mut [f32]) {
    for (p, value) in p.iter().zip(values.chunks_exact(out.len())) {
        axpy(*p, value, out);
    }
}

#[inline(always)]
pub fn widen(codes: &[i8], scales: &[f32], out: &mut [f32]) {
    for ((out, codes), d) in out.chunks_mut(32).zip(codes.chunks(32)).zip(scales) {
        for (o, q) in out.iter_mut().zip(codes) {
            *o = d * f32::from(*q);
        }
    }
}

#[inline(always)]
pub fn across(rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [f32]) {
    let (out, _) = out[..len * LANES].as_chunks_mut::<LANES>();
    for (c, out) in out.chunks_mut(LANES).enumerate() {
        let mut tile = [[0f32; LANES]; LANES];
        for (r, row) in tile.iter_mut().enumerate().take(used) {
            row[..out.len()].copy_from_slice(&rows[r * stride + c * LANES..][..out.len()]);
        }
        for (j, out) in out.iter_mut().enumerate() {
            for r in 0..LANES {
                out[r] = tile[r][j];
            }
        }
    }
}

/// One of the functions above (or another that is always inlined), compiled with the target features `$features`.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled {
    ($features:literal, $path:path, ($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {{
        #[target_feature(enable = $features)]
        fn compiled($($arg: $ty),*) $(-> $ret)? {
            $path($($arg),*)
        }
        fn entry($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: a table with this entry is handed out only on a processor that has these features.
            unsafe { compiled($($arg),*) }
        }
        entry
    }};
}
#[cfg(target_arch = "x86_64")]
pub(crate) use compiled;

/// All of the functions above, compiled with the target features `$features`.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_lanes {
    ($features:literal) => {{
        use $crate::kernels::lanes::{self, Lanes, compiled};
        use $crate::ops::Activation;
        Lanes {
            sum_squares: compiled!($features, lanes::sum_squares, (x: &[f32]) -> f32),
            sum: compiled!($features, lanes::sum, (x: &[f32]) -> f32),
            dot: compiled!($features, lanes::dot, (x: &[f32], y: &[f32]) -> f32),
            max: compiled!($features, lanes::max, (x: &[f32]) -> f32),
            axpy: compiled!($features, lanes::axpy, (a: f32, x: &[f32], y: &mut [f32])),
            scale: compiled!($features, lanes::scale, (a: f32, x: &mut [f32])),
            add: compiled!($features, lanes::add, (x: &[f32], y: &mut [f32])),
            scale_by: compiled!($features, lanes::scale_by, (x: &[f32], a: f32, w: &[f32], offset: f32, out: &mut [f32])),
            exp_sum: compiled!($features, lanes::exp_sum, (max: f32, x: &mut [f32]) -> f32),
            activate: compiled!($features, lanes::activate, (kind: Activation, x: &mut [f32])),
            gate: compiled!($features, lanes::gate, (kind: Activation, g: &mut [f32], up: &[f32])),
            rotate: compiled!($features, lanes::rotate, (a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32])),
            soft_cap: compiled!($features, lanes::soft_cap, (cap: f32, x: &mut [f32])),
            scores: compiled!($features, lanes::scores, (q: &[f32], keys: &[f32], out: &mut [f32])),
            mix: compiled!($features, lanes::mix, (p: &[f32], values: &[f32], out: &mut [f32])),
            widen: compiled!($features, lanes::widen, (codes: &[i8], scales: &[f32], out: &mut [f32])),
            across: compiled!($features, lanes::across, (rows: &[f32], stride: usize, used: usize, len: usize, out: &mut [f32])),
            halve: compiled!($features, lanes::halve, (x: &[f32], out: &mut [f32])),
            unhalve: compiled!($features, lanes::unhalve, (x: &[f32], out: &mut [f32])),
            quarter: compiled!($features, lanes::quarter, (x: &[f32], out: &mut [f32])),
            unquarter: compiled!($features, lanes::unquarter, (x: &[f32], out: &mut [f32])),
            activate_backward: compiled!($features, lanes::activate_backward, (kind: Activation, x: &[f32], dy: &mut [f32])),
            gate_backward: compiled!($features, lanes::gate_backward, (kind: Activation, g: &mut [f32], up: &mut [f32], dy: &[f32])),
            soft_cap_backward: compiled!($features, lanes::soft_cap_backward, (cap: f32, y: &[f32], dy: &mut [f32])),
            softmax: compiled!($features, lanes::softmax, (s: &mut [f32], most: &mut [f32; lanes::QUERIES], total: &mut [f32; lanes::QUERIES], shrink: &mut [f32; lanes::QUERIES])),
            scale_columns: compiled!($features, lanes::scale_columns, (by: &[f32; lanes::QUERIES], x: &mut [f32])),
            softmax_backward: compiled!($features, lanes::softmax_backward, (lse: &[f32], delta: &[f32], s: &mut [f32], dp: &mut [f32])),
        }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(crate) use compiled_lanes;

/// The functions above as the target's baseline compiles them.
pub const PLAIN: Lanes = Lanes {
    sum_squares,
    sum,
    dot,
    max,
    axpy,
    scale,
    add,
    scale_by,
    exp_sum,
    activate,
    gate,
    rotate,
    soft_cap,
    scores,
    mix,
    widen,
    across,
    halve,
    unhalve,
    quarter,
    unquarter,
    activate_backward,
    gate_backward,
    soft_cap_backward,
    softmax,
    scale_columns,
    softmax_backward,
};
