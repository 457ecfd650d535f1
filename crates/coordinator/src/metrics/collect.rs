//! What can be looked up: jobs, crews, checkpoints, devices, the process.

use std::collections::{BTreeMap, HashMap};

use shanty_proto::v1::DeviceFacts;
use shanty_telemetry::process;

use super::{table::*, text::Page};
use crate::machine::{JobView, MemberPhase, MemberView, record::JobState};

/// How long figures of a job that has ended are still told: long enough for whoever asks seldom.
const LINGER_MS: u64 = 15 * 60 * 1000;
/// All states, so that none is absent where it is nobody's.
const STATES: [JobState; 8] = [
    JobState::Queued,
    JobState::Preparing,
    JobState::Forming,
    JobState::Running,
    JobState::Recovering,
    JobState::Succeeded,
    JobState::Failed,
    JobState::Cancelled,
];

/// Whether a job's own figures are told.
pub(super) fn is_told(view: &JobView, now: u64) -> bool {
    !view.state.is_final() || now.saturating_sub(view.ended_unix_ms) < LINGER_MS
}

/// Writes what can be looked up.
pub(super) fn write(page: &mut Page, views: &[JobView], facts: &HashMap<String, DeviceFacts>, now: u64) {
    page.set(&BUILD, &[env!("CARGO_PKG_VERSION")], 1.0);
    for state in STATES {
        let count = views.iter().filter(|view| view.state == state).count();
        page.set(&JOBS, &[state.as_str()], count as f64);
    }
    page.set(&QUEUE, &[], views.iter().filter(|view| view.place.is_some()).count() as f64);
    for view in views.iter().filter(|view| is_told(view, now)) {
        job(page, view);
        crew(page, view);
        checkpoints(page, view, now);
        if !view.state.is_final() {
            for member in &view.members {
                worker(page, view, member, facts.get(member.worker.as_str()));
            }
        }
    }
    let usage = process::usage();
    page.set(&CPU, &[], usage.cpu_seconds);
    page.set(&RSS, &[], usage.resident_bytes as f64);
    page.set(&FILES, &[], usage.open_files as f64);
    page.set(&STARTED, &[], usage.started_unix_seconds);
}

fn job(page: &mut Page, view: &JobView) {
    let job = view.id.as_str();
    page.set(&STEP, &[job], view.step.0 as f64);
    page.set(&STEPS_PLANNED, &[job], view.steps.0 as f64);
    page.set(&EPOCH, &[job], view.epoch);
    if let Some(last) = &view.last_step {
        page.set(&LOSS, &[job], last.loss);
        page.set(&RATE, &[job], last.learning_rate);
        page.set(&NORM, &[job], last.gradient_norm);
    }
    page.set_some(&EVAL_LOSS, &[job], view.evaluations.last().map(|last| last.loss));
    page.set(&TOKEN_RATE, &[job], if view.state.is_final() { 0.0 } else { view.tokens_per_second });
    page.set_some(&ETA, &[job], view.eta_seconds);
    let ledger = &view.ledger;
    let rows = [
        ("leased", ledger.leased),
        ("committed", ledger.committed),
        ("requeued", ledger.requeued),
        ("skipped", ledger.skipped),
        ("recomputed", ledger.recomputed),
        ("remaining", ledger.remaining),
        ("duplicates", ledger.duplicates),
    ];
    for (state, count) in rows {
        page.set(&ROWS, &[job, state], count as f64);
    }
}

fn crew(page: &mut Page, view: &JobView) {
    let job = view.id.as_str();
    let mut phases: BTreeMap<&str, f64> = BTreeMap::new();
    if !view.state.is_final() {
        for member in &view.members {
            *phases.entry(phase(member.phase)).or_default() += 1.0;
        }
    }
    for (phase, count) in phases {
        page.set(&MEMBERS, &[job, phase], count);
    }
    let crew = &view.crew;
    page.set(&LOSSES, &[job], crew.losses as f64);
    page.set(&SPARES, &[job], crew.spares.len() as f64);
    page.set(&STRAGGLERS, &[job], crew.stragglers.len() as f64);
    page.set_some(&USUAL_STEP, &[job], crew.usual_step_seconds);
    page.set_some(&DEADLINE, &[job], crew.deadline_seconds);
    page.set(&RESTARTS, &[job], crew.coordinator_restarts as f64);
}

fn checkpoints(page: &mut Page, view: &JobView, now: u64) {
    let job = view.id.as_str();
    page.set(&CHECKPOINTS, &[job], view.checkpoints.len() as f64);
    if let Some(newest) = view.checkpoints.iter().max_by_key(|one| (one.attempt, one.step)) {
        page.set(&CHECKPOINT_STEP, &[job], newest.step.0 as f64);
        page.set(&CHECKPOINT_AGE, &[job], now.saturating_sub(newest.unix_ms) as f64 / 1000.0);
        page.set(&CHECKPOINT_DURATION, &[job], newest.seconds);
        page.set(&CHECKPOINT_SIZE, &[job], newest.size_bytes as f64);
    }
}

fn worker(page: &mut Page, view: &JobView, member: &MemberView, facts: Option<&DeviceFacts>) {
    let (job, worker, device) = (view.id.as_str(), member.worker.as_str(), member.device.as_str());
    page.set(&WORKER_STEP, &[job, worker, &member.host, device], member.step.0 as f64);
    if member.phase == MemberPhase::Lost {
        return;
    }
    page.set(&BEAT_AGE, &[job, worker], member.beat_age_seconds);
    let timings = &member.timings;
    let parts = [
        ("data", timings.data_seconds),
        ("compute", timings.compute_seconds),
        ("reduce", timings.reduce_seconds),
        ("update", timings.update_seconds),
    ];
    for (part, seconds) in parts {
        page.set(&STEP_PART, &[job, worker, part], seconds);
    }
    let Some(facts) = facts else { return };
    page.set(&WORKER_RSS, &[job, worker], facts.resident_bytes as f64);
    page.set(&WORKER_CPU, &[job, worker], facts.cpu_seconds);
    let labels = [job, worker, device];
    page.set(&CARD, &labels, if facts.absent.is_empty() { 1.0 } else { 0.0 });
    page.set_some(&CARD_BUSY, &labels, facts.utilization);
    page.set_some(&CARD_USED, &labels, facts.memory_used_bytes.map(|bytes| bytes as f64));
    page.set_some(&CARD_SIZE, &labels, facts.memory_size_bytes.map(|bytes| bytes as f64));
    page.set_some(&CARD_WARM, &labels, facts.temperature_celsius);
    page.set_some(&CARD_POWER, &labels, facts.power_watts);
    let errors = [
        ("uncorrected", facts.uncorrected_errors),
        ("corrected", facts.corrected_errors),
        ("link_replay", facts.link_replays),
    ];
    for (kind, count) in errors {
        page.set_some(&CARD_ERRORS, &[job, worker, device, kind], count.map(|count| count as f64));
    }
}

fn phase(phase: MemberPhase) -> &'static str {
    match phase {
        MemberPhase::Idle => "idle",
        MemberPhase::Loading => "loading",
        MemberPhase::Ready => "ready",
        MemberPhase::Forming => "forming",
        MemberPhase::Computing => "computing",
        MemberPhase::Reducing => "reducing",
        MemberPhase::Evaluating => "evaluating",
        MemberPhase::Waiting => "waiting",
        MemberPhase::Lost => "lost",
        MemberPhase::Writing => "writing",
    }
}
