//! The branch beside a linear layer.

use crate::{
    adapter::branch::{BranchScratch, LinearBranch, LinearSite, PassDropout},
    backend::{Backend, LowRank, Product, View, ViewMut},
};

/// The branch beside one linear layer: where its tensors lie, and its shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lora {
    /// Where A `[r, in]` begins in the flat buffers.
    pub a: usize,
    /// Where B `[out, r]` begins.
    pub b: usize,
    /// r.
    pub rank: usize,
    /// in.
    pub input: usize,
    /// out.
    pub output: usize,
    /// s.
    pub scale: f32,
    /// Where the bias of B `[out]` begins, where it has one.
    pub bias: Option<usize>,
    /// What its mask is told apart by.
    pub module: u32,
}

impl Lora {
    /// A.
    pub fn a<'b, B: Backend>(&self, parameters: &'b B::Buffer) -> View<'b, B> {
        View::at(parameters, self.a, self.rank, self.input)
    }

    /// B.
    pub fn b<'b, B: Backend>(&self, parameters: &'b B::Buffer) -> View<'b, B> {
        View::at(parameters, self.b, self.output, self.rank)
    }

    /// `drop(x) Aᵀ` into `projected` `[T, r]`.
    pub(super) fn project<B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        wide: &mut B::Buffer,
        projected: &mut B::Buffer,
    ) {
        let x = site.dropped(self.module, x, wide);
        let projected = ViewMut::<B>::new(projected, x.rows, self.rank);
        site.backend.gemm(1.0, x, false, self.a(site.parameters), true, 0.0, projected);
    }
}

impl Lora {
    /// `dp = s dy B` `[T, r]`, into `narrow`.
    fn narrow<'b, B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        narrow: &'b mut B::Buffer,
    ) -> View<'b, B> {
        let b = self.b::<B>(site.parameters);
        let dp = ViewMut::<B>::new(&mut *narrow, dy.rows, self.rank);
        site.backend.gemm(self.scale, dy, false, b, false, 0.0, dp);
        View::<B>::new(narrow, dy.rows, self.rank)
    }

    /// `dx = dy W + mask (dp A)`, or `dx += …`, with dp in `scratch.narrow`.
    fn widen<B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        mut dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        let (backend, tokens) = (site.backend, dy.rows);
        let a = self.a::<B>(site.parameters);
        let dp = View::<B>::new(&*scratch.narrow, tokens, self.rank);
        let beta = if accumulate { 1.0 } else { 0.0 };
        if site.merged {
            return site.multiply_backward(dy, beta, dx);
        }
        let Some(dropout) = site.dropout else {
            let branch = Product { alpha: 1.0, a: dp, transpose_a: false, b: a, transpose_b: false };
            backend.gemm_pair(site.product_backward(dy), branch, beta, dx);
            return;
        };
        site.multiply_backward(dy, beta, dx.reborrow());
        let wide = ViewMut::<B>::new(&mut *scratch.wide, tokens, self.input);
        backend.gemm(1.0, dp, false, a, false, 0.0, wide);
        let wide = View::<B>::new(&*scratch.wide, tokens, self.input);
        backend.dropout_backward(site.batch, dropout.key(self.module), dropout.p, wide, dx);
    }
}

impl<B: Backend> LinearBranch<B> for Lora {
    fn update<'b>(&self, parameters: &'b B::Buffer, dropout: Option<PassDropout>) -> Option<LowRank<'b, B>> {
        let (a, b) = (self.a::<B>(parameters), self.b::<B>(parameters));
        dropout.is_none().then_some(LowRank { scale: self.scale, a, b })
    }

    fn forward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        accumulate: bool,
        mut y: ViewMut<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        self.project(site, x, &mut scratch.wide, kept);
        let beta = if accumulate { 1.0 } else { 0.0 };
        if site.merged {
            site.multiply(x, beta, y.reborrow());
        } else {
            let branch = Product {
                alpha: self.scale,
                a: View::<B>::new(kept, x.rows, self.rank),
                transpose_a: false,
                b: self.b(site.parameters),
                transpose_b: true,
            };
            site.backend.gemm_pair(site.product(x), branch, beta, y.reborrow());
        }
        site.add_bias(y.reborrow());
        if let Some(bias) = self.bias {
            // s bias, in scratch.
            let own = View::<B>::at(site.parameters, bias, 1, self.output);
            site.backend.fill(0.0, ViewMut::<B>::new(&mut *scratch.fixed[0], 1, self.output));
            let scaled = ViewMut::<B>::new(&mut *scratch.fixed[0], 1, self.output);
            site.backend.column_sum(self.scale, own, scaled);
            site.backend.add_bias(View::<B>::new(&scratch.fixed[0], 1, self.output), y);
        }
    }

    fn keep_again(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        self.project(site, x, &mut scratch.wide, kept);
    }

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
    ) {
        let (backend, tokens) = (site.backend, x.rows);
        if let Some(bias) = self.bias {
            let dbias = ViewMut::<B>::at(&mut *gradient, bias, 1, self.output);
            backend.column_sum(self.scale, dy, dbias);
        }
        let projected = View::<B>::new(kept, tokens, self.rank);
        let db = ViewMut::<B>::at(&mut *gradient, self.b, self.output, self.rank);
        let (b, dp) =
            (self.b::<B>(site.parameters), ViewMut::<B>::new(&mut *scratch.narrow, tokens, self.rank));
        backend.low_rank_backward(self.scale, dy, b, projected, dp, db);

        let dp = View::<B>::new(&*scratch.narrow, tokens, self.rank);
        let dropped = site.dropped(self.module, x, &mut *scratch.wide);
        let da = ViewMut::<B>::at(gradient, self.a, self.rank, self.input);
        backend.gemm(1.0, dp, true, dropped, false, 1.0, da);
        if let Some(dx) = dx {
            self.widen(site, dy, accumulate, dx, scratch);
        }
    }

    fn input_gradient(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        if !site.merged {
            self.narrow(site, dy, &mut scratch.narrow);
        }
        self.widen(site, dy, accumulate, dx, scratch);
    }
}
