//! A job as it is loaded in this process.

use std::sync::Arc;

use crate::{engine::StepEngine, plan::JobPlan, row_log::RowLog};

use super::{
    checkpoint::Checkpoints,
    state::{State, Update},
    sum::LocalSum,
};

/// A job as it is loaded: outlives generations.
pub(crate) struct Job {
    pub(crate) plan: JobPlan,
    pub(crate) engine: Box<dyn StepEngine>,
    pub(crate) row_log: RowLog,
    /// How a step changes the parameters.
    pub(crate) update: Update,
    /// Adapter and optimizer; none before the first generation gave one.
    pub(crate) state: Option<State>,
    /// The local sum of the step after the state's.
    pub(crate) sum: LocalSum,
    /// Where sums over all ranks arrive. `[flat_length]`
    pub(crate) reduced: Vec<f32>,
    /// Rows of a micro-batch, as the crew agreed; 0 before the first generation.
    pub(crate) micro_batch_rows: u64,
    pub(crate) checkpoints: Checkpoints,
    /// Hash of what defines the adapter.
    pub(crate) adapter_hash: Arc<str>,
}

impl Job {
    pub(crate) fn new(plan: JobPlan, engine: Box<dyn StepEngine>, row_log: RowLog) -> Self {
        let length = engine.facts().flat_length;
        let update = Update::new(&plan.spec.train, plan.steps());
        let adapter = serde_json::to_vec(&plan.spec.adapter).unwrap_or_default();
        let adapter_hash = blake3::hash(&adapter).to_hex().as_str().into();
        Self {
            plan,
            engine,
            row_log,
            update,
            state: None,
            sum: LocalSum::default(),
            reduced: vec![0.0; length],
            micro_batch_rows: 0,
            checkpoints: Checkpoints::default(),
            adapter_hash,
        }
    }

    /// Length of the flat parameter vector.
    pub(crate) fn flat_length(&self) -> usize {
        self.reduced.len()
    }

    /// Drops state and sum: they belong to another attempt.
    pub(crate) fn forget_state(&mut self) {
        self.state = None;
        self.sum.clear();
        self.micro_batch_rows = 0;
    }
}
