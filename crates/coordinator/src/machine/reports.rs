//! What members report: a loaded base, steps, evaluations, checkpoints, the end.

use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Attempt, JobId, Rank, Step, WorkerId};

use super::{
    Machine,
    crew::Credit,
    effect::{Change, Effect, Point},
    event::{Moment, StepReport, Within},
    job::{Job, Phase},
    record::{CheckpointRecord, EvaluationRecord, JobState, RecoveryRecord, StepRecord},
};

/// Checkpoints that are remembered; far more than are kept.
const MOST_CHECKPOINTS: usize = 200;
/// Weight of the newest step in the smoothed rate.
const SMOOTHING: f64 = 0.2;

impl Machine {
    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(super) fn base_ready(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        job: &JobId,
        attempt: Attempt,
        base_hash: &str,
        seconds: f64,
        trainable_parameters: u64,
        part: Option<u32>,
    ) {
        let _ = self.with_job(job, |machine, job| {
            let session = machine.sessions.get_mut(worker).expect("it is current");
            if job.attempt != attempt || !session.is_assigned_to(job) || session.ready_since.is_some() {
                return;
            }
            // It may have been asked for another part meanwhile.
            if job.parts() > 1 && part != Some(session.part) {
                return;
            }
            let expected = job.base_hash.get_or_insert_with(|| base_hash.to_owned()).clone();
            if expected != base_hash {
                let reason =
                    format!("{worker} loaded another base ({base_hash}) than the others ({expected})");
                machine.note(now, job, "worker_refused", reason.clone());
                machine.refuse_worker(job, worker, attempt, reason);
                return;
            }
            session.ready_since = Some(now.monotonic);
            let text = format!(
                "{worker} loaded its base in {seconds:.1} s; {trainable_parameters} parameters train"
            );
            job.event(now, "worker_ready", text).worker = Some(worker.clone());
            machine.publish_event(job);
        });
    }

    /// A worker cannot go on with a job: what no repeat helps fails the job, else the worker is left out a while.
    pub(super) fn failure(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        job: &JobId,
        attempt: Attempt,
        error: Diagnostic,
    ) {
        let _ = self.with_job(job, |machine, job| {
            let session = machine.sessions.get_mut(worker).expect("it is current");
            if job.attempt != attempt || !session.is_assigned_to(job) {
                return;
            }
            if !error.kind.is_retryable() {
                let message = format!("{worker}: {}", error.message);
                return machine.fail(now, job, Diagnostic { message, ..error });
            }
            let count = session.failures_in(job).saturating_add(1);
            session.failures = Some((job.id.clone(), attempt, count));
            session.unfit_until = now.monotonic + machine.options.retry_worker_after;
            session.assigned = None;
            session.ready_since = None;
            let text = format!("{worker} failed: {}: {}", error.code, error.message);
            job.event(now, "worker_failed", text).worker = Some(worker.clone());
            machine.publish_event(job);
            if let Some(member) = job.crew.of_mut(worker) {
                member.credit = Credit::Out;
            }
            machine.member_gone(now, job, worker, &format!("it failed: {}", error.message), None);
        });
    }

    pub(super) fn step(&mut self, now: Moment, worker: &WorkerId, report: StepReport) {
        let id = report.within.job.clone();
        let _ = self.with_job(&id, |machine, job| machine.step_of(now, worker, report, job));
    }

    fn step_of(&mut self, now: Moment, worker: &WorkerId, report: StepReport, job: &mut Job) {
        if Self::rank_within(job, worker, &report.within) != Some(report.rank) {
            return self.late_step(now, &report, job);
        }
        let is_whole = report.reduced == report.leased || report.skipped.is_some();
        if !is_whole {
            job.health.record.duplicates += report.reduced.rows.saturating_sub(report.leased.rows);
            return self.fail(now, job, mismatch(worker, &report));
        }
        if report.step > job.steps() {
            return;
        }
        if report.step <= job.begun_from() {
            // The lineage had this step before the generation began; made again within it, its rows count twice.
            let rows = job.order.as_ref().map_or(0, |order| order.rows_in_step(report.step.0));
            job.health.record.duplicates += rows;
            return self.fail(now, job, made_twice(worker, &report, job.begun_from()));
        }
        if let Some(member) = job.crew.of_mut(worker) {
            if member.step < report.step {
                member.progressed = now.monotonic;
            }
            member.step = member.step.max(report.step);
            member.timings = report.timings;
        }
        job.learn_timings(worker, &report.timings);
        self.raise(job, report.step);
        if job.note_recorded(report.step) {
            self.commit(now, &report, job);
        }
        self.name_samples(now, job, worker, report.step, &report.bad_samples);
    }

