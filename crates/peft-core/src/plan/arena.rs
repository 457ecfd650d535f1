//! The buffers of a step, reserved once and used by every step.

use super::{Recompute, Sizes};
use crate::{
    adapter::BranchScratch,
    backend::{Backend, BatchRoom},
    error::Result,
};

/// Attention's output, kept from forward to backward.
pub struct Attended<B: Backend> {
    /// `[T, heads * head_dim]`.
    pub out: B::Owned,
    /// Logarithm of each row's sum, `[T, heads]`.
    pub log_sum: B::Owned,
}

/// What a layer's backward pass reads besides; kept, or computed again.
pub struct Work<B: Backend> {
    /// Factors of the first norm, `[T, 1]`.
    pub attention_norm: B::Owned,
    /// Rotated queries, `[T, heads * head_dim]`.
    pub q: B::Owned,
    /// Rotated keys, `[T, kv_heads * head_dim]`.
    pub k: B::Owned,
    /// Values, `[T, kv_heads * head_dim]`.
    pub v: B::Owned,
    /// The residual stream between the halves, `[T, hidden]`.
    pub middle: B::Owned,
    /// Queries and keys ahead of their norms, and the norms' factors, `[T, heads]`; empty where there are none.
    pub query_key: QueryKey<B>,
    /// Attention's output ahead of its norm, and the norm's factors; empty where there is none.
    pub attention_output: Output<B>,
    /// The same of the MLP.
    pub mlp_output: Output<B>,
    /// Factors of the second norm, `[T, 1]`.
    pub mlp_norm: B::Owned,
    /// `[T, intermediate]`; its gradient after the backward pass.
    pub gate: B::Owned,
    /// `[T, intermediate]`; its gradient after the backward pass.
    pub up: B::Owned,
    /// What each branch keeps, in the order of [`crate::model::Projection::ALL`].
    pub kept: [B::Owned; 7],
}

/// What norms of queries and keys read in the backward pass.
pub struct QueryKey<B: Backend> {
    /// `[T, heads * head_dim]`.
    pub q: B::Owned,
    /// `[T, kv_heads * head_dim]`.
    pub k: B::Owned,
    /// `[T * heads, 1]`.
    pub q_norm: B::Owned,
    /// `[T * kv_heads, 1]`.
    pub k_norm: B::Owned,
}

/// What a norm of a block's output reads in the backward pass.
pub struct Output<B: Backend> {
    /// `[T, hidden]`.
    pub x: B::Owned,
    /// `[T, 1]`.
    pub norm: B::Owned,
}

/// What layers work in.
pub struct Scratch<B: Backend> {
    /// A norm's output, `[T, hidden]`.
    pub normed: B::Owned,
    /// The gradient of a norm's output, `[T, hidden]`.
    pub dnormed: B::Owned,
    /// The gradient of the residual stream, `[T, hidden]`, turned by each layer from its output's to its input's.
    pub gradient: B::Owned,
    /// `[T, intermediate or queries]`: the activated product, the gradient of the queries.
    pub wide_a: B::Owned,
    /// `[T, intermediate or queries]`: the gradients of the activated product and of attention's output.
    pub wide_b: B::Owned,
    /// Gradient of the keys, `[T, kv_heads * head_dim]`.
    pub dk: B::Owned,
    /// Gradient of the values, `[T, kv_heads * head_dim]`.
    pub dv: B::Owned,
    /// A product that is cut into parts, or its gradient, `[T, parts]`; empty where there is none.
    pub fused: B::Owned,
    /// Gradient of the keys ahead of their norm, `[T, kv_heads * head_dim]`; empty where there is none.
    pub dk_normed: B::Owned,
    /// Keys and values behind a prefix.
    pub joined: Joined<B>,
    /// What branches work in.
    pub branch: BranchScratch<B>,
}

/// Keys and values of the layer at work behind those of a prefix, and their gradients, `[keys, kv_heads * head_dim]`; empty where
/// there is no prefix.
pub struct Joined<B: Backend> {
    /// Keys.
    pub keys: B::Owned,
    /// Values.
    pub values: B::Owned,
    /// The gradient of the keys.
    pub dkeys: B::Owned,
    /// The gradient of the values.
    pub dvalues: B::Owned,
}

/// What the head works in: one chunk of rows.
pub struct HeadScratch<B: Backend> {
    /// Rows that predict a trained token, `[rows, hidden]`.
    pub x: B::Owned,
    /// After the last norm, `[rows, hidden]`.
    pub normed: B::Owned,
    /// Its gradient, `[rows, hidden]`.
    pub dnormed: B::Owned,
    /// The gradient of `x`, `[rows, hidden]`.
    pub dx: B::Owned,
    /// Factors of the last norm, `[rows, 1]`.
    pub reciprocal: B::Owned,
    /// `[rows, vocabulary]`; their gradient afterwards.
    pub logits: B::Owned,
    /// `[rows, 1]`.
    pub losses: B::Owned,
    /// Rows of the head, widened.
    pub block: B::Owned,
    /// What the head's branch keeps.
    pub kept: B::Owned,
    /// `[rows, tokens whose rows are trained]`.
    pub few: B::Owned,
    /// Rows in a chunk.
    pub rows: usize,
    /// Rows of the head in a block; the whole vocabulary where it is read in place.
    pub block_rows: usize,
}

