//! DoRA: LoRA whose rows are brought to a trained length (Liu et al., arXiv 2402.09353), as PEFT computes it.
//!
//! `y = x Wᵀ + b + (g - 1) (d Wᵀ) + g s p Bᵀ` with `d = drop(x)`, `p = d Aᵀ`, `g = m / n` for each output and `n` the length
//! of a row of `W + s B A`. n is a constant for the gradient (section 4.3). Without dropout this is
//! `y = g u + b`, `u = d Wᵀ + s p Bᵀ`; with it, `y = g u + b + x Wᵀ - d Wᵀ`.
//!
//! u is kept from the forward pass. `dg = sum over tokens of dy u`, `dm = dg / n`; with `dz = g dy`:
//! `dB += s dzᵀ p`, `dp = s dz B`, `dA += dpᵀ d`, `dx = dz W + dp A`, or with dropout `dy W + mask (dz W - dy W + dp A)`.
//!
//! n² is summed without forming `W + s B A`: `|W|² + 2 s B·(W Aᵀ) + s² B·(B A Aᵀ)`, row by row.

use super::branch::Lora;
use crate::{
    adapter::branch::{BranchScratch, LinearBranch, LinearSite},
    backend::{Backend, Product, View, ViewMut},
};

/// The branch beside one linear layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dora {
    /// A and B.
    pub lora: Lora,
    /// Where m `[out]` begins in the flat buffers.
    pub magnitude: usize,
}

/// Which of the fixed buffers holds g after [`Dora::gains`]; the next holds 1 / n.
const GAIN: usize = 2;

impl Dora {
    /// g and 1 / n, into the fixed buffers of their names; the others are worked in.
    fn gains<B: Backend>(&self, site: &LinearSite<'_, B>, fixed: &mut [B::Owned; 4]) {
        let (backend, Lora { rank, output, scale, .. }) = (site.backend, self.lora);
        let (a, b) = (self.lora.a::<B>(site.parameters), self.lora.b::<B>(site.parameters));
        let [products, square, gain, inverse] = fixed;
        fn squares<B: Backend>(buffer: &mut B::Buffer, output: usize) -> ViewMut<'_, B> {
            ViewMut::new(buffer, 1, output)
        }
        backend.row_dot(1.0, site.weight, site.weight, 0.0, squares::<B>(&mut *gain, output));
        let of = ViewMut::<B>::new(&mut *products, output, rank);
        backend.gemm(1.0, site.weight, false, a, true, 0.0, of);
        let crossed = View::<B>::new(&*products, output, rank);
        backend.row_dot(2.0 * scale, b, crossed, 1.0, squares::<B>(&mut *gain, output));
        backend.gemm(1.0, a, false, a, true, 0.0, ViewMut::<B>::new(&mut *square, rank, rank));
        let of = ViewMut::<B>::new(&mut *products, output, rank);
        backend.gemm(1.0, b, false, View::<B>::new(&*square, rank, rank), false, 0.0, of);
        let own = View::<B>::new(&*products, output, rank);
        backend.row_dot(scale * scale, b, own, 1.0, squares::<B>(&mut *gain, output));
        backend.reciprocal_root(View::<B>::new(&*gain, 1, output), squares::<B>(&mut *inverse, output));
        let magnitude = View::<B>::at(site.parameters, self.magnitude, 1, output);
        backend.scale_columns(
            1.0,
            magnitude,
            View::<B>::new(&*inverse, 1, output),
            0.0,
            squares::<B>(gain, output),
        );
    }

    /// `u` into `kept`, with p left in `narrow` and d in `wide` where something is dropped.
    fn keep<B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        let Lora { rank, output, scale, .. } = self.lora;
        self.lora.project(site, x, &mut scratch.wide, &mut scratch.narrow);
        let dropped = self.dropped(site, x, &scratch.wide);
        let branch = Product {
            alpha: scale,
            a: View::<B>::new(&scratch.narrow, x.rows, rank),
            transpose_a: false,
            b: self.lora.b(site.parameters),
            transpose_b: true,
        };
        let u = ViewMut::<B>::new(kept, x.rows, output);
        site.backend.gemm_pair(site.product(dropped), branch, 0.0, u);
    }

    /// d, which [`Lora::project`] left in `wide` where something is dropped.
    fn dropped<'b, B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'b, B>,
        wide: &'b B::Buffer,
    ) -> View<'b, B> {
        if site.dropout.is_some() { View::new(wide, x.rows, x.columns) } else { x }
    }
}

