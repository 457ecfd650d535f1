//! The attention half of a decoder layer: `middle = x + O(attend(rope(Q n), rope(K n), V n))`, `n = norm(x)`.
//!
//! Attention is causal and stays inside a segment. Its backward pass needs x, the norm's factors, rotated q and k, v,
//! attention's output and the logarithm of each row's sum. Everything but the last two can be computed again by
//! [`Attention::project`] and [`Attention::output`], without attending again.

use super::{linear::Linear, rms_norm::RmsNorm, rope::RopeTable};
use crate::{
    backend::{AttentionShape, Backend, View, ViewMut},
    plan::{Attended, Scratch, Work},
};

/// Weights and shape of an attention block.
pub struct Attention<'a, B: Backend> {
    /// The norm ahead.
    pub norm: RmsNorm<'a, B>,
    /// Queries.
    pub q: Linear<'a, B>,
    /// Keys.
    pub k: Linear<'a, B>,
    /// Values.
    pub v: Linear<'a, B>,
    /// Output.
    pub o: Linear<'a, B>,
    /// Heads.
    pub shape: AttentionShape,
    /// Angles.
    pub rope: &'a RopeTable<B>,
}

impl<B: Backend> Attention<'_, B> {
    /// Features of all query heads.
    fn query_features(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    /// Features of all key heads.
    fn key_features(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Whether a part of this block is trained.
    pub fn is_adapted(&self) -> bool {
        self.o.is_trained() || self.inputs_adapted()
    }

    fn inputs_adapted(&self) -> bool {
        self.q.is_trained() || self.k.is_trained() || self.v.is_trained()
    }

    /// Norm, q, k, v, rotation; `x` `[T, hidden]`.
    pub fn project(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        work: &mut Work<B>,
        scratch: &mut Scratch<B>,
    ) {
        let (tokens, hidden) = (x.rows, x.columns);
        let (queries, keys) = (self.query_features(), self.key_features());
        let normed = ViewMut::<B>::new(&mut scratch.normed, tokens, hidden);
        self.norm.forward(backend, x, normed, ViewMut::<B>::new(&mut work.attention_norm, tokens, 1));
        let normed = View::<B>::new(&scratch.normed, tokens, hidden);
        let [q_kept, k_kept, v_kept, ..] = &mut work.kept;
        let branch = &mut scratch.branch;
        let q = ViewMut::<B>::new(&mut work.q, tokens, queries);
        self.q.forward(backend, batch, normed, false, q, q_kept, branch);
        let k = ViewMut::<B>::new(&mut work.k, tokens, keys);
        self.k.forward(backend, batch, normed, false, k, k_kept, branch);
        let v = ViewMut::<B>::new(&mut work.v, tokens, keys);
        self.v.forward(backend, batch, normed, false, v, v_kept, branch);
        self.rope.forward(backend, batch, ViewMut::<B>::new(&mut work.q, tokens, queries));
        self.rope.forward(backend, batch, ViewMut::<B>::new(&mut work.k, tokens, keys));
    }

    /// Attends over the keys and values of the batch itself.
    pub fn attend(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &Work<B>,
        attended: &mut Attended<B>,
    ) {
        let keys = View::<B>::new(&work.k, tokens, self.key_features());
        let values = View::<B>::new(&work.v, tokens, self.key_features());
        self.attend_to(backend, batch, tokens, work, keys, values, attended);
    }

    /// Attends over `keys` and `values`, such as those of a cache.
    #[expect(clippy::too_many_arguments, reason = "queries, keys, values and where the result goes")]
    pub fn attend_to(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &Work<B>,
        keys: View<'_, B>,
        values: View<'_, B>,
        attended: &mut Attended<B>,
    ) {
        let q = View::<B>::new(&work.q, tokens, self.query_features());
        let out = ViewMut::<B>::new(&mut attended.out, tokens, self.query_features());
        let log_sum = ViewMut::<B>::new(&mut attended.log_sum, tokens, self.shape.heads);
        backend.attention(batch, self.shape, q, keys, values, out, log_sum);
    }

    /// `middle = x + O(attended)`.
    pub fn output(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        attended: &Attended<B>,
        work: &mut Work<B>,
        scratch: &mut Scratch<B>,
    ) {
        let (tokens, hidden) = (x.rows, x.columns);
        backend.copy(x, ViewMut::<B>::new(&mut work.middle, tokens, hidden));
        let out = View::<B>::new(&attended.out, tokens, self.query_features());
        let middle = ViewMut::<B>::new(&mut work.middle, tokens, hidden);
        let [_, _, _, o_kept, ..] = &mut work.kept;
        self.o.forward(backend, batch, out, true, middle, o_kept, &mut scratch.branch);
    }

    /// Turns `scratch.gradient` from that of `middle` into that of `x`, and adds the branches' gradients to `flat`.
    /// Without `input_gradient` nothing below this block is trained: the gradient of x is not made.
    #[expect(clippy::too_many_arguments, reason = "what the forward pass kept, and where gradients go")]
    pub fn backward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        attended: &Attended<B>,
        work: &mut Work<B>,
        scratch: &mut Scratch<B>,
        flat: &mut B::Buffer,
        input_gradient: bool,
    ) {
        let (tokens, hidden) = (x.rows, x.columns);
        let (queries, keys) = (self.query_features(), self.key_features());
        let attend_gradient = input_gradient || self.inputs_adapted();
        let [q_kept, k_kept, v_kept, o_kept, ..] = &work.kept;

        let out = View::<B>::new(&attended.out, tokens, queries);
        let dmiddle = View::<B>::new(&scratch.gradient, tokens, hidden);
        let dout = attend_gradient.then(|| ViewMut::<B>::new(&mut scratch.wide, tokens, queries));
        self.o.backward(backend, batch, out, o_kept, dmiddle, false, dout, flat, &mut scratch.branch);
        if !attend_gradient {
            return;
        }

        backend.attention_backward(
            batch,
            self.shape,
            View::<B>::new(&work.q, tokens, queries),
            View::<B>::new(&work.k, tokens, keys),
            View::<B>::new(&work.v, tokens, keys),
            out,
            View::<B>::new(&attended.log_sum, tokens, self.shape.heads),
            View::<B>::new(&scratch.wide, tokens, queries),
            ViewMut::<B>::new(&mut scratch.dq, tokens, queries),
            ViewMut::<B>::new(&mut scratch.dk, tokens, keys),
            ViewMut::<B>::new(&mut scratch.dv, tokens, keys),
        );
        self.rope.backward(backend, batch, ViewMut::<B>::new(&mut scratch.dq, tokens, queries));
        self.rope.backward(backend, batch, ViewMut::<B>::new(&mut scratch.dk, tokens, keys));

        if self.inputs_adapted() {
            let normed = ViewMut::<B>::new(&mut scratch.normed, tokens, hidden);
            self.norm.forward(backend, x, normed, ViewMut::<B>::new(&mut work.attention_norm, tokens, 1));
        }
        let normed = View::<B>::new(&scratch.normed, tokens, hidden);
        let parts = [
            (&self.v, v_kept, View::<B>::new(&scratch.dv, tokens, keys)),
            (&self.k, k_kept, View::<B>::new(&scratch.dk, tokens, keys)),
            (&self.q, q_kept, View::<B>::new(&scratch.dq, tokens, queries)),
        ];
        for (index, (linear, kept, dy)) in parts.into_iter().enumerate() {
            let dnormed = input_gradient.then(|| ViewMut::<B>::new(&mut scratch.dnormed, tokens, hidden));
            linear.backward(backend, batch, normed, kept, dy, index > 0, dnormed, flat, &mut scratch.branch);
        }
        if input_gradient {
            let dnormed = View::<B>::new(&scratch.dnormed, tokens, hidden);
            let reciprocal = View::<B>::new(&work.attention_norm, tokens, 1);
            self.norm.backward(
                backend,
                dnormed,
                x,
                reciprocal,
                ViewMut::<B>::new(&mut scratch.gradient, tokens, hidden),
            );
        }
    }
}
