//! A micro-batch as the CPU's operations read it.

use std::sync::{Mutex, PoisonError};

use crate::batch::PackedBatch;

/// A micro-batch, and scratch memory for each thread that works on it.
pub struct CpuBatch {
    pub(super) packed: PackedBatch,
    pub(super) lanes: Vec<Mutex<Vec<f32>>>,
}

impl CpuBatch {
    /// Lends the calling thread its scratch memory. Must not be nested.
    pub(super) fn with_lane<R>(&self, work: impl FnOnce(&mut [f32]) -> R) -> R {
        let index = rayon::current_thread_index().unwrap_or(0) % self.lanes.len();
        // A poisoned lane holds scratch numbers, nothing that could be half done.
        let mut lane = self.lanes[index].lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut lane)
    }
}