    /// A report of an earlier generation, which the worker could not hand in while the coordinator was away: the step is
    /// in the lineage, and only its record is missing.
    fn late_step(&mut self, now: Moment, report: &StepReport, job: &mut Job) {
        let of_lineage = job.attempt == report.within.attempt
            && report.within.generation < job.generation_number()
            && report.within.generation >= job.health.record.lineage_from
            && report.step <= job.begun_from();
        let is_whole = report.reduced == report.leased || report.skipped.is_some();
        if job.formed && !job.is_ended() && of_lineage && is_whole && job.note_recorded(report.step) {
            let record = step_record(now, report, job, rate(report));
            self.effects.push(Effect::Record(Change::Step(job.id.clone(), record)));
        }
    }

    /// The first report of a step in this generation.
    fn commit(&mut self, now: Moment, report: &StepReport, job: &mut Job) {
        let rate = rate(report);
        let smooth = |old: f64, new: f64| if old > 0.0 { old + SMOOTHING * (new - old) } else { new };
        job.tokens_per_second = smooth(job.tokens_per_second, rate);
        job.seconds_per_step = smooth(job.seconds_per_step, report.seconds);
        job.advanced = true;
        job.fruitless = 0;
        if let Some(reason) = &report.skipped {
            self.step_skipped(now, job, report, reason);
        } else {
            job.health.pace.learn(report.seconds, report.step == job.begun_from().next());
            job.health.usual_loss.learn(report.loss);
            self.tell_deadline(now, job);
        }
        if job.is_ended() {
            return;
        }
        let record = step_record(now, report, job, rate);
        if job.last_step.as_ref().is_none_or(|last| last.step <= record.step) {
            job.last_step = Some(record.clone());
        }
        self.effects.push(Effect::Record(Change::Step(job.id.clone(), record.clone())));
        self.effects.push(Effect::Publish(job.id.clone(), Point::Step(record)));
        self.changed.insert(job.id.clone());
        // A report that was on its way when the generation broke says nothing about the recovery.
        if matches!(job.phase, Phase::Running)
            && let Some(over) = job.broken.take()
        {
            let stall = now.monotonic.saturating_sub(over.noticed);
            let text =
                format!("step {} after {:.2} s; {}", report.step, stall.as_secs_f64(), over.cause.text);
            let event = job.event(now, "recovered", text);
            event.stall_ms = Some(stall.as_secs_f64() * 1e3);
            event.detection_ms = over.cause.detection_ms;
            self.publish_event(job);
            job.health.recovered(RecoveryRecord {
                unix_ms: now.unix_ms,
                cause: over.cause.kind.to_owned(),
                text: over.cause.text,
                worker: over.cause.worker,
                step: report.step,
                generation: report.within.generation,
                detection_ms: over.cause.detection_ms,
                stall_ms: stall.as_secs_f64() * 1e3,
                steps_lost: over.steps_lost,
                rows_requeued: job.requeued.saturating_sub(over.requeued_before),
            });
            self.save(job);
        }
        self.find_stragglers(now, job, report.step);
    }

    pub(super) fn evaluation(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        within: &Within,
        step: Step,
        loss: f64,
        tokens: u64,
    ) {
        let _ = self.with_job(&within.job, |machine, job| {
            let known = job.evaluated.is_some_and(|evaluated| evaluated >= step);
            if Self::rank_within(job, worker, within).is_none() || known || step > job.steps() {
                return;
            }
            job.evaluated = Some(step);
            let record = EvaluationRecord { step, loss, tokens };
            job.evaluations.push(record.clone());
            machine.effects.push(Effect::Record(Change::Evaluation(job.id.clone(), record.clone())));
            machine.effects.push(Effect::Publish(job.id.clone(), Point::Evaluation(record)));
            machine.note(now, job, "evaluated", format!("loss {loss:.4} after step {step}"));
            machine.save(job);
        });
    }

