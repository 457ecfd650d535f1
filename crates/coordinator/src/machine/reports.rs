//! What members report: a loaded base, steps, evaluations, checkpoints, the end.

use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Attempt, JobId, Rank, Step, WorkerId};

use super::{
    Machine,
    crew::Credit,
    effect::{Change, Effect, Message, Point},
    event::{Moment, StepReport, Within},
    job::{Job, Phase},
    record::{CheckpointRecord, EvaluationRecord, JobState, StepRecord},
};

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
                session.assigned = None;
                session.failures = Some((job.id.clone(), attempt, u32::MAX));
                machine.note(now, job, "worker_refused", reason.clone());
                let release = Message::Release { job: job.id.clone(), attempt, succeeded: false, reason };
                machine.send(worker, release);
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
            return;
        }
        if report.reduced != report.leased {
            return self.fail(now, job, mismatch(worker, &report));
        }
        let first_applied = job.generation.as_ref().map_or(Step(0), |generation| generation.start.applied);
        if report.step <= first_applied || report.step > job.steps() {
            return;
        }
        if let Some(member) = job.crew.of_mut(worker) {
            member.step = member.step.max(report.step);
            member.timings = report.timings;
        }
        self.raise(job, report.step);
        if job.note_recorded(report.step) {
            self.commit(now, &report, job);
        }
    }

    /// The first report of a step in this generation.
    fn commit(&mut self, now: Moment, report: &StepReport, job: &mut Job) {
        let rate = if report.seconds > 0.0 { report.reduced.tokens as f64 / report.seconds } else { 0.0 };
        let smooth = |old: f64, new: f64| if old > 0.0 { old + SMOOTHING * (new - old) } else { new };
        job.tokens_per_second = smooth(job.tokens_per_second, rate);
        job.seconds_per_step = smooth(job.seconds_per_step, report.seconds);
        job.advanced = true;
        job.fruitless = 0;
        let record = StepRecord {
            step: report.step,
            attempt: job.attempt,
            generation: report.within.generation,
            loss: report.loss,
            learning_rate: report.learning_rate,
            gradient_norm: report.gradient_norm,
            tokens: report.reduced.tokens,
            tokens_per_second: rate,
            workers: job.crew.members.len() as u32,
            unix_ms: now.unix_ms,
        };
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
            let text = format!("step {} after {:.2} s; {}", report.step, stall.as_secs_f64(), over.cause);
            let event = job.event(now, "recovered", text);
            event.stall_ms = Some(stall.as_secs_f64() * 1e3);
            event.detection_ms = over.detection_ms;
            self.publish_event(job);
        }
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

    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(super) fn checkpoint(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        within: &Within,
        step: Step,
        path: String,
        size_bytes: u64,
        seconds: f64,
    ) {
        let _ = self.with_job(&within.job, |machine, job| {
            if Self::rank_within(job, worker, within).is_none() || step > job.steps() {
                return;
            }
            let record = CheckpointRecord {
                attempt: job.attempt,
                step,
                generation: within.generation,
                path,
                size_bytes,
                seconds,
                unix_ms: now.unix_ms,
            };
            job.checkpoint = Some(job.checkpoint.unwrap_or_default().max(step));
            if !job.checkpoints.iter().any(|known| known.path == record.path) {
                job.checkpoints.push(record.clone());
            }
            let keep = job.spec.checkpoint.keep.max(1);
            let beyond = job.checkpoints.len().saturating_sub(keep);
            job.checkpoints.drain(..beyond);
            machine.effects.push(Effect::Record(Change::Checkpoint(job.id.clone(), record.clone())));
            machine.effects.push(Effect::Publish(job.id.clone(), Point::Checkpoint(record)));
            machine.note(now, job, "checkpoint", format!("step {step} in {seconds:.2} s"));
            machine.save(job);
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
