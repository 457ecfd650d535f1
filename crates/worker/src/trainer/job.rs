//! A job as it is loaded in this process.

use std::sync::Arc;

use crate::{Error, engine::StepEngine, plan::JobPlan, row_log::RowLog};

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
    /// The furthest start of a generation that this worker was told of. Without a state, it shows what was missed.
    pub(crate) furthest_start: u64,
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

/// What outlives an engine.
pub(crate) struct Carried {
    state: State,
    furthest_start: u64,
    micro_batch_rows: u64,
}

impl Carried {
    pub(crate) fn applied(&self) -> u64 {
        self.state.applied()
    }
}

impl Job {
    pub(crate) fn new(plan: JobPlan, engine: Box<dyn StepEngine>, row_log: RowLog) -> Self {
        let length = engine.facts().flat_length;
        let update = Update::new(&plan.spec, plan.steps()).with_rates(&*engine);
        let adapter = serde_json::to_vec(&plan.spec.adapter).unwrap_or_default();
        let adapter_hash = blake3::hash(&adapter).to_hex().as_str().into();
        Self {
            plan,
            engine,
            row_log,
            update,
            state: None,
            furthest_start: 0,
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

    /// Lengths of [`State::parts`].
    pub(crate) fn part_lengths(&self) -> [usize; 4] {
        let flat = self.flat_length();
        [flat, flat, flat, self.engine.method_state().len()]
    }

    /// The state before the first step, which follows from the job alone.
    pub(crate) fn start_afresh(&mut self) -> Result<(), Error> {
        let parameters = self.engine.initial_parameters(self.plan.spec.train.seed)?;
        self.state = Some(self.update.fresh(parameters, self.engine.method_state()));
        self.micro_batch_rows = 0;
        self.sum.clear();
        Ok(())
    }

    /// The state, for the same job with another part of the base; none before the first generation gave one.
    pub(crate) fn take_state(&mut self) -> Option<Carried> {
        let (furthest_start, micro_batch_rows) = (self.furthest_start, self.micro_batch_rows);
        self.state.take().map(|state| Carried { state, furthest_start, micro_batch_rows })
    }

    /// Takes over what [`Job::take_state`] gave.
    pub(crate) fn carry(&mut self, carried: Carried) {
        let Carried { state, furthest_start, micro_batch_rows } = carried;
        self.state = Some(state);
        (self.furthest_start, self.micro_batch_rows) = (furthest_start, micro_batch_rows);
    }

    /// Drops state and sum: they belong to another attempt.
    pub(crate) fn forget_state(&mut self) {
        self.state = None;
        self.furthest_start = 0;
        self.sum.clear();
        self.micro_batch_rows = 0;
    }
}