    pub(super) fn checkpoint(&mut self, now: Moment, worker: &WorkerId, within: &Within, written: Written) {
        let _ = self.with_job(&within.job, |machine, job| {
            let Written { step, path, size_bytes, seconds, removed, held_seconds } = written;
            if Self::rank_within(job, worker, within).is_none() || step > job.steps() {
                return;
            }
            let loss = job.evaluations.iter().find(|evaluation| evaluation.step == step);
            let record = CheckpointRecord {
                attempt: job.attempt,
                step,
                generation: within.generation,
                path,
                size_bytes,
                seconds,
                unix_ms: now.unix_ms,
                loss: loss.map(|evaluation| evaluation.loss),
            };
            job.checkpoint = Some(job.checkpoint.unwrap_or_default().max(step));
            job.checkpoints.retain(|known| known.path != record.path && !removed.contains(&known.path));
            job.checkpoints.push(record.clone());
            job.checkpoints.sort_by_key(|known| (known.step, known.attempt, known.generation));
            let beyond = job.checkpoints.len().saturating_sub(MOST_CHECKPOINTS);
            job.checkpoints.drain(..beyond);
            if !removed.is_empty() {
                machine.effects.push(Effect::Record(Change::CheckpointsRemoved(job.id.clone(), removed)));
            }
            machine.effects.push(Effect::Record(Change::Checkpoint(job.id.clone(), record.clone())));
            machine.effects.push(Effect::Publish(job.id.clone(), Point::Checkpoint(record)));
            let held = held_seconds * 1e3;
            let text = format!("step {step} in {seconds:.2} s, {held:.1} ms of them on the step's path");
            machine.note(now, job, "checkpoint", text);
            machine.save(job);
        });
    }

    /// The job goes on with the checkpoints that it has; one that is to give way cannot.
    pub(super) fn checkpoint_failed(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        within: &Within,
        step: Step,
        error: &Diagnostic,
    ) {
        let _ = self.with_job(&within.job, |machine, job| {
            if Self::rank_within(job, worker, within).is_none() {
                return;
            }
            let last = match job.checkpoint {
                Some(last) => format!("the newest is of step {last}"),
                None => "there is none yet".to_owned(),
            };
            let text = format!("step {step}: {}: {}; {last}", error.code, error.message);
            job.event(now, "checkpoint_failed", text).worker = Some(worker.clone());
            machine.publish_event(job);
            machine.cannot_give_way(now, job, worker);
            // Others may fail meanwhile that nobody waits for.
            if job.health.keeper.as_ref() == Some(worker) {
                job.health.keep_failed = true;
            }
        });
    }

    pub(super) fn finished(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        within: &Within,
        step: Step,
        adapter: String,
    ) {
        let _ = self.with_job(&within.job, |machine, job| {
            let is_first = Self::rank_within(job, worker, within) == Some(Rank(0));
            if !is_first || step != job.steps() {
                return;
            }
            machine.raise(job, step);
            job.adapter = adapter;
            let reason = format!("all {step} steps are applied");
            machine.end(now, job, JobState::Succeeded, reason);
        });
    }
}

/// Trained tokens a second.
fn rate(report: &StepReport) -> f64 {
    if report.seconds > 0.0 { report.reduced.tokens as f64 / report.seconds } else { 0.0 }
}

fn step_record(now: Moment, report: &StepReport, job: &Job, tokens_per_second: f64) -> StepRecord {
    StepRecord {
        step: report.step,
        attempt: job.attempt,
        generation: report.within.generation,
        loss: report.loss,
        learning_rate: report.learning_rate,
        gradient_norm: report.gradient_norm,
        tokens: report.reduced.tokens,
        tokens_per_second,
        workers: job.crew.members.len() as u32,
        unix_ms: now.unix_ms,
        skipped: report.skipped.is_some(),
    }
}

/// A member made a step that its generation began with.
fn made_twice(worker: &WorkerId, report: &StepReport, begun_from: Step) -> Diagnostic {
    let message = format!(
        "{worker} made step {} in generation {}, which began after step {begun_from}: its rows count twice",
        report.step, report.within.generation
    );
    Diagnostic::new("SH0640", message).kind(Kind::Internal)
}

/// What is told of a checkpoint.
pub(super) struct Written {
    pub step: Step,
    pub path: String,
    pub size_bytes: u64,
    pub seconds: f64,
    /// Paths of checkpoints that were deleted for it.
    pub removed: Vec<String>,
    pub held_seconds: f64,
}

/// A step's reduction did not amount to what was leased: somebody trained rows that nobody leased.
fn mismatch(worker: &WorkerId, report: &StepReport) -> Diagnostic {
    let (reduced, leased) = (report.reduced, report.leased);
    let message = format!(
        "step {} was reduced by {worker} to {} tokens of {} rows (row hash {:016x}), leased were {} tokens of {} \
         rows (row hash {:016x})",
        report.step,
        reduced.tokens,
        reduced.rows,
        reduced.row_hash,
        leased.tokens,
        leased.rows,
        leased.row_hash
    );
    Diagnostic::new("SH0601", message).kind(Kind::Internal)
}
