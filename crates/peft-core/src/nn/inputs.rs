//! Several linear layers of one input: each apart, or their matrices stacked in one whose product is cut into parts.
//!
//! An adapter of stacked matrices is one, over all parts. Parts are copied out of the product and their gradients into one:
//! whoever works on them finds the same matrices in both cases.

use super::linear::Linear;
use crate::{
    adapter::BranchScratch,
    backend::{Backend, View, ViewMut},
};

/// `N` linear layers of one input.
pub enum Inputs<'a, B: Backend, const N: usize> {
    /// Each apart.
    Apart([Linear<'a, B>; N]),
    /// Stacked.
    Fused(Linear<'a, B>),
}

impl<B: Backend, const N: usize> Inputs<'_, B, N> {
    /// Whether anything here is trained.
    pub fn is_trained(&self) -> bool {
        match self {
            Self::Apart(linears) => linears.iter().any(Linear::is_trained),
            Self::Fused(linear) => linear.is_trained(),
        }
    }

    /// Writes each part `[T, out]`, and what its branch keeps; of stacked ones the first place to keep is used. `x` `[T, in]`.
    pub fn forward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        parts: [(ViewMut<'_, B>, &mut B::Owned); N],
        fused: &mut B::Buffer,
        branch: &mut BranchScratch<B>,
    ) {
        let linear = match self {
            Self::Apart(linears) => {
                for (linear, (y, kept)) in linears.iter().zip(parts) {
                    linear.forward(backend, batch, x, false, y, kept, branch);
                }
                return;
            }
            Self::Fused(linear) => linear,
        };
        let columns = parts.iter().map(|(y, _)| y.columns).sum();
        let (mut kept, mut start) = (None, 0);
        let parts = parts.map(|(y, place)| {
            kept.get_or_insert(place);
            y
        });
        if let Some(kept) = kept {
            let y = ViewMut::<B>::new(&mut *fused, x.rows, columns);
            linear.forward(backend, batch, x, false, y, kept, branch);
        }
        for y in parts {
            let end = start + y.columns;
            let part = View::<B>::new(fused, x.rows, columns).column_range(start, y.columns);
            backend.copy(part, y);
            start = end;
        }
    }

    /// Adds the branches' gradients to `flat` and writes `dx`, given each part's gradient and what its branch kept.
    #[expect(clippy::too_many_arguments, reason = "what the forward pass kept, and where gradients go")]
    pub fn backward(
        &self,
        backend: &B,
        batch: &B::Batch,
        x: View<'_, B>,
        parts: [(View<'_, B>, &B::Owned); N],
        mut dx: Option<ViewMut<'_, B>>,
        fused: &mut B::Buffer,
        flat: &mut B::Buffer,
        branch: &mut BranchScratch<B>,
    ) {
        let linear = match self {
            Self::Apart(linears) => {
                // From the last to the first: the order in which flat gradients are filled.
                for (index, (linear, (dy, kept))) in linears.iter().zip(parts).rev().enumerate() {
                    let dx = dx.as_mut().map(ViewMut::reborrow);
                    linear.backward(backend, batch, x, kept, dy, index > 0, dx, flat, branch);
                }
                return;
            }
            Self::Fused(linear) => linear,
        };
        let columns = parts.iter().map(|(dy, _)| dy.columns).sum();
        let mut start = 0;
        for (dy, _) in &parts {
            let part = ViewMut::<B>::new(&mut *fused, x.rows, columns).column_range(start, dy.columns);
            backend.copy(*dy, part);
            start += dy.columns;
        }
        if let Some((_, kept)) = parts.first() {
            let dy = View::<B>::new(fused, x.rows, columns);
            linear.backward(backend, batch, x, kept, dy, false, dx, flat, branch);
        }
    }
}
