//! The buffers of a step, reserved once and used by every step.

use super::{Levels, Sizes};
use crate::{
    adapter::BranchScratch,
    backend::{Backend, BatchRoom, Use},
    error::Result,
};

/// One item of a list to read and another to write.
///
/// # Panics
/// Where both are one: a defect of the caller.
pub fn two<T>(all: &mut [T], read: usize, write: usize) -> (&T, &mut T) {
    assert_ne!(read, write, "what is read is not what is written");
    let (low, high) = all.split_at_mut(read.max(write));
    if read < write { (&low[read], &mut high[0]) } else { (&high[0], &mut low[write]) }
}

/// Attention's output, kept from forward to backward.
pub struct Attended<B: Backend> {
    /// `[T, heads * head_dim]`.
    pub out: B::Owned,
    /// Logarithm of each row's sum, `[T, heads]`.
    pub log_sum: B::Owned,
}

/// A layer's input and attention's output in host memory.
pub struct Boundary<B: Backend> {
    /// `[T, hidden]`.
    pub input: B::Aside,
    /// `[T, heads * head_dim]`.
    pub out: B::Aside,
    /// `[T, heads]`.
    pub log_sum: B::Aside,
}

/// The outputs of gate and up; kept, or computed again.
pub struct Expansion<B: Backend> {
    /// `[T, intermediate]`; its gradient after the backward pass.
    pub gate: B::Owned,
    /// `[T, intermediate]`; its gradient after the backward pass.
    pub up: B::Owned,
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
    /// `[T, intermediate or queries]`: the activated product and its gradient, the gradient of attention's output; and a
    /// chunk of logits.
    pub wide: B::Owned,
    /// The gradient of the queries, `[T, heads * head_dim]`; that of the last norm's output.
    pub dq: B::Owned,
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

/// What the head works in beside the layers' scratch: one chunk of rows.
pub struct HeadMemory<B: Backend> {
    /// The gradient of the chunk's rows, `[rows, hidden]`.
    pub dx: B::Owned,
    /// Factors of the last norm, `[rows, 1]`.
    pub reciprocal: B::Owned,
    /// The loss of each predicting row of the micro-batch, `[T, 1]`.
    pub losses: B::Owned,
    /// The same on the host, to be summed.
    pub read_losses: Vec<f32>,
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

/// What the head works in: one chunk of rows.
pub struct HeadScratch<'a, B: Backend> {
    /// Rows that predict a trained token, `[rows, hidden]`.
    pub x: &'a mut B::Buffer,
    /// After the last norm, `[rows, hidden]`.
    pub normed: &'a mut B::Buffer,
    /// Its gradient, `[rows, hidden]`.
    pub dnormed: &'a mut B::Buffer,
    /// `[rows, vocabulary]`; their gradient afterwards.
    pub logits: &'a mut B::Buffer,
    /// The rest.
    pub own: &'a mut HeadMemory<B>,
}

/// All buffers of a step.
pub struct Arena<B: Backend> {
    /// Tokens there is room for.
    pub tokens: usize,
    /// Which layers keep what.
    pub levels: Levels,
    /// Input of each layer, and the last layer's output, by [`Levels::boundary_place`].
    pub inputs: Vec<B::Owned>,
    /// By [`Levels::boundary_place`].
    pub attended: Vec<Attended<B>>,
    /// By [`Levels::work_place`].
    pub work: Vec<Work<B>>,
    /// By [`Levels::expansion_place`].
    pub expansions: Vec<Expansion<B>>,
    /// Boundaries that lie in host memory, by layer.
    pub aside: Vec<Boundary<B>>,
    /// What layers work in.
    pub scratch: Scratch<B>,
    /// What the head works in.
    pub head: HeadMemory<B>,
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
    pub fn new(backend: &B, sizes: &Sizes, levels: Levels) -> Result<Self> {
        let mut arena = backend.in_one_piece(|| Self::in_place(backend, sizes, levels))?;
        for _ in 0..levels.aside {
            let rows = |columns, purpose| backend.allocate_aside(sizes.tokens * columns, purpose);
            arena.aside.push(Boundary {
                input: rows(sizes.hidden, Use::Activation)?,
                out: rows(sizes.queries, Use::Activation)?,
                log_sum: rows(sizes.heads, Use::Exact)?,
            });
        }
        Ok(arena)
    }

