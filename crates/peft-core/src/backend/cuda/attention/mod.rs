//! Attention: which kernels run over which blocks.
//!
//! On a Hopper card, bf16 activations and heads of 64, 96, 128 or 256 features go to kernels written for it
//! ([`hopper`]); everything else goes to kernels that run on any card ([`plain`]).

mod hopper;
mod plain;
mod tiles;

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

pub(super) use self::{plain::allow_shared, tiles::TileLists};
use super::{Cuda, CudaBatch, DeviceError};
use crate::backend::{AttentionShape, View, ViewMut};

/// Kernels that were loaded.
#[derive(Default)]
pub(super) struct AttentionKernels {
    plain: Loaded<usize, plain::Kernels>,
    hopper: Loaded<(usize, bool), hopper::Kernels>,
}

/// What is loaded when first asked for.
struct Loaded<K, V>(Mutex<HashMap<K, V>>);

impl<K, V> Default for Loaded<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + std::hash::Hash + Copy, V: Copy> Loaded<K, V> {
    fn get(&self, key: K, load: impl FnOnce() -> Result<V, DeviceError>) -> Result<V, DeviceError> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = known.get(&key) {
            return Ok(*value);
        }
        let value = load()?;
        known.insert(key, value);
        Ok(value)
    }
}

/// The shape of attention as kernels take it; 0 for no cap and no window.
#[derive(Clone, Copy)]
#[repr(C)]
struct ShapeArgument {
    heads: u32,
    group: u32,
    scale: f32,
    cap: f32,
    window: u32,
}

impl From<AttentionShape> for ShapeArgument {
    fn from(shape: AttentionShape) -> Self {
        Self {
            heads: shape.heads as u32,
            group: (shape.heads / shape.kv_heads) as u32,
            scale: shape.scale,
            cap: shape.soft_cap.unwrap_or(0.0),
            // A window of 0 would see nothing; no span is as long as the largest number.
            window: shape.window.map_or(0, |window| u32::try_from(window.max(1)).map_or(0, |window| window)),
        }
    }
}

/// What attention reads and writes forward.
pub(super) struct Forward<'a> {
    pub(super) q: View<'a, Cuda>,
    pub(super) k: View<'a, Cuda>,
    pub(super) v: View<'a, Cuda>,
    pub(super) out: ViewMut<'a, Cuda>,
    pub(super) log_sum: ViewMut<'a, Cuda>,
}

/// What attention reads and writes backward.
pub(super) struct Backward<'a> {
    pub(super) q: View<'a, Cuda>,
    pub(super) k: View<'a, Cuda>,
    pub(super) v: View<'a, Cuda>,
    pub(super) out: View<'a, Cuda>,
    pub(super) log_sum: View<'a, Cuda>,
    pub(super) dout: View<'a, Cuda>,
    pub(super) dq: ViewMut<'a, Cuda>,
    pub(super) dk: ViewMut<'a, Cuda>,
    pub(super) dv: ViewMut<'a, Cuda>,
}

pub(super) fn forward(cuda: &Cuda, batch: &CudaBatch, shape: AttentionShape, on: &Forward<'_>) {
    if batch.span_count == 0 {
        return;
    }
    let done = if hopper::takes(cuda, shape, [on.q, on.k, on.v, on.out.view()]) {
        hopper::forward(cuda, batch, shape, on)
    } else {
        plain::forward(cuda, batch, shape, on)
    };
    cuda.device.note(done);
}

pub(super) fn backward(cuda: &Cuda, batch: &CudaBatch, shape: AttentionShape, on: &Backward<'_>) {
    if batch.span_count == 0 {
        return;
    }
    let results = [on.dq.view(), on.dk.view(), on.dv.view()];
    let all_take = |views: &[View<'_, Cuda>]| hopper::takes(cuda, shape, views.iter().copied());
    let done = if all_take(&[on.q, on.k, on.v, on.out, on.dout]) && all_take(&results) {
        hopper::backward(cuda, batch, shape, on)
    } else {
        plain::backward(cuda, batch, shape, on)
    };
    cuda.device.note(done);
}