/// All buffers of a step.
pub struct Arena<B: Backend> {
    /// Tokens there is room for.
    pub tokens: usize,
    /// Input of each layer, and the last layer's output.
    pub inputs: Vec<B::Owned>,
    /// One for each layer.
    pub attended: Vec<Attended<B>>,
    /// One for each layer, or one for all.
    pub work: Vec<Work<B>>,
    /// What layers work in.
    pub scratch: Scratch<B>,
    /// What the head works in.
    pub head: HeadScratch<B>,
    /// The matrices of the layer at work, written out; empty where they are read in place.
    pub weights: [B::Owned; 7],
    /// The micro-batch.
    pub batch: B::Batch,
}

impl<B: Backend> Arena<B> {
    /// Reserves everything.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(backend: &B, sizes: &Sizes, recompute: Recompute) -> Result<Self> {
        let tokens = sizes.tokens;
        let rows = |columns: usize| backend.allocate(tokens * columns);
        let works = if recompute == Recompute::Layers { 1 } else { sizes.layers };
        let attended = || Ok(Attended { out: rows(sizes.queries)?, log_sum: rows(sizes.heads)? });
        Ok(Self {
            tokens,
            inputs: (0..=sizes.layers).map(|_| rows(sizes.hidden)).collect::<Result<_>>()?,
            attended: (0..sizes.layers).map(|_| attended()).collect::<Result<_>>()?,
            work: (0..works).map(|_| Work::new(backend, sizes)).collect::<Result<_>>()?,
            scratch: Scratch {
                normed: rows(sizes.hidden)?,
                dnormed: rows(sizes.hidden)?,
                gradient: rows(sizes.hidden)?,
                wide_a: rows(sizes.wide())?,
                wide_b: rows(sizes.wide())?,
                dk: rows(sizes.keys)?,
                dv: rows(sizes.keys)?,
                dk_normed: rows(sizes.normed_keys)?,
                fused: rows(sizes.fused)?,
                joined: Joined {
                    keys: rows(sizes.joined)?,
                    values: rows(sizes.joined)?,
                    dkeys: rows(sizes.joined)?,
                    dvalues: rows(sizes.joined)?,
                },
                branch: BranchScratch {
                    wide: rows(sizes.branch.wide)?,
                    narrow: rows(sizes.branch.narrow)?,
                    output: rows(sizes.branch.output)?,
                    fixed: each(sizes.branch.fixed, |length| backend.allocate(length))?,
                },
            },
            head: HeadScratch::new(backend, sizes)?,
            weights: each(sizes.weights, |length| backend.allocate(length))?,
            batch: backend.allocate_batch(BatchRoom {
                tokens,
                longest_span: sizes.max_length,
                widest: sizes.branch.wide,
                heads: sizes.heads,
            })?,
        })
    }
}

impl<B: Backend> Work<B> {
    fn new(backend: &B, sizes: &Sizes) -> Result<Self> {
        let rows = |columns: usize| backend.allocate(sizes.tokens * columns);
        Ok(Self {
            attention_norm: rows(1)?,
            q: rows(sizes.queries)?,
            k: rows(sizes.keys)?,
            v: rows(sizes.keys)?,
            middle: rows(sizes.hidden)?,
            query_key: QueryKey {
                q: rows(sizes.normed_queries)?,
                k: rows(sizes.normed_keys)?,
                q_norm: rows(sizes.normed_queries / sizes.head_dim)?,
                k_norm: rows(sizes.normed_keys / sizes.head_dim)?,
            },
            attention_output: Output { x: rows(sizes.normed_output)?, norm: rows(sizes.output_norm())? },
            mlp_output: Output { x: rows(sizes.normed_output)?, norm: rows(sizes.output_norm())? },
            mlp_norm: rows(1)?,
            gate: rows(sizes.intermediate)?,
            up: rows(sizes.intermediate)?,
            kept: each(sizes.kept, rows)?,
        })
    }
}

impl<B: Backend> HeadScratch<B> {
    fn new(backend: &B, sizes: &Sizes) -> Result<Self> {
        let rows = |columns: usize| backend.allocate(sizes.head_rows * columns);
        Ok(Self {
            x: rows(sizes.hidden)?,
            normed: rows(sizes.hidden)?,
            dnormed: rows(sizes.hidden)?,
            dx: rows(sizes.hidden)?,
            reciprocal: rows(1)?,
            logits: rows(sizes.vocabulary)?,
            losses: rows(1)?,
            block: backend.allocate(sizes.head_block * sizes.hidden)?,
            kept: rows(sizes.head_kept)?,
            few: rows(sizes.head_few)?,
            rows: sizes.head_rows,
            block_rows: if sizes.head_block == 0 { sizes.vocabulary } else { sizes.head_block },
        })
    }
}

/// Buffers of the given lengths.
fn each<T, const COUNT: usize>(
    lengths: [usize; COUNT],
    allocate: impl Fn(usize) -> Result<T>,
) -> Result<[T; COUNT]> {
    let all: Vec<T> = lengths.into_iter().map(allocate).collect::<Result<_>>()?;
    Ok(all.try_into().unwrap_or_else(|_| unreachable!("as many buffers as lengths")))
}
