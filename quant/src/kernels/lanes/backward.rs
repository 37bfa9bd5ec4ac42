//! Derivatives of the element-wise operations.

use super::{QUERIES, clamped_silu, erf, exp, gelu, gelu_tanh, relu, sigmoid, silu};
use crate::ops::Activation;

#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    // The density of the normal distribution: 1 / sqrt(2 pi) e^(-x^2 / 2).
    let density = 0.398_942_3 * exp(-0.5 * x * x);
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
}

#[inline(always)]
fn gelu_tanh_slope(x: f32) -> f32 {
    // 1 + tanh u = 2 sigmoid 2u, which does not cancel far below zero.
    let square = x * x;
    let s = sigmoid(2.0 * 0.797_884_6 * (x + 0.044_715 * x * square));
    s + 2.0 * x * s * (1.0 - s) * 0.797_884_6 * (1.0 + 0.134_145 * square)
}

#[inline(always)]
fn relu_slope(x: f32) -> f32 {
    if x > 0.0 { 1.0 } else { 0.0 }
}

#[inline(always)]
fn clamped_silu_slope(x: f32) -> f32 {
    let s = sigmoid(1.702 * x);
    let slope = s * (1.0 + 1.702 * x * (1.0 - s));
    if x > 7.0 { 0.0 } else { slope }
}

/// Runs `$body` with `$f` and `$slope` standing for the activation `$kind` and its derivative.
macro_rules! with_slope {
    ($kind:expr, $f:ident, $slope:ident => $body:expr) => {
        match $kind {
            Activation::Silu => {
                use {silu as $f, silu_slope as $slope};
                $body
            }
            Activation::Gelu => {
                use {gelu as $f, gelu_slope as $slope};
                $body
            }
            Activation::GeluTanh => {
                use {gelu_tanh as $f, gelu_tanh_slope as $slope};
                $body
            }
            Activation::Relu => {
                use {relu as $f, relu_slope as $slope};
                $body
            }
            Activation::ClampedSilu => {
                use {clamped_silu as $f, clamped_silu_slope as $slope};
                $body
            }
        }
    };
}

/// See [`super::Lanes::activate_backward`].
#[inline(always)]
pub fn activate_backward(kind: Activation, x: &[f32], dy: &mut [f32]) {
    #[allow(unused_imports)]
    {
        with_slope!(kind, f, slope => for (x, dy) in x.iter().zip(dy) {
            *dy *= slope(*x);
        })
    }
}

/// See [`super::Lanes::gate_backward`].
#[inline(always)]
pub fn gate_backward(kind: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    if kind == Activation::ClampedSilu {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let (g, u) = (*gate, *up);
            *gate = dy * (u.clamp(-7.0, 7.0) + 1.0) * clamped_silu_slope(g);
            *up = if u.abs() > 7.0 { 0.0 } else { dy * clamped_silu(g) };
        }
        return;
    }
    with_slope!(kind, f, slope => for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
        let (g, u) = (*gate, *up);
        *gate = dy * u * slope(g);
        *up = dy * f(g);
    })
}

/// See [`super::Lanes::soft_cap_backward`].
#[inline(always)]
pub fn soft_cap_backward(cap: f32, y: &[f32], dy: &mut [f32]) {
    for (y, dy) in y.iter().zip(dy) {
        let t = y / cap;
        *dy *= 1.0 - t * t;
    }
}

/// e^x, 0 where that is below the smallest normal number: masked scores would else underflow, which is slow.
#[inline(always)]
fn share(x: f32) -> f32 {
    // Compared so that a NaN stays one.
    let y = exp(if x < -87.0 { -87.0 } else { x });
    if x < -87.0 { 0.0 } else { y }
}

/// See [`super::Lanes::softmax`].
#[inline(always)]
pub fn softmax(s: &mut [f32], most: &mut [f32; QUERIES], total: &mut [f32; QUERIES], shrink: &mut [f32; QUERIES]) {
    let (rows, _) = s.as_chunks_mut::<QUERIES>();
    let before = *most;
    for row in rows.iter() {
        for i in 0..QUERIES {
            most[i] = if row[i] > most[i] { row[i] } else { most[i] };
        }
    }
    // Where nothing is seen, minus infinity less minus infinity would be NaN.
    let mut from = [0f32; QUERIES];
    for i in 0..QUERIES {
        from[i] = if most[i] == f32::NEG_INFINITY { 0.0 } else { most[i] };
        shrink[i] = exp(before[i] - from[i]);
        total[i] *= shrink[i];
    }
    for row in rows {
        for i in 0..QUERIES {
            row[i] = share(row[i] - from[i]);
            total[i] += row[i];
        }
    }
}

/// See [`super::Lanes::scale_columns`].
#[inline(always)]
pub fn scale_columns(by: &[f32; QUERIES], x: &mut [f32]) {
    for row in x.as_chunks_mut::<QUERIES>().0 {
        for i in 0..QUERIES {
            row[i] *= by[i];
        }
    }
}

/// See [`super::Lanes::softmax_backward`].
#[inline(always)]
pub fn softmax_backward(lse: &[f32], delta: &[f32], s: &mut [f32], dp: &mut [f32]) {
    let (lse, delta) = (&lse.as_chunks::<QUERIES>().0[0], &delta.as_chunks::<QUERIES>().0[0]);
    for (s, dp) in s.as_chunks_mut::<QUERIES>().0.iter_mut().zip(dp.as_chunks_mut::<QUERIES>().0) {
        for i in 0..QUERIES {
            s[i] = share(s[i] - lse[i]);
            dp[i] = s[i] * (dp[i] - delta[i]);
        }
    }
}
