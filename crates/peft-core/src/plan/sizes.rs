//! The number of f32 in every buffer of a step.

use super::{PlanRequest, Recompute};
use crate::{
    adapter::{Needs, ParameterLayout},
    model::{ModelConfig, ModuleKind, Projection},
};

/// Numbers that a chunk of logits may hold.
const LOGITS: usize = 1 << 24;
/// Rows of logits made at once, at most: more gains nothing, the product is large enough.
const HEAD_ROWS: usize = 512;
/// Numbers of the head that are widened at once, at most.
const HEAD_BLOCK: usize = 1 << 24;
/// Numbers that a chunk of logits may hold, and its rows at most, on a GPU.
const LOGITS_ACCELERATED: usize = 1 << 28;
const HEAD_ROWS_ACCELERATED: usize = 4096;

/// The number of f32 in every buffer of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Layers.
    pub layers: usize,
    /// Flat parameters.
    pub parameters: usize,
    /// Longest row, tokens.
    pub max_length: usize,
    /// Features of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Features of all query heads.
    pub queries: usize,
    /// Features of all key heads.
    pub keys: usize,
    /// Features inside the feed-forward half.
    pub intermediate: usize,
    /// Vocabulary.
    pub vocabulary: usize,
    /// What the branch of each projection keeps for each token, in the order of [`Projection::ALL`]; 0 where none is adapted
    /// in any layer.
    pub kept: [usize; 7],
    /// What branches work in.
    pub branch: Needs,
    /// Numbers of each matrix written out, in the order of [`Projection::ALL`]; 0 where it is read in place.
    pub weights: [usize; 7],
    /// Rows of logits made at once.
    pub head_rows: usize,
    /// Rows of the head widened at once; 0 where it is read in place.
    pub head_block: usize,
    /// Numbers in the threads' own scratch.
    pub lanes: usize,
    /// Numbers in the table of angles.
    pub rope: usize,
}

impl Sizes {
    /// Counts the buffers of a step of `tokens` tokens in rows of at most `max_length`.
    pub fn new(
        config: &ModelConfig,
        layout: &ParameterLayout,
        tokens: usize,
        max_length: usize,
        request: &PlanRequest,
    ) -> Self {
        let mut kept = [0; 7];
        for adapted in layout.modules().iter().filter(|adapted| adapted.module.kind == ModuleKind::Linear) {
            let of_projection: &mut usize = &mut kept[adapted.module.index];
            *of_projection = adapted.needs.kept.max(*of_projection);
        }
        let branch = layout.needs();
        let size = |projection: Projection| {
            let [rows, columns] = config.shape(projection);
            rows * columns
        };
        let weights = if request.dequantised { Projection::ALL.map(size) } else { [0; 7] };
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let queries = config.attention_heads * config.head_dim;
        let (logits, most_rows) = match request.accelerated {
            true => (LOGITS_ACCELERATED, HEAD_ROWS_ACCELERATED),
            false => (LOGITS, HEAD_ROWS),
        };
        let head_rows = (logits / config.vocabulary_size).clamp(1, most_rows).min(tokens.max(1));
        let head_block = match request.accelerated {
            true => config.vocabulary_size,
            false => (HEAD_BLOCK / hidden).clamp(1, config.vocabulary_size),
        };
        // Two tiles of attention, or a row that dropout is applied to.
        let lane = (2 * 64 * max_length).max(if request.dropout { branch.wide } else { 0 });
        Self {
            tokens,
            layers: config.layers,
            parameters: layout.len(),
            max_length,
            hidden,
            heads: config.attention_heads,
            queries,
            keys: config.key_value_heads * config.head_dim,
            intermediate,
            vocabulary: config.vocabulary_size,
            kept,
            branch,
            weights,
            head_rows,
            head_block: if request.head_widened { head_block } else { 0 },
            lanes: match request.accelerated {
                // Ids and the like, attention's sums by head, the larger operand of a product rounded to 2 bytes.
                true => {
                    let operand =
                        (tokens * intermediate.max(queries)).max(head_rows * config.vocabulary_size);
                    tokens * (config.attention_heads + 11) + operand / 2
                }
                false => request.threads.max(1) * lane,
            },
            rope: max_length * config.head_dim,
        }
    }

    /// Features of the two widest scratch buffers.
    pub(super) fn wide(&self) -> usize {
        self.intermediate.max(self.queries)
    }

    /// Kept for each layer whatever the plan: its input, attention's output and logarithms.
    fn kept_always(&self) -> usize {
        self.hidden + self.queries + self.heads
    }

    /// Kept for each layer, or once for the layer at work: q, k, v, middle, gate, up, norms, branches.
    fn work(&self) -> usize {
        let kept: usize = self.kept.iter().sum();
        self.queries + 2 * self.keys + self.hidden + 2 * self.intermediate + 2 + kept
    }

    /// Numbers that the forward pass keeps.
    pub fn activations(&self, recompute: Recompute) -> usize {
        let works = if recompute == Recompute::Layers { 1 } else { self.layers };
        let last_hidden = self.hidden;
        self.tokens * (self.layers * self.kept_always() + last_hidden + works * self.work())
    }

    /// Numbers that operations work in.
    pub fn scratch(&self) -> usize {
        let branch = self.branch.wide + self.branch.narrow + self.branch.output;
        let per_token = 3 * self.hidden + 2 * self.wide() + 2 * self.keys + branch;
        let head = self.tokens
            + self.head_rows * (self.vocabulary + 4 * self.hidden + 1)
            + self.head_block * self.hidden;
        self.tokens * per_token
            + head
            + self.weights.iter().sum::<usize>()
            + self.lanes
            + self.rope
            + self.branch.fixed
    }
}
