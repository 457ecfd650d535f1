//! What follows from a job alone: its rows step by step, and what is due at which boundary.

use std::path::PathBuf;

use shanty_config::job::JobSpec;
use shanty_data::{
    MixPart,
    order::{self, Order},
};
use shanty_peft_core::model::ShardPart;
use shanty_proto::v1::{Assign, DataSummary};

use crate::Error;

/// One attempt at a job, as assigned.
#[derive(Debug, Clone)]
pub(crate) struct JobPlan {
    pub(crate) job_id: String,
    pub(crate) attempt: u32,
    /// The specification as it was sent, to notice a changed one.
    pub(crate) spec_json: String,
    pub(crate) spec: JobSpec,
    /// The folder of the run on this machine: logs, and a start that was computed from the base.
    pub(crate) store: PathBuf,
    /// Where checkpoints and the finished adapter go: a folder or a URL.
    pub(crate) location: String,
    pub(crate) data: DataSummary,
    /// The part of the base that this worker is to hold; none for all of it.
    pub(crate) part: Option<ShardPart>,
    order: Order,
}

impl JobPlan {
    /// Reads an assignment.
    pub(crate) fn new(assign: Assign) -> Result<Self, Error> {
        let unclear = |reason: String| Error::Protocol { message: "Assign", reason };
        let spec: JobSpec = serde_json::from_str(&assign.spec_json)
            .map_err(|error| unclear(format!("its job specification cannot be read: {error}")))?;
        let data = assign.data.ok_or_else(|| unclear("it has no summary of the data".to_owned()))?;
        let part = |part: &shanty_proto::v1::MixPart| MixPart {
            rows: part.rows,
            rows_per_epoch: part.rows_per_epoch,
        };
        let mix: Vec<MixPart> = data.train_mix.iter().map(part).collect();
        let batch = spec.train.global_batch_size as u64;
        let order = Order::mixed(spec.train.seed, data.train_rows, &mix, batch)
            .map_err(|error| Error::part(&error))?;
        let store = spec.checkpoint.folder(&spec.name);
        let location = spec.checkpoint.location(&spec.name);
        let Assign { job_id, attempt, spec_json, shard_part, .. } = assign;
        let parts = spec.base.shard.parts();
        let part = match shard_part {
            None if parts == 1 => None,
            Some(part) if parts > 1 && part < parts => {
                Some(ShardPart { part: part as usize, parts: parts as usize })
            }
            other => {
                let reason = format!("the base is in {parts} parts, and this worker is given part {other:?}");
                return Err(unclear(reason));
            }
        };
        Ok(Self { job_id, attempt, spec_json, spec, store, location, data, part, order })
    }

    /// Whether an assignment is of the job that is loaded, so that its engine serves for it.
    pub(crate) fn needs_same_engine(&self, other: &Self) -> bool {
        self.job_id == other.job_id && self.spec_json == other.spec_json
    }

    /// Number of [`Self::part`].
    pub(crate) fn part(&self) -> Option<u32> {
        self.part.and_then(|part| u32::try_from(part.part).ok())
    }

    /// Updates that the job makes in all.
    pub(crate) fn steps(&self) -> u64 {
        self.data.steps
    }

    /// All rows of a step.
    pub(crate) fn rows_of_step(&self, step: u64) -> Vec<u64> {
        self.order.step_rows(step)
    }

    /// The epoch that the step after `applied` updates falls in, from 0.
    pub(crate) fn epoch_after(&self, applied: u64) -> u64 {
        self.order.epoch_of(applied + 1)
    }

    /// Rows of one rank in a regular step.
    pub(crate) fn rows_of_rank(&self, step: u64, world_size: u32, rank: u32) -> Vec<u64> {
        order::slice(&self.order.step_rows(step), world_size, rank).to_vec()
    }

