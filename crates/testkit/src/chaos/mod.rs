//! A tiny job under a thousand faults: real processes, killed, stopped, cut off, slowed down, and started again as a
//! service manager would; then a look at what the workers and the coordinator themselves wrote down.

mod crew;
mod history;
mod sea;
mod storm;

use std::{path::PathBuf, time::Duration};

use serde::Serialize;
use shanty_chaos::Fault;

use crate::TinyJob;

pub use history::{Kind, Spread};
pub use storm::run;

/// What is played.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program.
    pub shanty: PathBuf,
    /// How many faults.
    pub faults: u64,
    /// Mean time from one fault to the next; times are exponential.
    pub pause: Duration,
    /// Which faults, and how often in proportion.
    pub kinds: Vec<(Fault, u32)>,
    /// Worker processes that are kept alive.
    pub workers: usize,
    /// The job; when it ends before the faults do, the next one begins.
    pub job: TinyJob,
    /// Decides everything but the machine's own timing.
    pub seed: u64,
    /// Whether workers get network namespaces of their own and the run a small disk, both of which take root.
    pub sea: bool,
}

/// Which faults there are, in proportion.
pub const MIX: [(Fault, u32); 6] = [
    (Fault::Kill, 56),
    (Fault::Stop, 16),
    (Fault::Partition, 12),
    (Fault::Slow, 6),
    // Once all members are lost, the next generation waits until their credits have run out: 20 s after the coordinator's last
    // start. One that is killed more often than that never gets there.
    (Fault::Coordinator, 6),
    (Fault::DiskFull, 4),
];

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Faults that struck.
    pub faults: u64,
    /// From the fault to the moment when the coordinator said that the worker is lost; all kinds.
    pub detection_ms: Spread,
    /// From the fault to the next committed step of a later generation; all kinds.
    pub stall_ms: Spread,
    /// Steps that are in nobody's row log.
    pub steps_lost: u64,
    /// Rows that are in the lineage of the final adapter more often than they should.
    pub duplicates: u64,
    /// Rows that are missing in it.
    pub omissions: u64,
    /// Largest difference of a final loss from the undisturbed run's.
    pub loss_difference: f64,
    /// The same by kind of fault.
    pub kinds: std::collections::BTreeMap<&'static str, Kind>,
    /// Jobs that were played one after another, and steps of all of them.
    pub jobs: u64,
    /// Steps of all jobs.
    pub steps: u64,
    /// Memberships that were agreed on.
    pub generations: u64,
    /// Rows that moved to another worker, and rows that were trained again after a return to a checkpoint.
    pub requeued: u64,
    /// Rows that were trained again after all workers that had the state were lost.
    pub recomputed: u64,
    /// Worker processes that ended without having been struck.
    pub unexplained_exits: u64,
    /// Faults that could not be made here, by kind.
    pub not_made: Vec<&'static str>,
    /// How long it took.
    pub seconds: f64,
    /// What decided it.
    pub seed: u64,
}
