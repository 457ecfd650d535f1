//! How a generation's members come to hold the same state: from the seed, from a checkpoint, or from each other.

use bytemuck::{Pod, Zeroable};
use shanty_checkpoint::{Blocking, Expectations, Key, Optimizer};
use shanty_collective::Collective;
use tracing::info;

use crate::{Error, control::Interrupted, engine::missing_state, failpoint::Point};

use super::{
    Stop, Surroundings, debts,
    formation::{Formation, Origin, Start},
    job::Job,
    state::{METHOD_STATE, State, digest_of},
};

/// Parameters that travel in one broadcast. Between two, a member that is to leave does.
const CHUNK: usize = 1 << 20;

/// What each member says to all others before state moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Introduction {
    /// Hash of base and adapter definition, which must be the same everywhere.
    engine_hash: [u8; 32],
    parameters: u64,
    /// The most rows of a micro-batch that this member can take.
    micro_batch_rows: u64,
    /// The plan of the state that this member holds; 0 for none.
    planned_rows: u64,
}

/// What goes ahead of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Header {
    applied: u64,
    hash: [u8; 32],
}

/// Makes the state before the first step, where a generation starts from it and this worker has none. Done before
/// anybody is waited for: whoever leaves this generation then holds the state that it answers with.
pub(super) fn prepare(job: &mut Job, start: &Start) -> Result<(), Error> {
    job.furthest_start = job.furthest_start.max(start.applied_step);
    // Who shares a base makes a start that reads it with the others of the group, once they have met.
    let together = job.engine.start_reads_base() && job.engine.shared_base().is_some();
    if begins_afresh(job, start) && !together {
        job.start_afresh()?;
    }
    Ok(())
}

/// Whether this worker is to make the state before the first step.
pub(super) fn begins_afresh(job: &Job, start: &Start) -> bool {
    // A worker that never got the state of a later step must not pass for one that stands before the first.
    let begins = start.applied_step == 0 && job.furthest_start == 0;
    start.from == Origin::Seed || (begins && job.state.is_none())
}

/// Brings this member's state to the start of the generation.
pub(super) fn reach_start(
    around: &Surroundings,
    job: &mut Job,
    formation: &Formation,
    collective: &mut dyn Collective,
) -> Result<(), Stop> {
    let mut debts = Vec::new();
    let source = match &formation.start.from {
        Origin::Seed => 0,
        Origin::Checkpoint(path) => {
            if formation.rank == 0 {
                (job.micro_batch_rows, debts) = load(job, path)?;
            }
            job.drop_sum()?;
            0
        }
        Origin::Members { donor, .. } => *donor,
    };
    agree(around, job, formation, collective, source)?;
    match &formation.start.from {
        // Everybody holds what follows from the seed alone; of what the base had to compute, all take one member's bits.
        Origin::Seed if job.engine.facts().computed_start => {
            transfer(around, job, formation, collective, 0, |rank| rank != 0)?;
        }
        Origin::Seed => {}
        Origin::Checkpoint(_) => {
            let receives = |rank| rank != 0;
            transfer(around, job, formation, collective, 0, receives)?;
            job.owed = debts::deal(collective, &debts, job.flat_length())
                .map_err(|error| broken(around, formation, &error))?;
        }
        Origin::Members { receivers, .. } if receivers.is_empty() => {}
        Origin::Members { donor, receivers } => {
            transfer(around, job, formation, collective, *donor, |rank| receivers.contains(&rank))?;
        }
    }
    let applied = job.state.as_ref().map(State::applied);
    if applied != Some(formation.start.applied_step) {
        let reason = format!(
            "it starts after step {}, this worker's state {}",
            formation.start.applied_step,
            applied.map_or("is missing".to_owned(), |applied| format!("is of step {applied}"))
        );
        return Err(Error::Protocol { message: "Form", reason }.into());
    }
    around.control.set_applied(formation.start.applied_step);
    Ok(())
}

