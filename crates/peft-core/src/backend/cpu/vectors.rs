//! Operations on rows and columns that methods of adaptation need: scales, sums, scatters.
//!
//! Sums over tokens are split by columns, never by tokens, and run from the first token to the last: the thread count
//! changes no bit.

use rayon::prelude::*;

use super::{Cpu, math, row_of};
use crate::backend::{View, ViewMut};

/// Columns of a task.
const COLUMNS: usize = 256;

pub(super) fn scale_columns(
    cpu: &Cpu,
    alpha: f32,
    x: View<'_, Cpu>,
    factors: View<'_, Cpu>,
    beta: f32,
    out: ViewMut<'_, Cpu>,
) {
    let factors = row_of(factors, 0);
    cpu.rows(out, |row, out| {
        let numbers = out.iter_mut().zip(row_of(x, row)).zip(factors);
        if beta == 0.0 {
            numbers.for_each(|((out, x), factor)| *out = alpha * x * factor);
        } else {
            numbers.for_each(|((out, x), factor)| *out = alpha * x * factor + beta * *out);
        }
    });
}

/// Calls `add(row, first column, sums)` for every row of `rows`, for each part of the columns of `out`, and adds the sums
/// to `out`, which is one row.
fn columns(
    cpu: &Cpu,
    rows: usize,
    out: ViewMut<'_, Cpu>,
    add: impl Fn(usize, usize, &mut [f32]) + Sync + Send,
) {
    let out = &mut out.data[out.offset..out.offset + out.columns];
    cpu.install(|| {
        out.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, out)| {
            let mut sums = [0.0_f32; COLUMNS];
            let sums = &mut sums[..out.len()];
            for row in 0..rows {
                add(row, part * COLUMNS, sums);
            }
            math::add(sums, out);
        });
    });
}

pub(super) fn column_sum(cpu: &Cpu, alpha: f32, x: View<'_, Cpu>, out: ViewMut<'_, Cpu>) {
    columns(cpu, x.rows, out, |row, first, sums| {
        for (sum, x) in sums.iter_mut().zip(&row_of(x, row)[first..]) {
            *sum += alpha * x;
        }
    });
}

pub(super) fn column_dot(cpu: &Cpu, x: View<'_, Cpu>, y: View<'_, Cpu>, out: ViewMut<'_, Cpu>) {
    columns(cpu, x.rows, out, |row, first, sums| {
        for ((sum, x), y) in sums.iter_mut().zip(&row_of(x, row)[first..]).zip(&row_of(y, row)[first..]) {
            *sum += x * y;
        }
    });
}

pub(super) fn norm_weight_gradient(
    cpu: &Cpu,
    dout: View<'_, Cpu>,
    x: View<'_, Cpu>,
    reciprocal: View<'_, Cpu>,
    out: ViewMut<'_, Cpu>,
) {
    columns(cpu, x.rows, out, |row, first, sums| {
        let factor = row_of(reciprocal, row)[0];
        let numbers = sums.iter_mut().zip(&row_of(x, row)[first..]).zip(&row_of(dout, row)[first..]);
        for ((sum, x), dout) in numbers {
            *sum += dout * x * factor;
        }
    });
}

pub(super) fn row_dot(
    cpu: &Cpu,
    alpha: f32,
    x: View<'_, Cpu>,
    y: View<'_, Cpu>,
    beta: f32,
    out: ViewMut<'_, Cpu>,
) {
    let out = &mut out.data[out.offset..out.offset + out.columns];
    cpu.install(|| {
        out.par_iter_mut().with_min_len(16).enumerate().for_each(|(row, out)| {
            let sum = alpha * math::dot(row_of(x, row), row_of(y, row));
            *out = if beta == 0.0 { sum } else { sum + beta * *out };
        });
    });
}

/// Adds row t of `from` to row (or column) `ids[t]` of `table`, one token after the other.
pub(super) fn scatter(ids: &[u32], from: View<'_, Cpu>, columns: bool, table: ViewMut<'_, Cpu>) {
    for (at, &id) in ids.iter().enumerate() {
        let (from, id) = (row_of(from, at), id as usize);
        if columns {
            for (row, from) in from.iter().enumerate() {
                table.data[table.offset + row * table.stride + id] += from;
            }
        } else {
            let start = table.offset + id * table.stride;
            math::add(from, &mut table.data[start..start + from.len()]);
        }
    }
}
