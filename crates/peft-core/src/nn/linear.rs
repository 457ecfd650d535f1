//! A frozen linear layer, with a LoRA branch where it is adapted.
//!
//! `y = x Wᵀ + b + branch`. Backward `dx = dy W + branch`; W is frozen and the product for its gradient is never made.
//! The backward pass needs x where there is a branch, and the branch's projection.

use crate::{
    adapter::lora::{Lora, LoraScratch},
    backend::{Backend, Product, View, ViewMut},
};

/// Weights of a linear layer, ready for use.
pub struct Linear<'a, B: Backend> {
    /// W, `[out, in]`.
    pub weight: View<'a, B>,
    /// b, `[1, out]`.
    pub bias: Option<View<'a, B>>,
    /// The trained branch.
    pub lora: Option<Lora<'a, B>>,
}

impl<B: Backend> Linear<'_, B> {
    /// `y = x Wᵀ + b + branch`, or `y += …` with `accumulate`. `x` `[T, in]`, `y` `[T, out]`.
    /// `projected` `[T, r]` keeps what the branch's backward pass needs; `wide` is scratch `[T, in]`.
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    pub fn forward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        accumulate: bool,
        mut y: ViewMut<'_, B>,
        projected: &mut B::Buffer,
        wide: &mut B::Buffer,
    ) {
        let beta = if accumulate { 1.0 } else { 0.0 };
        let frozen = Product { alpha: 1.0, a: x, transpose_a: false, b: self.weight, transpose_b: true };
        if let Some(lora) = &self.lora {
            lora.project(backend, batch, x, wide, ViewMut::<B>::new(&mut *projected, x.rows, lora.rank()));
            let branch = lora.expansion(View::<B>::new(projected, x.rows, lora.rank()));
            backend.gemm_pair(frozen, branch, beta, y.reborrow());
        } else {
            backend.gemm(1.0, x, false, self.weight, true, beta, y.reborrow());
        }
        if let Some(bias) = self.bias {
            backend.add_bias(bias, y);
        }
    }

    /// Adds the branch's gradients to `flat`, and writes `dx`, or adds to it with `accumulate`; without `dx` no
    /// gradient of the input is made.
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    pub fn backward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        projected: &B::Buffer,
        dy: View<'_, B>,
        accumulate: bool,
        dx: Option<ViewMut<'_, B>>,
        flat: &mut B::Buffer,
        mut scratch: LoraScratch<'_, B>,
    ) {
        if let Some(lora) = &self.lora {
            let projected = View::<B>::new(projected, x.rows, lora.rank());
            lora.backward(backend, batch, x, projected, dy, flat, &mut scratch);
        }
        let Some(mut dx) = dx else { return };
        let beta = if accumulate { 1.0 } else { 0.0 };
        let frozen = Product { alpha: 1.0, a: dy, transpose_a: false, b: self.weight, transpose_b: false };
        match &self.lora {
            Some(lora) if lora.dropout.is_none() => {
                let narrow = View::<B>::new(&*scratch.narrow, x.rows, lora.rank());
                backend.gemm_pair(frozen, lora.contraction(narrow), beta, dx);
            }
            lora => {
                backend.gemm(1.0, dy, false, self.weight, false, beta, dx.reborrow());
                if let Some(lora) = lora {
                    lora.input_gradient(backend, batch, dx, &mut scratch);
                }
            }
        }
    }
}
