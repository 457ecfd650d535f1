//! What memory a step takes, decided before it begins.
//!
//! [`Sizes`] counts every buffer from the model's shape and the number of tokens of a micro-batch; [`MemoryPlan`] sums
//! them up by part and picks whether activations are kept or computed again; [`Arena`] reserves them.
//! The counts and the reservation share one description, so they cannot drift apart.

mod arena;
mod levels;
mod share;
mod sizes;

use serde::{Deserialize, Serialize};

use crate::{backend::cuda::DeviceError, error::Result};

pub use arena::{
    Arena, Attended, Boundary, Expansion, HeadMemory, HeadScratch, Joined, Output, QueryKey, Scratch, Work,
    two,
};
pub use levels::{Level, Levels};
pub use share::{ShareChoice, ShareOption};
pub use sizes::Sizes;
pub(crate) use sizes::WORKSPACE;

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
    /// Of them, the embedding's where it is not the head as well: beside a card it can stay in host memory.
    pub embedding_bytes: u64,
    /// Whether the base's matrices must be written out before use (4 bits).
    pub dequantised: bool,
    /// Whether the head must be widened before use (bf16).
    pub head_widened: bool,
    /// Whether dropout is on.
    pub dropout: bool,
    /// Threads that work.
    pub threads: usize,
    /// Whether a GPU works: larger pieces, no scratch of threads, host memory to put activations aside.
    pub accelerated: bool,
    /// Whether activations take 2 bytes, not 4.
    pub half_activations: bool,
    /// Whether sums over several members lie beside their own gradient.
    pub reduced_apart: bool,
    /// Bytes of the host's memory that may be pinned beside a card; none for no limit.
    pub host_limit: Option<u64>,
}

impl PlanRequest {
    /// What the plan may take.
    pub fn limit(&self) -> u64 {
        self.memory_limit.unwrap_or_else(default_memory_limit)
    }
}

/// Memory of a worker by part, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// Rows of a micro-batch.
    pub micro_batch_rows: usize,
    /// Tokens a micro-batch has room for.
    pub micro_batch_tokens: usize,
    /// What becomes of each layer's activations.
    pub levels: Levels,
    /// The frozen base.
    pub base_bytes: u64,
    /// Trained parameters, their gradient, and its sum over all members where that lies apart, f32.
    pub adapter_bytes: u64,
    /// AdamW's two moments, f32.
    pub optimizer_bytes: u64,
    /// What the forward pass keeps for the backward pass.
    pub activation_bytes: u64,
    /// What operations work in: gradients of activations, a chunk of logits, one layer's weights written out.
    pub scratch_bytes: u64,
    /// What lies in the host's memory instead: what the forward pass keeps, and the embedding.
    pub aside_bytes: u64,
    /// Whether the embedding stays in the host's memory.
    pub embedding_aside: bool,
}

/// Tokens of a micro-batch that keep products large; more gains nothing on a CPU.
const ENOUGH_TOKENS: usize = 2048;
/// The same for a GPU.
const ENOUGH_TOKENS_ACCELERATED: usize = 8192;

impl MemoryPlan {
    /// Picks the micro-batch, and what becomes of each layer's activations: of the choices that fit, the one that
    /// computes least again. Where none fits, the smallest is returned.
    pub fn choose(sizes: impl Fn(usize) -> Sizes, request: &PlanRequest) -> Self {
        let limit = request.limit();
        let enough = if request.accelerated { ENOUGH_TOKENS_ACCELERATED } else { ENOUGH_TOKENS };
        let wanted = request.micro_batch_rows.unwrap_or_else(|| (enough / request.max_length.max(1)).max(1));
        let mut rows = wanted;
        loop {
            let sizes = sizes(rows * request.max_length);
            let plan = Self::for_rows(&sizes, rows, request, limit);
            if plan.peak_bytes() <= limit || rows == 1 || request.micro_batch_rows.is_some() {
                return plan;
            }
            rows /= 2;
        }
    }

    fn for_rows(sizes: &Sizes, rows: usize, request: &PlanRequest, limit: u64) -> Self {
        if !request.accelerated {
            return Self::search(sizes, rows, request, limit);
        }
        let near = Self::search(sizes, rows, request, limit);
        if near.peak_bytes() <= limit && near.levels.aside == 0 || request.embedding_bytes == 0 {
            return near;
        }
        let base_bytes = request.base_bytes.saturating_sub(request.embedding_bytes);
        let host_limit = request.host_limit.map(|limit| limit.saturating_sub(request.embedding_bytes));
        let far = Self::search(sizes, rows, &PlanRequest { base_bytes, host_limit, ..*request }, limit);
        Self { aside_bytes: far.aside_bytes + request.embedding_bytes, embedding_aside: true, ..far }
    }

