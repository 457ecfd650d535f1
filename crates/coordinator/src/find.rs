//! Looking for checkpoints in a job's store.

use shanty_checkpoint::{Expectations, Manifest, Store};
use shanty_config::JobSpec;
use shanty_proto::{Attempt, Generation, JobId, Step};

use crate::{error::Result, machine::record::CheckpointRecord};

/// The store of a job.
fn store_of(spec: &JobSpec) -> Result<Store> {
    Ok(Store::open(&spec.checkpoint.location(&spec.name))?)
}

fn record(manifest: &Manifest) -> CheckpointRecord {
    CheckpointRecord {
        attempt: Attempt(manifest.attempt),
        step: Step(manifest.step),
        generation: Generation(manifest.generation),
        path: manifest.path(),
        size_bytes: manifest.size_bytes(),
        seconds: 0.0,
        unix_ms: manifest.created_unix_ms,
        loss: manifest.state.loss.map(|loss| loss.value()),
    }
}

/// The newest checkpoint whose files are whole, and what is wrong with newer ones; none beyond the step `up_to`.
pub(crate) async fn newest_good(
    job: &JobId,
    spec: &JobSpec,
    data_hash: Option<String>,
    up_to: Option<Step>,
) -> Result<(Option<CheckpointRecord>, Vec<String>)> {
    let expect = Expectations {
        data_hash,
        seed: Some(spec.train.seed),
        global_batch_size: Some(spec.train.global_batch_size as u64),
        ..Expectations::default()
    };
    if let Some(up_to) = up_to {
        return newest_up_to(&store_of(spec)?, &expect, up_to).await;
    }
    let verified = store_of(spec)?.newest_verified(&expect).await?;
    let Some(verified) = verified else { return Ok((None, Vec::new())) };
    let damaged: Vec<String> = verified.skipped.iter().map(ToString::to_string).collect();
    for reason in &damaged {
        tracing::warn!(%job, reason, "a checkpoint cannot be used");
    }
    Ok((Some(record(&verified.manifest)), damaged))
}

async fn newest_up_to(
    store: &Store,
    expect: &Expectations,
    up_to: Step,
) -> Result<(Option<CheckpointRecord>, Vec<String>)> {
    let mut damaged = Vec::new();
    for manifest in store.list().await?.iter().filter(|manifest| manifest.step <= up_to.0) {
        let sound = match manifest.check(expect) {
            Ok(()) => store.verify(manifest).await,
            Err(error) => Err(error),
        };
        match sound {
            Ok(()) => return Ok((Some(record(manifest)), damaged)),
            Err(error) => damaged.push(format!("{}: {error}", manifest.path())),
        }
    }
    Ok((None, damaged))
}

/// All checkpoints whose manifest is whole, newest first.
pub(crate) async fn list(spec: &JobSpec) -> Result<Vec<CheckpointRecord>> {
    Ok(store_of(spec)?.list().await?.iter().map(record).collect())
}
