//! The algorithms that choose the numbers.

mod factor;
mod gptq;
mod grid;
mod hessian;
mod solution;
#[cfg(test)]
mod tests;

pub use gptq::{Fit, Order, Variant};
pub use grid::Grid;
pub use hessian::Hessian;
