//! How large every buffer of a step is.

use super::{Levels, PlanRequest};
use crate::{
    adapter::{Fit, Needs, ParameterLayout, Role},
    batch::VirtualTokens,
    model::{ModelConfig, ModuleKind, Projection},
};

/// Numbers that a chunk of logits may hold.
const LOGITS: usize = 1 << 24;
/// Rows of logits made at once, at most: more gains nothing, the product is large enough.
const HEAD_ROWS: usize = 512;
/// Numbers of the head that are widened at once, at most.
const HEAD_BLOCK: usize = 1 << 24;
/// Rows of logits made at once on a GPU: no fewer where memory is to be had for them, and at most.
const FEWEST_ROWS_ACCELERATED: usize = 256;
const HEAD_ROWS_ACCELERATED: usize = 4096;
/// Bytes that products on a GPU may work in.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// How large every buffer of a step is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of an activation.
    pub activation: usize,
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
    /// Features of a head.
    pub head_dim: usize,
    /// Features of all query heads.
    pub queries: usize,
    /// Features of all key heads.
    pub keys: usize,
    /// Features of all query heads where a norm of theirs keeps them; 0 where there is none.
    pub normed_queries: usize,
    /// The same of the key heads.
    pub normed_keys: usize,
    /// Features of the residual stream where norms of the blocks' outputs keep them; 0 where there are none.
    pub normed_output: usize,
    /// Features of the widest product that is cut into parts; 0 where there is none.
    pub fused: usize,
    /// Features of all key heads where keys and values are laid behind a prefix, else 0. With its virtual tokens a micro-batch has as many
    /// keys as there is room for tokens.
    pub joined: usize,
    /// Numbers that a network in front of the adapter makes, and their gradient.
    pub made: usize,
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
    /// What the branch of the head keeps for each row.
    pub head_kept: usize,
    /// Tokens whose rows of the head are trained.
    pub head_few: usize,
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
        let mut weights = [0; 7];
        for projection in config.projections().iter().filter(|_| request.dequantised) {
            weights[projection.index()] = size(*projection);
        }
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let queries = config.attention_heads * config.head_dim;
        let keys = config.key_value_heads * config.head_dim;
        let wide = tokens * intermediate.max(queries);
        let head_rows = if request.accelerated {
            // Logits lie where the feed-forward halves work.
            let least = FEWEST_ROWS_ACCELERATED.min(tokens.max(1));
            (wide / config.vocabulary_size).clamp(least, HEAD_ROWS_ACCELERATED.max(least))
        } else {
            (LOGITS / config.vocabulary_size).clamp(1, HEAD_ROWS)
        }
        .min(tokens.max(1));
        let head_branch = layout.modules().iter().find(|adapted| adapted.module.kind == ModuleKind::Head);
        let rows = layout.entries().iter().find(|entry| entry.role == Role::Rows);
        let head_branch = head_branch.filter(|adapted| adapted.branch);
        let head_block = match request.accelerated || head_branch.is_some() {
            true => config.vocabulary_size,
            false => (HEAD_BLOCK / hidden).clamp(1, config.vocabulary_size),
        };
        // Two tiles of attention, or a row that dropout is applied to.
        let lane = (2 * 64 * max_length).max(if request.dropout { branch.wide } else { 0 });
        Self {
            activation: if request.half_activations { 2 } else { 4 },
            tokens,
            layers: config.layers,
            parameters: layout.len(),
            max_length,
            hidden,
            heads: config.attention_heads,
            head_dim: config.head_dim,
            queries,
            keys,
            normed_queries: if config.query_key_norms { queries } else { 0 },
            normed_keys: if config.query_key_norms { keys } else { 0 },
            normed_output: if config.output_norms { hidden } else { 0 },
            fused: if config.fused { (queries + 2 * keys).max(2 * intermediate) } else { 0 },
            joined: match layout.virtual_tokens() {
                VirtualTokens::Keys(_) => config.key_value_heads * config.head_dim,
                VirtualTokens::None | VirtualTokens::Rows(_) => 0,
            },
            made: 0,
            intermediate,
            vocabulary: config.vocabulary_size,
            kept,
            branch,
            weights,
            head_rows,
            head_block: if request.head_widened { head_block } else { 0 },
            head_kept: head_branch.map_or(0, |adapted| adapted.needs.kept),
            head_few: if config.tied_embeddings { rows.map_or(0, |entry| entry.rows()) } else { 0 },
            lanes: match request.accelerated {
                // Ids and the like, attention's sums by head, and what products work in.
                true => tokens * (config.attention_heads + 11) + WORKSPACE / 4,
                false => request.threads.max(1) * lane,
            },
            rope: max_length * config.head_dim,
        }
    }

    /// As [`Sizes::new`] for a fitted method: what is trained may be a network that makes what passes read.
    pub fn of(
        config: &ModelConfig,
        fit: &Fit,
        tokens: usize,
        max_length: usize,
        request: &PlanRequest,
    ) -> Self {
        let sizes = Self::new(config, fit.layout(), tokens, max_length, request);
        let made = fit.network().map_or(0, |_| 2 * fit.layout().len());
        Self { parameters: fit.trained().len(), made, ..sizes }
    }

    /// Numbers of the widest scratch buffer: a row of the feed-forward half for each token, or a chunk of logits.
    pub(super) fn wide(&self) -> usize {
        (self.tokens * self.intermediate.max(self.queries)).max(self.head_rows * self.vocabulary)
    }

    /// Numbers of the scratch buffer that is as wide as queries, or as the head's gradient.
    pub(super) fn middle(&self) -> usize {
        (self.tokens * self.queries).max(self.head_rows * self.hidden)
    }

    /// Factors a token of the norm of a block's output.
    pub(super) fn output_norm(&self) -> usize {
        usize::from(self.normed_output > 0)
    }

    /// A layer's input, attention's output and logarithms, bytes.
    pub(super) fn boundary_bytes(&self) -> u64 {
        self.rows(self.hidden + self.queries) + 4 * (self.tokens * self.heads) as u64
    }

    /// What a layer needs besides: q, k, v, middle, norms, branches; bytes.
    fn work_bytes(&self) -> u64 {
        let kept: usize = self.kept.iter().sum();
        let query_key = self.normed_queries + self.normed_keys;
        let norms = query_key / self.head_dim + 2 * self.output_norm();
        self.rows(self.queries + 2 * self.keys + self.hidden + query_key + 2 * self.normed_output + kept)
            + (4 * self.tokens * (2 + norms)) as u64
    }

    /// Gate and up, bytes.
    fn expansion_bytes(&self) -> u64 {
        self.rows(2 * self.intermediate)
    }

    fn rows(&self, columns: usize) -> u64 {
        (self.activation * self.tokens * columns) as u64
    }

    /// What the forward pass keeps for the backward pass in the memory that operations work in, bytes.
    pub fn activation_bytes(&self, levels: &Levels) -> u64 {
        let boundaries = levels.shared_boundaries() + levels.layers() - levels.aside;
        let works = levels.shared_work() + levels.unexpanded + levels.everything;
        let expansions = levels.shared_expansions() + levels.everything;
        self.rows(self.hidden)
            + boundaries as u64 * self.boundary_bytes()
            + works as u64 * self.work_bytes()
            + expansions as u64 * self.expansion_bytes()
    }

    /// What the forward pass keeps in host memory, bytes.
    pub fn aside_bytes(&self, levels: &Levels) -> u64 {
        levels.aside as u64 * self.boundary_bytes()
    }

    /// Multiplications that a level saves for each token of a layer, by [`super::Level::Unexpanded`] and by
    /// [`super::Level::Everything`] on top: what the choice weighs.
    pub(super) fn savings(&self) -> [u64; 2] {
        let attention = self.hidden * (2 * self.queries + 2 * self.keys);
        [attention as u64, (2 * self.hidden * self.intermediate) as u64]
    }

    /// What operations work in, bytes.
    pub fn scratch_bytes(&self) -> u64 {
        let branch = self.branch.wide + self.branch.narrow + self.branch.output;
        let activations = self.wide()
            + self.middle()
            + self.head_rows * (self.hidden + self.head_kept + self.head_few)
            + self.head_block * self.hidden
            + self.weights.iter().sum::<usize>();
        let fixed: usize = self.branch.fixed.iter().sum();
        let exact = self.tokens + self.head_rows + self.rope + fixed + self.lanes + self.made;
        self.rows(3 * self.hidden + 2 * self.keys + self.normed_keys + self.fused + 4 * self.joined + branch)
            + (self.activation * activations + 4 * exact) as u64
    }
}