    /// Rows of one rank in an evaluation.
    pub(crate) fn evaluation_rows_of_rank(&self, world_size: u32, rank: u32) -> Vec<u64> {
        let rows: Vec<u64> = (0..self.data.eval_rows).collect();
        order::slice(&rows, world_size, rank).to_vec()
    }

    /// Whether the state after `applied` updates is to be evaluated.
    pub(crate) fn evaluation_is_due(&self, applied: u64, evaluated: Option<u64>) -> bool {
        let every = self.spec.train.eval_every_steps;
        let planned = applied == 0 || applied == self.steps() || (every > 0 && applied.is_multiple_of(every));
        self.data.eval_rows > 0 && planned && evaluated.is_none_or(|evaluated| evaluated < applied)
    }

    /// Whether the state after `applied` updates is to be kept as a checkpoint.
    pub(crate) fn checkpoint_is_due(&self, applied: u64, kept: Option<u64>) -> bool {
        let every = self.spec.checkpoint.every_steps;
        let planned = applied == self.steps() || (every > 0 && applied.is_multiple_of(every));
        applied > 0 && planned && kept.is_none_or(|kept| kept < applied)
    }
}

impl JobPlan {
    /// Whether the adapters of all ranks are compared after `applied` updates: every so many steps, and before each
    /// checkpoint.
    pub(crate) fn comparison_is_due(&self, applied: u64, checkpoint_is_due: bool) -> bool {
        let every = self.spec.cluster.compare_every_steps;
        checkpoint_is_due || applied > 0 && every > 0 && applied.is_multiple_of(every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(eval_every_steps: u64, checkpoint_every_steps: u64) -> JobPlan {
        let spec = serde_json::json!({
            "name": "j", "base": {"model": "m"}, "adapter": {}, "data": {"train": "t"},
            "train": {"global_batch_size": 4, "eval_every_steps": eval_every_steps},
            "checkpoint": {"every_steps": checkpoint_every_steps},
        });
        let data = DataSummary { train_rows: 10, eval_rows: 3, steps: 6, ..DataSummary::default() };
        let spec_json = spec.to_string();
        let assign =
            Assign { job_id: "j-1".to_owned(), attempt: 1, spec_json, data: Some(data), ..Assign::default() };
        JobPlan::new(assign).unwrap()
    }

    #[test]
    fn evaluation_is_due_before_after_and_in_between_but_never_twice() {
        let due = |plan: &JobPlan, evaluated| {
            (0..=6).filter(|step| plan.evaluation_is_due(*step, evaluated)).collect()
        };
        let ends: Vec<u64> = due(&plan(0, 0), None);
        assert_eq!(ends, [0, 6]);
        let regular: Vec<u64> = due(&plan(2, 0), None);
        assert_eq!(regular, [0, 2, 4, 6]);
        let resumed: Vec<u64> = due(&plan(2, 0), Some(2));
        assert_eq!(resumed, [4, 6]);
        let finished: Vec<u64> = due(&plan(2, 0), Some(6));
        assert!(finished.is_empty());
    }

    #[test]
    fn a_checkpoint_is_due_at_the_last_step_whatever_the_interval() {
        let due = |plan: &JobPlan, kept| (0..=6).filter(|step| plan.checkpoint_is_due(*step, kept)).collect();
        let last: Vec<u64> = due(&plan(0, 0), None);
        assert_eq!(last, [6]);
        let regular: Vec<u64> = due(&plan(0, 4), None);
        assert_eq!(regular, [4, 6]);
        let resumed: Vec<u64> = due(&plan(0, 4), Some(4));
        assert_eq!(resumed, [6]);
    }

    #[test]
    fn ranks_share_a_step_and_the_short_last_batch_leaves_some_with_none() {
        let plan = plan(0, 0);
        let shares: Vec<Vec<u64>> = (0..3).map(|rank| plan.rows_of_rank(3, 3, rank)).collect();
        assert_eq!(shares.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 0]);
        assert_eq!(plan.evaluation_rows_of_rank(2, 1), [2]);
    }
}
