//! Between wire types and our own. Messages are checked here; the machine sees only what makes sense.

use shanty_proto::{
    Attempt, Generation, JobId, Rank, Step, WorkerId, from_detail,
    v1::{self, coordinator_message::Message as Out, worker_message::Message as In},
};

use crate::{
    error::{Error, Result},
    machine::{
        Announcement, Attachment, KeptSum, MemberPhase, Message, Said, StepReport, Timings, Within,
        WorkerInfo,
        record::{GenerationRecord, RankRows, Source, StartPoint},
    },
    store::LogLine,
};

pub(crate) fn job_id(text: &str) -> Result<JobId> {
    JobId::new(text).map_err(Error::bad)
}

fn within(job: &str, attempt: u32, generation: u64) -> Result<Within> {
    Ok(Within { job: job_id(job)?, attempt: Attempt(attempt), generation: Generation(generation) })
}

fn finite(name: &str, value: f64) -> Result<f64> {
    // A loss that is not finite is the worker's to report as an error; here it would poison averages and JSON.
    if value.is_finite() { Ok(value) } else { Err(Error::bad(format!("{name} is {value}"))) }
}

/// A worker's introduction: who, what, and where it belongs.
pub(crate) fn hello(hello: v1::Hello) -> Result<(WorkerId, WorkerInfo, Option<Attachment>)> {
    let worker = WorkerId::new(hello.worker_id).map_err(Error::bad)?;
    let info = WorkerInfo {
        host: hello.host,
        pid: hello.pid,
        version: hello.version,
        device: hello.device,
        address: hello.collective_address,
        part: hello.shard_part,
        only: None,
        draining: hello.draining,
    };
    Ok((worker, info, hello.attachment.map(attachment).transpose()?))
}

fn attachment(from: v1::Attachment) -> Result<Attachment> {
    Ok(Attachment {
        job: job_id(&from.job_id)?,
        attempt: Attempt(from.attempt),
        generation: Generation(from.generation),
        rank: Rank(from.rank),
        applied: Step(from.applied_step),
    })
}

/// A step report without what was leased, which the caller looks up.
pub(crate) fn step_report(from: v1::StepReport) -> Result<StepReport> {
    let reduced = from.reduced.ok_or_else(|| Error::bad("a step report without what was reduced"))?;
    Ok(StepReport {
        within: within(&from.job_id, from.attempt, from.generation)?,
        step: Step(from.step),
        rank: Rank(from.rank),
        loss: finite("a step's loss", from.loss)?,
        reduced: announcement(reduced),
        leased: Announcement::default(),
        gradient_norm: finite("a step's gradient norm", from.gradient_norm)?,
        learning_rate: finite("a step's learning rate", from.learning_rate)?,
        seconds: finite("a step's time", from.seconds)?,
        timings: from.timings.map(timings).unwrap_or_default(),
        skipped: (!from.skipped.is_empty()).then_some(from.skipped),
        bad_samples: from.bad_samples,
    })
}

/// What a worker says, but for `Hello`, steps and logs, which take another way.
pub(crate) fn said(message: In) -> Result<Said> {
    Ok(match message {
        In::Beat(beat) => Said::Beat {
            sequence: beat.sequence,
            phase: phase_in(beat.phase()),
            attachment: beat.attachment.map(attachment).transpose()?,
            progress: beat.progress,
        },
        In::BaseReady(ready) => Said::BaseReady {
            job: job_id(&ready.job_id)?,
            attempt: Attempt(ready.attempt),
            base_hash: ready.base_hash,
            seconds: ready.seconds,
            trainable_parameters: ready.trainable_parameters,
            part: ready.shard_part,
        },
        In::Failure(failure) => {
            let detail = failure.error.ok_or_else(|| Error::bad("a failure without an error"))?;
            Said::Failure {
                job: job_id(&failure.job_id)?,
                attempt: Attempt(failure.attempt),
                error: from_detail(&detail, shanty_diagnostic::Kind::User),
            }
        }
        In::Broken(broken) => Said::Broken {
            within: within(&broken.job_id, broken.attempt, broken.generation)?,
            error: broken.error,
        },
        In::Left(left) => Said::Left {
            within: within(&left.job_id, left.attempt, left.generation)?,
            applied: Step(left.applied_step),
            holds_state: !left.state_hash.is_empty(),
            hash: left.state_hash,
            kept: left.kept.map(|kept| KeptSum { step: Step(kept.step), rows: kept.row_ids }),
        },
        In::Checkpoint(written) => Said::Checkpoint {
            within: within(&written.job_id, written.attempt, written.generation)?,
            step: Step(written.step),
            path: written.path,
            size_bytes: written.size_bytes,
            seconds: finite("a checkpoint's time", written.seconds)?,
            removed: written.removed,
            held_seconds: finite("a checkpoint's time", written.held_seconds)?,
        },
        In::CheckpointFailed(failed) => {
            let detail = failed.error.ok_or_else(|| Error::bad("a failed checkpoint without an error"))?;
            Said::CheckpointFailed {
                within: within(&failed.job_id, failed.attempt, failed.generation)?,
                step: Step(failed.step),
                error: from_detail(&detail, shanty_diagnostic::Kind::User),
            }
        }
        In::Evaluation(evaluation) => Said::Evaluation {
            within: within(&evaluation.job_id, evaluation.attempt, evaluation.generation)?,
            step: Step(evaluation.step),
            loss: finite("an evaluation's loss", evaluation.loss)?,
            tokens: evaluation.tokens,
        },
        In::Finished(finished) => Said::Finished {
            within: within(&finished.job_id, finished.attempt, finished.generation)?,
            step: Step(finished.step),
            adapter: finished.adapter,
        },
        In::Goodbye(goodbye) => Said::Goodbye { reason: goodbye.reason },
        In::Draining(draining) => Said::Draining { reason: draining.reason },
        In::Diverged(diverged) => Said::Diverged {
            within: within(&diverged.job_id, diverged.attempt, diverged.generation)?,
            step: Step(diverged.step),
            hashes: diverged.hashes,
        },
        In::BadStep(bad) => Said::BadStep {
            within: within(&bad.job_id, bad.attempt, bad.generation)?,
            step: Step(bad.step),
            reason: bad.reason,
            samples: bad.samples,
        },
        In::Hello(_) => return Err(Error::bad("a second Hello on one stream")),
        In::Step(_) | In::Logs(_) => return Err(Error::bad("a message out of place")),
    })
}