    fn search(sizes: &Sizes, rows: usize, request: &PlanRequest, limit: u64) -> Self {
        let layers = sizes.layers;
        let plan = |levels| Self::of(sizes, rows, request, levels);
        let fits = |levels: &Levels| plan(*levels).peak_bytes() <= limit;
        match request.recompute {
            Recompute::Never => return plan(Levels::everything(layers)),
            Recompute::Layers => return plan(Levels::boundaries(layers)),
            Recompute::Auto => {}
        }
        let [some, rest] = sizes.savings();
        let saved = |levels: &Levels| {
            (levels.unexpanded + levels.everything) as u64 * some + levels.everything as u64 * rest
        };
        let kept = (0..=layers).flat_map(|everything| {
            (0..=layers - everything).map(move |unexpanded| Levels {
                aside: 0,
                boundaries: layers - everything - unexpanded,
                unexpanded,
                everything,
            })
        });
        if let Some(best) = kept.filter(fits).max_by_key(saved) {
            return plan(best);
        }
        let aside = |aside| Levels { aside, ..Levels::boundaries(layers - aside) };
        // What is pinned is there or it is not: the host's memory is a limit as hard as the card's.
        let room = request.host_limit.map_or(layers as u64, |limit| limit / sizes.boundary_bytes().max(1));
        let most = if request.accelerated {
            usize::try_from(room).map_or(layers, |room| room.min(layers))
        } else {
            0
        };
        plan((0..=most).map(aside).find(fits).unwrap_or_else(|| aside(most)))
    }

    fn of(sizes: &Sizes, rows: usize, request: &PlanRequest, levels: Levels) -> Self {
        let flat = 4 * sizes.parameters as u64;
        // Beside the parameters lies what products read.
        let rounded = if request.half_activations { flat / 2 } else { 0 };
        Self {
            micro_batch_rows: rows,
            micro_batch_tokens: sizes.tokens,
            levels,
            base_bytes: request.base_bytes,
            adapter_bytes: (2 + u64::from(request.reduced_apart)) * flat + rounded,
            optimizer_bytes: 2 * flat,
            activation_bytes: sizes.activation_bytes(&levels),
            scratch_bytes: sizes.scratch_bytes(),
            aside_bytes: sizes.aside_bytes(&levels),
            embedding_aside: false,
        }
    }

    /// Tokens of the longest row that a step of one row has room for, of those that are multiples of 256; 0 where there is
    /// room for none, and `most` where that fits.
    pub fn largest_context(sizes: impl Fn(usize) -> Sizes, request: &PlanRequest, most: usize) -> usize {
        const STEP: usize = 256;
        let limit = request.memory_limit.unwrap_or_else(default_memory_limit);
        let fits = |length: usize| {
            let request = PlanRequest { micro_batch_rows: Some(1), max_length: length, ..*request };
            Self::choose(|_| sizes(length), &request).peak_bytes() <= limit
        };
        let (mut low, mut high) = (0, most / STEP);
        if high > 0 && fits(high * STEP) {
            return if fits(most) { most } else { high * STEP };
        }
        // What fits is a beginning of all lengths: more tokens never take less.
        while low + 1 < high {
            let middle = low.midpoint(high);
            if fits(middle * STEP) { low = middle } else { high = middle }
        }
        low * STEP
    }

    /// Out of memory is foreseen, not met.
    ///
    /// # Errors
    /// Where the plan takes more than `limit`.
    pub(crate) fn check(&self, limit: Option<u64>) -> Result<()> {
        match limit {
            Some(limit) if self.base_bytes > limit => {
                Err(DeviceError::BaseTooLarge { needed: self.base_bytes, limit }.into())
            }
            Some(limit) if self.peak_bytes() > limit => Err(DeviceError::PlanTooLarge {
                needed: self.peak_bytes(),
                limit,
                base: self.base_bytes,
                activations: self.activation_bytes + self.scratch_bytes,
                tokens: self.micro_batch_tokens,
            }
            .into()),
            _ => Ok(()),
        }
    }

    /// All parts together, but for the host's memory beside a card.
    pub fn peak_bytes(&self) -> u64 {
        self.base_bytes
            + self.adapter_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.scratch_bytes
    }
}

