//! What stands beside a module in a pass.
//!
//! A branch holds no numbers: it knows where its tensors lie in the flat parameters, and in the flat gradient of the
//! same layout. It is made once, when an engine is loaded, and works without allocating.

use crate::{
    backend::{Backend, LowRank, Product, View, ViewMut},
    random::DropoutKey,
};

/// Dropout of one pass over the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PassDropout {
    /// Share of numbers set to 0.
    pub p: f32,
    /// The job's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
}

impl PassDropout {
    /// What the mask of a module (by [`crate::model::Module::number`]) is drawn from.
    pub fn key(&self, module: u32) -> DropoutKey {
        DropoutKey { seed: self.seed, step: self.step, module }
    }
}

/// A frozen linear layer at work, as its branch sees it.
pub struct LinearSite<'a, B: Backend> {
    /// Where operations run.
    pub backend: &'a B,
    /// The micro-batch.
    pub batch: &'a B::Batch,
    /// W, `[out, in]`.
    pub weight: View<'a, B>,
    /// b, `[1, out]`.
    pub bias: Option<View<'a, B>>,
    /// The flat parameters.
    pub parameters: &'a B::Buffer,
    /// Dropout; none where it is off or the model is evaluated.
    pub dropout: Option<PassDropout>,
    /// Whether W holds what [`LinearBranch::update`] says already.
    pub merged: bool,
}

impl<'a, B: Backend> LinearSite<'a, B> {
    /// `x Wᵀ` `[T, out]`.
    pub fn product<'b>(&self, x: View<'b, B>) -> Product<'b, B>
    where
        'a: 'b,
    {
        Product { alpha: 1.0, a: x, transpose_a: false, b: self.weight, transpose_b: true }
    }

    /// `dy W` `[T, in]`.
    pub fn product_backward<'b>(&self, dy: View<'b, B>) -> Product<'b, B>
    where
        'a: 'b,
    {
        Product { alpha: 1.0, a: dy, transpose_a: false, b: self.weight, transpose_b: false }
    }

    /// `y = x Wᵀ + beta y`.
    pub fn multiply(&self, x: View<'_, B>, beta: f32, y: ViewMut<'_, B>) {
        self.backend.gemm(1.0, x, false, self.weight, true, beta, y);
    }

    /// `dx = dy W + beta dx`.
    pub fn multiply_backward(&self, dy: View<'_, B>, beta: f32, dx: ViewMut<'_, B>) {
        self.backend.gemm(1.0, dy, false, self.weight, false, beta, dx);
    }

    /// Adds the bias, where there is one.
    pub fn add_bias(&self, y: ViewMut<'_, B>) {
        if let Some(bias) = self.bias {
            self.backend.add_bias(bias, y);
        }
    }

    /// The input after dropout with the mask of `module`: itself, or written into `wide`.
    pub fn dropped<'b>(&self, module: u32, x: View<'b, B>, wide: &'b mut B::Buffer) -> View<'b, B> {
        let Some(dropout) = self.dropout else { return x };
        let out = ViewMut::<B>::new(&mut *wide, x.rows, x.columns);
        self.backend.dropout(self.batch, dropout.key(module), dropout.p, x, out);
        View::<B>::new(wide, x.rows, x.columns)
    }
}

/// Memory that branches work in; as much as [`super::Needs`] asks for.
pub struct BranchScratch<B: Backend> {
    /// For each token, as wide as an input.
    pub wide: B::Owned,
    /// For each token, narrow.
    pub narrow: B::Owned,
    /// For each token, as wide as an output.
    pub output: B::Owned,
    /// Whatever the number of tokens.
    pub fixed: [B::Owned; 4],
}

/// What stands beside a linear layer. `T` is the number of tokens.
pub trait LinearBranch<B: Backend>: Send + Sync {
    /// What the branch adds to W in this pass, where that is all that it does; a backend may add it while it writes W out
    /// ([`LinearSite::merged`]).
    fn update<'b>(
        &self,
        _parameters: &'b B::Buffer,
        _dropout: Option<PassDropout>,
    ) -> Option<LowRank<'b, B>> {
        None
    }

    /// `y = x Wᵀ + b`, changed by the branch; or `y += …` with `accumulate`. `x` `[T, in]`, `y` `[T, out]`.
    /// `kept` has room for [`super::Needs::kept`] numbers a token, for the backward pass.
    fn forward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        accumulate: bool,
        y: ViewMut<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    );

    /// Fills `kept` as [`LinearBranch::forward`] does, where it is called for nothing else: activations are
    /// computed again. Not needed where nothing is kept.
    fn keep_again(
        &self,
        _site: &LinearSite<'_, B>,
        _x: View<'_, B>,
        _kept: &mut B::Buffer,
        _scratch: &mut BranchScratch<B>,
    ) {
    }

    /// Writes `dx` as [`LinearBranch::backward`] does, or adds to it with `accumulate`, and nothing else. The input x is
    /// not known yet.
    fn input_gradient(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    );

    /// Adds the gradients of the branch's tensors to `gradient`, where they lie as in the parameters, and writes `dx`, or
    /// adds to it with `accumulate`; without `dx` no gradient of the input is wanted.
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    fn backward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &B::Buffer,
        dy: View<'_, B>,
        accumulate: bool,
        dx: Option<ViewMut<'_, B>>,
        gradient: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    );
}

/// The token embedding at work, as its branch sees it.
pub struct EmbeddingSite<'a, B: Backend> {
    /// Where operations run.
    pub backend: &'a B,
    /// The micro-batch; its token ids are the input.
    pub batch: &'a B::Batch,
    /// The flat parameters.
    pub parameters: &'a B::Buffer,
}

/// What stands beside the token embedding.
pub trait EmbeddingBranch<B: Backend>: Send + Sync {
    /// Changes `y` `[T, hidden]`, which holds the frozen embedding of every token.
    fn forward(&self, site: &EmbeddingSite<'_, B>, y: ViewMut<'_, B>, scratch: &mut BranchScratch<B>);

    /// Adds the gradients of the branch's tensors to `gradient`.
    fn backward(
        &self,
        site: &EmbeddingSite<'_, B>,
        dy: View<'_, B>,
        gradient: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    );
}
