//! Virtual tokens: rows that every span of a batch has at its front.

use super::{Cpu, CpuBatch, math, row_of};
use crate::{
    backend::{SpanStart, View, ViewMut},
    batch::Span,
};

/// The row of the keys that stands for row `row` of the batch. Spans lie in the order of their rows, without gaps.
fn key_of(spans: &[Span], row: usize) -> usize {
    let span = &spans[spans.partition_point(|span| span.query_start <= row) - 1];
    span.key_start + span.keys - span.queries + row - span.query_start
}

impl Cpu {
    pub(super) fn put_virtual_rows(
        &self,
        batch: &CpuBatch,
        at: SpanStart,
        from: View<'_, Self>,
        to: ViewMut<'_, Self>,
    ) {
        for span in &batch.packed.spans {
            for row in 0..from.rows {
                let start = to.offset + (at.of(span) + row) * to.stride;
                to.data[start..start + from.columns].copy_from_slice(row_of(from, row));
            }
        }
    }

    /// A task takes a row of `to`, and the spans one after the other: the order of the sum does not depend on threads.
    pub(super) fn sum_virtual_rows(&self, batch: &CpuBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.rows(to, |row, to| {
            for span in &batch.packed.spans {
                math::add(row_of(from, span.key_start + row), to);
            }
        });
    }

    pub(super) fn copy_rows_to_keys(&self, batch: &CpuBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        for span in &batch.packed.spans {
            let ahead = span.keys - span.queries;
            for row in 0..span.queries {
                let start = to.offset + (span.key_start + ahead + row) * to.stride;
                to.data[start..start + from.columns].copy_from_slice(row_of(from, span.query_start + row));
            }
        }
    }

    pub(super) fn copy_keys_to_rows(&self, batch: &CpuBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let spans = &batch.packed.spans;
        self.rows(to, |row, to| to.copy_from_slice(row_of(from, key_of(spans, row))));
    }
}
