//! The feed-forward half of a decoder layer: `next = middle + down(f(gate n) * (up n))`, `n = norm(middle)`, with f silu
//! or gelu (SwiGLU, GeGLU: Shazeer, arXiv 2002.05202). Where a family has it, down's output passes a norm ahead of the sum.
//!
//! The backward pass needs middle, the norm's factors, and the outputs of gate and up, which [`Mlp::expand`] can compute
//! again; the product with `down` has to be repeated only where its output passes a norm. It overwrites gate and up by their gradients.

use super::{inputs::Inputs, linear::Linear, rms_norm::RmsNorm};
use crate::{
    backend::{Backend, View, ViewMut},
    model::Activation,
    plan::{Expansion, Scratch, Work},
};

/// Weights of a feed-forward block.
pub struct Mlp<'a, B: Backend> {
    /// The norm ahead.
    pub norm: RmsNorm<'a, B>,
    /// Gate and up.
    pub inputs: Inputs<'a, B, 2>,
    /// Down.
    pub down: Linear<'a, B>,
    /// The norm of the output.
    pub output_norm: Option<RmsNorm<'a, B>>,
    /// f.
    pub activation: Activation,
}

impl<B: Backend> Mlp<'_, B> {
    fn features(&self) -> usize {
        self.down.weight.columns
    }

    fn inputs_adapted(&self) -> bool {
        self.inputs.is_trained()
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
        let parts = [
            (ViewMut::<B>::new(&mut expansion.gate, tokens, features), gate_kept),
            (ViewMut::<B>::new(&mut expansion.up, tokens, features), up_kept),
        ];
        self.inputs.forward(backend, batch, normed, parts, &mut scratch.fused, &mut scratch.branch);
    }

    /// `next = middle + down(f(gate) * up)`; `next` `[T, hidden]`.
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
        backend.copy(View::<B>::new(&work.middle, tokens, hidden), next.reborrow());
        if let Some(norm) = &self.output_norm {
            self.output(backend, batch, tokens, work, expansion, scratch);
            return norm.add(backend, &mut work.mlp_output, &mut scratch.normed, next);
        }
        self.activate(backend, tokens, expansion, scratch);
        let activated = View::<B>::new(&scratch.wide, tokens, self.features());
        let [.., down_kept] = &mut work.kept;
        self.down.forward(backend, batch, activated, true, next, down_kept, &mut scratch.branch);
    }

    /// Computes again what [`Mlp::contract`] left for the backward pass: whether that was more than nothing.
    pub fn contract_again(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &mut Work<B>,
        expansion: &Expansion<B>,
        scratch: &mut Scratch<B>,
    ) -> bool {
        let Some(norm) = &self.output_norm else { return false };
        self.output(backend, batch, tokens, work, expansion, scratch);
        let hidden = self.down.weight.rows;
        let normed = ViewMut::<B>::new(&mut scratch.normed, tokens, hidden);
        let output = &mut work.mlp_output;
        let x = View::<B>::new(&output.x, tokens, hidden);
        norm.forward(backend, x, normed, ViewMut::<B>::new(&mut output.norm, tokens, 1));
        true
    }

    /// `mlp_output = down(f(gate) * up)`.
    fn output(
        &self,
        backend: &B,
        batch: &B::Batch,
        tokens: usize,
        work: &mut Work<B>,
        expansion: &Expansion<B>,
        scratch: &mut Scratch<B>,
    ) {
        self.activate(backend, tokens, expansion, scratch);
        let activated = View::<B>::new(&scratch.wide, tokens, self.features());
        let y = ViewMut::<B>::new(&mut work.mlp_output.x, tokens, self.down.weight.rows);
        let [.., down_kept] = &mut work.kept;
        self.down.forward(backend, batch, activated, false, y, down_kept, &mut scratch.branch);
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
        let into_norm = input_gradient || self.norm.is_trained();
        let expand_gradient = into_norm || self.inputs_adapted();
        let doutput = match &self.output_norm {
            None => &scratch.gradient,
            Some(norm) => {
                let dnext = View::<B>::new(&scratch.gradient, tokens, hidden);
                norm.add_backward(backend, dnext, &work.mlp_output, &mut scratch.dnormed, flat);
                &scratch.dnormed
            }
        };
        let doutput = View::<B>::new(doutput, tokens, hidden);
        let wide = &mut scratch.wide;
        if expand_gradient {
            let dactivated = ViewMut::<B>::new(&mut *wide, tokens, features);
            self.down.input_gradient(backend, batch, doutput, false, dactivated, &mut scratch.branch);
            // Leaves the activated product where its gradient was.
            let dactivated = ViewMut::<B>::new(&mut *wide, tokens, features);
            let gate = ViewMut::<B>::new(&mut expansion.gate, tokens, features);
            let up = ViewMut::<B>::new(&mut expansion.up, tokens, features);
            match self.activation {
                Activation::Silu => backend.swiglu_backward(dactivated, gate, up),
                Activation::GeluTanh => backend.geglu_backward(dactivated, gate, up),
            }
        } else if self.down.is_trained() {
            self.activate_into(backend, tokens, expansion, wide);
        }
        let activated = View::<B>::new(&*wide, tokens, features);
        let [.., down_kept] = &mut work.kept;
        if again {
            self.down.keep_again(backend, batch, activated, down_kept, &mut scratch.branch);
        }
        let branch = &mut scratch.branch;
        self.down.backward(backend, batch, activated, down_kept, doutput, false, None, flat, branch);
        if !expand_gradient {
            return;
        }

        if self.inputs_adapted() {
            self.normalise(backend, tokens, work, scratch);
        }
        let normed = View::<B>::new(&scratch.normed, tokens, hidden);
        let [_, _, _, _, gate_kept, up_kept, _] = &work.kept;
        let parts = [
            (View::<B>::new(&expansion.gate, tokens, features), gate_kept),
            (View::<B>::new(&expansion.up, tokens, features), up_kept),
        ];
        let dnormed = into_norm.then(|| ViewMut::<B>::new(&mut scratch.dnormed, tokens, hidden));
        let (fused, branch) = (&mut scratch.fused, &mut scratch.branch);
        self.inputs.backward(backend, batch, normed, parts, dnormed, fused, flat, branch);
        if into_norm {
            let dnormed = View::<B>::new(&scratch.dnormed, tokens, hidden);
            let middle = View::<B>::new(&work.middle, tokens, hidden);
            let reciprocal = View::<B>::new(&work.mlp_norm, tokens, 1);
            let gradient = ViewMut::<B>::new(&mut scratch.gradient, tokens, hidden);
            self.norm.backward(backend, dnormed, middle, reciprocal, gradient, flat);
        }
    }

    fn normalise(&self, backend: &B, tokens: usize, work: &mut Work<B>, scratch: &mut Scratch<B>) {
        let hidden = self.down.weight.rows;
        let middle = View::<B>::new(&work.middle, tokens, hidden);
        let normed = ViewMut::<B>::new(&mut scratch.normed, tokens, hidden);
        self.norm.forward(backend, middle, normed, ViewMut::<B>::new(&mut work.mlp_norm, tokens, 1));
    }

    /// `wide = f(gate) * up`.
    fn activate(&self, backend: &B, tokens: usize, expansion: &Expansion<B>, scratch: &mut Scratch<B>) {
        self.activate_into(backend, tokens, expansion, &mut scratch.wide);
    }

    fn activate_into(&self, backend: &B, tokens: usize, expansion: &Expansion<B>, wide: &mut B::Buffer) {
        let features = self.features();
        let gate = View::<B>::new(&expansion.gate, tokens, features);
        let up = View::<B>::new(&expansion.up, tokens, features);
        let out = ViewMut::<B>::new(wide, tokens, features);
        match self.activation {
            Activation::Silu => backend.swiglu(gate, up, out),
            Activation::GeluTanh => backend.geglu(gate, up, out),
        }
    }
}
