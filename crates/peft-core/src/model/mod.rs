//! The frozen base: what a decoder is made of, where its weights come from.
//!
//! [`config`] holds the description of a decoder, which [`families`] read from `config.json`; [`weights`] reads safetensors,
//! [`base`] is what the layer loop asks for weights, [`resident`] keeps a whole base in memory, [`sharded`] one of
//! several parts of it, [`modules`] names
//! what adapters are put on.

pub mod base;
pub mod config;
pub mod decoder;
pub mod export;
pub mod families;
pub mod gguf;
pub mod modules;
pub mod resident;
pub mod sharded;
pub mod trained;
pub mod weights;

pub use base::{BaseSource, DenseView, EmbeddingView, Held, HeldView, LayerWeights, LinearWeights, Matrix};
pub use config::{Activation, ModelConfig, Norm, Projection, Rope, RopeScaling};
pub use modules::{Module, ModuleKind, Place};
pub use resident::{LoadProgress, MemoryUse, ResidentBase};
pub use sharded::{LayerGather, ShardPart, ShardedBase};
