//! Causal attention in tiles of query rows, with the keys above the diagonal left out, and those before a window.
//!
//! Forward, a task is a tile of one head: `S = scale Q K^T`, softmax by row, `O = P V`, and the logarithm of each
//! row's sum is kept. Backward, a task is a key head of a span: it computes `P` again from that logarithm, then
//! `dV += P^T dO`, `dS = P (dO V^T - rowsum(dO O)) scale`, `dQ = dS K`, `dK += dS^T Q` (Dao et al., FlashAttention,
//! arXiv 2205.14135, without its tiling over keys: a tile of scores stays in the second-level cache here).

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Cpu, CpuBatch,
    gemm::{Operand, Shared, Target, multiply, multiply_shared},
    math,
};
use crate::{
    backend::{AttentionShape, View, ViewMut},
    batch::Span,
};

/// Query rows of a tile.
pub(super) const TILE: usize = 64;

/// A tile of queries of one head.
struct Tile {
    /// First query, counted in the span.
    first: usize,
    /// Number of queries.
    queries: usize,
    /// First key that the tile's first query sees, counted in the span.
    first_key: usize,
    /// Number of keys from there to the last that the tile's last query sees.
    keys: usize,
    /// Keys of the span up to the tile's first query, that query's own included.
    known: usize,
    /// Keys that a query sees at most.
    window: usize,
}

impl Tile {
    fn of(span: &Span, shape: AttentionShape, index: usize) -> Option<Self> {
        let first = index * TILE;
        if first >= span.queries {
            return None;
        }
        let queries = TILE.min(span.queries - first);
        let known = first + 1 + span.keys - span.queries;
        let window = shape.window.unwrap_or(usize::MAX);
        let first_key = known.saturating_sub(window);
        Some(Self { first, queries, first_key, keys: known + queries - 1 - first_key, known, window })
    }

    /// Which of the tile's keys its query `i` sees.
    fn seen(&self, i: usize) -> Range<usize> {
        let end = self.known + i;
        end.saturating_sub(self.window) - self.first_key..end - self.first_key
    }

    /// Splits the numbers of query `i`, one a key of the tile, into those before, inside and behind what it sees.
    fn split<'a>(&self, i: usize, row: &'a mut [f32]) -> [&'a mut [f32]; 3] {
        let Range { start, end } = self.seen(i);
        let (seen, behind) = row.split_at_mut(end);
        let (before, seen) = seen.split_at_mut(start);
        [before, seen, behind]
    }
}

/// Part of a matrix: rows from `row` on, the columns of head `head`.
fn head<'a>(x: View<'a, Cpu>, row: usize, rows: usize, head: usize, head_dim: usize) -> Operand<'a> {
    Operand::new(x.data, x.offset + row * x.stride + head * head_dim, rows, head_dim, x.stride)
}

#[expect(clippy::too_many_arguments, reason = "mirrors the backend's operation")]
pub(super) fn forward(
    cpu: &Cpu,
    batch: &CpuBatch,
    shape: AttentionShape,
    q: View<'_, Cpu>,
    k: View<'_, Cpu>,
    v: View<'_, Cpu>,
    out: ViewMut<'_, Cpu>,
    log_sum: ViewMut<'_, Cpu>,
) {
    let spans = &batch.packed.spans;
    let tiles = spans.iter().map(|span| span.queries.div_ceil(TILE)).max().unwrap_or(0);
    let (out_offset, out_stride, out) = (out.offset, out.stride, Shared::new(out.data));
    let (sum_offset, sum_stride, log_sum) = (log_sum.offset, log_sum.stride, Shared::new(log_sum.data));
    let group = shape.heads / shape.kv_heads;
    let dim = shape.head_dim;
    cpu.tasks(spans.len() * shape.heads * tiles, |task| {
        let (rest, index) = (task / tiles, task % tiles);
        let (span, query_head) = (&spans[rest / shape.heads], rest % shape.heads);
        let Some(tile) = Tile::of(span, shape, index) else { return };
        let (row, key_row) = (span.query_start + tile.first, span.key_start + tile.first_key);
        let queries = head(q, row, tile.queries, query_head, dim);
        let keys = head(k, key_row, tile.keys, query_head / group, dim);
        let values = head(v, key_row, tile.keys, query_head / group, dim);
        batch.with_lane(|lane| {
            let scores = &mut lane[..tile.queries * tile.keys];
            let target = Target { offset: 0, stride: tile.keys };
            multiply(shape.scale, queries, keys.transposed(), 0.0, scores, target);
            let mut factors = [0.0; TILE];
            for (i, scores) in scores.chunks_exact_mut(tile.keys).enumerate() {
                let [before, seen, behind] = tile.split(i, scores);
                if let Some(cap) = shape.soft_cap {
                    math::soft_cap(seen, cap);
                }
                let largest = math::maximum(seen);
                let sum = math::exp_and_sum(seen, largest);
                before.fill(0.0);
                behind.fill(0.0);
                factors[i] = 1.0 / sum;
                // SAFETY: one number of a row and head of this task's own.
                let place = unsafe { log_sum.stretch(sum_offset + (row + i) * sum_stride + query_head, 1) };
                place[0] = largest + sum.ln();
            }
            let target =
                Target { offset: out_offset + row * out_stride + query_head * dim, stride: out_stride };
            let scores = Operand::new(scores, 0, tile.queries, tile.keys, tile.keys);
            // SAFETY: rows and columns of this task's own tile and head.
            unsafe { multiply_shared(1.0, scores, values, 0.0, out, target) };
            for (i, factor) in factors[..tile.queries].iter().enumerate() {
                // SAFETY: as above.
                math::scale(unsafe { out.stretch(target.offset + i * out_stride, dim) }, *factor);
            }
        });
    });
}