pub(crate) fn log_lines(logs: v1::LogLines, worker: &WorkerId) -> Result<(JobId, Vec<LogLine>)> {
    let line = |line: v1::LogLine| LogLine {
        unix_ms: line.unix_ms,
        // A worker speaks for itself alone.
        worker: worker.to_string(),
        level: line.level,
        text: line.text,
    };
    Ok((job_id(&logs.job_id)?, logs.lines.into_iter().map(line).collect()))
}

fn announcement(from: v1::Announcement) -> Announcement {
    Announcement { tokens: from.tokens, rows: from.rows, row_hash: from.row_hash }
}

pub(crate) fn announcement_out(from: Announcement) -> v1::Announcement {
    v1::Announcement { tokens: from.tokens, rows: from.rows, row_hash: from.row_hash }
}

fn timings(from: v1::StepTimings) -> Timings {
    Timings {
        data_seconds: from.data_seconds,
        compute_seconds: from.compute_seconds,
        reduce_seconds: from.reduce_seconds,
        update_seconds: from.update_seconds,
        tokens: from.tokens,
    }
}

/// What the machine does not know and a worker is told all the same.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub beat_ms: u32,
    pub credit_ms: u32,
    /// Whether collectives are encrypted.
    pub encrypted: bool,
}

/// What the machine tells a worker.
pub(crate) fn message_out(message: Message, terms: Terms) -> v1::CoordinatorMessage {
    let out = match message {
        Message::Welcome { attached } => {
            let Terms { beat_ms, credit_ms, .. } = terms;
            Out::Welcome(v1::Welcome { beat_interval_ms: beat_ms, credit_ms, attached })
        }
        Message::BeatAck { sequence, credit } => {
            let credit = credit.map(|given| v1::Credit {
                generation: given.generation.0,
                up_to_step: given.up_to.0,
                deadline_ms: u32::try_from(given.deadline.as_millis()).unwrap_or(u32::MAX),
            });
            Out::BeatAck(v1::BeatAck { sequence, credit })
        }
        Message::Assign { job, attempt, spec_json, facts, steps, part } => Out::Assign(v1::Assign {
            job_id: job.into(),
            attempt: attempt.0,
            spec_json: spec_json.to_string(),
            shard_part: part,
            data: Some(v1::DataSummary {
                hash: facts.hash,
                train_rows: facts.train_rows,
                eval_rows: facts.eval_rows,
                train_tokens: facts.train_tokens,
                train_trained_tokens: facts.train_trained_tokens,
                steps: steps.0,
                tokenizer_hash: facts.tokenizer_hash,
                train_mix: facts
                    .train_mix
                    .iter()
                    .map(|part| v1::MixPart { rows: part.rows, rows_per_epoch: part.rows_per_epoch })
                    .collect(),
            }),
        }),
        Message::Form { job, attempt, rank, generation } => {
            Out::Form(v1::Form { encrypted: terms.encrypted, ..form(job, attempt, rank, &generation) })
        }
        Message::Leave { job, attempt, generation, reason, after } => Out::Leave(v1::Leave {
            job_id: job.into(),
            attempt: attempt.0,
            generation: generation.0,
            reason,
            after_step: after.map(|step| step.0),
        }),
        Message::Drain { reason } => Out::Drain(v1::Drain { reason }),
        Message::Drained { reason } => Out::Drained(v1::Drained { reason }),
        Message::Keep { job, attempt, generation, step } => Out::Keep(v1::Keep {
            job_id: job.into(),
            attempt: attempt.0,
            generation: generation.0,
            step: step.0,
        }),
        Message::Release { job, attempt, succeeded, reason } => {
            Out::Release(v1::Release { job_id: job.into(), attempt: attempt.0, succeeded, reason })
        }
    };
    v1::CoordinatorMessage { message: Some(out) }
}

