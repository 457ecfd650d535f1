//! Operations that work row by row.

use rayon::prelude::*;

use super::{Cpu, CpuBatch, math, row_of};
use crate::{
    backend::{View, ViewMut},
    random::DropoutKey,
};

/// Numbers a task handles at least: enough to be worth handing to another thread.
const GRAIN: usize = 1 << 14;

/// The memory of a matrix's rows, from the first to the end of the last.
fn rows_of(view: ViewMut<'_, Cpu>) -> &mut [f32] {
    if view.rows == 0 {
        return &mut [];
    }
    &mut view.data[view.offset..view.offset + (view.rows - 1) * view.stride + view.columns]
}

/// How many rows make a task.
fn grain(columns: usize) -> usize {
    GRAIN.div_ceil(columns.max(1))
}

impl Cpu {
    /// Calls `work(row, numbers)` for every row of `out`.
    pub(super) fn rows(&self, out: ViewMut<'_, Self>, work: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let (columns, stride) = (out.columns, out.stride);
        let grain = grain(columns);
        let memory = rows_of(out);
        self.install(|| {
            memory.par_chunks_mut(stride.max(1) * grain).enumerate().for_each(|(task, rows)| {
                for (i, row) in rows.chunks_mut(stride.max(1)).enumerate() {
                    work(task * grain + i, &mut row[..columns]);
                }
            });
        });
    }

    /// Calls `work(row, numbers of a, numbers of b)` for every row of two matrices of as many rows.
    pub(super) fn row_pairs(
        &self,
        a: ViewMut<'_, Self>,
        b: ViewMut<'_, Self>,
        work: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
    ) {
        debug_assert_eq!(a.rows, b.rows);
        let (a_columns, a_stride, b_columns, b_stride) = (a.columns, a.stride, b.columns, b.stride);
        let grain = grain(a_columns);
        let (a, b) = (rows_of(a), rows_of(b));
        self.install(|| {
            a.par_chunks_mut(a_stride.max(1) * grain)
                .zip(b.par_chunks_mut(b_stride.max(1) * grain))
                .enumerate()
                .for_each(|(task, (a, b))| {
                    let rows = a.chunks_mut(a_stride.max(1)).zip(b.chunks_mut(b_stride.max(1)));
                    for (i, (a, b)) in rows.enumerate() {
                        work(task * grain + i, &mut a[..a_columns], &mut b[..b_columns]);
                    }
                });
        });
    }

    /// Calls `work(numbers of a, numbers of b, numbers of c)` for every row of three matrices of one shape.
    pub(super) fn row_triples(
        &self,
        a: ViewMut<'_, Self>,
        b: ViewMut<'_, Self>,
        c: ViewMut<'_, Self>,
        work: impl Fn(&mut [f32], &mut [f32], &mut [f32]) + Sync + Send,
    ) {
        debug_assert!(a.rows == b.rows && b.rows == c.rows);
        let (columns, strides) = (a.columns, [a.stride, b.stride, c.stride].map(|stride| stride.max(1)));
        let (a, b, c) = (rows_of(a), rows_of(b), rows_of(c));
        self.install(|| {
            let chunks = b.par_chunks_mut(strides[1]).zip(c.par_chunks_mut(strides[2]));
            a.par_chunks_mut(strides[0])
                .zip(chunks)
                .with_min_len(grain(columns))
                .for_each(|(a, (b, c))| work(&mut a[..columns], &mut b[..columns], &mut c[..columns]));
        });
    }

    pub(super) fn rms_norm_rows(
        &self,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        epsilon: f32,
        out: ViewMut<'_, Self>,
        reciprocal: ViewMut<'_, Self>,
    ) {
        let weight = row_of(weight, 0);
        self.row_pairs(out, reciprocal, |row, out, reciprocal| {
            let x = row_of(x, row);
            let mean = math::dot(x, x) / x.len() as f32;
            reciprocal[0] = 1.0 / (mean + epsilon).sqrt();
            math::scale_by(x, reciprocal[0], weight, out);
        });
    }

    pub(super) fn rms_norm_backward_rows(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        let weight = row_of(weight, 0);
        self.rows(dx, |row, dx| {
            let (x, dout, factor) = (row_of(x, row), row_of(dout, row), row_of(reciprocal, row)[0]);
            let projection = math::dot3(x, dout, weight) / x.len() as f32;
            let slope = projection * factor * factor * factor;
            math::add_norm_gradient(dout, weight, x, factor, slope, dx);
        });
    }

    pub(super) fn rope_rows(
        &self,
        positions: &[u32],
        head_dim: usize,
        table: View<'_, Self>,
        backward: bool,
        x: ViewMut<'_, Self>,
    ) {
        let half = head_dim / 2;
        let sign = if backward { -1.0 } else { 1.0 };
        self.rows(x, |row, x| {
            let (cosines, sines) = row_of(table, positions[row] as usize).split_at(half);
            for head in x.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(half);
                math::rotate(first, second, cosines, sines, sign);
            }
        });
    }

    pub(super) fn dropout_rows(
        &self,
        batch: &CpuBatch,
        key: DropoutKey,
        p: f32,
        x: View<'_, Self>,
        out: ViewMut<'_, Self>,
    ) {
        let (packed, key) = (&batch.packed, key.philox_key());
        self.rows(out, |row, out| {
            math::dropout_mask(key, packed.sample_ids[row], packed.positions[row], p, out);
            math::multiply(row_of(x, row), out);
        });
    }

    pub(super) fn dropout_backward_rows(
        &self,
        batch: &CpuBatch,
        key: DropoutKey,
        p: f32,
        dout: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        let (packed, key) = (&batch.packed, key.philox_key());
        self.rows(dx, |row, dx| {
            batch.with_lane(|lane| {
                let mask = &mut lane[..dx.len()];
                math::dropout_mask(key, packed.sample_ids[row], packed.positions[row], p, mask);
                math::add_product(row_of(dout, row), mask, dx);
            });
        });
    }
}
