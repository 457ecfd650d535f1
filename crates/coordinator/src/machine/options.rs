//! The machine's time-outs and bounds.

use std::time::Duration;

/// Time-outs and bounds of the step protocol.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often workers beat.
    pub beat_interval: Duration,
    /// A worker whose stream is up but that says nothing for this long is lost.
    pub lost_after: Duration,
    /// How long a credit lasts.
    pub credit: Duration,
    /// How long to wait for more workers once the least number is ready.
    pub gather: Duration,
    /// How long a member may take from `Leave` to `Left`: it finishes its micro-batch first.
    pub leave_within: Duration,
    /// A member may be without progress for this long however short the job's steps are; see `pace`.
    pub hang_least: Duration,
    /// How long ready workers are collected before a running generation is broken to let them join.
    pub join_gather: Duration,
    /// How far beyond the highest committed step a credit goes.
    pub steps_ahead: u64,
    /// How long a worker that failed a job for a passing reason is left out of it.
    pub retry_worker_after: Duration,
    /// After so many passing failures in one attempt a worker is not asked again.
    pub worker_tries: u32,
    /// After so many losses of all members, without a step that had not been reached before, the job fails.
    pub total_losses: u32,
    /// The pause before the second try of what failed; each later one is twice as long.
    pub retry_pause: Duration,
    /// How long a job that lost workers may hope for others, before a job that can run with what is left gets them.
    pub patience: Duration,
    /// Jobs at work at a time; 0: any number.
    pub most_jobs: u32,
    /// The same of one owner.
    pub most_jobs_an_owner: u32,
    /// After so many generations in a row that broke before their first step, the job fails.
    pub fruitless_generations: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            beat_interval: Duration::from_millis(250),
            lost_after: Duration::from_secs(3),
            credit: Duration::from_secs(20),
            gather: Duration::from_secs(3),
            leave_within: Duration::from_secs(60),
            hang_least: Duration::from_secs(10),
            join_gather: Duration::from_secs(1),
            steps_ahead: 12,
            retry_worker_after: Duration::from_secs(10),
            worker_tries: 3,
            total_losses: 3,
            fruitless_generations: 20,
            retry_pause: Duration::from_secs(5),
            patience: Duration::from_secs(60),
            most_jobs: 0,
            most_jobs_an_owner: 0,
        }
    }
}
