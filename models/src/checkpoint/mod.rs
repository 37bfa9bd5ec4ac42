//! One view of a model on disk.

mod bytes;
mod metadata;

pub use bytes::Bytes;
pub use metadata::{Array, Metadata, Value, ValueType};