fn form(job: JobId, attempt: Attempt, rank: Rank, generation: &GenerationRecord) -> v1::Form {
    let member = |(rank, member): (u32, &crate::machine::record::MemberRecord)| v1::GenerationMember {
        worker_id: member.worker.to_string(),
        rank,
        collective_address: member.address.clone(),
    };
    v1::Form {
        job_id: job.into(),
        attempt: attempt.0,
        generation: generation.generation.0,
        rank: rank.0,
        members: (0u32..).zip(&generation.members).map(member).collect(),
        token: generation.token.to_vec(),
        start: Some(start(&generation.start)),
        encrypted: false,
    }
}

/// The job that a worker's message is about.
pub(crate) fn job_of(message: &In) -> Option<&str> {
    match message {
        In::Hello(hello) => hello.attachment.as_ref().map(|it| it.job_id.as_str()),
        In::Beat(beat) => beat.attachment.as_ref().map(|it| it.job_id.as_str()),
        In::BaseReady(message) => Some(&message.job_id),
        In::Failure(message) => Some(&message.job_id),
        In::Step(message) => Some(&message.job_id),
        In::Broken(message) => Some(&message.job_id),
        In::Left(message) => Some(&message.job_id),
        In::Checkpoint(message) => Some(&message.job_id),
        In::Evaluation(message) => Some(&message.job_id),
        In::Finished(message) => Some(&message.job_id),
        In::Logs(message) => Some(&message.job_id),
        In::Diverged(message) => Some(&message.job_id),
        In::BadStep(message) => Some(&message.job_id),
        In::CheckpointFailed(message) => Some(&message.job_id),
        In::Draining(_) | In::Goodbye(_) => None,
    }
}

fn start(from: &StartPoint) -> v1::StartPoint {
    let source = match &from.source {
        Source::Fresh => v1::start_point::Source::Fresh(v1::Fresh {}),
        Source::Checkpoint(path) => {
            v1::start_point::Source::Checkpoint(v1::FromCheckpoint { path: path.clone() })
        }
        Source::Members { donor, receivers } => v1::start_point::Source::Members(v1::FromMembers {
            donor: donor.0,
            receivers: receivers.iter().map(|rank| rank.0).collect(),
        }),
    };
    let rows = |(rank, rows): (u32, &RankRows)| v1::RankRows {
        rank,
        kept: rows.kept.clone(),
        compute: rows.compute.clone(),
    };
    v1::StartPoint {
        applied_step: from.applied.0,
        source: Some(source),
        rows: (0u32..).zip(&from.rows).map(rows).collect(),
        evaluated_step: from.evaluated.map(|step| step.0),
        checkpoint_step: from.checkpoint.map(|step| step.0),
        usual_loss: from.usual_loss.0,
        usual_loss_steps: from.usual_loss.1,
        skip_steps: from.skip.iter().map(|step| step.0).collect(),
    }
}

pub(crate) fn row_out(row: shanty_data::Row) -> v1::Row {
    let segment =
        |segment: shanty_data::Segment| v1::Segment { sample_id: segment.sample_id, length: segment.length };
    v1::Row {
        id: row.id,
        token_ids: row.token_ids,
        segments: row.segments.into_iter().map(segment).collect(),
        trained: row.trained.into_iter().flat_map(|range| [range.start, range.end]).collect(),
    }
}

fn phase_in(phase: v1::MemberPhase) -> MemberPhase {
    match phase {
        v1::MemberPhase::Unspecified | v1::MemberPhase::Idle => MemberPhase::Idle,
        v1::MemberPhase::Loading => MemberPhase::Loading,
        v1::MemberPhase::Ready => MemberPhase::Ready,
        v1::MemberPhase::Forming => MemberPhase::Forming,
        v1::MemberPhase::Computing => MemberPhase::Computing,
        v1::MemberPhase::Reducing => MemberPhase::Reducing,
        v1::MemberPhase::Evaluating => MemberPhase::Evaluating,
        v1::MemberPhase::Waiting => MemberPhase::Waiting,
        v1::MemberPhase::Lost => MemberPhase::Lost,
        v1::MemberPhase::Writing => MemberPhase::Writing,
    }
}
