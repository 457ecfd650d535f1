//! Attention on any card: products by `mma.sync`, tiles loaded by the threads that use them.

use cudarc::driver::{result, sys};

use super::{Backward, Forward, ShapeArgument};
use crate::backend::{
    AttentionShape, View,
    cuda::{
        Cuda, CudaBatch, DeviceError,
        compile::{AttentionTiles, Unit},
        device::{Device, call, function},
        launch, matrix, target,
    },
};

/// Kernels for one size of heads.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    tiles: AttentionTiles,
    forward: sys::CUfunction,
    delta: sys::CUfunction,
    dq: sys::CUfunction,
    dkv: sys::CUfunction,
}

fn kernels(device: &Device, head_dim: usize) -> Result<Kernels, DeviceError> {
    device.attention.plain.get(head_dim, || load(device, head_dim))
}

fn load(device: &Device, head_dim: usize) -> Result<Kernels, DeviceError> {
    let unsupported = || DeviceError::Unsupported { what: format!("heads of {head_dim} features") };
    if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > 256 {
        return Err(unsupported());
    }
    let tiles =
        AttentionTiles::choose(head_dim, device.shared_bytes, device.precision).ok_or_else(unsupported)?;
    let module = device.module(&Unit::attention(head_dim, tiles).load(&device.architecture)?)?;
    // SAFETY: the module is loaded and never unloaded.
    unsafe {
        let kernels = Kernels {
            tiles,
            forward: function(module, "attention_forward")?,
            delta: function(module, "attention_delta")?,
            dq: function(module, "attention_dq")?,
            dkv: function(module, "attention_dkv")?,
        };
        for (function, bytes) in [
            (kernels.forward, tiles.forward_bytes(head_dim)),
            (kernels.dq, tiles.backward_bytes(head_dim)),
            (kernels.dkv, tiles.backward_bytes(head_dim)),
        ] {
            allow_shared(function, bytes)?;
        }
        Ok(kernels)
    }
}

/// Lets blocks of a kernel take `bytes` bytes of shared memory.
///
/// # Safety
/// The kernel's module must be loaded.
pub(in crate::backend::cuda) unsafe fn allow_shared(
    kernel: sys::CUfunction,
    bytes: usize,
) -> Result<(), DeviceError> {
    use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
    // SAFETY: the caller's.
    unsafe { result::function::set_function_attribute(kernel, SHARED, bytes as i32) }
        .map_err(call("cuFuncSetAttribute"))
}

pub(super) fn forward(
    cuda: &Cuda,
    batch: &CudaBatch,
    shape: AttentionShape,
    on: &Forward<'_>,
) -> Result<(), DeviceError> {
    let kernels = kernels(&cuda.device, shape.head_dim)?;
    let (tiles, argument) = (kernels.tiles, ShapeArgument::from(shape));
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
        matrix(on.q),
        matrix(on.k),
        matrix(on.v),
        target(&on.out),
        target(&on.log_sum)
    );
    Ok(())
}

pub(super) fn backward(
    cuda: &Cuda,
    batch: &CudaBatch,
    shape: AttentionShape,
    on: &Backward<'_>,
) -> Result<(), DeviceError> {
    let kernels = kernels(&cuda.device, shape.head_dim)?;
    let (tiles, argument) = (kernels.tiles, ShapeArgument::from(shape));
    let delta = matrix(View::new(&batch.statistics.buffer, on.q.rows, shape.heads));
    let (out, dout, log_sum) = (matrix(on.out), matrix(on.dout), matrix(on.log_sum));
    let delta_grid = [on.q.rows, shape.heads.div_ceil(8), 1];
    launch!(at cuda.device, kernels.delta, "attention_delta", delta_grid, [32, 8], 0, dout, out, delta);
    let (q, k, v) = (matrix(on.q), matrix(on.k), matrix(on.v));
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
        target(&on.dq)
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
        target(&on.dk),
        target(&on.dv)
    );
    Ok(())
}
