//! Token embedding: `y[t] = E[id[t]]`. Frozen and first, so nothing flows back through it.

use crate::{
    backend::{Backend, ViewMut},
    model::EmbeddingView,
};

/// Writes the embedding of every token of the batch into y `[T, hidden]`.
pub fn forward<B: Backend>(backend: &B, batch: &B::Batch, table: &EmbeddingView<'_>, y: ViewMut<'_, B>) {
    backend.gather_embedding(batch, table, y);
}
