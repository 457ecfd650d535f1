//! Where the time of a step goes, by kind of operation.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use serde::Serialize;

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Products with frozen matrices, the head included; with them what a branch adds to the same target.
    Product,
    /// Products with a side of at most [`NARROW`]: the rest of the branches.
    NarrowProduct,
    /// Attention, forward.
    Attention,
    /// Attention, backward.
    AttentionBackward,
    /// Norms, both ways.
    Norm,
    /// Rotary positions, both ways.
    Rope,
    /// SwiGLU, both ways.
    Swiglu,
    /// Dropout, both ways.
    Dropout,
    /// Softmax and loss.
    CrossEntropy,
    /// Copies, sums, gathering rows.
    Move,
    /// Writing frozen matrices out as f32.
    Dequantise,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Product,
        Self::NarrowProduct,
        Self::Attention,
        Self::AttentionBackward,
        Self::Norm,
        Self::Rope,
        Self::Swiglu,
        Self::Dropout,
        Self::CrossEntropy,
        Self::Move,
        Self::Dequantise,
    ];
}

/// A product with a side this short is counted as narrow.
pub const NARROW: usize = 64;

/// Time spent in one kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spent {
    /// The kind.
    pub operation: Operation,
    /// How often.
    pub calls: u64,
    /// How long altogether.
    pub time: Duration,
    /// Multiplications and additions, where they are counted.
    pub flops: u64,
}

#[derive(Default)]
struct Counter {
    calls: AtomicU64,
    nanoseconds: AtomicU64,
    flops: AtomicU64,
}

/// Counters by kind of operation.
#[derive(Default)]
pub(super) struct Profile {
    counters: [Counter; Operation::ALL.len()],
}

impl Profile {
    /// Runs `work` and counts it.
    pub fn measure<R>(&self, operation: Operation, flops: usize, work: impl FnOnce() -> R) -> R {
        let begin = Instant::now();
        let result = work();
        let counter = &self.counters[operation as usize];
        counter.calls.fetch_add(1, Relaxed);
        counter.nanoseconds.fetch_add(begin.elapsed().as_nanos() as u64, Relaxed);
        counter.flops.fetch_add(flops as u64, Relaxed);
        result
    }

    /// What was counted since the last call.
    pub fn take(&self) -> Vec<Spent> {
        let take = |counter: &AtomicU64| counter.swap(0, Relaxed);
        let spent = |operation: Operation| {
            let counter = &self.counters[operation as usize];
            Spent {
                operation,
                calls: take(&counter.calls),
                time: Duration::from_nanos(take(&counter.nanoseconds)),
                flops: take(&counter.flops),
            }
        };
        Operation::ALL.map(spent).into_iter().filter(|spent| spent.calls > 0).collect()
    }
}
