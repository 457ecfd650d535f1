//! The operations that layers are written over.
//!
//! A backend owns memory and runs operations on strided [`View`]s of it. Every operation writes into views that the
//! caller hands in; none allocates. Layers never look into a buffer: the same layer code runs on slices of
//! host memory ([`cpu`]) and on an NVIDIA card's memory ([`cuda`]).
//!
//! Each planned slot of memory is a buffer of its own, so that the borrow checker sees which operation reads and
//! which writes it.

pub mod cpu;
pub mod cuda;
mod view;

use std::ops::{DerefMut, Range};

pub use view::{View, ViewMut};

use crate::{
    batch::{PackedBatch, Span},
    engine::GradientSink,
    error::Result,
    model::{EmbeddingView, Matrix},
    optim::{FlatState, FlatUpdate, Outcome},
    random::DropoutKey,
};

/// Shape of an attention operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Multiplies the scores, mostly `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Keys that a query sees, itself included; none sees all before it.
    pub window: Option<usize>,
    /// Bounds the scaled scores: `cap tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Attention to all keys before a query, scaled by `1 / sqrt(head_dim)`.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self { heads, kv_heads, head_dim, scale, window: None, soft_cap: None }
    }
}

/// `alpha op(a) op(b)`, where `op` transposes if the flag is set.
pub struct Product<'a, B: Backend> {
    /// Multiplies the product.
    pub alpha: f32,
    /// The left factor.
    pub a: View<'a, B>,
    /// Whether rows and columns of `a` change places.
    pub transpose_a: bool,
    /// The right factor.
    pub b: View<'a, B>,
    /// Whether rows and columns of `b` change places.
    pub transpose_b: bool,
}

/// What a buffer is for: a backend may keep activations in fewer bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Activations, their gradients, and weights written out for products.
    Activation,
    /// What must be f32: parameters and their gradients, logarithms, norms' factors, losses, angles.
    Exact,
}

/// What a branch of low rank adds to a frozen matrix: `scale b a`.
pub struct LowRank<'a, B: Backend> {
    /// Multiplies the product.
    pub scale: f32,
    /// `[rank, in]`.
    pub a: View<'a, B>,
    /// `[out, rank]`.
    pub b: View<'a, B>,
}

/// What of a span begins where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanStart {
    /// Its queries: rows of the batch.
    Queries,
    /// Its keys: rows of the keys and values.
    Keys,
}

impl SpanStart {
    /// The first row.
    pub fn of(self, span: &Span) -> usize {
        match self {
            Self::Queries => span.query_start,
            Self::Keys => span.key_start,
        }
    }
}

/// How large a micro-batch may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRoom {
    /// Tokens of all rows.
    pub tokens: usize,
    /// Keys of the longest span, virtual ones included.
    pub longest_span: usize,
    /// Columns of the widest matrix that dropout is applied to.
    pub widest: usize,
    /// Query heads.
    pub heads: usize,
}

/// Called when a range of the flat gradient is final.
pub type Ready<'a, B> = dyn FnMut(Range<usize>, &<B as Backend>::Buffer) + Send + 'a;

