//! Numbers: block formats, kernels and the arithmetic of language models.
//!
//! This crate knows no model, no file and no token. See `docs/architecture.md`.

pub mod formats;