/// What may be pinned of the host's memory beside a card: three quarters of what is free.
pub fn host_limit() -> Option<u64> {
    Some(default_memory_limit() / 2 * 3)
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
    use shanty_diagnostic::Diagnose;

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
            embedding_bytes: 0,
            dequantised: true,
            head_widened: true,
            dropout: false,
            threads: 2,
            accelerated: false,
            half_activations: false,
            reduced_apart: false,
            host_limit: None,
        }
    }

    #[test]
    fn computing_again_is_chosen_only_where_memory_is_short() {
        let roomy = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(1 << 40)));
        assert_eq!((roomy.levels, roomy.micro_batch_rows), (Levels::everything(4), 16));
        let [some, rest] = sizes(1).savings();
        let saved = |levels: Levels| {
            (levels.unexpanded + levels.everything) as u64 * some + levels.everything as u64 * rest
        };
        let (mut limit, mut last) = (roomy.peak_bytes(), saved(roomy.levels));
        while last > 0 {
            let tight = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(limit - 1)));
            assert_eq!((tight.micro_batch_rows, tight.aside_bytes), (16, 0));
            assert!(tight.peak_bytes() < limit, "{tight:?}");
            assert!(saved(tight.levels) < last, "less memory cannot save more work: {tight:?}");
            (limit, last) = (tight.peak_bytes(), saved(tight.levels));
        }
        let tiny = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(1)));
        assert_eq!(tiny.micro_batch_rows, 1);
    }

    #[test]
    fn the_largest_context_is_the_longest_row_that_fits() {
        let config = r#"{"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "hidden_act": "silu"}"#;
        let config = ModelConfig::from_json(config.as_bytes(), "config.json".as_ref()).unwrap();
        let layout = ParameterLayout::default();
        for (accelerated, host_limit) in [(false, None), (true, None), (true, Some(1 << 20))] {
            let request = PlanRequest { accelerated, host_limit, ..request(Recompute::Auto, Some(64 << 20)) };
            let sizes = |length| Sizes::new(&config, &layout, length, length, &request);
            let longest = MemoryPlan::largest_context(sizes, &request, 1 << 20);
            let peak = |length| {
                let request = PlanRequest { micro_batch_rows: Some(1), max_length: length, ..request };
                let plan = MemoryPlan::choose(|_| sizes(length), &request);
                assert!(host_limit.is_none_or(|limit| plan.aside_bytes <= limit), "{plan:?}");
                plan.peak_bytes()
            };
            assert!(longest > 0 && longest.is_multiple_of(256));
            assert!(peak(longest) <= 64 << 20, "{longest} fits");
            assert!(peak(longest + 256) > 64 << 20, "{longest} is the longest");
            assert_eq!(MemoryPlan::largest_context(sizes, &request, 300), 300, "what is asked for at most");
            let none = PlanRequest { memory_limit: Some(1), ..request };
            assert_eq!(MemoryPlan::largest_context(sizes, &none, 1 << 20), 0);
        }
    }

    #[test]
    fn what_is_too_large_is_told_by_what_it_is() {
        let plan = MemoryPlan::choose(sizes, &request(Recompute::Auto, Some(1)));
        let code = |limit| plan.check(Some(limit)).unwrap_err().diagnostic().code;
        assert!(plan.check(Some(plan.peak_bytes())).is_ok());
        assert_eq!(code(plan.peak_bytes() - 1), "SH0810");
        assert_eq!(code(plan.base_bytes - 1), "SH0830");
    }

    #[test]
    fn beside_a_card_boundaries_go_to_the_host_where_memory_is_shorter_still() {
        let request = |limit| PlanRequest {
            accelerated: true,
            micro_batch_rows: Some(16),
            ..request(Recompute::Auto, Some(limit))
        };
        let sizes = |tokens| Sizes { layers: 9, ..sizes(tokens) };
        let again = Levels::boundaries(9);
        let kept = MemoryPlan::of(&sizes(2048), 16, &request(0), again).peak_bytes();
        let plan = MemoryPlan::choose(sizes, &request(kept - 1));
        assert_eq!(
            plan.levels,
            Levels { aside: 3, ..Levels::boundaries(6) },
            "two share two places: nothing is won"
        );
        assert!(plan.peak_bytes() < kept && plan.aside_bytes > 0);
        let least = MemoryPlan::choose(sizes, &request(1));
        assert_eq!(least.levels, Levels { aside: 9, ..Levels::boundaries(0) });
    }
}