/// Tensor operations over caller-owned, strided memory. Numbers are `f32`, or what a backend keeps
/// [`Use::Activation`] in; operands of elementwise operations are of one kind.
///
/// Shapes are written `[rows, columns]`; `T` is the number of tokens of the micro-batch.
pub trait Backend: Sized + Send + Sync + 'static {
    /// Memory that views look into.
    type Buffer: ?Sized + Send + Sync;
    /// Memory that is owned.
    type Owned: DerefMut<Target = Self::Buffer> + Send + Sync;
    /// A micro-batch where operations can read it: ids, positions, spans, targets.
    type Batch: Send;
    /// Host memory that activations lie in between forward and backward, away from the memory that operations work in.
    type Aside: Send + Sync;

    /// Reserves `length` numbers, all 0.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn allocate(&self, length: usize, purpose: Use) -> Result<Self::Owned>;
    /// Reserves flat parameters, all 0: f32, and what products read them as, which [`Backend::upload`] refreshes.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn allocate_parameters(&self, length: usize) -> Result<Self::Owned> {
        self.allocate(length, Use::Exact)
    }
    /// Calls `build`, which reserves buffers and does no more, so that they lie in one piece of memory. It may be called
    /// twice: what the first call returns is dropped.
    ///
    /// # Errors
    /// What `build` returns, or when the memory cannot be had.
    fn in_one_piece<R>(&self, mut build: impl FnMut() -> Result<R>) -> Result<R> {
        build()
    }
    /// Reserves host memory for `length` numbers.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn allocate_aside(&self, length: usize, purpose: Use) -> Result<Self::Aside>;
    /// Copies `from`, which has no gaps, aside, beside other work. `from` must stay until [`Backend::await_aside`].
    fn put_aside(&self, from: View<'_, Self>, to: &mut Self::Aside);
    /// Copies what lies aside to `to`, which has no gaps, after the work that is queued and beside what comes later.
    /// `to` is there after [`Backend::await_aside`].
    fn bring_back(&self, from: &Self::Aside, to: ViewMut<'_, Self>);
    /// Whatever is queued from now on comes after the last copy to or from `aside`.
    fn await_aside(&self, aside: &Self::Aside);
    /// Notes in `state` what the losses `[rows, 1]` of a micro-batch add up to.
    fn add_losses(&self, losses: View<'_, Self>, state: &mut FlatState<Self>);
    /// The losses of the micro-batches noted since the last call, in their order. Waits for them.
    ///
    /// # Errors
    /// What failed before.
    fn losses(&self, state: &mut FlatState<Self>) -> Result<Vec<f64>>;
    /// Clips, updates, and sets the gradient that was used to 0. Nothing changes where the gradient's norm is not finite.
    fn update_flat(&self, update: &FlatUpdate<'_>, state: &mut FlatState<Self>);
    /// What the last update amounted to, and the losses noted since they were last asked for. Waits for them.
    ///
    /// # Errors
    /// What failed before.
    fn outcome(&self, state: &mut FlatState<Self>) -> Result<Outcome>;
    /// Reserves room for a micro-batch.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn allocate_batch(&self, room: BatchRoom) -> Result<Self::Batch>;
    /// Makes `from` readable by operations. It must fit the room reserved.
    fn load_batch(&self, from: &PackedBatch, into: &mut Self::Batch);
    /// Runs `work` where operations start without a hand-over between threads.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R;
    /// Waits until all operations are done, and says what failed since the last time. Operations themselves do not fail:
    /// after a failure they do nothing, until this tells of it.
    ///
    /// # Errors
    /// The first failure.
    fn settle(&self) -> Result<()>;
    /// Host numbers where operations can read them: themselves, or a copy in `place`, which is reserved at first.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn lend<'a>(&self, host: &'a [f32], place: &'a mut Option<Self::Owned>) -> Result<&'a Self::Buffer>;
    /// Calls `work` with a buffer that gradients are added to, and sees to it that they arrive in `host`, on top of what
    /// is there. `sink` hears of each final range. `place` and `staging` are reserved at first.
    ///
    /// # Errors
    /// When the memory cannot be had, or what `work` returns.
    fn with_gradient<R>(
        &self,
        host: &mut [f32],
        place: &mut Option<Self::Owned>,
        staging: &mut Vec<f32>,
        sink: &mut dyn GradientSink,
        work: impl FnOnce(&mut Self::Buffer, &mut Ready<'_, Self>) -> Result<R>,
    ) -> Result<R>;
    /// Copies host numbers into the front of `into`.
    fn upload(&self, from: &[f32], into: &mut Self::Buffer);
    /// Copies a view to the host, row after row.
    fn download(&self, from: View<'_, Self>, into: &mut [f32]);

    /// A frozen matrix as operations can read it: itself where it is dense and near, else written into `scratch`.
    fn frozen<'a>(&'a self, matrix: &Matrix<'a>, scratch: &'a mut Self::Buffer) -> View<'a, Self>;
    /// As [`Backend::frozen`], and with the update added where a backend does that while it writes the matrix out:
    /// whether it did. A layer then needs one product where it needed three.
    fn frozen_updated<'a>(
        &'a self,
        matrix: &Matrix<'a>,
        _update: &LowRank<'_, Self>,
        scratch: &'a mut Self::Buffer,
    ) -> (View<'a, Self>, bool) {
        (self.frozen(matrix, scratch), false)
    }
    /// A frozen vector as operations can read it.
    fn frozen_vector<'a>(&'a self, vector: &'a [f32]) -> View<'a, Self>;
    /// Rows `first .. first + rows` of a table as operations can read them: in place, or written into `scratch`.
    fn frozen_rows<'a>(
        &'a self,
        table: &EmbeddingView<'a>,
        first: usize,
        rows: usize,
        scratch: &'a mut Self::Buffer,
    ) -> View<'a, Self>;

    /// `c = alpha op(a) op(b) + beta c`, where `op` transposes if the flag is set. `beta` 0 never reads `c`.
    #[expect(clippy::too_many_arguments, reason = "the signature every BLAS has")]
    fn gemm(
        &self,
        alpha: f32,
        a: View<'_, Self>,
        transpose_a: bool,
        b: View<'_, Self>,
        transpose_b: bool,
        beta: f32,
        c: ViewMut<'_, Self>,
    );
    /// `c = first + second + beta c`: a layer and its branch. A backend may do both in one pass over `c`.
    fn gemm_pair(
        &self,
        first: Product<'_, Self>,
        second: Product<'_, Self>,
        beta: f32,
        mut c: ViewMut<'_, Self>,
    ) {
        let mut multiply = |product: Product<'_, Self>, beta| {
            let Product { alpha, a, transpose_a, b, transpose_b } = product;
            self.gemm(alpha, a, transpose_a, b, transpose_b, beta, c.reborrow());
        };
        multiply(first, beta);
        multiply(second, 1.0);
    }
    /// Backward of `y += scale p Bᵀ`: `dp = scale dy B` `[T, rank]` and `db += scale dyᵀ p` `[out, rank]`. `dy`
    /// `[T, out]`, `b` `[out, rank]`, `p` `[T, rank]`. A backend may do both in one pass over `dy`.
    fn low_rank_backward(
        &self,
        scale: f32,
        dy: View<'_, Self>,
        b: View<'_, Self>,
        p: View<'_, Self>,
        dp: ViewMut<'_, Self>,
        db: ViewMut<'_, Self>,
    ) {
        self.gemm(scale, dy, true, p, false, 1.0, db);
        self.gemm(scale, dy, false, b, false, 0.0, dp);
    }
    /// `to = value` everywhere.
    fn fill(&self, value: f32, to: ViewMut<'_, Self>);
    /// `to = from`.
    fn copy(&self, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// `to += from`.
    fn add(&self, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// `to *= factor`.
    fn scale(&self, factor: f32, to: ViewMut<'_, Self>);
    /// `to[t, :] += bias` for every row.
    fn add_bias(&self, bias: View<'_, Self>, to: ViewMut<'_, Self>);

    /// `out[t, :] = table[ids[t], :]`.
    fn gather_embedding(&self, batch: &Self::Batch, table: &EmbeddingView<'_>, out: ViewMut<'_, Self>);
    /// `out[i, :] = x[predicting[first + i], :]`, the rows that predict a trained token.
    fn gather_predicting(&self, batch: &Self::Batch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>);
    /// `out[predicting[first + i], :] = x[i, :]`.
    fn scatter_predicting(
        &self,
        batch: &Self::Batch,
        first: usize,
        x: View<'_, Self>,
        out: ViewMut<'_, Self>,
    );

    /// Writes the virtual tokens `from` `[count, columns]` to the front of every span of `to`: `to[start + i, :] = from[i, :]`.
    fn put_virtual(&self, batch: &Self::Batch, at: SpanStart, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// Adds up what lies at the front of every span of `from`, whose rows are keys of the batch, span by span:
    /// `to[i, :] += from[span.key_start + i, :]`. `to` `[count, columns]`.
    fn sum_virtual(&self, batch: &Self::Batch, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// Writes the rows of `from` `[T, columns]` behind the virtual keys of their span in `to` `[keys, columns]`.
    fn rows_to_keys(&self, batch: &Self::Batch, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// The reverse of [`Backend::rows_to_keys`]: `to` `[T, columns]` gets the keys that stand for rows.
    fn keys_to_rows(&self, batch: &Self::Batch, from: View<'_, Self>, to: ViewMut<'_, Self>);

    /// `out = x / sqrt(mean(x^2) + epsilon) * weight`; the factor of each row is kept in `reciprocal` `[T, 1]`.
    fn rms_norm(
        &self,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        epsilon: f32,
        out: ViewMut<'_, Self>,
        reciprocal: ViewMut<'_, Self>,
    );
    /// Adds to `dx` the gradient of [`Backend::rms_norm`] with respect to `x`.
    fn rms_norm_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    );
    /// Turns the two halves of every head of `x` by the angles of each token's position, in place.
    /// `table` `[positions, head_dim]` holds cosines, then sines. `backward` turns the other way.
    fn rope(
        &self,
        batch: &Self::Batch,
        head_dim: usize,
        table: View<'_, Self>,
        backward: bool,
        x: ViewMut<'_, Self>,
    );
    /// `out = silu(gate) * up`.
    fn swiglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>);
    /// Replaces `gate` and `up` by their gradients, and their product's gradient `dout` by the product itself, which
    /// what comes after it wants: one pass instead of two.
    fn swiglu_backward(&self, dout: ViewMut<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>);
    /// `out = gelu(gate) * up`, with the approximation of gelu by tanh.
    fn geglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>);
    /// As [`Backend::swiglu_backward`], of [`Backend::geglu`].
    fn geglu_backward(&self, dout: ViewMut<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>);
    /// `x = cap tanh(x / cap)`.
    fn soft_cap(&self, cap: f32, x: ViewMut<'_, Self>);

    /// Causal attention inside the batch's spans, bounded and within the window that `shape` says; `log_sum` `[T, heads]` keeps the logarithm of each row's sum.
    /// `k` and `v` may be a cache with rows of their own.
    #[expect(clippy::too_many_arguments, reason = "three inputs, two outputs, batch and shape")]
    fn attention(
        &self,
        batch: &Self::Batch,
        shape: AttentionShape,
        q: View<'_, Self>,
        k: View<'_, Self>,
        v: View<'_, Self>,
        out: ViewMut<'_, Self>,
        log_sum: ViewMut<'_, Self>,
    );
    /// Gradients of [`Backend::attention`]; `dq`, `dk`, `dv` are overwritten.
    #[expect(clippy::too_many_arguments, reason = "six inputs, three outputs, batch and shape")]
    fn attention_backward(
        &self,
        batch: &Self::Batch,
        shape: AttentionShape,
        q: View<'_, Self>,
        k: View<'_, Self>,
        v: View<'_, Self>,
        out: View<'_, Self>,
        log_sum: View<'_, Self>,
        dout: View<'_, Self>,
        dq: ViewMut<'_, Self>,
        dk: ViewMut<'_, Self>,
        dv: ViewMut<'_, Self>,
    );

    /// `out = x * mask`, where the mask is 0 or `1 / (1 - p)`, a pure function of key, sample and position.
    fn dropout(
        &self,
        batch: &Self::Batch,
        key: DropoutKey,
        p: f32,
        x: View<'_, Self>,
        out: ViewMut<'_, Self>,
    );
    /// `dx += dout * mask`, with the mask of [`Backend::dropout`].
    fn dropout_backward(
        &self,
        batch: &Self::Batch,
        key: DropoutKey,
        p: f32,
        dout: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    );

    /// `out[t, j] = alpha x[t, j] factors[0, j] + beta out[t, j]`; `beta` 0 never reads `out`.
    fn scale_columns(
        &self,
        alpha: f32,
        x: View<'_, Self>,
        factors: View<'_, Self>,
        beta: f32,
        out: ViewMut<'_, Self>,
    );
    /// `out[0, j] += alpha sum over t of x[t, j]`.
    fn column_sum(&self, alpha: f32, x: View<'_, Self>, out: ViewMut<'_, Self>);
    /// `out[0, j] += sum over t of x[t, j] y[t, j]`.
    fn column_dot(&self, x: View<'_, Self>, y: View<'_, Self>, out: ViewMut<'_, Self>);
    /// `out[0, i] = alpha sum over j of x[i, j] y[i, j] + beta out[0, i]`; `beta` 0 never reads `out`.
    fn row_dot(&self, alpha: f32, x: View<'_, Self>, y: View<'_, Self>, beta: f32, out: ViewMut<'_, Self>);
    /// `to = 1 / sqrt(from)`.
    fn reciprocal_root(&self, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// Adds to `dweight` `[1, features]` the gradient of [`Backend::rms_norm`] with respect to `weight`:
    /// `sum over t of dout[t, j] x[t, j] reciprocal[t]`.
    fn rms_norm_weight_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dweight: ViewMut<'_, Self>,
    );
    /// `out[t, :] = table[ids[t], :]`, or `table[:, ids[t]]` if `columns` is set.
    fn gather_ids(&self, batch: &Self::Batch, table: View<'_, Self>, columns: bool, out: ViewMut<'_, Self>);
    /// `table[ids[t], :] += from[t, :]`, or `table[:, ids[t]]` if `columns` is set.
    fn scatter_ids(&self, batch: &Self::Batch, from: View<'_, Self>, columns: bool, table: ViewMut<'_, Self>);
    /// `out[t, :] = row[0, :]` where `ids[t]` is `id`; other rows stay.
    fn set_rows_of(&self, batch: &Self::Batch, id: u32, row: View<'_, Self>, out: ViewMut<'_, Self>);
    /// `row[0, :] += sum of from[t, :]` over all t where `ids[t]` is `id`.
    fn sum_rows_of(&self, batch: &Self::Batch, id: u32, from: View<'_, Self>, row: ViewMut<'_, Self>);

    /// Writes each row's cross-entropy of `logits` `[rows, vocabulary]` against `targets[first ..]` to `losses`
    /// `[rows, 1]`, and overwrites the logits by its gradient where `gradient` is set.
    /// With `soft_cap` the loss is that of `cap tanh(logit / cap)`, and so is the gradient of `logits`.
    fn cross_entropy(
        &self,
        batch: &Self::Batch,
        first: usize,
        gradient: bool,
        soft_cap: Option<f32>,
        logits: ViewMut<'_, Self>,
        losses: ViewMut<'_, Self>,
    );
}
