//! A checkpoint of the state as it stands: within a generation, or of what a worker left one with.

use shanty_checkpoint::{Blocking, Keep as Retention, Key, Optimizer, Snapshot, WritePoint};
use shanty_proto::v1::{CheckpointFailed, CheckpointWritten, Keep, worker_message::Message};
use tracing::{info, warn};

use crate::{
    Error,
    engine::{AdapterFiles, AdapterWriter},
    plan::JobPlan,
};

use super::{Surroundings, job::Job, state::METHOD_STATE};

/// A checkpoint in the making: the numbers are copied, the files may not be made yet.
pub(super) struct Draft {
    pub(super) key: Key,
    job: String,
    optimizer: Optimizer,
    method: Vec<f32>,
    state: shanty_checkpoint::State,
    files: Files,
    /// Files of what members owe to rounded sums.
    debts: Vec<(String, Vec<u8>)>,
}

enum Files {
    Made(AdapterFiles),
    ToBeMade(AdapterWriter),
}

impl Draft {
    /// Makes what is left to be made; takes its time.
    pub(super) fn finish(self) -> Result<Snapshot, Error> {
        let mut files = match self.files {
            Files::Made(files) => files,
            Files::ToBeMade(make) => make(&self.optimizer.parameters, &self.method)?,
        };
        if !self.method.is_empty() {
            let bytes = self.method.iter().flat_map(|value| value.to_le_bytes());
            files.push((METHOD_STATE.to_owned(), bytes.collect()));
        }
        files.extend(self.debts);
        Ok(Snapshot {
            job: self.job,
            key: self.key,
            files: files.into_iter().map(|(name, content)| (name, content.into())).collect(),
            optimizer: self.optimizer,
            state: self.state,
        })
    }

    #[cfg(test)]
    pub(super) fn of(snapshot: Snapshot) -> Self {
        let made = |(name, content): (String, bytes::Bytes)| (name, content.to_vec());
        Self {
            key: snapshot.key,
            job: snapshot.job,
            optimizer: snapshot.optimizer,
            method: Vec::new(),
            state: snapshot.state,
            files: Files::Made(snapshot.files.into_iter().map(made).collect()),
            debts: Vec::new(),
        }
    }
}

/// How many checkpoints a job keeps.
pub(super) fn rule(plan: &JobPlan) -> Retention {
    let checkpoint = &plan.spec.checkpoint;
    Retention { newest: checkpoint.keep.max(1), best: checkpoint.keep_best }
}

/// Copies the state for a checkpoint; nothing if there is none. `debts` are files of what members owe to rounded sums.
pub(super) fn draft(
    around: &Surroundings,
    job: &Job,
    key: Key,
    debts: Vec<(String, Vec<u8>)>,
) -> Result<Option<Draft>, Error> {
    let Some(state) = &job.state else { return Ok(None) };
    let optimizer = state.to_checkpoint(&*job.engine)?;
    let files = match job.engine.adapter_writer() {
        Some(writer) => Files::ToBeMade(writer),
        None => Files::Made(job.engine.adapter_files(&optimizer.parameters, &state.method)?),
    };
    let plan = &job.plan;
    let loss = job.evaluated_loss.filter(|(step, _)| *step == key.step).map(|(_, loss)| loss.into());
    Ok(Some(Draft {
        key,
        job: plan.job_id.clone(),
        optimizer,
        method: state.method.clone(),
        files,
        debts,
        state: shanty_checkpoint::State {
            epoch: plan.epoch_after(key.step),
            world_size: job.world_size,
            threads: u32::try_from(around.threads).unwrap_or(u32::MAX),
            micro_batch_rows: u32::try_from(job.micro_batch_rows).unwrap_or(u32::MAX),
            global_batch_size: plan.spec.train.global_batch_size as u64,
            seed: plan.spec.train.seed,
            evaluated_step: job.evaluated_step,
            loss,
            base_hash: job.engine.facts().base_hash.clone(),
            tokenizer_hash: plan.data.tokenizer_hash.clone(),
            data_hash: plan.data.hash.clone(),
            adapter_hash: job.adapter_hash.to_string(),
            shanty_version: env!("CARGO_PKG_VERSION").to_owned(),
        },
    }))
}

/// Writes what this worker left a generation with, and says how that went.
pub(super) fn keep(around: &Surroundings, job: &mut Job, keep: &Keep) {
    job.checkpoints.wait();
    let Keep { job_id, attempt, generation, step } = keep.clone();
    let message = match write(around, job, keep) {
        Ok(written) => {
            info!(step, path = %written.path, bytes = written.bytes, "checkpoint written");
            Message::Checkpoint(CheckpointWritten {
                job_id,
                attempt,
                generation,
                step,
                path: written.path,
                size_bytes: written.bytes,
                seconds: written.seconds,
                ..CheckpointWritten::default()
            })
        }
        Err(error) => {
            warn!(step, %error, "failed to write a checkpoint");
            let error = Some(error.detail());
            Message::CheckpointFailed(CheckpointFailed { job_id, attempt, generation, step, error })
        }
    };
    around.report(message);
}

fn write(around: &Surroundings, job: &Job, keep: &Keep) -> Result<shanty_checkpoint::Written, Error> {
    let wrong = |reason: String| Error::Protocol { message: "Keep", reason };
    let key = Key { attempt: keep.attempt, step: keep.step, generation: keep.generation };
    let applied = job.state.as_ref().map(super::state::State::applied);
    if job.plan.job_id != keep.job_id || applied != Some(keep.step) {
        return Err(wrong(format!("it is of step {}, this worker holds {applied:?}", keep.step)));
    }
    let draft = draft(around, job, key, Vec::new())?.ok_or_else(|| wrong("there is no state".to_owned()))?;
    let snapshot = draft.finish()?;
    let part = |error: shanty_checkpoint::Error| Error::part(&error);
    let store = Blocking::open(&job.plan.location).map_err(part)?;
    let holds_credit = &mut |point: WritePoint| {
        let is_in_time = point != WritePoint::BeforeManifest || around.control.holds_credit(keep.generation);
        if is_in_time { Ok(()) } else { Err("the credit of this worker ran out".to_owned()) }
    };
    store.write_with(&snapshot, holds_credit).map_err(part)
}
