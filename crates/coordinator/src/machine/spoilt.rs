//! Steps whose loss is no number, or out of all proportion, where the job wants them passed over.

use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Step, WorkerId};

use super::{
    Machine,
    event::{Moment, StepReport, Within},
    job::{Cause, Forming, Job, Origin, Phase},
};

/// Too many bad steps.
const TOO_MANY: &str = "SH0643";

impl Machine {
    /// A step was passed over where it was, as all ranks agreed. Called for the first report of it.
    pub(super) fn step_skipped(&mut self, now: Moment, job: &mut Job, report: &StepReport, reason: &str) {
        let planned = job.health.record.skip.contains(&report.step);
        job.health.record.skipped.insert(report.step);
        let text = format!("step {} is passed over: {reason}", report.step);
        self.note(now, job, "skipped", text);
        self.save(job);
        if !planned && job.health.note_bad(report.step) {
            self.fail_bad(now, job, report.step, reason);
        }
    }

    /// Names the samples that a reporter found at fault.
    pub(super) fn name_samples(
        &mut self,
        now: Moment,
        job: &mut Job,
        worker: &WorkerId,
        step: Step,
        samples: &[u64],
    ) {
        if samples.is_empty() {
            return;
        }
        let names: Vec<String> = samples.iter().map(u64::to_string).collect();
        let text = format!("step {step}: among samples {}", names.join(", "));
        job.event(now, "bad_samples", text).worker = Some(worker.clone());
        self.publish_event(job);
    }

    /// A step is to be undone: the adapter goes back to a checkpoint, and the step is passed over on the way.
    pub(super) fn bad_step(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        within: &Within,
        step: Step,
        reason: &str,
        samples: &[u64],
    ) {
        let _ = self.with_job(&within.job, |machine, job| {
            let is_next = step > job.begun_from() && step <= job.steps();
            if Self::rank_within(job, worker, within).is_none() || !is_next {
                return;
            }
            machine.name_samples(now, job, worker, step, samples);
            if !job.is_stepping() || job.health.record.skip.contains(&step) {
                return;
            }
            let back = Step(step.0.saturating_sub(1 + job.spec.train.rollback_steps));
            let text = format!(
                "step {step} is bad: {reason}; goes back to step {back} or before, and passes over it"
            );
            machine.note(now, job, "bad_step", text.clone());
            job.health.record.skip.insert(step);
            job.health.back_to = Some(back);
            if job.health.note_bad(step) {
                return machine.fail_bad(now, job, step, reason);
            }
            machine.start_leaving(now, job, Cause::new("bad_step", text).of(worker, None));
        });
    }

    fn fail_bad(&mut self, now: Moment, job: &mut Job, step: Step, reason: &str) {
        let message = format!("too many steps are bad; the last is step {step}: {reason}");
        let hint =
            "lower `train.learning_rate`, set `train.warmup_steps`, or look at the samples that were named";
        self.fail(now, job, Diagnostic::new(TOO_MANY, message).kind(Kind::User).hint(hint));
    }

    /// All members have left what is to be undone.
    pub(super) fn go_back_to(&mut self, now: Moment, job: &mut Job, step: Step) {
        let text = format!("looks for a checkpoint not beyond step {step}");
        self.note(now, job, "rollback", text);
        job.phase = Phase::Forming(Forming { origin: Origin::Fenced, enough_since: None });
        self.save(job);
    }
}
