//! What views show, as it travels.

use shanty_proto::v1;

use crate::{
    machine::{
        JobView, MemberPhase, MemberView,
        ledger::Ledger,
        record::{CheckpointRecord, EvaluationRecord, EventRecord, JobState, StepRecord},
    },
    store::LogLine,
};

pub(crate) fn state_out(state: JobState) -> v1::JobState {
    match state {
        JobState::Queued => v1::JobState::Queued,
        JobState::Preparing => v1::JobState::Preparing,
        JobState::Forming => v1::JobState::Forming,
        JobState::Running => v1::JobState::Running,
        JobState::Recovering => v1::JobState::Recovering,
        JobState::Succeeded => v1::JobState::Succeeded,
        JobState::Failed => v1::JobState::Failed,
        JobState::Cancelled => v1::JobState::Cancelled,
    }
}

fn phase_out(phase: MemberPhase) -> v1::MemberPhase {
    match phase {
        MemberPhase::Idle => v1::MemberPhase::Idle,
        MemberPhase::Loading => v1::MemberPhase::Loading,
        MemberPhase::Ready => v1::MemberPhase::Ready,
        MemberPhase::Forming => v1::MemberPhase::Forming,
        MemberPhase::Computing => v1::MemberPhase::Computing,
        MemberPhase::Reducing => v1::MemberPhase::Reducing,
        MemberPhase::Evaluating => v1::MemberPhase::Evaluating,
        MemberPhase::Waiting => v1::MemberPhase::Waiting,
        MemberPhase::Lost => v1::MemberPhase::Lost,
        MemberPhase::Writing => v1::MemberPhase::Writing,
    }
}

pub(crate) fn step_out(from: &StepRecord) -> v1::StepRecord {
    v1::StepRecord {
        step: from.step.0,
        attempt: from.attempt.0,
        generation: from.generation.0,
        loss: from.loss,
        learning_rate: from.learning_rate,
        gradient_norm: from.gradient_norm,
        tokens: from.tokens,
        tokens_per_second: from.tokens_per_second,
        workers: from.workers,
        unix_ms: from.unix_ms,
        skipped: from.skipped,
    }
}

pub(crate) fn evaluation_out(from: &EvaluationRecord) -> v1::Evaluation {
    v1::Evaluation { step: from.step.0, loss: from.loss, tokens: from.tokens }
}

pub(crate) fn checkpoint_out(from: &CheckpointRecord) -> v1::Checkpoint {
    v1::Checkpoint {
        attempt: from.attempt.0,
        step: from.step.0,
        generation: from.generation.0,
        path: from.path.clone(),
        size_bytes: from.size_bytes,
        seconds: from.seconds,
        written_unix_ms: from.unix_ms,
        loss: from.loss,
    }
}

pub(crate) fn event_out(from: &EventRecord) -> v1::Event {
    v1::Event {
        unix_ms: from.unix_ms,
        kind: from.kind.clone(),
        text: from.text.clone(),
        worker_id: from.worker.as_ref().map(ToString::to_string).unwrap_or_default(),
        step: from.step.0,
        detection_ms: from.detection_ms,
        stall_ms: from.stall_ms,
    }
}

fn member_out(from: &MemberView) -> v1::Member {
    v1::Member {
        worker_id: from.worker.to_string(),
        host: from.host.clone(),
        pid: from.pid,
        device: from.device.clone(),
        rank: from.rank.map(|rank| rank.0),
        phase: phase_out(from.phase).into(),
        step: from.step.0,
        beat_age_seconds: from.beat_age_seconds,
        reason: from.reason.clone(),
        timings: Some(v1::StepTimings {
            data_seconds: from.timings.data_seconds,
            compute_seconds: from.timings.compute_seconds,
            reduce_seconds: from.timings.reduce_seconds,
            update_seconds: from.timings.update_seconds,
            tokens: from.timings.tokens,
        }),
        spare: from.spare,
        draining: from.draining,
    }
}

fn ledger_out(from: &Ledger) -> v1::Ledger {
    v1::Ledger {
        leased: from.leased,
        committed: from.committed,
        requeued: from.requeued,
        skipped: from.skipped,
        recomputed: from.recomputed,
        remaining: from.remaining,
        duplicates: from.duplicates,
    }
}

pub(crate) fn status_out(from: &JobView) -> v1::JobStatus {
    let failure = from.failure.as_ref().map(|failure| failure.diagnostic());
    v1::JobStatus {
        job_id: from.id.to_string(),
        state: state_out(from.state).into(),
        reason: from.reason.clone(),
        attempt: from.attempt.0,
        generation: from.generation.0,
        step: from.step.0,
        steps: from.steps.0,
        epoch: from.epoch,
        loss: from.last_step.as_ref().map(|step| step.loss),
        learning_rate: from.last_step.as_ref().map(|step| step.learning_rate),
        gradient_norm: from.last_step.as_ref().map(|step| step.gradient_norm),
        tokens_per_second: from.tokens_per_second,
        eta_seconds: from.eta_seconds,
        members: from.members.iter().map(member_out).collect(),
        ledger: Some(ledger_out(&from.ledger)),
        checkpoints: from.checkpoints.iter().map(checkpoint_out).collect(),
        evaluations: from.evaluations.iter().map(evaluation_out).collect(),
        events: from.events.iter().map(event_out).collect(),
        adapter: from.adapter.clone(),
        error_code: failure.as_ref().map(|error| error.code.clone()).unwrap_or_default(),
        submitted_unix_ms: from.submitted_unix_ms,
        started_unix_ms: from.started_unix_ms,
        ended_unix_ms: from.ended_unix_ms,
        error: failure.as_ref().map(shanty_proto::to_detail),
        crew: Some(super::wire_crew::health_out(&from.crew)),
    }
}

pub(crate) fn summary_out(from: &JobView) -> v1::JobSummary {
    let living = |member: &&MemberView| member.rank.is_some() && member.phase != MemberPhase::Lost;
    v1::JobSummary {
        job_id: from.id.to_string(),
        state: state_out(from.state).into(),
        reason: from.reason.clone(),
        step: from.step.0,
        steps: from.steps.0,
        loss: from.last_step.as_ref().map(|step| step.loss),
        members: if from.state.is_final() { 0 } else { from.members.iter().filter(living).count() as u32 },
        submitted_unix_ms: from.submitted_unix_ms,
        owner: from.owner.clone(),
        priority: from.priority,
        place: from.place,
        share: from.share,
    }
}

pub(crate) fn log_line_out(line: LogLine) -> v1::LogLine {
    v1::LogLine { unix_ms: line.unix_ms, worker_id: line.worker, level: line.level, text: line.text }
}
