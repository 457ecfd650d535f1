//! LoRA on the token embedding: `y[t] += s B A[:, id[t]]` with A `[r, vocabulary]`, B `[hidden, r]`.
//!
//! With `a[t] = A[:, id[t]]`: `dB += s dyᵀ a`, `da = s dy B`, `dA[:, id[t]] += da[t]`. There is no dropout, as in PEFT.
//! Tokens that are trained themselves take their row from the adapter instead.

use crate::{
    adapter::branch::{BranchScratch, EmbeddingBranch, EmbeddingSite},
    backend::{Backend, View, ViewMut},
};

/// What is trained at the token embedding: where its tensors lie.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingLora {
    /// Low-rank update.
    pub update: Option<EmbeddingUpdate>,
    /// Token ids whose rows are trained, and where the first row lies.
    pub tokens: (Vec<u32>, usize),
    /// Columns of the embedding.
    pub hidden: usize,
}

/// A low-rank update of the embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbeddingUpdate {
    /// Where A `[r, vocabulary]` begins in the flat buffers.
    pub a: usize,
    /// Where B `[hidden, r]` begins.
    pub b: usize,
    /// r.
    pub rank: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// s.
    pub scale: f32,
}

impl EmbeddingUpdate {
    /// `a[t] = A[:, id[t]]` into the front of `narrow`.
    fn gather<B: Backend>(&self, site: &EmbeddingSite<'_, B>, tokens: usize, narrow: &mut B::Buffer) {
        let a = View::<B>::at(site.parameters, self.a, self.rank, self.vocabulary);
        site.backend.gather_ids(site.batch, a, true, ViewMut::<B>::new(narrow, tokens, self.rank));
    }
}

impl<B: Backend> EmbeddingBranch<B> for EmbeddingLora {
    fn forward(&self, site: &EmbeddingSite<'_, B>, mut y: ViewMut<'_, B>, scratch: &mut BranchScratch<B>) {
        if let Some(update) = &self.update {
            update.gather(site, y.rows, &mut scratch.narrow);
            let b = View::<B>::at(site.parameters, update.b, self.hidden, update.rank);
            let a = View::<B>::new(&scratch.narrow, y.rows, update.rank);
            site.backend.gemm(update.scale, a, false, b, true, 1.0, y.reborrow());
        }
        let (tokens, start) = &self.tokens;
        for (index, id) in tokens.iter().enumerate() {
            let row = View::<B>::at(site.parameters, start + index * self.hidden, 1, self.hidden);
            site.backend.set_rows_of(site.batch, *id, row, y.reborrow());
        }
    }

    fn backward(
        &self,
        site: &EmbeddingSite<'_, B>,
        dy: View<'_, B>,
        gradient: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        let (tokens, start) = &self.tokens;
        for (index, id) in tokens.iter().enumerate() {
            let row = ViewMut::<B>::at(&mut *gradient, start + index * self.hidden, 1, self.hidden);
            site.backend.sum_rows_of(site.batch, *id, dy, row);
        }
        let Some(update) = &self.update else { return };
        update.gather(site, dy.rows, &mut scratch.narrow);
        let a = View::<B>::new(&scratch.narrow, dy.rows, update.rank);
        let db = ViewMut::<B>::at(&mut *gradient, update.b, self.hidden, update.rank);
        site.backend.gemm(update.scale, dy, true, a, false, 1.0, db);
        let b = View::<B>::at(site.parameters, update.b, self.hidden, update.rank);
        let da = ViewMut::<B>::new(&mut *scratch.narrow, dy.rows, update.rank);
        site.backend.gemm(update.scale, dy, false, b, false, 0.0, da);
        let da = View::<B>::new(&scratch.narrow, dy.rows, update.rank);
        let table = ViewMut::<B>::at(gradient, update.a, update.rank, update.vocabulary);
        site.backend.scatter_ids(site.batch, da, true, table);
    }
}
