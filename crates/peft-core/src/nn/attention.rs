//! The attention half of a decoder layer: `middle = x + O(attend(rope(Q n), rope(K n), V n))`, `n = norm(x)`.
//!
//! Where a family has them, q and k pass a norm by head ahead of rotation, and O's output a norm ahead of the sum.
//! Attention is causal and stays inside a segment. Its backward pass needs x, the norm's factors, rotated q and k, v,
//! attention's output and the logarithm of each row's sum. Everything but the last two can be computed again by
//! [`Attention::project`] and [`Attention::output`], without attending again.

use super::{inputs::Inputs, linear::Linear, rms_norm::RmsNorm, rope::RopeTable};
use crate::{
    backend::{AttentionShape, Backend, SpanStart, View, ViewMut},
    plan::{Attended, Joined, Scratch, Work},
};

/// Weights and shape of an attention block.
pub struct Attention<'a, B: Backend> {
    /// The norm ahead.
    pub norm: RmsNorm<'a, B>,
    /// Queries, keys and values.
    pub inputs: Inputs<'a, B, 3>,
    /// Output.
    pub o: Linear<'a, B>,
    /// The norms of each head's queries and keys.
    pub query_key_norms: Option<[RmsNorm<'a, B>; 2]>,
    /// The norm of the output.
    pub output_norm: Option<RmsNorm<'a, B>>,
    /// Heads.
    pub shape: AttentionShape,
    /// Angles.
    pub rope: &'a RopeTable<B>,
    /// Trained keys and values ahead of those of every span.
    pub prefix: Option<Prefix<'a, B>>,
}

