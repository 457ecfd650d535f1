//! Frozen weights in 4 bits.
//!
//! [`nf4`] quantises and dequantises as bitsandbytes does, bit for bit; [`double`] quantises the block scales
//! again; [`packed`] keeps a decoder layer's matrices in one buffer, [`cut`] in parts; [`bitsandbytes`] knows the layout of
//! pre-quantised checkpoints.

pub mod bitsandbytes;
pub mod cut;
pub mod double;
pub mod nf4;
pub mod packed;

pub use cut::{AlignedBytes, Cut, Nf4Pieces};
pub use nf4::{Nf4View, Scales};
pub use packed::{PackedLayer, PackedShape};

/// How weights are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nf4Options {
    /// Numbers that share a scale: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Whether scales are quantised to 8 bits.
    pub double: bool,
}

impl Default for Nf4Options {
    fn default() -> Self {
        Self { block_size: 64, double: true }
    }
}
