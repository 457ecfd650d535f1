//! The buffers of a step, reserved once and used by every step.

use super::{Recompute, Sizes};
use crate::{
    adapter::BranchScratch,
    backend::{Backend, BatchRoom, Use},
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
    /// Factors of the second norm, `[T, 1]`.
    pub mlp_norm: B::Owned,
    /// `[T, intermediate]`; its gradient after the backward pass.
    pub gate: B::Owned,
    /// `[T, intermediate]`; its gradient after the backward pass.
    pub up: B::Owned,
    /// What each branch keeps, in the order of [`crate::model::Projection::ALL`].
    pub kept: [B::Owned; 7],
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
    /// What branches work in.
    pub branch: BranchScratch<B>,
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
    /// The loss of each predicting row of the micro-batch, `[T, 1]`.
    pub losses: B::Owned,
    /// The same on the host, to be summed.
    pub read_losses: Vec<f32>,
    /// Rows of the head, widened.
    pub block: B::Owned,
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
        let rows = |columns: usize| backend.allocate(tokens * columns, Use::Activation);
        let exact = |columns: usize| backend.allocate(tokens * columns, Use::Exact);
        let works = if recompute == Recompute::Layers { 1 } else { sizes.layers };
        let attended = || Ok(Attended { out: rows(sizes.queries)?, log_sum: exact(sizes.heads)? });
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
                branch: BranchScratch {
                    wide: rows(sizes.branch.wide)?,
                    narrow: rows(sizes.branch.narrow)?,
                    output: rows(sizes.branch.output)?,
                    fixed: backend.allocate(sizes.branch.fixed, Use::Exact)?,
                },
            },
            head: HeadScratch::new(backend, sizes)?,
            weights: each(sizes.weights, |length| backend.allocate(length, Use::Activation))?,
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
        let rows = |columns: usize| backend.allocate(sizes.tokens * columns, Use::Activation);
        let exact = |columns: usize| backend.allocate(sizes.tokens * columns, Use::Exact);
        Ok(Self {
            attention_norm: exact(1)?,
            q: rows(sizes.queries)?,
            k: rows(sizes.keys)?,
            v: rows(sizes.keys)?,
            middle: rows(sizes.hidden)?,
            mlp_norm: exact(1)?,
            gate: rows(sizes.intermediate)?,
            up: rows(sizes.intermediate)?,
            kept: each(sizes.kept, rows)?,
        })
    }
}

impl<B: Backend> HeadScratch<B> {
    fn new(backend: &B, sizes: &Sizes) -> Result<Self> {
        let rows = |columns: usize| backend.allocate(sizes.head_rows * columns, Use::Activation);
        Ok(Self {
            x: rows(sizes.hidden)?,
            normed: rows(sizes.hidden)?,
            dnormed: rows(sizes.hidden)?,
            dx: rows(sizes.hidden)?,
            reciprocal: backend.allocate(sizes.head_rows, Use::Exact)?,
            logits: rows(sizes.vocabulary)?,
            losses: backend.allocate(sizes.tokens, Use::Exact)?,
            read_losses: Vec::with_capacity(sizes.tokens),
            block: backend.allocate(sizes.head_block * sizes.hidden, Use::Activation)?,
            rows: sizes.head_rows,
            block_rows: if sizes.head_block == 0 { sizes.vocabulary } else { sizes.head_block },
        })
    }
}

/// Seven buffers of the given lengths.
fn each<T>(lengths: [usize; 7], allocate: impl Fn(usize) -> Result<T>) -> Result<[T; 7]> {
    let [q, k, v, o, gate, up, down] = lengths;
    Ok([
        allocate(q)?,
        allocate(k)?,
        allocate(v)?,
        allocate(o)?,
        allocate(gate)?,
        allocate(up)?,
        allocate(down)?,
    ])
}
