//! A job as it is loaded in this process.

use std::sync::Arc;

use shanty_checkpoint::Optimizer;

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
    /// What this worker owes to sums that travel rounded, as of the state; empty where it owes nothing.
    pub(crate) owed: Vec<f32>,
    /// Rows of a micro-batch, as the crew agreed; 0 before the first generation.
    pub(crate) micro_batch_rows: u64,
    /// Members of the last generation.
    pub(crate) world_size: u32,
    /// The last evaluated step of the lineage.
    pub(crate) evaluated_step: Option<u64>,
    pub(crate) checkpoints: Checkpoints,
    /// The last evaluation that this worker took part in: after which step, and the mean loss.
    pub(crate) evaluated_loss: Option<(u64, f64)>,
    /// Hash of what defines the adapter.
    pub(crate) adapter_hash: Arc<str>,
}

/// What outlives an engine.
pub(crate) struct Carried {
    applied: u64,
    optimizer: Optimizer,
    method: Vec<f32>,
    furthest_start: u64,
    micro_batch_rows: u64,
}

impl Carried {
    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }
}

impl Job {
    pub(crate) fn new(plan: JobPlan, engine: Box<dyn StepEngine>, row_log: RowLog) -> Self {
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
            owed: Vec::new(),
            micro_batch_rows: 0,
            world_size: 1,
            evaluated_step: None,
            checkpoints: Checkpoints::default(),
            evaluated_loss: None,
            adapter_hash,
        }
    }

    /// Length of the flat parameter vector.
    pub(crate) fn flat_length(&self) -> usize {
        self.engine.facts().flat_length
    }

    /// Lengths of the parts of a state, in the order in which they travel: see [`State::read`].
    pub(crate) fn part_lengths(&self) -> [usize; 4] {
        let flat = self.flat_length();
        [flat, flat, flat, self.engine.method_state().len()]
    }

    /// The state before the first step, which follows from the job alone.
    pub(crate) fn start_afresh(&mut self) -> Result<(), Error> {
        self.owed.clear();
        let parameters = self.engine.initial_parameters(self.plan.spec.train.seed)?;
        let method = self.engine.method_state();
        self.sum.clear(&mut *self.engine)?;
        self.state = Some(self.update.fresh(&mut *self.engine, &parameters, method)?);
        self.micro_batch_rows = 0;
        Ok(())
    }

    /// Takes the state that another member or a checkpoint gave. The local sum is of another one and is dropped.
    pub(crate) fn take_state(
        &mut self,
        applied: u64,
        given: &Optimizer,
        method: Vec<f32>,
    ) -> Result<(), Error> {
        self.owed.clear();
        // Should the engine fail half way, it holds none.
        self.state = None;
        self.sum.clear(&mut *self.engine)?;
        self.state = Some(self.update.restore(&mut *self.engine, applied, given, method)?);
        Ok(())
    }

    /// The state, for the same job with another part of the base; none before the first generation gave one.
    pub(crate) fn carried(&self) -> Result<Option<Carried>, Error> {
        let Some(state) = &self.state else { return Ok(None) };
        Ok(Some(Carried {
            applied: state.applied(),
            optimizer: state.to_checkpoint(&*self.engine)?,
            method: state.method.clone(),
            furthest_start: self.furthest_start,
            micro_batch_rows: self.micro_batch_rows,
        }))
    }

    /// Takes over what [`Job::carried`] gave.
    pub(crate) fn carry(&mut self, carried: Carried) -> Result<(), Error> {
        let Carried { applied, optimizer, method, furthest_start, micro_batch_rows } = carried;
        self.take_state(applied, &optimizer, method)?;
        (self.furthest_start, self.micro_batch_rows) = (furthest_start, micro_batch_rows);
        Ok(())
    }

    /// Drops the local sum.
    pub(crate) fn drop_sum(&mut self) -> Result<(), Error> {
        self.sum.clear(&mut *self.engine)
    }

    /// Drops state and sum: they belong to another attempt.
    pub(crate) fn forget_state(&mut self) -> Result<(), Error> {
        self.state = None;
        self.furthest_start = 0;
        self.micro_batch_rows = 0;
        self.owed.clear();
        self.drop_sum()
    }
}
