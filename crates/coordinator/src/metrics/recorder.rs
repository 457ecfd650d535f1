//! What must be counted when it happens, because it cannot be looked up later.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use shanty_proto::JobId;

use super::{
    table::{CALLS_TAKEN, DETECTION, Kind, Metric, RECOVERIES, REQUEUED, STALL, STEPS, STEPS_LOST, TOKENS},
    text::{Histogram, Labels, Page},
};
use crate::machine::{JobView, Point, record::RecoveryRecord};

/// Counts.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    jobs: HashMap<JobId, OfJob>,
    histograms: BTreeMap<&'static str, BTreeMap<Labels, Histogram>>,
}

#[derive(Debug, Default)]
struct OfJob {
    steps: u64,
    tokens: u64,
    recoveries: BTreeMap<String, u64>,
    steps_lost: u64,
    requeued: u64,
    /// The newest recovery that was counted.
    seen: Option<(u64, u64, u64)>,
}

impl Recorder {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Counts are whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job's newest status. What it got over before its first status is of a coordinator before this one.
    pub fn status(&self, view: &JobView) {
        let mut counts = self.lock();
        let known = counts.jobs.contains_key(&view.id);
        let of_job = counts.jobs.entry(view.id.clone()).or_default();
        let before = of_job.seen;
        of_job.seen = view.crew.recoveries.first().map(key).max(before);
        if !known {
            return;
        }
        let mut news = Vec::new();
        for recovery in view.crew.recoveries.iter().filter(|recovery| Some(key(recovery)) > before) {
            *of_job.recoveries.entry(recovery.cause.clone()).or_default() += 1;
            of_job.steps_lost += recovery.steps_lost;
            of_job.requeued += recovery.rows_requeued;
            news.push((recovery.cause.clone(), recovery.detection_ms, recovery.stall_ms));
        }
        for (cause, detection_ms, stall_ms) in news {
            counts.observe(&STALL, vec![cause.clone()], stall_ms / 1000.0);
            if let Some(milliseconds) = detection_ms {
                counts.observe(&DETECTION, vec![cause], milliseconds / 1000.0);
            }
        }
    }

    /// Something happened to a job.
    pub fn point(&self, job: &JobId, point: &Point) {
        if let Point::Step(step) = point {
            let mut counts = self.lock();
            let of_job = counts.jobs.entry(job.clone()).or_default();
            of_job.steps += 1;
            of_job.tokens += step.tokens;
        }
    }

    /// A call was answered.
    pub fn call(&self, call: &str, is_good: bool, took: Duration) {
        let outcome = if is_good { "ok" } else { "error" };
        self.lock().observe(&CALLS_TAKEN, vec![call.to_owned(), outcome.to_owned()], took.as_secs_f64());
    }

    /// Writes the counts; those of jobs that are not `shown` are left out.
    pub(super) fn write(&self, page: &mut Page, shown: impl Fn(&JobId) -> bool) {
        let counts = self.lock();
        for (job, of_job) in counts.jobs.iter().filter(|(job, _)| shown(job)) {
            let job = job.as_str();
            page.set(&STEPS, &[job], of_job.steps as f64);
            page.set(&TOKENS, &[job], of_job.tokens as f64);
            page.set(&STEPS_LOST, &[job], of_job.steps_lost as f64);
            page.set(&REQUEUED, &[job], of_job.requeued as f64);
            for (cause, count) in &of_job.recoveries {
                page.set(&RECOVERIES, &[job, cause], *count as f64);
            }
        }
        for metric in [&CALLS_TAKEN, &DETECTION, &STALL] {
            for (labels, histogram) in counts.histograms.get(metric.name).into_iter().flatten() {
                let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
                page.set_histogram(metric, &labels, histogram.clone());
            }
        }
    }
}

impl Counts {
    fn observe(&mut self, metric: &'static Metric, labels: Labels, value: f64) {
        let Kind::Histogram(bounds) = metric.kind else { return };
        self.histograms.entry(metric.name).or_default().entry(labels).or_default().observe(bounds, value);
    }
}

/// Recoveries of a job in the order in which they came about.
fn key(recovery: &RecoveryRecord) -> (u64, u64, u64) {
    (recovery.unix_ms, recovery.generation.0, recovery.step.0)
}
