//! Attention on Hopper: products by `wgmma`, tiles loaded by the copy engine.

use std::{ffi::c_void, mem::MaybeUninit, ptr};

use cudarc::driver::sys::{self, CUtensorMap};

use super::{Backward, Forward, ShapeArgument, plain::allow_shared, tiles::Counter};
use crate::backend::{
    AttentionShape, View,
    cuda::{
        Cuda, CudaBatch, DeviceError, MatrixArgument, Numbers,
        compile::{HopperTiles, Unit},
        device::{Device, call, function},
        launch, matrix, target,
    },
};

/// Threads of a block: one warp group that loads, two that compute.
const THREADS: usize = 384;
/// Threads of a block that computes statistics.
const STATISTICS_THREADS: usize = 256;

/// Kernels for one size of heads, with a soft cap or without.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    tiles: HopperTiles,
    forward: sys::CUfunction,
    statistics: sys::CUfunction,
    dkv: sys::CUfunction,
    dq: sys::CUfunction,
}

/// A matrix that kernels write.
#[derive(Clone, Copy)]
#[repr(C)]
struct Target {
    address: u64,
    stride: u64,
}

impl From<MatrixArgument> for Target {
    fn from(matrix: MatrixArgument) -> Self {
        Self { address: matrix.address, stride: matrix.stride }
    }
}

/// Whether these kernels take such heads, and matrices that lie in memory as these do: bf16, every row at a multiple of
/// 16 bytes.
pub(super) fn takes<'a>(
    cuda: &Cuda,
    shape: AttentionShape,
    views: impl IntoIterator<Item = View<'a, Cuda>>,
) -> bool {
    cuda.device.architecture == "sm_90"
        && HopperTiles::choose(shape.head_dim, shape.soft_cap.is_some()).is_some()
        && views.into_iter().all(|view| {
            let MatrixArgument { address, stride, .. } = matrix(view);
            view.data.numbers == Numbers::Bf16 && address.is_multiple_of(16) && stride.is_multiple_of(8)
        })
}

fn kernels(device: &Device, shape: AttentionShape) -> Result<Kernels, DeviceError> {
    let key = (shape.head_dim, shape.soft_cap.is_some());
    device.attention.hopper.get(key, || load(device, key.0, key.1))
}

fn load(device: &Device, head_dim: usize, soft_cap: bool) -> Result<Kernels, DeviceError> {
    let unsupported = || DeviceError::Unsupported { what: format!("heads of {head_dim} features") };
    let tiles = HopperTiles::choose(head_dim, soft_cap).ok_or_else(unsupported)?;
    // What is Hopper's alone goes by a name of its own.
    let architecture = format!("{}a", device.architecture);
    let forward = device.module(&Unit::attention_hopper_forward(tiles).load(&architecture)?)?;
    let backward = device.module(&Unit::attention_hopper_backward(tiles).load(&architecture)?)?;
    // SAFETY: the modules are loaded and never unloaded.
    unsafe {
        let kernels = Kernels {
            tiles,
            forward: function(forward, "attention_hopper_forward")?,
            statistics: function(backward, "attention_hopper_statistics")?,
            dkv: function(backward, "attention_hopper_dkv")?,
            dq: function(backward, "attention_hopper_dq")?,
        };
        allow_shared(kernels.forward, tiles.forward_bytes())?;
        allow_shared(kernels.dkv, tiles.keys_bytes())?;
        allow_shared(kernels.dq, tiles.queries_bytes())?;
        Ok(kernels)
    }
}

/// A matrix of heads for the copy engine, which takes `rows` rows of one head at a time. Features lie in stretches of
/// 128 bytes, or 64 where heads are no multiple of that, swizzled over that width; rows past the end read as 0.
fn map(view: View<'_, Cuda>, head_dim: usize, rows: usize) -> Result<CUtensorMap, DeviceError> {
    use sys::{
        CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as BF16,
        CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE as ZEROS,
        CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE as PLAIN,
        CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B as WIDE,
        CUtensorMapSwizzle_enum as Swizzle,
    };
    let (stretch, swizzle) = if head_dim.is_multiple_of(64) {
        (64, Swizzle::CU_TENSOR_MAP_SWIZZLE_128B)
    } else {
        (32, Swizzle::CU_TENSOR_MAP_SWIZZLE_64B)
    };
    let MatrixArgument { address, stride, .. } = matrix(view);
    let sizes = [stretch as u64, view.rows as u64, (view.columns / stretch) as u64];
    let strides = [2 * stride, 2 * stretch as u64];
    let (window, steps) = ([stretch as u32, rows as u32, (head_dim / stretch) as u32], [1_u32; 3]);
    let mut map = MaybeUninit::<CUtensorMap>::uninit();
    // SAFETY: the driver writes the map and reads three sizes, two strides, three edges and three steps; the matrix
    // is only described.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            BF16,
            3,
            ptr::with_exposed_provenance_mut::<c_void>(address as usize),
            sizes.as_ptr(),
            strides.as_ptr(),
            window.as_ptr(),
            steps.as_ptr(),
            PLAIN,
            swizzle,
            WIDE,
            ZEROS,
        )
        .result()
        .map_err(call("cuTensorMapEncodeTiled"))?;
        Ok(map.assume_init())
    }
}