impl<B: Backend> LinearBranch<B> for Dora {
    fn forward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        accumulate: bool,
        mut y: ViewMut<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        let output = self.lora.output;
        self.keep(site, x, kept, scratch);
        self.gains(site, &mut scratch.fixed);
        let mut beta = if accumulate { 1.0 } else { 0.0 };
        if site.dropout.is_some() {
            let dropped = View::<B>::new(&scratch.wide, x.rows, x.columns);
            let less = Product { alpha: -1.0, ..site.product(dropped) };
            site.backend.gemm_pair(site.product(x), less, beta, y.reborrow());
            beta = 1.0;
        }
        let (u, gain) =
            (View::<B>::new(kept, x.rows, output), View::<B>::new(&scratch.fixed[GAIN], 1, output));
        site.backend.scale_columns(1.0, u, gain, beta, y.reborrow());
        site.add_bias(y);
    }

    fn keep_again(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        self.keep(site, x, kept, scratch);
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
        let Lora { rank, output, input, scale, .. } = self.lora;
        let b = self.lora.b::<B>(site.parameters);
        self.gains(site, &mut scratch.fixed);
        let [_, dgain, gain, inverse] = &mut scratch.fixed;
        backend.fill(0.0, ViewMut::<B>::new(&mut *dgain, 1, output));
        backend.column_dot(
            dy,
            View::<B>::new(kept, tokens, output),
            ViewMut::<B>::new(&mut *dgain, 1, output),
        );
        let dm = ViewMut::<B>::at(&mut *gradient, self.magnitude, 1, output);
        let (dgain, inverse) = (View::<B>::new(&*dgain, 1, output), View::<B>::new(&*inverse, 1, output));
        backend.scale_columns(1.0, dgain, inverse, 1.0, dm);

        let dz = ViewMut::<B>::new(&mut *scratch.output, tokens, output);
        backend.scale_columns(1.0, dy, View::<B>::new(&*gain, 1, output), 0.0, dz);
        let dz = View::<B>::new(&*scratch.output, tokens, output);
        self.lora.project(site, x, &mut scratch.wide, &mut scratch.narrow);
        let p = View::<B>::new(&scratch.narrow, tokens, rank);
        backend.gemm(
            scale,
            dz,
            true,
            p,
            false,
            1.0,
            ViewMut::<B>::at(&mut *gradient, self.lora.b, output, rank),
        );
        let dp = ViewMut::<B>::new(&mut *scratch.narrow, tokens, rank);
        backend.gemm(scale, dz, false, b, false, 0.0, dp);
        let dp = View::<B>::new(&*scratch.narrow, tokens, rank);
        let dropped = self.dropped(site, x, &scratch.wide);
        let da = ViewMut::<B>::at(gradient, self.lora.a, rank, input);
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
        let (backend, tokens) = (site.backend, dy.rows);
        let Lora { rank, output, scale, .. } = self.lora;
        self.gains(site, &mut scratch.fixed);
        let dz = ViewMut::<B>::new(&mut *scratch.output, tokens, output);
        backend.scale_columns(1.0, dy, View::<B>::new(&scratch.fixed[GAIN], 1, output), 0.0, dz);
        let dz = View::<B>::new(&*scratch.output, tokens, output);
        let dp = ViewMut::<B>::new(&mut *scratch.narrow, tokens, rank);
        backend.gemm(scale, dz, false, self.lora.b::<B>(site.parameters), false, 0.0, dp);
        self.widen(site, dy, accumulate, dx, scratch);
    }
}

impl Dora {
    /// dx, with dz in `scratch.output` and dp in `scratch.narrow`.
    fn widen<B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        mut dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        let (backend, tokens) = (site.backend, dy.rows);
        let Lora { rank, output, input, module, .. } = self.lora;
        let a = self.lora.a::<B>(site.parameters);
        let dz = View::<B>::new(&*scratch.output, tokens, output);
        let dp = View::<B>::new(&*scratch.narrow, tokens, rank);
        let beta = if accumulate { 1.0 } else { 0.0 };
        let branch = Product { alpha: 1.0, a: dp, transpose_a: false, b: a, transpose_b: false };
        let Some(dropout) = site.dropout else {
            backend.gemm_pair(site.product_backward(dz), branch, beta, dx);
            return;
        };
        let wide = ViewMut::<B>::new(&mut *scratch.wide, tokens, input);
        backend.gemm_pair(site.product_backward(dz), branch, 0.0, wide);
        let wide = ViewMut::<B>::new(&mut *scratch.wide, tokens, input);
        backend.gemm(-1.0, dy, false, site.weight, false, 1.0, wide);
        site.multiply_backward(dy, beta, dx.reborrow());
        let wide = View::<B>::new(&*scratch.wide, tokens, input);
        backend.dropout_backward(site.batch, dropout.key(module), dropout.p, wide, dx);
    }
}