/// Keys and values ahead of those of every span: not rotated, the same for all spans.
pub struct Prefix<'a, B: Backend> {
    /// `[count, kv_heads * head_dim]`.
    pub keys: View<'a, B>,
    /// `[count, kv_heads * head_dim]`.
    pub values: View<'a, B>,
    /// Keys of the batch, these of every span included.
    pub rows: usize,
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
        let norms = self.norm.is_trained()
            || self.heads_normed()
            || self.output_norm.as_ref().is_some_and(RmsNorm::is_trained);
        norms || self.o.is_trained() || self.inputs_adapted() || self.prefix.is_some()
    }

    /// Whether a norm of queries or keys is trained.
    fn heads_normed(&self) -> bool {
        self.query_key_norms.as_ref().is_some_and(|norms| norms.iter().any(RmsNorm::is_trained))
    }

    fn inputs_adapted(&self) -> bool {
        self.inputs.is_trained()
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
        let (q, k) = match &self.query_key_norms {
            None => (&mut work.q, &mut work.k),
            Some(_) => (&mut work.query_key.q, &mut work.query_key.k),
        };
        let parts = [
            (ViewMut::<B>::new(q, tokens, queries), q_kept),
            (ViewMut::<B>::new(k, tokens, keys), k_kept),
            (ViewMut::<B>::new(&mut work.v, tokens, keys), v_kept),
        ];
        self.inputs.forward(backend, batch, normed, parts, &mut scratch.fused, &mut scratch.branch);
        if let Some([query_norm, key_norm]) = &self.query_key_norms {
            let (dim, kept) = (self.shape.head_dim, &mut work.query_key);
            let by_head = |norm: &RmsNorm<'_, B>, heads, x: &B::Buffer, y, reciprocal| {
                let rows = tokens * heads;
                let y = ViewMut::<B>::new(y, rows, dim);
                norm.forward(
                    backend,
                    View::<B>::new(x, rows, dim),
                    y,
                    ViewMut::<B>::new(reciprocal, rows, 1),
                );
            };
            by_head(query_norm, self.shape.heads, &kept.q, &mut work.q, &mut kept.q_norm);
            by_head(key_norm, self.shape.kv_heads, &kept.k, &mut work.k, &mut kept.k_norm);
        }
        self.rope.forward(backend, batch, ViewMut::<B>::new(&mut work.q, tokens, queries));
        self.rope.forward(backend, batch, ViewMut::<B>::new(&mut work.k, tokens, keys));
    }

    /// Attends over the keys and values of the batch itself, behind those of the prefix.
    pub fn attend(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &Work<B>,
        joined: &mut Joined<B>,
        attended: &mut Attended<B>,
    ) {
        let features = self.key_features();
        if let Some(prefix) = &self.prefix {
            self.join(backend, batch, tokens, prefix, work, joined);
            let keys = View::<B>::new(&joined.keys, prefix.rows, features);
            let values = View::<B>::new(&joined.values, prefix.rows, features);
            return self.attend_to(backend, batch, tokens, work, keys, values, attended);
        }
        let keys = View::<B>::new(&work.k, tokens, features);
        let values = View::<B>::new(&work.v, tokens, features);
        self.attend_to(backend, batch, tokens, work, keys, values, attended);
    }

    /// Lays the prefix ahead of the keys and values of every span.
    fn join(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        prefix: &Prefix<'_, B>,
        work: &Work<B>,
        joined: &mut Joined<B>,
    ) {
        let features = self.key_features();
        let parts = [(prefix.keys, &work.k, &mut joined.keys), (prefix.values, &work.v, &mut joined.values)];
        for (ahead, own, to) in parts {
            backend.put_virtual(batch, SpanStart::Keys, ahead, ViewMut::<B>::new(to, prefix.rows, features));
            let own = View::<B>::new(own, tokens, features);
            backend.rows_to_keys(batch, own, ViewMut::<B>::new(to, prefix.rows, features));
        }
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
        let branch = &mut scratch.branch;
        let Some(norm) = &self.output_norm else {
            return self.o.forward(backend, batch, out, true, middle, o_kept, branch);
        };
        let y = ViewMut::<B>::new(&mut work.attention_output.x, tokens, hidden);
        self.o.forward(backend, batch, out, false, y, o_kept, branch);
        norm.add(backend, &mut work.attention_output, &mut scratch.normed, middle);
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
        let into_norm = input_gradient || self.norm.is_trained();
        let attend_gradient =
            into_norm || self.heads_normed() || self.inputs_adapted() || self.prefix.is_some();
        let [q_kept, k_kept, v_kept, o_kept, ..] = &work.kept;

        let out = View::<B>::new(&attended.out, tokens, queries);
        let doutput = match &self.output_norm {
            None => &scratch.gradient,
            Some(norm) => {
                let dmiddle = View::<B>::new(&scratch.gradient, tokens, hidden);
                norm.add_backward(backend, dmiddle, &work.attention_output, &mut scratch.dnormed, flat);
                &scratch.dnormed
            }
        };
        let doutput = View::<B>::new(doutput, tokens, hidden);
        let dout = attend_gradient.then(|| ViewMut::<B>::new(&mut scratch.wide, tokens, queries));

        self.o.backward(backend, batch, out, o_kept, doutput, false, dout, flat, &mut scratch.branch);
        if !attend_gradient {
            return;
        }

        match &self.prefix {
            Some(prefix) => {
                self.attend_backward_joined(backend, batch, tokens, prefix, attended, work, scratch, flat);
            }
            None => {
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
            }
        }
        self.rope.backward(backend, batch, ViewMut::<B>::new(&mut scratch.dq, tokens, queries));
        self.rope.backward(backend, batch, ViewMut::<B>::new(&mut scratch.dk, tokens, keys));
        let (dq, dk) = match &self.query_key_norms {
            None => (&scratch.dq, &scratch.dk),
            Some([query_norm, key_norm]) => {
                let (kept, shape) = (&work.query_key, self.shape);
                let (dim, heads) =
                    (shape.head_dim, [shape.heads, shape.kv_heads].map(|heads| heads * tokens));
                let parts = [
                    (query_norm, heads[0], &scratch.dq, &kept.q, &kept.q_norm, &mut scratch.wide),
                    (key_norm, heads[1], &scratch.dk, &kept.k, &kept.k_norm, &mut scratch.dk_normed),
                ];
                for (norm, rows, dy, x, factor, dx) in parts {
                    let mut dx = ViewMut::<B>::new(dx, rows, dim);
                    backend.fill(0.0, dx.reborrow());
                    let (dy, x) = (View::<B>::new(dy, rows, dim), View::<B>::new(x, rows, dim));
                    norm.backward(backend, dy, x, View::<B>::new(factor, rows, 1), dx, flat);
                }
                (&scratch.wide, &scratch.dk_normed)
            }
        };

        if self.inputs_adapted() {
            let normed = ViewMut::<B>::new(&mut scratch.normed, tokens, hidden);
            self.norm.forward(backend, x, normed, ViewMut::<B>::new(&mut work.attention_norm, tokens, 1));
        }
        let normed = View::<B>::new(&scratch.normed, tokens, hidden);
        let parts = [
            (View::<B>::new(dq, tokens, queries), q_kept),
            (View::<B>::new(dk, tokens, keys), k_kept),
            (View::<B>::new(&scratch.dv, tokens, keys), v_kept),
        ];
        let dnormed = into_norm.then(|| ViewMut::<B>::new(&mut scratch.dnormed, tokens, hidden));
        let (fused, branch) = (&mut scratch.fused, &mut scratch.branch);
        self.inputs.backward(backend, batch, normed, parts, dnormed, fused, flat, branch);
        if into_norm {
            let dnormed = View::<B>::new(&scratch.dnormed, tokens, hidden);
            let reciprocal = View::<B>::new(&work.attention_norm, tokens, 1);
            self.norm.backward(
                backend,
                dnormed,
                x,
                reciprocal,
                ViewMut::<B>::new(&mut scratch.gradient, tokens, hidden),
                flat,
            );
        }
    }

    /// The backward pass of attention behind a prefix, whose gradient is summed over all spans.
    #[expect(clippy::too_many_arguments, reason = "what the forward pass kept, and where gradients go")]
    fn attend_backward_joined(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        prefix: &Prefix<'_, B>,
        attended: &Attended<B>,
        work: &Work<B>,
        scratch: &mut Scratch<B>,
        flat: &mut B::Buffer,
    ) {
        let (queries, features, rows) = (self.query_features(), self.key_features(), prefix.rows);
        self.join(backend, batch, tokens, prefix, work, &mut scratch.joined);
        let Joined { keys, values, dkeys, dvalues } = &mut scratch.joined;
        backend.attention_backward(
            batch,
            self.shape,
            View::<B>::new(&work.q, tokens, queries),
            View::<B>::new(keys, rows, features),
            View::<B>::new(values, rows, features),
            View::<B>::new(&attended.out, tokens, queries),
            View::<B>::new(&attended.log_sum, tokens, self.shape.heads),
            View::<B>::new(&scratch.wide, tokens, queries),
            ViewMut::<B>::new(&mut scratch.dq, tokens, queries),
            ViewMut::<B>::new(dkeys, rows, features),
            ViewMut::<B>::new(dvalues, rows, features),
        );
        let parts = [(prefix.keys, &*dkeys, &mut scratch.dk), (prefix.values, &*dvalues, &mut scratch.dv)];
        for (ahead, gradient, own) in parts {
            let gradient = View::<B>::new(gradient, rows, features);
            backend.sum_virtual(batch, gradient, ahead.of(flat));
            backend.keys_to_rows(batch, gradient, ViewMut::<B>::new(own, tokens, features));
        }
    }
}