/// Takes the state of a checkpoint; returns its micro-batch plan, and what its members owed.
fn load(job: &mut Job, path: &str) -> Result<(u64, Vec<Vec<f32>>), Error> {
    let key: Key = path.parse().map_err(|()| Error::Protocol {
        message: "Form",
        reason: format!("`{path}` is not the name of a checkpoint"),
    })?;
    let part = |error: shanty_checkpoint::Error| Error::part(&error);
    let store = Blocking::open(&job.plan.location).map_err(part)?;
    let manifest = store.manifest(key).map_err(damaged)?;
    manifest
        .check(&Expectations {
            base_hash: Some(job.engine.facts().base_hash.clone()),
            data_hash: Some(job.plan.data.hash.clone()),
            adapter_hash: Some(job.adapter_hash.to_string()),
            seed: Some(job.plan.spec.train.seed),
            global_batch_size: Some(job.plan.spec.train.global_batch_size as u64),
            tokenizer_hash: None,
        })
        .map_err(part)?;
    let snapshot = store.load(&manifest).map_err(damaged)?;
    info!(%path, step = snapshot.key.step, "read the checkpoint");
    let rows = u64::from(snapshot.state.micro_batch_rows);
    if snapshot.optimizer.parameters.len() != job.flat_length() {
        let reason = format!("checkpoint `{path}` has {} parameters", snapshot.optimizer.parameters.len());
        return Err(Error::Protocol { message: "Form", reason });
    }
    let method = snapshot.file(METHOD_STATE).map_or(Vec::new(), |bytes| {
        let numbers = bytes.as_chunks::<4>().0.iter();
        numbers.map(|bytes| f32::from_le_bytes(*bytes)).collect()
    });
    if method.len() != job.part_lengths()[3] {
        let reason = format!("checkpoint `{path}` has {} numbers of the method's state", method.len());
        return Err(Error::Protocol { message: "Form", reason });
    }
    job.take_state(snapshot.key.step, &snapshot.optimizer, method)?;
    Ok((rows, debts::of(&snapshot)))
}

/// It was whole when it was chosen: another try chooses the one before.
fn damaged(error: shanty_checkpoint::Error) -> Error {
    let diagnostic = shanty_diagnostic::Diagnose::diagnostic(&error);
    match error {
        shanty_checkpoint::Error::Damaged { .. } => {
            Error::Part(Box::new(diagnostic.kind(shanty_diagnostic::Kind::Transient)))
        }
        _ => Error::Part(Box::new(diagnostic)),
    }
}

/// All members say what they are; they must be the same, and take the same micro-batches.
fn agree(
    around: &Surroundings,
    job: &mut Job,
    formation: &Formation,
    collective: &mut dyn Collective,
    source: u32,
) -> Result<(), Stop> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(job.engine.facts().base_hash.as_bytes());
    hasher.update(job.adapter_hash.as_bytes());
    let own = Introduction {
        engine_hash: *hasher.finalize().as_bytes(),
        parameters: job.flat_length() as u64,
        micro_batch_rows: job.engine.micro_batch_rows().max(1) as u64,
        planned_rows: if job.state.is_some() { job.micro_batch_rows } else { 0 },
    };
    let mut all = vec![own; formation.members.len()];
    collective
        .all_gather(bytemuck::bytes_of(&own), bytemuck::cast_slice_mut(&mut all))
        .map_err(|error| broken(around, formation, &error))?;
    if let Some(rank) =
        all.iter().position(|one| (one.engine_hash, one.parameters) != (own.engine_hash, own.parameters))
    {
        let donor = u32::try_from(rank).unwrap_or(u32::MAX);
        let step = formation.start.applied_step;
        return Err(
            Error::StateDiffers { step, donor, what: "the base or adapter that this worker loaded" }.into()
        );
    }
    let most = all.iter().map(|one| one.micro_batch_rows).min().unwrap_or(1);
    let planned = all.get(source as usize).map_or(0, |one| one.planned_rows);
    if planned > most {
        tracing::warn!(
            planned,
            most,
            "micro-batches are smaller than before: bits will differ from an uninterrupted run"
        );
    }
    job.micro_batch_rows = if planned == 0 { most } else { planned.min(most) };
    Ok(())
}

