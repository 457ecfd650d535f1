//! What an engine is loaded with.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::plan::Recompute;

/// How frozen weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As stored; bf16 and f16 matrices are widened to f32.
    None,
    /// 4-bit NormalFloat in blocks of 64.
    Nf4 {
        /// Whether block scales are kept in 8 bits.
        double: bool,
    },
}

/// What an engine is loaded with.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The base's folder, in Hugging Face layout.
    pub base: PathBuf,
    /// How its matrices are kept.
    pub quantization: Quantization,
    /// Threads; 0 takes as many as the machine has.
    pub threads: usize,
    /// Keep activations or compute them again.
    pub recompute: Recompute,
    /// Rows of a micro-batch; chosen from memory when none.
    pub micro_batch_rows: Option<usize>,
    /// Longest row, tokens.
    pub max_length: usize,
    /// Bytes that the plan may take; half of what is free when none.
    pub memory_limit: Option<u64>,
}
