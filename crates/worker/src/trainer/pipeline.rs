//! Rows of the steps ahead, leased while earlier steps compute.

use std::{collections::VecDeque, time::Instant};

use shanty_proto::v1::{LeaseRowsRequest, Split};
use tokio_util::sync::CancellationToken;

use crate::{
    Error,
    control::Interrupted,
    plan::JobPlan,
    rows::{Lease, Leased, RowClient},
};

use super::formation::Formation;

/// Rows of one request of an evaluation.
const EVALUATION_ROWS_A_LEASE: usize = 32;
/// Requests of an evaluation that are under way at a time.
const EVALUATION_LEASES: usize = 2;

/// Leases of one generation.
pub(super) struct Pipeline {
    client: RowClient,
    /// Ends all requests when the generation is left.
    cancel: CancellationToken,
    job_id: String,
    attempt: u32,
    generation: u64,
    rank: u32,
    world_size: u32,
    /// Rows to compute in the generation's first step, where they are not the regular slice.
    first_rows: Option<Vec<u64>>,
    /// Steps that were asked for, in order, and not taken yet.
    pending: VecDeque<(u64, Lease)>,
    next_step: u64,
}

impl Pipeline {
    pub(super) fn new(
        client: RowClient,
        cancel: CancellationToken,
        plan: &JobPlan,
        formation: &Formation,
    ) -> Self {
        Self {
            client,
            cancel,
            job_id: plan.job_id.clone(),
            attempt: plan.attempt,
            generation: formation.generation,
            rank: formation.rank,
            world_size: formation.world_size(),
            first_rows: formation.start.first_rows.as_ref().map(|(_, compute)| compute.clone()),
            pending: VecDeque::new(),
            next_step: formation.start.applied_step + 1,
        }
    }

    /// Asks for the rows of all steps up to `credited` that were not asked for yet.
    pub(super) fn ask_up_to(&mut self, credited: u64, plan: &JobPlan) {
        while self.next_step <= credited.min(plan.steps()) {
            let step = self.next_step;
            let ids = match self.first_rows.take() {
                Some(ids) => ids,
                None => plan.rows_of_rank(step, self.world_size, self.rank),
            };
            let lease = self.lease(Split::Train, step, ids);
            self.pending.push_back((step, lease));
            self.next_step += 1;
        }
    }

    /// The rows of a step that was asked for, and how long they were waited for, in seconds.
    pub(super) fn take(&mut self, step: u64) -> Result<Result<(Leased, f64), Error>, Interrupted> {
        let began = Instant::now();
        match self.pending.pop_front() {
            Some((of, lease)) if of == step => {
                let leased = lease.wait()?;
                Ok(leased.map(|leased| (leased, began.elapsed().as_secs_f64())))
            }
            _ => Ok(Err(Error::WrongRows { step, reason: "they were not asked for".to_owned() })),
        }
    }

    /// The evaluation rows of this rank, a few at a time. There is at least one part, for the announcement.
    pub(super) fn evaluation(&self, step: u64, ids: &[u64]) -> EvaluationRows<'_> {
        let parts = match ids {
            [] => VecDeque::from([Vec::new()]),
            ids => ids.chunks(EVALUATION_ROWS_A_LEASE).map(<[u64]>::to_vec).collect(),
        };
        EvaluationRows { pipeline: self, step, parts, pending: VecDeque::new() }
    }

    fn lease(&self, split: Split, step: u64, row_ids: Vec<u64>) -> Lease {
        let request = LeaseRowsRequest {
            job_id: self.job_id.clone(),
            attempt: self.attempt,
            generation: self.generation,
            split: split.into(),
            step,
            row_ids,
        };
        self.client.lease(request, self.cancel.clone())
    }
}

/// The rows of an evaluation as they arrive.
pub(super) struct EvaluationRows<'a> {
    pipeline: &'a Pipeline,
    step: u64,
    parts: VecDeque<Vec<u64>>,
    pending: VecDeque<Lease>,
}

impl EvaluationRows<'_> {
    /// The next few rows; none after the last.
    pub(super) fn next(&mut self) -> Option<Result<Result<Leased, Error>, Interrupted>> {
        while self.pending.len() < EVALUATION_LEASES
            && let Some(ids) = self.parts.pop_front()
        {
            self.pending.push_back(self.pipeline.lease(Split::Eval, self.step, ids));
        }
        self.pending.pop_front().map(Lease::wait)
    }
}
