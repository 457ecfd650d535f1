//! What LoRA adds to a linear layer, and what it gets back.
//!
//! `y += s drop(x) Aᵀ Bᵀ` with A `[r, in]`, B `[out, r]`, s = alpha / r or alpha / sqrt(r), after Hu et al.,
//! arXiv 2106.09685, as PEFT computes it: dropout lies on the branch's input alone.
//!
//! With `p = drop(x) Aᵀ` `[T, r]`, kept from the forward pass:
//! `dB += s dyᵀ p`, `dp = s dy B`, `dA += dpᵀ drop(x)`, `dx += mask (dp A)`.
//! The mask is drawn again in the backward pass; nothing of it is kept.

use crate::{
    adapter::ParameterEntry,
    backend::{Backend, Product, View, ViewMut},
    random::DropoutKey,
};

/// Dropout on a branch's input in one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of numbers set to 0.
    pub p: f32,
    /// What the mask is drawn from.
    pub key: DropoutKey,
}

/// The branch beside one linear layer.
pub struct Lora<'a, B: Backend> {
    /// A, `[r, in]`.
    pub a: View<'a, B>,
    /// B, `[out, r]`.
    pub b: View<'a, B>,
    /// s.
    pub scale: f32,
    /// Dropout; none where it is off or the model is evaluated.
    pub dropout: Option<Dropout>,
}

/// Memory that a branch works in.
pub struct LoraScratch<'a, B: Backend> {
    /// `[T, widest input]`: the input after dropout, and the gradient before it.
    pub wide: &'a mut B::Buffer,
    /// `[T, r]`: the gradient of the product with A.
    pub narrow: &'a mut B::Buffer,
}

impl<'a, B: Backend> Lora<'a, B> {
    /// The branch whose tensors are `a` and `b` of the flat `parameters`.
    pub fn new(
        parameters: &'a B::Buffer,
        (a, b): (&ParameterEntry, &ParameterEntry),
        dropout: Option<Dropout>,
    ) -> Self {
        Self {
            a: View::<B>::at(parameters, a.range.start, a.shape[0], a.shape[1]),
            b: View::<B>::at(parameters, b.range.start, b.shape[0], b.shape[1]),
            scale: a.scale,
            dropout,
        }
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.rows
    }

    /// `projected = drop(x) Aᵀ`; `x` `[T, in]`, `projected` `[T, r]`.
    pub fn project(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        wide: &mut B::Buffer,
        projected: ViewMut<'_, B>,
    ) {
        let x = self.dropped(backend, batch, x, wide);
        backend.gemm(1.0, x, false, self.a, true, 0.0, projected);
    }

    /// `s projected Bᵀ` `[T, out]`: what the branch adds to the layer's output.
    pub fn expansion<'b>(&'b self, projected: View<'b, B>) -> Product<'b, B> {
        Product { alpha: self.scale, a: projected, transpose_a: false, b: self.b, transpose_b: true }
    }

    /// Adds the gradients of A and B to the `flat` gradient, where they lie as A and B do in the parameters, and leaves
    /// dp in `scratch.narrow`, for [`Lora::contraction`] or [`Lora::input_gradient`].
    #[expect(clippy::too_many_arguments, reason = "what the forward pass had, and where gradients go")]
    pub fn backward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        projected: View<'_, B>,
        dy: View<'_, B>,
        flat: &mut B::Buffer,
        scratch: &mut LoraScratch<'_, B>,
    ) {
        let (tokens, rank) = (x.rows, self.rank());
        let db = ViewMut::<B>::at(&mut *flat, self.b.offset, self.b.rows, rank);
        backend.gemm(self.scale, dy, true, projected, false, 1.0, db);

        let dp = ViewMut::<B>::new(&mut *scratch.narrow, tokens, rank);
        backend.gemm(self.scale, dy, false, self.b, false, 0.0, dp);
        let dp = View::<B>::new(&*scratch.narrow, tokens, rank);

        let dropped = self.dropped(backend, batch, x, &mut *scratch.wide);
        let da = ViewMut::<B>::at(flat, self.a.offset, rank, self.a.columns);
        backend.gemm(1.0, dp, true, dropped, false, 1.0, da);
    }

    /// `dp A` `[T, in]`: what the branch adds to the gradient of its input where nothing is dropped.
    pub fn contraction<'b>(&'b self, dp: View<'b, B>) -> Product<'b, B> {
        Product { alpha: 1.0, a: dp, transpose_a: false, b: self.a, transpose_b: false }
    }

    /// `dx += mask (dp A)`, with dp in `scratch.narrow`.
    pub fn input_gradient(
        &self,
        backend: &B,
        batch: &B::Batch,
        dx: ViewMut<'_, B>,
        scratch: &mut LoraScratch<'_, B>,
    ) {
        let dp = View::<B>::new(&*scratch.narrow, dx.rows, self.rank());
        let Some(dropout) = self.dropout else {
            backend.gemm(1.0, dp, false, self.a, false, 1.0, dx);
            return;
        };
        let (rows, columns) = (dx.rows, self.a.columns);
        let wide = ViewMut::<B>::new(&mut *scratch.wide, rows, columns);
        backend.gemm(1.0, dp, false, self.a, false, 0.0, wide);
        let wide = View::<B>::new(&*scratch.wide, rows, columns);
        backend.dropout_backward(batch, dropout.key, dropout.p, wide, dx);
    }

    /// The input after dropout: itself, or written into `wide`.
    fn dropped<'b>(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'b, B>,
        wide: &'b mut B::Buffer,
    ) -> View<'b, B> {
        let Some(dropout) = self.dropout else { return x };
        let out = ViewMut::<B>::new(&mut *wide, x.rows, x.columns);
        backend.dropout(batch, dropout.key, dropout.p, x, out);
        View::<B>::new(wide, x.rows, x.columns)
    }
}