/// Where the gradients go.
pub(super) struct Gradients<'a> {
    pub dq: ViewMut<'a, Cpu>,
    pub dk: ViewMut<'a, Cpu>,
    pub dv: ViewMut<'a, Cpu>,
}

/// What the forward pass read and wrote, and the gradient of what it wrote.
pub(super) struct Known<'a> {
    pub q: View<'a, Cpu>,
    pub k: View<'a, Cpu>,
    pub v: View<'a, Cpu>,
    pub out: View<'a, Cpu>,
    pub log_sum: View<'a, Cpu>,
    pub dout: View<'a, Cpu>,
}

pub(super) fn backward(
    cpu: &Cpu,
    batch: &CpuBatch,
    shape: AttentionShape,
    known: &Known<'_>,
    to: Gradients<'_>,
) {
    let spans = &batch.packed.spans;
    let Gradients { dq, dk, dv } = to;
    let (dq_offset, dq_stride, dq) = (dq.offset, dq.stride, Shared::new(dq.data));
    let (dk_offset, dk_stride, dk) = (dk.offset, dk.stride, Shared::new(dk.data));
    let (dv_offset, dv_stride, dv) = (dv.offset, dv.stride, Shared::new(dv.data));
    let group = shape.heads / shape.kv_heads;
    let dim = shape.head_dim;
    let Known { q, k, v, out, log_sum, dout } = *known;
    cpu.tasks(spans.len() * shape.kv_heads, |task| {
        let (span, kv_head) = (&spans[task / shape.kv_heads], task % shape.kv_heads);
        let dk_target =
            Target { offset: dk_offset + span.key_start * dk_stride + kv_head * dim, stride: dk_stride };
        let dv_target =
            Target { offset: dv_offset + span.key_start * dv_stride + kv_head * dim, stride: dv_stride };
        for row in 0..span.keys {
            // SAFETY: rows of this task's span, columns of its key head.
            unsafe {
                dk.stretch(dk_target.offset + row * dk_stride, dim).fill(0.0);
                dv.stretch(dv_target.offset + row * dv_stride, dim).fill(0.0);
            }
        }
        batch.with_lane(|lane| {
            for query_head in kv_head * group..(kv_head + 1) * group {
                let mut index = 0;
                while let Some(tile) = Tile::of(span, shape, index) {
                    index += 1;
                    let (row, key_row) = (span.query_start + tile.first, span.key_start + tile.first_key);
                    let size = tile.queries * tile.keys;
                    let (p, rest) = lane.split_at_mut(size);
                    let ds = &mut rest[..size];
                    let queries = head(q, row, tile.queries, query_head, dim);
                    let keys = head(k, key_row, tile.keys, kv_head, dim);
                    let values = head(v, key_row, tile.keys, kv_head, dim);
                    let dout_tile = head(dout, row, tile.queries, query_head, dim);
                    let tight = Target { offset: 0, stride: tile.keys };
                    multiply(shape.scale, queries, keys.transposed(), 0.0, p, tight);
                    multiply(1.0, dout_tile, values.transposed(), 0.0, ds, tight);
                    for i in 0..tile.queries {
                        let range = i * tile.keys..(i + 1) * tile.keys;
                        let [p_before, p_seen, p_behind] = tile.split(i, &mut p[range.clone()]);
                        let [ds_before, ds_seen, ds_behind] = tile.split(i, &mut ds[range]);
                        let sum = log_sum.data[log_sum.offset + (row + i) * log_sum.stride + query_head];
                        let start = |x: View<'_, Cpu>| x.offset + (row + i) * x.stride + query_head * dim;
                        let mean = math::dot(
                            &out.data[start(out)..start(out) + dim],
                            &dout.data[start(dout)..start(dout) + dim],
                        );
                        if let Some(cap) = shape.soft_cap {
                            math::soft_cap(p_seen, cap);
                            math::capped_softmax_gradient(p_seen, sum, mean, shape.scale, cap, ds_seen);
                        } else {
                            math::exp_shifted(p_seen, sum);
                            math::softmax_gradient(p_seen, mean, shape.scale, ds_seen);
                        }
                        for unseen in [p_before, p_behind, ds_before, ds_behind] {
                            unseen.fill(0.0);
                        }
                    }
                    let p = Operand::new(p, 0, tile.queries, tile.keys, tile.keys);
                    let ds = Operand::new(ds, 0, tile.queries, tile.keys, tile.keys);
                    let dq_target =
                        Target { offset: dq_offset + row * dq_stride + query_head * dim, stride: dq_stride };
                    let target = |to: &Target| Target {
                        offset: to.offset + tile.first_key * to.stride,
                        stride: to.stride,
                    };
                    let (dk_target, dv_target) = (target(&dk_target), target(&dv_target));
                    // SAFETY: rows of this task's span; columns of query heads that belong to its key head, and of
                    // that key head.
                    unsafe {
                        multiply_shared(1.0, ds, keys, 0.0, dq, dq_target);
                        multiply_shared(1.0, ds.transposed(), queries, 1.0, dk, dk_target);
                        multiply_shared(1.0, p.transposed(), dout_tile, 1.0, dv, dv_target);
                    }
                }
            }
        });
    });
}

impl Cpu {
    /// Runs `task(0) … task(count - 1)`, several at once.
    pub(super) fn tasks(&self, count: usize, task: impl Fn(usize) + Sync + Send) {
        self.install(|| (0..count).into_par_iter().with_max_len(1).for_each(task));
    }
}
