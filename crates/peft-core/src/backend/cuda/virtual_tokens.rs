//! Rows and keys that stand before the tokens of a span.

use super::{Cuda, CudaBatch, THREADS, any, grid, launch};
use crate::backend::{SpanStart, View, ViewMut};

impl Cuda {
    /// [`crate::backend::Backend::put_virtual`].
    pub(super) fn put_virtual_tokens(
        &self,
        batch: &CudaBatch,
        at: SpanStart,
        from: View<'_, Self>,
        to: ViewMut<'_, Self>,
    ) {
        let (spans, count) = (batch.spans.address, batch.span_count as u32);
        let (grid, keys) = (grid(from.rows, from.columns), u32::from(at == SpanStart::Keys));
        let (from, to) = (any(from), any(to.view()));
        launch!(self.device, "put_virtual", grid, [THREADS, 1], spans, count, keys, from, to);
    }

    /// Runs `kernel`, one thread an element of a matrix of `size`, which knows the spans.
    pub(super) fn over_spans(
        &self,
        kernel: &'static str,
        batch: &CudaBatch,
        size: (usize, usize),
        from: View<'_, Self>,
        to: ViewMut<'_, Self>,
    ) {
        let (grid, spans, count) = (grid(size.0, size.1), batch.spans.address, batch.span_count as u32);
        launch!(self.device, kernel, grid, [THREADS, 1], spans, count, any(from), any(to.view()));
    }
}
