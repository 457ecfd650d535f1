//! What became of a job's time: steps that count, steps that were made again, and breaks.

use serde::{Deserialize, Serialize};
use shanty_proto::Step;

use super::{event::Moment, job::Job, record::StepRecord};

/// What is durable of it. What the store missed of a coordinator that was killed follows from its steps.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeRecord {
    /// Steps made for the first time.
    pub productive_seconds: f64,
    /// From a break's notice to the beginning of the next committed step.
    pub stalled_seconds: f64,
    /// Steps made again after a return to a checkpoint.
    pub recomputed_seconds: f64,
    /// Up to here, steps are made again.
    again_up_to: Step,
    /// The newest step whose time is in here.
    counted: Step,
}

impl TimeRecord {
    /// A step was committed.
    pub(super) fn trained(&mut self, step: Step, seconds: f64) {
        if step <= self.again_up_to {
            self.recomputed_seconds += seconds;
        } else {
            self.productive_seconds += seconds;
        }
        self.counted = step;
    }

    /// A break is over; the step that ended it took `step_seconds` of `seconds`.
    pub(super) fn stalled(&mut self, seconds: f64, step_seconds: f64) {
        self.stalled_seconds += (seconds - step_seconds).max(0.0);
    }

    /// The job goes back from `watermark` to an earlier step.
    pub(super) fn return_to(&mut self, step: Step, watermark: Step) {
        self.again_up_to = self.again_up_to.max(watermark);
        self.counted = self.counted.min(step);
    }

    /// Adds steps that were recorded after this was.
    pub(super) fn catch_up(&mut self, steps: &[StepRecord]) {
        for step in steps {
            if step.step > self.counted && step.tokens_per_second > 0.0 {
                self.trained(step.step, step.tokens as f64 / step.tokens_per_second);
            }
        }
    }
}

/// What became of a job's time, as status shows it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TimeView {
    /// See [`TimeRecord::productive_seconds`].
    pub productive_seconds: f64,
    /// See [`TimeRecord::stalled_seconds`]; a break that lasts is in it.
    pub stalled_seconds: f64,
    /// See [`TimeRecord::recomputed_seconds`].
    pub recomputed_seconds: f64,
    /// Since the first generation formed.
    pub elapsed_seconds: f64,
}

pub(super) fn view_of(now: Moment, job: &Job) -> TimeView {
    let record = job.health.record.time;
    let lasting = job.broken.as_ref().filter(|_| !job.is_ended());
    let lasting = lasting.map_or(0.0, |over| now.monotonic.saturating_sub(over.noticed).as_secs_f64());
    let until = if job.ended_unix_ms > 0 { job.ended_unix_ms } else { now.unix_ms };
    let elapsed_ms = if job.started_unix_ms > 0 { until.saturating_sub(job.started_unix_ms) } else { 0 };
    TimeView {
        productive_seconds: record.productive_seconds,
        stalled_seconds: record.stalled_seconds + lasting,
        recomputed_seconds: record.recomputed_seconds,
        elapsed_seconds: elapsed_ms as f64 / 1e3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_made_again_are_told_from_those_made_first() {
        let mut time = TimeRecord::default();
        (1..=5).for_each(|step| time.trained(Step(step), 1.0));
        time.return_to(Step(3), Step(5));
        (4..=6).for_each(|step| time.trained(Step(step), 2.0));
        assert_eq!((time.productive_seconds, time.recomputed_seconds), (7.0, 4.0));
    }

    #[test]
    fn a_break_counts_without_the_step_that_ended_it() {
        let mut time = TimeRecord::default();
        time.stalled(3.0, 1.0);
        time.stalled(0.5, 1.0);
        assert_eq!(time.stalled_seconds, 2.0);
    }
}
