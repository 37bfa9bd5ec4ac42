//! The rest of a model's arithmetic: norms, rotary positions, gates, attention, loss; and their gradients.

mod attention;
mod backward;
mod loss;
mod rows;
mod waiting;

pub use attention::{Attention, AttentionGradients, AttentionRows, AttentionSequence, Kv};
pub use waiting::Waiting;

/// The function between the two matrices of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// The approximation of `Gelu` by tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// gpt-oss's gate: `min(x, 7) * sigmoid(1.702 min(x, 7))`, and what it gates becomes `clamp(up, -7, 7) + 1`.
    ClampedSilu,
}

/// Which columns of a head rotary positions turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Pairs `(i, i + r/2)`.
    Half,
    /// Pairs `(2i, 2i + 1)`.
    Interleaved,
    /// Each half of the columns by itself: pairs `(i, i + r/4)` and `(r/2 + i, 3r/4 + i)`.
    TwoHalves,
}
