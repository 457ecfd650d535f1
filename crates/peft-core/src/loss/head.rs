//! Output head and cross-entropy in one, a chunk of rows at a time.
//!
//! Only rows that predict a trained token go through the last norm and the head. Logits exist for one chunk of
//! rows only; their gradient overwrites them, and is multiplied back into the gradient of the hidden state at
//! once. A head kept as bf16 is widened a block of its rows at a time; where one block holds
//! all of it, once.

use crate::{
    adapter::BranchScratch,
    backend::{Backend, View, ViewMut},
    model::EmbeddingView,
    nn::{
        linear::{Branch, Linear, TrainedParts},
        rms_norm::RmsNorm,
    },
    plan::{HeadMemory, HeadScratch},
};

/// The end of a decoder.
pub struct Head<'a, B: Backend> {
    /// The norm behind the last layer.
    pub norm: RmsNorm<'a, B>,
    /// `[vocabulary, hidden]`.
    pub table: EmbeddingView<'a>,
    /// Bounds the logits.
    pub soft_cap: Option<f32>,
    /// What is trained here.
    pub trained: TrainedHead<'a, B>,
}

/// What is trained of the head.
pub struct TrainedHead<'a, B: Backend> {
    /// Its table in the flat parameters, where it is trained itself.
    pub table: Option<View<'a, B>>,
    /// What stands beside it.
    pub branch: Option<Branch<'a, B>>,
    /// Tokens whose rows are trained, and the rows.
    pub rows: Option<(&'a [u32], View<'a, B>)>,
}

impl<B: Backend> Default for TrainedHead<'_, B> {
    fn default() -> Self {
        Self { table: None, branch: None, rows: None }
    }
}

/// The head's rows as products read them.
enum Table<'a, B: Backend> {
    /// All in one block.
    Whole(View<'a, B>),
    /// Widened into this scratch when wanted.
    Blocks(&'a mut B::Buffer),
}

/// Where gradients go: that of the hidden state `[T, hidden]`, and the flat one.
pub struct HeadGradient<'a, B: Backend> {
    /// Written, unscaled; rows that predict nothing get 0.
    pub hidden: ViewMut<'a, B>,
    /// Added to, where anything here is trained.
    pub flat: &'a mut B::Buffer,
}