/// Moves the state from `donor` to those who receive it; the others compare it with theirs.
fn transfer(
    around: &Surroundings,
    job: &mut Job,
    formation: &Formation,
    collective: &mut dyn Collective,
    donor: u32,
    receives: impl Fn(u32) -> bool,
) -> Result<(), Stop> {
    let rank = formation.rank;
    let step = formation.start.applied_step;
    let gives = rank == donor;
    if job.state.is_none() && !receives(rank) {
        let reason = format!("rank {rank} is to hold the state of step {step}, but holds none");
        return Err(Error::Protocol { message: "Form", reason }.into());
    }
    let mut header = Header { applied: 0, hash: [0; 32] };
    if let Some(state) = job.state.as_ref().filter(|_| gives) {
        header = Header { applied: state.applied(), hash: *state.digest(&*job.engine)?.as_bytes() };
    }
    collective
        .broadcast(donor, bytemuck::bytes_of_mut(&mut header))
        .map_err(|error| broken(around, formation, &error))?;

    // What arrives is kept apart until it is whole: a member that loses its donor here still holds what it had.
    let lengths = job.part_lengths();
    let mut arriving = receives(rank).then(|| lengths.map(|length| vec![0.0f32; length]));
    let longest = lengths.into_iter().max().unwrap_or(0);
    let mut chunk = vec![0.0f32; CHUNK.min(longest)];
    let mut own = vec![0.0f32; if receives(rank) || gives { 0 } else { chunk.len() }];
    for (part, length) in lengths.into_iter().enumerate() {
        for start in (0..length).step_by(CHUNK) {
            around.control.check(formation.generation)?;
            let range = start..(start + CHUNK).min(length);
            let chunk = &mut chunk[..range.len()];
            if let Some(state) = job.state.as_ref().filter(|_| gives) {
                state.read(&*job.engine, part, range.start, chunk)?;
            }
            collective
                .broadcast(donor, bytemuck::cast_slice_mut(chunk))
                .map_err(|error| broken(around, formation, &error))?;
            around.control.advance();
            around.failpoints.reach(Point::DuringStateTransfer, formation.place(step))?;
            match (&mut arriving, &job.state) {
                (Some(parts), _) => parts[part][range].copy_from_slice(chunk),
                (None, _) if gives => {}
                (None, Some(state)) => {
                    let own = &mut own[..range.len()];
                    state.read(&*job.engine, part, range.start, own)?;
                    if !same_bits(own, chunk) {
                        return Err(
                            Error::StateDiffers { step, donor, what: "what this worker holds" }.into()
                        );
                    }
                }
                (None, None) => return Err(missing_state().into()),
            }
        }
    }
    if let Some(parts) = arriving {
        let digest = digest_of(header.applied, parts.each_ref().map(Vec::as_slice));
        if *digest.as_bytes() != header.hash {
            return Err(Error::StateDiffers { step, donor, what: "its hash" }.into());
        }
        let [parameters, exp_avg, exp_avg_sq, method] = parts;
        let optimizer = Optimizer { parameters, exp_avg, exp_avg_sq };
        job.take_state(header.applied, &optimizer, method)?;
        info!(donor, step = header.applied, "received adapter and optimizer");
    }
    Ok(())
}

fn same_bits(left: &[f32], right: &[f32]) -> bool {
    bytemuck::cast_slice::<f32, u8>(left) == bytemuck::cast_slice::<f32, u8>(right)
}

/// A collective failed: because the generation was left, or by itself.
pub(super) fn broken(around: &Surroundings, formation: &Formation, error: &shanty_collective::Error) -> Stop {
    match around.control.check(formation.generation) {
        Err(Interrupted) => Stop::Interrupted,
        Ok(()) => Stop::Broken(error.to_string()),
    }
}
