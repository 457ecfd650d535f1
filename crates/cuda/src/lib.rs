//! What the crates that use CUDA share: where its libraries lie ([`libraries`]), and memory on a card as one of
//! them hands it to another ([`Span`]). Nothing here calls CUDA.

pub mod libraries;
mod span;

pub use span::Span;
