//! What memory a step takes, decided before it begins.
//!
//! [`Sizes`] counts every buffer from the model's shape and the number of tokens of a micro-batch; [`MemoryPlan`] sums
//! them up by part and picks whether activations are kept or computed again; [`Arena`] reserves them.
//! The counts and the reservation share one description, so they cannot drift apart.

mod arena;
mod sizes;

use serde::{Deserialize, Serialize};

pub use arena::{Arena, Attended, HeadScratch, Scratch, Work};
pub use sizes::Sizes;

/// What becomes of activations between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Kept where they fit into the memory limit, else computed again.
    #[default]
    Auto,
    /// Kept.
    Never,
    /// Only layer inputs and attention's output are kept; the rest is computed again, without attending again and
    /// without the last product of each half.
    Layers,
}

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanRequest {
    /// Rows of a micro-batch; chosen when none.
    pub micro_batch_rows: Option<usize>,
    /// Longest row, tokens.
    pub max_length: usize,
    /// Keep or compute again.
    pub recompute: Recompute,
    /// Bytes that a plan may take; asked of the machine when none.
    pub memory_limit: Option<u64>,
    /// Bytes of the frozen base.
    pub base_bytes: u64,
    /// Whether the base's matrices must be written out before use (4 bits).
    pub dequantised: bool,
    /// Whether the head must be widened before use (bf16).
    pub head_widened: bool,
    /// Whether dropout is on.
    pub dropout: bool,
    /// Threads that work.
    pub threads: usize,
    /// Whether a GPU works: larger pieces, no scratch of threads.
    pub accelerated: bool,
}

/// Memory of a worker by part, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// Rows of a micro-batch.
    pub micro_batch_rows: usize,
    /// Tokens a micro-batch has room for.
    pub micro_batch_tokens: usize,
    /// What becomes of activations; never [`Recompute::Auto`].
    pub recompute: Recompute,
    /// The frozen base.
    pub base_bytes: u64,
    /// Trained parameters and their gradient, f32.
    pub adapter_bytes: u64,
    /// AdamW's two moments, f32.
    pub optimizer_bytes: u64,
    /// What the forward pass keeps for the backward pass.
    pub activation_bytes: u64,
    /// What operations work in: gradients of activations, a chunk of logits, one layer's weights written out.
    pub scratch_bytes: u64,
}

/// Tokens of a micro-batch that keep products large; more gains nothing on a CPU.
const ENOUGH_TOKENS: usize = 2048;
/// The same for a GPU.
const ENOUGH_TOKENS_ACCELERATED: usize = 8192;

impl MemoryPlan {
    /// Picks micro-batch and recompute.
    pub fn choose(sizes: impl Fn(usize) -> Sizes, request: &PlanRequest) -> Self {
        let limit = request.memory_limit.unwrap_or_else(default_memory_limit);
        let enough = if request.accelerated { ENOUGH_TOKENS_ACCELERATED } else { ENOUGH_TOKENS };
        let wanted = request.micro_batch_rows.unwrap_or_else(|| (enough / request.max_length.max(1)).max(1));
        let mut rows = wanted;
        loop {
            let sizes = sizes(rows * request.max_length);
            let kept = Self::of(&sizes, rows, request, Recompute::Never);
            let again = Self::of(&sizes, rows, request, Recompute::Layers);
            let plan = match request.recompute {
                Recompute::Never => kept,
                Recompute::Layers => again,
                Recompute::Auto if kept.peak_bytes() <= limit => kept,
                Recompute::Auto => again,
            };
            if plan.peak_bytes() <= limit || rows == 1 || request.micro_batch_rows.is_some() {
                return plan;
            }
            rows /= 2;
        }
    }

    fn of(sizes: &Sizes, rows: usize, request: &PlanRequest, recompute: Recompute) -> Self {
        let flat = 4 * sizes.parameters as u64;
        Self {
            micro_batch_rows: rows,
            micro_batch_tokens: sizes.tokens,
            recompute,
            base_bytes: request.base_bytes,
            adapter_bytes: 2 * flat,
            optimizer_bytes: 2 * flat,
            activation_bytes: 4 * sizes.activations(recompute) as u64,
            scratch_bytes: 4 * sizes.scratch() as u64,
        }
    }

    /// All parts together.
    pub fn peak_bytes(&self) -> u64 {
        self.base_bytes
            + self.adapter_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.scratch_bytes
    }
}

/// Half of the memory that the machine says is free; 4 GiB where it does not say.
fn default_memory_limit() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kibibytes = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kibibytes.map_or(4 << 30, |kibibytes| kibibytes * 1024 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{adapter::ParameterLayout, model::ModelConfig};

    fn sizes(tokens: usize) -> Sizes {
        let config = r#"{"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "hidden_act": "silu"}"#;
        let config = ModelConfig::from_json(config.as_bytes(), "config.json".as_ref()).unwrap();
        let layout = ParameterLayout::default();
        Sizes::new(&config, &layout, tokens, 128, &request(Recompute::Auto, None))
    }

    fn request(recompute: Recompute, memory_limit: Option<u64>) -> PlanRequest {
        PlanRequest {
            micro_batch_rows: None,
            max_length: 128,
            recompute,
            memory_limit,
            base_bytes: 1000,
            dequantised: true,
            head_widened: true,
            dropout: false,
            threads: 2,
            accelerated: false,
        }
    }

    #[test]
    fn computing_again_is_chosen_only_where_memory_is_short() {
        let roomy = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(1 << 40)));
        assert_eq!((roomy.recompute, roomy.micro_batch_rows), (Recompute::Never, 16));
        let tight = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(roomy.peak_bytes() - 1)));
        assert_eq!((tight.recompute, tight.micro_batch_rows), (Recompute::Layers, 16));
        assert!(tight.activation_bytes < roomy.activation_bytes);
        let tiny = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(1)));
        assert_eq!(tiny.micro_batch_rows, 1);
    }
}
