//! The feed-forward half of a decoder layer: `next = middle + down(silu(gate n) * (up n))`, `n = norm(middle)`
//! (SwiGLU: Shazeer, arXiv 2002.05202).
//!
//! The backward pass needs middle, the norm's factors, and the outputs of gate and up, which [`Mlp::expand`] can compute
//! again; the product with `down` never has to be repeated. It overwrites gate and up by their gradients.

use super::{linear::Linear, rms_norm::RmsNorm};
use crate::{
    backend::{Backend, View, ViewMut},
    plan::{Expansion, Scratch, Work},
};

/// Weights of a feed-forward block.
pub struct Mlp<'a, B: Backend> {
    /// The norm ahead.
    pub norm: RmsNorm<'a, B>,
    /// Gate.
    pub gate: Linear<'a, B>,
    /// Up.
    pub up: Linear<'a, B>,
    /// Down.
    pub down: Linear<'a, B>,
}

impl<B: Backend> Mlp<'_, B> {
    fn features(&self) -> usize {
        self.down.weight.columns
    }

    fn inputs_adapted(&self) -> bool {
        self.gate.is_trained() || self.up.is_trained()
    }

    /// Norm, gate, up.
    pub fn expand(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &mut Work<B>,
        expansion: &mut Expansion<B>,
        scratch: &mut Scratch<B>,
    ) {
        let (hidden, features) = (self.down.weight.rows, self.features());
        self.normalise(backend, tokens, work, scratch);
        let normed = View::<B>::new(&scratch.normed, tokens, hidden);
        let [_, _, _, _, gate_kept, up_kept, _] = &mut work.kept;
        let branch = &mut scratch.branch;
        let gate = ViewMut::<B>::new(&mut expansion.gate, tokens, features);
        self.gate.forward(backend, batch, normed, false, gate, gate_kept, branch);
        let up = ViewMut::<B>::new(&mut expansion.up, tokens, features);
        self.up.forward(backend, batch, normed, false, up, up_kept, branch);
    }

    /// `next = middle + down(silu(gate) * up)`; `next` `[T, hidden]`.
    pub fn contract(
        &self,
        backend: &B,
        batch: &B::Batch,
        work: &mut Work<B>,
        expansion: &Expansion<B>,
        scratch: &mut Scratch<B>,
        mut next: ViewMut<'_, B>,
    ) {
        let (tokens, hidden) = (next.rows, next.columns);
        self.activate(backend, tokens, expansion, scratch);
        let activated = View::<B>::new(&scratch.wide, tokens, self.features());
        backend.copy(View::<B>::new(&work.middle, tokens, hidden), next.reborrow());
        let [.., down_kept] = &mut work.kept;
        self.down.forward(backend, batch, activated, true, next, down_kept, &mut scratch.branch);
    }

    /// Turns `scratch.gradient` from that of `next` into that of `middle`, and adds the branches' gradients to `flat`.
    /// `again` says that the forward pass kept nothing of `down`'s branch. Without `input_gradient` nothing
    /// below this block is trained: the gradient of middle is not made.
    #[expect(clippy::too_many_arguments, reason = "what the forward pass kept, and where gradients go")]
    pub fn backward(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &mut Work<B>,
        expansion: &mut Expansion<B>,
        scratch: &mut Scratch<B>,
        flat: &mut B::Buffer,
        again: bool,
        input_gradient: bool,
    ) {
        let (hidden, features) = (self.down.weight.rows, self.features());
        let expand_gradient = input_gradient || self.inputs_adapted();
        let dnext = View::<B>::new(&scratch.gradient, tokens, hidden);
        if expand_gradient {
            let dactivated = ViewMut::<B>::new(&mut scratch.wide, tokens, features);
            self.down.input_gradient(backend, batch, dnext, false, dactivated, &mut scratch.branch);
            // Leaves the activated product where its gradient was.
            backend.swiglu_backward(
                ViewMut::<B>::new(&mut scratch.wide, tokens, features),
                ViewMut::<B>::new(&mut expansion.gate, tokens, features),
                ViewMut::<B>::new(&mut expansion.up, tokens, features),
            );
        } else if self.down.is_trained() {
            self.activate(backend, tokens, expansion, scratch);
        }
        let activated = View::<B>::new(&scratch.wide, tokens, features);
        let dnext = View::<B>::new(&scratch.gradient, tokens, hidden);
        if again {
            let [.., down_kept] = &mut work.kept;
            self.down.keep_again(backend, batch, activated, down_kept, &mut scratch.branch);
        }
        let [.., down_kept] = &work.kept;
        self.down.backward(
            backend,
            batch,
            activated,
            down_kept,
            dnext,
            false,
            None,
            flat,
            &mut scratch.branch,
        );
        if !expand_gradient {
            return;
        }

        if self.inputs_adapted() {
            self.normalise(backend, tokens, work, scratch);
        }
        let normed = View::<B>::new(&scratch.normed, tokens, hidden);
        let [_, _, _, _, gate_kept, up_kept, _] = &work.kept;
        let parts = [
            (&self.up, up_kept, View::<B>::new(&expansion.up, tokens, features)),
            (&self.gate, gate_kept, View::<B>::new(&expansion.gate, tokens, features)),
        ];
        for (index, (linear, kept, dy)) in parts.into_iter().enumerate() {
            let dnormed = input_gradient.then(|| ViewMut::<B>::new(&mut scratch.dnormed, tokens, hidden));
            linear.backward(backend, batch, normed, kept, dy, index > 0, dnormed, flat, &mut scratch.branch);
        }
        if input_gradient {
            let dnormed = View::<B>::new(&scratch.dnormed, tokens, hidden);
            let middle = View::<B>::new(&work.middle, tokens, hidden);
            let reciprocal = View::<B>::new(&work.mlp_norm, tokens, 1);
            let gradient = ViewMut::<B>::new(&mut scratch.gradient, tokens, hidden);
            self.norm.backward(backend, dnormed, middle, reciprocal, gradient);
        }
    }

    fn normalise(&self, backend: &B, tokens: usize, work: &mut Work<B>, scratch: &mut Scratch<B>) {
        let hidden = self.down.weight.rows;
        let middle = View::<B>::new(&work.middle, tokens, hidden);
        let normed = ViewMut::<B>::new(&mut scratch.normed, tokens, hidden);
        self.norm.forward(backend, middle, normed, ViewMut::<B>::new(&mut work.mlp_norm, tokens, 1));
    }

    /// `wide = silu(gate) * up`.
    fn activate(&self, backend: &B, tokens: usize, expansion: &Expansion<B>, scratch: &mut Scratch<B>) {
        let features = self.features();
        let gate = View::<B>::new(&expansion.gate, tokens, features);
        let up = View::<B>::new(&expansion.up, tokens, features);
        backend.swiglu(gate, up, ViewMut::<B>::new(&mut scratch.wide, tokens, features));
    }
}
