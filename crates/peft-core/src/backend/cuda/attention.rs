//! Attention: which kernels run over which blocks.

use super::{Cuda, CudaBatch, launch, matrix, target};
use crate::backend::{AttentionShape, View, ViewMut};

/// The shape of attention as kernels take it.
#[derive(Clone, Copy)]
#[repr(C)]
struct ShapeArgument {
    heads: u32,
    group: u32,
    scale: f32,
}

fn shape_argument(shape: AttentionShape) -> ShapeArgument {
    ShapeArgument {
        heads: shape.heads as u32,
        group: (shape.heads / shape.kv_heads) as u32,
        scale: shape.scale,
    }
}

#[expect(clippy::too_many_arguments, reason = "mirrors the backend's operation")]
pub(super) fn forward(
    cuda: &Cuda,
    batch: &CudaBatch,
    shape: AttentionShape,
    q: View<'_, Cuda>,
    k: View<'_, Cuda>,
    v: View<'_, Cuda>,
    out: ViewMut<'_, Cuda>,
    log_sum: ViewMut<'_, Cuda>,
) {
    let kernels = match cuda.device.attention(shape.head_dim) {
        Ok(kernels) => kernels,
        Err(error) => return cuda.device.note(Err(error)),
    };
    let (tiles, argument) = (kernels.tiles, shape_argument(shape));
    let grid = [batch.longest_queries.div_ceil(tiles.rows()), shape.heads, batch.span_count];
    launch!(
        at cuda.device,
        kernels.forward,
        "attention_forward",
        grid,
        [32 * tiles.warps, 1],
        tiles.forward_bytes(shape.head_dim),
        batch.spans.address,
        argument,
        matrix(q),
        matrix(k),
        matrix(v),
        target(&out),
        target(&log_sum)
    );
}

#[expect(clippy::too_many_arguments, reason = "mirrors the backend's operation")]
pub(super) fn backward(
    cuda: &Cuda,
    batch: &CudaBatch,
    shape: AttentionShape,
    q: View<'_, Cuda>,
    k: View<'_, Cuda>,
    v: View<'_, Cuda>,
    out: View<'_, Cuda>,
    log_sum: View<'_, Cuda>,
    dout: View<'_, Cuda>,
    dq: ViewMut<'_, Cuda>,
    dk: ViewMut<'_, Cuda>,
    dv: ViewMut<'_, Cuda>,
) {
    let kernels = match cuda.device.attention(shape.head_dim) {
        Ok(kernels) => kernels,
        Err(error) => return cuda.device.note(Err(error)),
    };
    let (tiles, argument) = (kernels.tiles, shape_argument(shape));
    let delta = matrix(View::new(&batch.delta.buffer, q.rows, shape.heads));
    let (out, dout, log_sum) = (matrix(out), matrix(dout), matrix(log_sum));
    let delta_grid = [q.rows, shape.heads.div_ceil(8), 1];
    launch!(at cuda.device, kernels.delta, "attention_delta", delta_grid, [32, 8], 0, dout, out, delta);
    let (q, k, v) = (matrix(q), matrix(k), matrix(v));
    let (threads, shared) = ([32 * tiles.warps, 1], tiles.backward_bytes(shape.head_dim));
    let spans = batch.spans.address;
    let grid = [batch.longest_queries.div_ceil(tiles.rows()), shape.heads, batch.span_count];
    launch!(
        at cuda.device,
        kernels.dq,
        "attention_dq",
        grid,
        threads,
        shared,
        spans,
        argument,
        q,
        k,
        v,
        log_sum,
        delta,
        dout,
        target(&dq)
    );
    let grid = [batch.longest_keys.div_ceil(tiles.rows()), shape.kv_heads, batch.span_count];
    launch!(
        at cuda.device,
        kernels.dkv,
        "attention_dkv",
        grid,
        threads,
        shared,
        spans,
        argument,
        q,
        k,
        v,
        log_sum,
        delta,
        dout,
        target(&dk),
        target(&dv)
    );
}