impl<B: Backend> Head<'_, B> {
    /// Cross-entropy of the batch's `count` predicting rows of `hidden` `[T, hidden]`, kept in `scratch` for [`Head::sum`].
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    pub fn loss(
        &self,
        backend: &B,
        batch: &B::Batch,
        count: usize,
        hidden: View<'_, B>,
        scratch: &mut HeadScratch<'_, B>,
        branch: &mut BranchScratch<B>,
        mut gradient: Option<HeadGradient<'_, B>>,
    ) {
        if let Some(gradient) = &mut gradient {
            backend.fill(0.0, gradient.hidden.reborrow());
        }
        let (features, vocabulary) = (hidden.columns, self.table.rows());
        let HeadScratch { x, normed, dnormed, logits, own } = scratch;
        let HeadMemory { dx, reciprocal, losses, block, rows, block_rows, kept, few, .. } = &mut **own;
        let block_rows = self.block_rows(*block_rows);
        let mut table = self.table(backend, block, block_rows);
        for first in (0..count).step_by(*rows) {
            let rows = (*rows).min(count - first);
            let x_view = ViewMut::<B>::new(&mut **x, rows, features);
            backend.gather_predicting(batch, first, hidden, x_view);
            let x = View::<B>::new(&**x, rows, features);
            let normed_view = ViewMut::<B>::new(&mut **normed, rows, features);
            self.norm.forward(backend, x, normed_view, ViewMut::<B>::new(&mut *reciprocal, rows, 1));
            let normed = View::<B>::new(&**normed, rows, features);
            self.multiply(backend, batch, &mut table, block_rows, normed, logits, kept, branch);
            let logits_view = ViewMut::<B>::new(&mut **logits, rows, vocabulary);
            let losses = ViewMut::<B>::at(&mut *losses, first, rows, 1);
            backend.cross_entropy(batch, first, gradient.is_some(), self.soft_cap, logits_view, losses);

            let Some(HeadGradient { hidden, flat }) = &mut gradient else { continue };
            self.rows_backward(backend, normed, logits, few, flat);
            if let Some(own) = self.trained.table {
                let dlogits = View::<B>::new(&**logits, rows, vocabulary);
                let dtable = ViewMut::<B>::at(flat, own.offset, vocabulary, features);
                backend.gemm(1.0, dlogits, true, normed, false, 1.0, dtable);
            }
            let dlogits = View::<B>::new(&**logits, rows, vocabulary);
            let into = ViewMut::<B>::new(&mut **dnormed, rows, features);
            match (&self.trained.branch, &table) {
                (Some(own), Table::Whole(weight)) => {
                    self.linear(*weight, own).backward(
                        backend,
                        batch,
                        normed,
                        kept,
                        dlogits,
                        false,
                        Some(into),
                        flat,
                        branch,
                    );
                }
                _ => {
                    for (start, size) in blocks(vocabulary, block_rows) {
                        let weight = table.block(backend, &self.table, start, size);
                        let beta = if start > 0 { 1.0 } else { 0.0 };
                        let dnormed = ViewMut::<B>::new(&mut **dnormed, rows, features);
                        let part = dlogits.column_range(start, size);
                        backend.gemm(1.0, part, false, weight, false, beta, dnormed);
                    }
                }
            }
            if let Some((_, own)) = self.trained.rows {
                let dlogits = View::<B>::new(&*few, rows, own.rows);
                let dnormed = ViewMut::<B>::new(&mut **dnormed, rows, features);
                backend.gemm(1.0, dlogits, false, own, false, 1.0, dnormed);
            }
            backend.fill(0.0, ViewMut::<B>::new(&mut *dx, rows, features));
            let dnormed = View::<B>::new(&**dnormed, rows, features);
            let reciprocal = View::<B>::new(&*reciprocal, rows, 1);
            let dx_view = ViewMut::<B>::new(&mut *dx, rows, features);
            self.norm.backward(backend, dnormed, x, reciprocal, dx_view, flat);
            let dx = View::<B>::new(&*dx, rows, features);
            backend.scatter_predicting(batch, first, dx, hidden.reborrow());
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
        batch: &B::Batch,
        hidden: View<'_, B>,
        scratch: &mut HeadScratch<'_, B>,
        branch: &mut BranchScratch<B>,
        out: &mut [f32],
    ) {
        let (features, vocabulary) = (hidden.columns, self.table.rows());
        let HeadScratch { normed, logits, own, .. } = scratch;
        let HeadMemory { reciprocal, block, rows, block_rows, kept, .. } = &mut **own;
        let block_rows = self.block_rows(*block_rows);
        let mut table = self.table(backend, block, block_rows);
        for first in (0..hidden.rows).step_by(*rows) {
            let rows = (*rows).min(hidden.rows - first);
            let x = hidden.row_range(first, rows);
            let normed_view = ViewMut::<B>::new(&mut **normed, rows, features);
            self.norm.forward(backend, x, normed_view, ViewMut::<B>::new(&mut *reciprocal, rows, 1));
            let normed = View::<B>::new(&**normed, rows, features);
            self.multiply(backend, batch, &mut table, block_rows, normed, logits, kept, branch);
            if let Some(cap) = self.soft_cap {
                backend.soft_cap(cap, ViewMut::<B>::new(&mut **logits, rows, vocabulary));
            }
            let out = &mut out[first * vocabulary..(first + rows) * vocabulary];
            backend.download(View::<B>::new(&**logits, rows, vocabulary), out);
        }
    }

    /// `logits = normed tableᵀ`, with what is trained beside the table.
    #[expect(clippy::too_many_arguments, reason = "inputs, outputs and scratch of a layer without memory")]
    fn multiply(
        &self,
        backend: &B,
        batch: &B::Batch,
        table: &mut Table<'_, B>,
        block_rows: usize,
        normed: View<'_, B>,
        logits: &mut B::Buffer,
        kept: &mut B::Buffer,
        branch: &mut BranchScratch<B>,
    ) {
        let (rows, vocabulary) = (normed.rows, self.table.rows());
        match (&self.trained.branch, &*table) {
            (Some(own), Table::Whole(weight)) => {
                let logits = ViewMut::<B>::new(&mut *logits, rows, vocabulary);
                self.linear(*weight, own).forward(backend, batch, normed, false, logits, kept, branch);
            }
            _ => {
                for (start, size) in blocks(vocabulary, block_rows) {
                    let weight = table.block(backend, &self.table, start, size);
                    let part = ViewMut::<B>::new(&mut *logits, rows, vocabulary).column_range(start, size);
                    backend.gemm(1.0, normed, false, weight, true, 0.0, part);
                }
            }
        }
        if let Some((ids, own)) = self.trained.rows {
            for (index, id) in ids.iter().enumerate() {
                let part = ViewMut::<B>::new(&mut *logits, rows, vocabulary).column_range(*id as usize, 1);
                backend.gemm(1.0, normed, false, own.row_range(index, 1), true, 0.0, part);
            }
        }
    }

    /// Moves the gradients of trained rows' logits from `logits` to `few` `[rows, tokens]`, and adds the rows' own to `flat`.
    fn rows_backward(
        &self,
        backend: &B,
        normed: View<'_, B>,
        logits: &mut B::Buffer,
        few: &mut B::Buffer,
        flat: &mut B::Buffer,
    ) {
        let Some((ids, own)) = self.trained.rows else { return };
        let (rows, vocabulary) = (normed.rows, self.table.rows());
        for (index, id) in ids.iter().enumerate() {
            let from = View::<B>::new(&*logits, rows, vocabulary).column_range(*id as usize, 1);
            backend.copy(from, ViewMut::<B>::new(&mut *few, rows, ids.len()).column_range(index, 1));
            let part = ViewMut::<B>::new(&mut *logits, rows, vocabulary).column_range(*id as usize, 1);
            backend.fill(0.0, part);
        }
        let dlogits = View::<B>::new(&*few, rows, ids.len());
        let drows = ViewMut::<B>::at(flat, own.offset, own.rows, own.columns);
        backend.gemm(1.0, dlogits, true, normed, false, 1.0, drows);
    }

    fn linear<'a>(&'a self, weight: View<'a, B>, branch: &'a Branch<'_, B>) -> Linear<'a, B> {
        let Branch { branch, parameters, dropout } = *branch;
        let branch = Some(Branch { branch, parameters, dropout });
        Linear { weight, bias: None, branch, trained: TrainedParts::default(), merged: false }
    }

    /// A table that is trained lies whole in the parameters.
    fn block_rows(&self, block_rows: usize) -> usize {
        if self.trained.table.is_some() { self.table.rows() } else { block_rows }
    }

    fn table<'a>(&'a self, backend: &'a B, block: &'a mut B::Buffer, block_rows: usize) -> Table<'a, B> {
        if let Some(own) = self.trained.table {
            return Table::Whole(own);
        }
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
