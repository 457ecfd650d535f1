//! A frozen linear layer, with a branch where it is adapted.
//!
//! `y = x Wᵀ + b`, changed by the branch. Backward `dx = dy W` and what the branch adds. Where W is frozen the product for
//! its gradient is never made. The backward pass needs x where anything is trained, and what the branch keeps.

use crate::{
    adapter::{BranchScratch, LinearBranch, LinearSite, PassDropout},
    backend::{Backend, View, ViewMut},
};

/// Weights of a linear layer, ready for use.
pub struct Linear<'a, B: Backend> {
    /// W, `[out, in]`.
    pub weight: View<'a, B>,
    /// b, `[1, out]`.
    pub bias: Option<View<'a, B>>,
    /// What is trained beside it.
    pub branch: Option<Branch<'a, B>>,
    /// Where the gradients of W and b lie, where these are trained themselves.
    pub trained: TrainedParts,
    /// Whether W holds the branch's update already.
    pub merged: bool,
}

/// Where weight and bias of a module lie in the flat buffers, where they are trained themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainedParts {
    /// The weight.
    pub weight: Option<usize>,
    /// The bias.
    pub bias: Option<usize>,
}

/// A branch in a pass.
pub struct Branch<'a, B: Backend> {
    /// What it does.
    pub branch: &'a dyn LinearBranch<B>,
    /// The flat parameters.
    pub parameters: &'a B::Buffer,
    /// Dropout of this pass.
    pub dropout: Option<PassDropout>,
}

impl<B: Backend> Linear<'_, B> {
    /// Whether anything here is trained.
    pub fn is_trained(&self) -> bool {
        self.branch.is_some() || self.trained != TrainedParts::default()
    }

    /// `y = x Wᵀ + b` and the branch, or `y += …` with `accumulate`. `x` `[T, in]`, `y` `[T, out]`.
    /// `kept` holds what the branch's backward pass needs.
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    pub fn forward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        accumulate: bool,
        mut y: ViewMut<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        if let Some(branch) = &self.branch {
            let site = self.site(backend, batch, branch);
            return branch.branch.forward(&site, x, accumulate, y, kept, scratch);
        }
        let beta = if accumulate { 1.0 } else { 0.0 };
        backend.gemm(1.0, x, false, self.weight, true, beta, y.reborrow());
        if let Some(bias) = self.bias {
            backend.add_bias(bias, y);
        }
    }

    /// Fills `kept` as the forward pass does, without y.
    pub fn keep_again(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        if let Some(branch) = &self.branch {
            branch.branch.keep_again(&self.site(backend, batch, branch), x, kept, scratch);
        }
    }

    /// Adds the gradients of what is trained to `flat`, and writes `dx`, or adds to it with `accumulate`; without `dx` no
    /// gradient of the input is made.
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    pub fn backward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        kept: &B::Buffer,
        dy: View<'_, B>,
        accumulate: bool,
        dx: Option<ViewMut<'_, B>>,
        flat: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        if let Some(at) = self.trained.bias {
            backend.column_sum(1.0, dy, ViewMut::<B>::at(&mut *flat, at, 1, dy.columns));
        }
        if let Some(at) = self.trained.weight {
            let dweight = ViewMut::<B>::at(&mut *flat, at, dy.columns, x.columns);
            backend.gemm(1.0, dy, true, x, false, 1.0, dweight);
        }
        if let Some(branch) = &self.branch {
            let site = self.site(backend, batch, branch);
            return branch.branch.backward(&site, x, kept, dy, accumulate, dx, flat, scratch);
        }
        let Some(dx) = dx else { return };
        let beta = if accumulate { 1.0 } else { 0.0 };
        backend.gemm(1.0, dy, false, self.weight, false, beta, dx);
    }

    /// `dx = dy W` and what the branch adds, or `dx += …` with `accumulate`, without any gradient of what is trained: for a
    /// caller that has the layer's input only afterwards, and then calls [`Linear::backward`] without dx.
    pub fn input_gradient(
        &self,
        backend: &B,
        batch: &B::Batch,
        dy: View<'_, B>,
        accumulate: bool,
        dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        if let Some(branch) = &self.branch {
            let site = self.site(backend, batch, branch);
            return branch.branch.input_gradient(&site, dy, accumulate, dx, scratch);
        }
        let beta = if accumulate { 1.0 } else { 0.0 };
        backend.gemm(1.0, dy, false, self.weight, false, beta, dx);
    }

    fn site<'b>(
        &'b self,
        backend: &'b B,
        batch: &'b B::Batch,
        branch: &'b Branch<'_, B>,
    ) -> LinearSite<'b, B> {
        LinearSite {
            backend,
            batch,
            weight: self.weight,
            bias: self.bias,
            parameters: branch.parameters,
            dropout: branch.dropout,
            merged: self.merged,
        }
    }
}