    fn in_place(backend: &B, sizes: &Sizes, levels: Levels) -> Result<Self> {
        let tokens = sizes.tokens;
        let rows = |columns: usize| backend.allocate(tokens * columns, Use::Activation);
        let exact = |columns: usize| backend.allocate(tokens * columns, Use::Exact);
        let attended = || Ok(Attended { out: rows(sizes.queries)?, log_sum: exact(sizes.heads)? });
        let expansion = || Ok(Expansion { gate: rows(sizes.intermediate)?, up: rows(sizes.intermediate)? });
        let layers = levels.layers();
        let last = layers.saturating_sub(1);
        let boundaries = if layers == 0 { 0 } else { levels.shared_boundaries() + layers - levels.aside };
        let works = if layers == 0 { 0 } else { levels.work_place(last) + 1 };
        let expansions = if layers == 0 { 0 } else { levels.expansion_place(last) + 1 };
        Ok(Self {
            tokens,
            levels,
            inputs: (0..=boundaries).map(|_| rows(sizes.hidden)).collect::<Result<_>>()?,
            attended: (0..boundaries).map(|_| attended()).collect::<Result<_>>()?,
            work: (0..works).map(|_| Work::new(backend, sizes)).collect::<Result<_>>()?,
            expansions: (0..expansions).map(|_| expansion()).collect::<Result<_>>()?,
            aside: Vec::with_capacity(levels.aside),
            scratch: Scratch {
                normed: rows(sizes.hidden)?,
                dnormed: rows(sizes.hidden)?,
                gradient: rows(sizes.hidden)?,
                wide: backend.allocate(sizes.wide(), Use::Activation)?,
                dq: backend.allocate(sizes.middle(), Use::Activation)?,
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
                    fixed: each(sizes.branch.fixed, |length| backend.allocate(length, Use::Exact))?,
                },
            },
            head: HeadMemory::new(backend, sizes)?,
            weights: each(sizes.weights, |length| backend.allocate(length, Use::Activation))?,
            batch: backend.allocate_batch(BatchRoom {
                tokens,
                longest_span: sizes.max_length,
                widest: sizes.branch.wide,
                heads: sizes.heads,
            })?,
        })
    }

    /// What the head works in: between the last layer's forward and its backward pass the layers' scratch is free.
    pub fn head(&mut self) -> HeadScratch<'_, B> {
        Self::head_scratch(&mut self.scratch, &mut self.head).0
    }

    /// As [`Arena::head`], of its parts, with what branches work in and the gradient of the residual stream.
    pub fn head_scratch<'a>(
        scratch: &'a mut Scratch<B>,
        own: &'a mut HeadMemory<B>,
    ) -> (HeadScratch<'a, B>, &'a mut BranchScratch<B>, &'a mut B::Buffer) {
        let Scratch { normed, dnormed, gradient, wide, dq, branch, .. } = scratch;
        (HeadScratch { x: normed, normed: dnormed, dnormed: dq, logits: wide, own }, branch, gradient)
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
            query_key: QueryKey {
                q: rows(sizes.normed_queries)?,
                k: rows(sizes.normed_keys)?,
                q_norm: exact(sizes.normed_queries / sizes.head_dim)?,
                k_norm: exact(sizes.normed_keys / sizes.head_dim)?,
            },
            attention_output: Output { x: rows(sizes.normed_output)?, norm: exact(sizes.output_norm())? },
            mlp_output: Output { x: rows(sizes.normed_output)?, norm: exact(sizes.output_norm())? },
            mlp_norm: exact(1)?,
            kept: each(sizes.kept, rows)?,
        })
    }
}

impl<B: Backend> HeadMemory<B> {
    fn new(backend: &B, sizes: &Sizes) -> Result<Self> {
        let activation = |length| backend.allocate(length, Use::Activation);
        Ok(Self {
            dx: activation(sizes.head_rows * sizes.hidden)?,
            reciprocal: backend.allocate(sizes.head_rows, Use::Exact)?,
            losses: backend.allocate(sizes.tokens, Use::Exact)?,
            read_losses: Vec::with_capacity(sizes.tokens),
            block: activation(sizes.head_block * sizes.hidden)?,
            kept: activation(sizes.head_rows * sizes.head_kept)?,
            few: activation(sizes.head_rows * sizes.head_few)?,
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
