//! Output head and cross-entropy in one, a chunk of rows at a time.
//!
//! Only rows that predict a trained token go through the last norm and the head. Logits exist for one chunk of
//! rows only; their gradient overwrites them, and is multiplied back into the gradient of the hidden state at
//! once. The head is frozen. A head kept as bf16 is widened a block of its rows at a time; where one block holds
//! all of it, once.

use crate::{
    backend::{Backend, View, ViewMut},
    model::EmbeddingView,
    nn::rms_norm::RmsNorm,
    plan::{HeadMemory, HeadScratch},
};

/// The frozen end of a decoder.
pub struct Head<'a, B: Backend> {
    /// The norm behind the last layer.
    pub norm: RmsNorm<'a, B>,
    /// `[vocabulary, hidden]`.
    pub table: EmbeddingView<'a>,
}

/// The head's rows as products read them.
enum Table<'a, B: Backend> {
    /// All in one block.
    Whole(View<'a, B>),
    /// Widened into this scratch when wanted.
    Blocks(&'a mut B::Buffer),
}

impl<B: Backend> Head<'_, B> {
    /// Cross-entropy of the batch's `count` predicting rows of `hidden` `[T, hidden]`, kept in `scratch` for
    /// [`Head::sum`]. With `gradient` `[T, hidden]`, that of `hidden` is written there, unscaled; rows that predict
    /// nothing get 0.
    pub fn loss(
        &self,
        backend: &B,
        batch: &B::Batch,
        count: usize,
        hidden: View<'_, B>,
        scratch: &mut HeadScratch<'_, B>,
        mut gradient: Option<ViewMut<'_, B>>,
    ) {
        if let Some(gradient) = &mut gradient {
            backend.fill(0.0, gradient.reborrow());
        }
        let (features, vocabulary) = (hidden.columns, self.table.rows());
        let HeadScratch { x, normed, dnormed, logits, own } = scratch;
        let HeadMemory { dx, reciprocal, losses, block, rows, block_rows, .. } = &mut **own;
        let mut table = self.table(backend, block, *block_rows);
        for first in (0..count).step_by(*rows) {
            let rows = (*rows).min(count - first);
            let x_view = ViewMut::<B>::new(&mut **x, rows, features);
            backend.gather_predicting(batch, first, hidden, x_view);
            let x = View::<B>::new(&**x, rows, features);
            let normed_view = ViewMut::<B>::new(&mut **normed, rows, features);
            self.norm.forward(backend, x, normed_view, ViewMut::<B>::new(&mut *reciprocal, rows, 1));
            let normed = View::<B>::new(&**normed, rows, features);
            for (start, size) in blocks(vocabulary, *block_rows) {
                let weight = table.block(backend, &self.table, start, size);
                let part = ViewMut::<B>::new(&mut **logits, rows, vocabulary).column_range(start, size);
                backend.gemm(1.0, normed, false, weight, true, 0.0, part);
            }
            let logits_view = ViewMut::<B>::new(&mut **logits, rows, vocabulary);
            let losses = ViewMut::<B>::at(&mut *losses, first, rows, 1);
            backend.cross_entropy(batch, first, gradient.is_some(), logits_view, losses);

            let Some(gradient) = &mut gradient else { continue };
            let dlogits = View::<B>::new(&**logits, rows, vocabulary);
            for (start, size) in blocks(vocabulary, *block_rows) {
                let weight = table.block(backend, &self.table, start, size);
                let beta = if start > 0 { 1.0 } else { 0.0 };
                let dnormed = ViewMut::<B>::new(&mut **dnormed, rows, features);
                backend.gemm(1.0, dlogits.column_range(start, size), false, weight, false, beta, dnormed);
            }
            backend.fill(0.0, ViewMut::<B>::new(&mut *dx, rows, features));
            let dnormed = View::<B>::new(&**dnormed, rows, features);
            let reciprocal = View::<B>::new(&*reciprocal, rows, 1);
            self.norm.backward(backend, dnormed, x, reciprocal, ViewMut::<B>::new(&mut *dx, rows, features));
            let dx = View::<B>::new(&*dx, rows, features);
            backend.scatter_predicting(batch, first, dx, gradient.reborrow());
        }
    }

    /// The sum of the losses that [`Head::loss`] left, in f64 in the order of the tokens. Waits for them.
    pub fn sum(backend: &B, count: usize, memory: &mut HeadMemory<B>) -> f64 {
        let HeadMemory { losses, read_losses, .. } = memory;
        read_losses.resize(count, 0.0);
        backend.download(View::<B>::new(losses, count, 1), read_losses);
        read_losses.iter().map(|loss| f64::from(*loss)).sum()
    }

    /// Logits of every row of `hidden`, written to `out` row after row.
    pub fn logits(
        &self,
        backend: &B,
        hidden: View<'_, B>,
        scratch: &mut HeadScratch<'_, B>,
        out: &mut [f32],
    ) {
        let (features, vocabulary) = (hidden.columns, self.table.rows());
        let HeadScratch { normed, logits, own, .. } = scratch;
        let HeadMemory { reciprocal, block, rows, block_rows, .. } = &mut **own;
        let mut table = self.table(backend, block, *block_rows);
        for first in (0..hidden.rows).step_by(*rows) {
            let rows = (*rows).min(hidden.rows - first);
            let x = hidden.row_range(first, rows);
            let normed_view = ViewMut::<B>::new(&mut **normed, rows, features);
            self.norm.forward(backend, x, normed_view, ViewMut::<B>::new(&mut *reciprocal, rows, 1));
            for (start, size) in blocks(vocabulary, *block_rows) {
                let weight = table.block(backend, &self.table, start, size);
                let part = ViewMut::<B>::new(&mut **logits, rows, vocabulary).column_range(start, size);
                backend.gemm(1.0, View::<B>::new(&**normed, rows, features), false, weight, true, 0.0, part);
            }
            let out = &mut out[first * vocabulary..(first + rows) * vocabulary];
            backend.download(View::<B>::new(&**logits, rows, vocabulary), out);
        }
    }

    fn table<'a>(&'a self, backend: &'a B, block: &'a mut B::Buffer, block_rows: usize) -> Table<'a, B> {
        let vocabulary = self.table.rows();
        if block_rows >= vocabulary {
            Table::Whole(backend.frozen_rows(&self.table, 0, vocabulary, block))
        } else {
            Table::Blocks(block)
        }
    }
}

impl<B: Backend> Table<'_, B> {
    fn block<'b>(
        &'b mut self,
        backend: &'b B,
        table: &EmbeddingView<'b>,
        first: usize,
        rows: usize,
    ) -> View<'b, B> {
        match self {
            Self::Whole(view) => view.row_range(first, rows),
            Self::Blocks(scratch) => backend.frozen_rows(table, first, rows, scratch),
        }
    }
}

/// First row and size of each block.
fn blocks(vocabulary: usize, block_rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..vocabulary).step_by(block_rows).map(move |start| (start, block_rows.min(vocabulary - start)))
}
