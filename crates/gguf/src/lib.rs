//! Reads GGUF, the file format of llama.cpp, versions 2 and 3
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! [`Header`] holds the metadata and the place of every tensor, all checked against the length of the file before anything
//! is believed: what a header claims never decides how much is allocated. Arrays stay as the bytes that they are in the
//! file and are read item by item. [`Kind`] knows ggml's blocks and turns them into f32, bit for bit as ggml does.

mod blocks;
mod header;
mod kind;
mod parse;
mod value;

pub use header::{Header, HeaderError, TensorInfo};
pub use kind::Kind;
pub use parse::Problem;
pub use value::{List, Value};

/// The four bytes that every file begins with.
pub const MAGIC: [u8; 4] = *b"GGUF";
