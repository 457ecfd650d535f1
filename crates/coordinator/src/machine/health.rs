//! What a job's crew went through: recoveries, steps passed over, rows that count twice.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use shanty_config::UsualLoss;
use shanty_data::order::Order;
use shanty_proto::{Generation, Step, WorkerId};

use super::{event::AdapterFacts, pace::Pace, time::TimeRecord};

/// Recoveries that are kept.
const RECOVERIES: usize = 32;
/// More bad steps than this within [`BAD_STEPS_WITHIN`] steps, and passing over them is no help.
const BAD_STEPS: usize = 5;
/// See [`BAD_STEPS`].
const BAD_STEPS_WITHIN: u64 = 20;

/// How a generation ended early, and the next committed step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecoveryRecord {
    /// When the step was committed.
    pub unix_ms: u64,
    /// `lost`, `broken`, `hung`, `diverged`, `bad_step`, `left`; `joined`, `drained`, `straggler`, `gives_way`, `shrunk`.
    pub cause: String,
    /// In words.
    pub text: String,
    /// The worker that it was about, if it was one.
    pub worker: Option<WorkerId>,
    /// The first step committed afterwards.
    pub step: Step,
    /// The generation that committed it.
    pub generation: Generation,
    /// From the last sign of life, or of progress, to the moment it was noticed.
    pub detection_ms: Option<f64>,
    /// From that moment to the committed step.
    pub stall_ms: f64,
    /// Committed steps that had to be trained again.
    pub steps_lost: u64,
    /// Rows that moved to another worker.
    pub rows_requeued: u64,
}

/// What is durable of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthRecord {
    /// Newest last.
    pub recoveries: Vec<RecoveryRecord>,
    /// Members lost.
    pub losses: u64,
    /// Restarts of the coordinator while the job was at work.
    pub coordinator_restarts: u64,
    /// Steps that are to be passed over.
    pub skip: BTreeSet<Step>,
    /// Steps of the lineage that were passed over.
    pub skipped: BTreeSet<Step>,
    /// Rows that count twice in the adapter.
    pub duplicates: u64,
    /// The generation that the lineage began with: of the last start that was not from members.
    pub lineage_from: Generation,
    /// No member holds the state: it is in a checkpoint.
    pub handed_over: bool,
    /// All who held the state were lost, and there was no generation since.
    pub all_lost: bool,
    /// What became of its time.
    pub time: TimeRecord,
    /// What is trained, once a worker has loaded the base.
    pub adapter: Option<AdapterFacts>,
}

/// What a job's crew went through.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health {
    pub record: HealthRecord,
    pub pace: Pace,
    pub usual_loss: UsualLoss,
    /// How often a worker's state differed from the others'.
    pub divergences: BTreeMap<WorkerId, u32>,
    /// Bad steps of late.
    bad: Vec<Step>,
    /// The adapter is to go back to a checkpoint not beyond this step.
    pub back_to: Option<Step>,
    /// Who was asked for a checkpoint before the last members go.
    pub keeper: Option<WorkerId>,
    /// It could not write one.
    pub keep_failed: bool,
    /// A user wants a checkpoint of a step beyond this one.
    pub save_after: Option<Step>,
}

impl Health {
    /// Notes a recovery.
    pub fn recovered(&mut self, recovery: RecoveryRecord) {
        if self.record.recoveries.len() == RECOVERIES {
            self.record.recoveries.remove(0);
        }
        self.record.recoveries.push(recovery);
    }

    /// Notes a bad step; says whether there are too many.
    pub fn note_bad(&mut self, step: Step) -> bool {
        self.bad.retain(|bad| bad.0 + BAD_STEPS_WITHIN > step.0 && *bad != step);
        self.bad.push(step);
        self.bad.len() > BAD_STEPS
    }

    /// Goes back to an earlier step.
    pub fn return_to(&mut self, step: Step) {
        self.record.skipped.retain(|skipped| *skipped <= step);
    }

    /// Rows of steps that were passed over.
    pub fn rows_skipped(&self, order: &Order) -> u64 {
        self.record.skipped.iter().map(|step| order.rows_in_step(step.0)).sum()
    }
}
