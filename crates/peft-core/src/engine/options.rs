//! What an engine is loaded with.

use std::path::PathBuf;

use crate::{
    adapter::SharedMethod, backend::cuda::Precision, model::ShardPart, plan::Recompute, quant::Nf4Options,
};

/// Where an engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineDevice {
    /// On the processor.
    #[default]
    Cpu,
    /// On an NVIDIA card, or an error: never on the processor instead.
    Cuda {
        /// Which card, from 0.
        index: usize,
        /// How products are computed.
        precision: Precision,
    },
}

/// What an engine is loaded with.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The base's folder, in Hugging Face layout.
    pub base: PathBuf,
    /// 4-bit NormalFloat for the decoder's matrices; none widens them to f32.
    pub quantization: Option<Nf4Options>,
    /// What is trained; none runs the bare base.
    pub adapter: Option<SharedMethod>,
    /// Where to compute.
    pub device: EngineDevice,
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
    /// Where a start that is computed from the base (PiSSA, OLoRA, LoftQ) lies, or is put where it is not there. All
    /// engines of a run must be given the same, also where they resume.
    pub start: Option<PathBuf>,
    /// The part of the base that is loaded, where several members share it; none loads all of it.
    pub shard: Option<ShardPart>,
    /// Whether other engines train with this one, so that a card keeps room for the sum of their gradients.
    pub member: bool,
}

impl EngineOptions {
    /// A base in f32 without an adapter, on all threads, for rows of at most `max_length` tokens.
    pub fn new(base: impl Into<PathBuf>, max_length: usize) -> Self {
        Self {
            base: base.into(),
            quantization: None,
            adapter: None,
            device: EngineDevice::Cpu,
            threads: 0,
            recompute: Recompute::Auto,
            micro_batch_rows: None,
            max_length,
            memory_limit: None,
            start: None,
            shard: None,
            member: false,
        }
    }
}