pub(super) fn forward(
    cuda: &Cuda,
    batch: &CudaBatch,
    shape: AttentionShape,
    on: &Forward<'_>,
) -> Result<(), DeviceError> {
    let Kernels { tiles, forward, .. } = kernels(&cuda.device, shape)?;
    let map = |view, rows| map(view, shape.head_dim, rows);
    let items = batch.tiles.queries.count * shape.heads;
    let log_sum = target(&on.log_sum);
    launch!(
        at cuda.device,
        forward,
        "attention_hopper_forward",
        [items.min(cuda.device.multiprocessors), 1, 1],
        [THREADS, 1],
        tiles.forward_bytes(),
        map(on.q, HopperTiles::ROWS)?,
        map(on.k, tiles.forward.rows)?,
        map(on.v, tiles.forward.rows)?,
        batch.spans.address,
        batch.tiles.queries.memory.address,
        items as u32,
        batch.tiles.counter(Counter::Forward),
        ShapeArgument::from(shape),
        Target::from(target(&on.out)),
        log_sum.address,
        log_sum.stride
    );
    Ok(())
}

pub(super) fn backward(
    cuda: &Cuda,
    batch: &CudaBatch,
    shape: AttentionShape,
    on: &Backward<'_>,
) -> Result<(), DeviceError> {
    let Kernels { tiles, statistics: statistics_kernel, dkv, dq, .. } = kernels(&cuda.device, shape)?;
    let map = |view, rows| map(view, shape.head_dim, rows);
    let (spans, statistics, rows) = (batch.spans.address, batch.statistics.address, on.q.rows as u32);
    let argument = ShapeArgument::from(shape);
    let (dout, out, log_sum) = (matrix(on.dout), matrix(on.out), matrix(on.log_sum));
    let lanes = match shape.head_dim {
        ..=64 => 8,
        65..=128 => 16,
        _ => 32,
    };
    launch!(
        at cuda.device,
        statistics_kernel,
        "attention_hopper_statistics",
        [on.q.rows.div_ceil(STATISTICS_THREADS / lanes), shape.heads, 1],
        [STATISTICS_THREADS, 1],
        0,
        dout.address,
        dout.stride,
        out.address,
        out.stride,
        log_sum.address,
        log_sum.stride,
        rows,
        statistics
    );
    let items = batch.tiles.keys.count * (HopperTiles::ROWS / tiles.key_rows) * shape.kv_heads;
    launch!(
        at cuda.device,
        dkv,
        "attention_hopper_dkv",
        [items.min(cuda.device.multiprocessors), 1, 1],
        [THREADS, 1],
        tiles.keys_bytes(),
        map(on.q, tiles.keys.rows)?,
        map(on.k, tiles.key_rows)?,
        map(on.v, tiles.key_rows)?,
        map(on.dout, tiles.keys.rows)?,
        spans,
        batch.tiles.keys.memory.address,
        items as u32,
        batch.tiles.counter(Counter::Keys),
        argument,
        statistics,
        rows,
        Target::from(target(&on.dk)),
        Target::from(target(&on.dv))
    );
    let items = batch.tiles.queries.count * shape.heads;
    launch!(
        at cuda.device,
        dq,
        "attention_hopper_dq",
        [items.min(cuda.device.multiprocessors), 1, 1],
        [THREADS, 1],
        tiles.queries_bytes(),
        map(on.q, HopperTiles::ROWS)?,
        map(on.k, tiles.queries.rows)?,
        map(on.v, tiles.queries.rows)?,
        map(on.dout, HopperTiles::ROWS)?,
        spans,
        batch.tiles.queries.memory.address,
        items as u32,
        batch.tiles.counter(Counter::Queries),
        argument,
        statistics,
        rows,
        Target::from(target(&on.dq))
    );
    Ok(())
}
