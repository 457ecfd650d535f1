//! All metrics: names, labels and what they say, declared once. `docs/reference/metrics.md` is made from this.

/// How a metric is to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Grows, and begins at 0 with the coordinator.
    Counter,
    /// As it is now.
    Gauge,
    /// How many were at most so large.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Its word in the text format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// A metric.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// How it is to be read.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($constant:ident = $kind:expr, $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) const $constant: Metric =
            Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help };)*
        /// All metrics, in the order of the page.
        pub const METRICS: &[Metric] = &[$($constant),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

/// Calls that are answered from memory take tenths of a millisecond, rows from a slow disk seconds.
const CALLS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// A broken stream is noticed at once, silence after seconds, a hang after its deadline.
const DETECTIONS: &[f64] = &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0];

metrics! {
    BUILD = Gauge, "shanty_build_info" ["version"] "1; the version of the coordinator.";
    JOBS = Gauge, "shanty_jobs" ["state"] "Jobs by state, ended ones included.";
    QUEUE = Gauge, "shanty_queue_length" [] "Jobs that wait for their turn.";
    STEP = Gauge, "shanty_job_step" ["job"] "Highest step that is known to be committed.";
    STEPS_PLANNED = Gauge, "shanty_job_planned_steps" ["job"] "Steps that the job makes in all.";
    EPOCH = Gauge, "shanty_job_epoch" ["job"] "Passes over the data so far.";
    LOSS = Gauge, "shanty_job_loss" ["job"] "Mean loss a trained token of the last committed step, nats.";
    EVAL_LOSS = Gauge, "shanty_job_eval_loss" ["job"] "Mean loss of the held-out rows when they were last evaluated, nats.";
    RATE = Gauge, "shanty_job_learning_rate" ["job"] "Learning rate of the last committed step.";
    NORM = Gauge, "shanty_job_gradient_norm" ["job"] "Gradient norm of the last committed step, before clipping.";
    TOKEN_RATE = Gauge, "shanty_job_tokens_per_second" ["job"] "Trained tokens a second, smoothed.";
    ETA = Gauge, "shanty_job_eta_seconds" ["job"] "Time to the last step at the present rate; absent where none is known.";
    STEPS = Counter, "shanty_steps_total" ["job"] "Steps committed since the coordinator started; a step that was trained again counts again.";
    TOKENS = Counter, "shanty_tokens_total" ["job"] "Trained tokens of those steps.";
    ROWS = Gauge, "shanty_rows" ["job", "state"] "Rows by what became of them: leased, committed, requeued, skipped, recomputed, remaining, duplicates (always 0).";
    MEMBERS = Gauge, "shanty_members" ["job", "phase"] "Members of a job's crew by what they do.";
    LOSSES = Counter, "shanty_member_losses_total" ["job"] "Members lost in the life of the job.";
    SPARES = Gauge, "shanty_spare_workers" ["job"] "Workers that wait to take a member's place.";
    STRAGGLERS = Gauge, "shanty_stragglers" ["job"] "Members that the others wait for, step after step.";
    USUAL_STEP = Gauge, "shanty_usual_step_seconds" ["job"] "Median of the last steps' times.";
    DEADLINE = Gauge, "shanty_hang_deadline_seconds" ["job"] "A member without progress for this long is taken for hung.";
    RECOVERIES = Counter, "shanty_recoveries_total" ["job", "cause"] "Generations that ended early and were got over, by cause.";
    DETECTION = Histogram(DETECTIONS), "shanty_recovery_detection_seconds" ["cause"] "From the last sign of life, or of progress, to the moment a loss was noticed.";
    STALL = Histogram(DETECTIONS), "shanty_recovery_stall_seconds" ["cause"] "From the moment a loss was noticed to the next committed step.";
    STEPS_LOST = Counter, "shanty_recovery_lost_steps_total" ["job"] "Committed steps that had to be trained again.";
    REQUEUED = Counter, "shanty_recovery_requeued_rows_total" ["job"] "Rows that moved to another worker.";
    RESTARTS = Counter, "shanty_coordinator_restarts_total" ["job"] "Restarts of the coordinator while the job was at work.";
    CHECKPOINT_STEP = Gauge, "shanty_checkpoint_step" ["job"] "Step of the newest checkpoint.";
    CHECKPOINT_AGE = Gauge, "shanty_checkpoint_age_seconds" ["job"] "Time since the newest checkpoint was written.";
    CHECKPOINT_DURATION = Gauge, "shanty_checkpoint_duration_seconds" ["job"] "Time that the newest checkpoint took to write.";
    CHECKPOINT_SIZE = Gauge, "shanty_checkpoint_size_bytes" ["job"] "Bytes of the newest checkpoint.";
    CHECKPOINTS = Gauge, "shanty_checkpoints" ["job"] "Checkpoints that are kept.";
    WORKER_STEP = Gauge, "shanty_worker_step" ["job", "worker", "host", "device"] "Updates that the worker has applied.";
    BEAT_AGE = Gauge, "shanty_worker_beat_age_seconds" ["job", "worker"] "Time since the worker was last heard.";
    STEP_PART = Gauge, "shanty_worker_step_seconds" ["job", "worker", "part"] "Where the time of the worker's last step went: data, compute, reduce, update.";
    WORKER_RSS = Gauge, "shanty_worker_resident_bytes" ["job", "worker"] "Memory of the worker's process.";
    WORKER_CPU = Counter, "shanty_worker_cpu_seconds_total" ["job", "worker"] "Time of the worker's process on any core.";
    CARD = Gauge, "shanty_device_monitored" ["job", "worker", "device"] "1 where the worker's card says what follows, 0 where it does not: there is none, or no NVML.";
    CARD_BUSY = Gauge, "shanty_device_utilization_ratio" ["job", "worker", "device"] "Share of the last moments in which the card computed.";
    CARD_USED = Gauge, "shanty_device_memory_used_bytes" ["job", "worker", "device"] "Memory of the card that is taken.";
    CARD_SIZE = Gauge, "shanty_device_memory_size_bytes" ["job", "worker", "device"] "Memory that the card has.";
    CARD_WARM = Gauge, "shanty_device_temperature_celsius" ["job", "worker", "device"] "How warm the card is.";
    CARD_POWER = Gauge, "shanty_device_power_watts" ["job", "worker", "device"] "What the card draws.";
    CARD_ERRORS = Counter, "shanty_device_errors_total" ["job", "worker", "device", "kind"] "Errors since the card's driver was loaded: uncorrected, corrected, link_replay.";
    CALLS_TAKEN = Histogram(CALLS), "shanty_rpc_duration_seconds" ["call", "outcome"] "Time to answer a call; of a streamed answer, to its beginning.";
    CPU = Counter, "process_cpu_seconds_total" [] "Time of the coordinator on any core.";
    RSS = Gauge, "process_resident_memory_bytes" [] "Memory of the coordinator.";
    FILES = Gauge, "process_open_fds" [] "Files and connections that the coordinator has open.";
    STARTED = Gauge, "process_start_time_seconds" [] "When the coordinator started, seconds since the Unix epoch.";
}

/// The reference page.
pub fn reference() -> String {
    let mut page = "<!-- Made by `cargo xtask docs` from crates/coordinator/src/metrics/table.rs. -->\n# Metrics\n\n\
        `GET /metrics` on the coordinator's port, in Prometheus' text format. Whoever asks needs a token of the role `read` (or a \
        certificate); from the coordinator's own machine nothing is asked. Figures of a job are there while it is at work or waits, and \
        a quarter of an hour beyond its end. Counters begin anew with the coordinator, as Prometheus expects.\n\n\
        | metric | kind | labels | what it says |\n|---|---|---|---|\n"
        .to_owned();
    for metric in METRICS {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        page.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            metric.name,
            metric.kind.as_str(),
            labels.join(", "),
            metric.help
        ));
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_say_what_they_are() {
        let names: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        for metric in METRICS {
            let is_counter = metric.kind == Counter;
            assert_eq!(metric.name.ends_with("_total"), is_counter, "{}", metric.name);
            assert!(metric.help.ends_with('.') && !metric.help.contains('|'), "{}", metric.name);
            if let Histogram(bounds) = metric.kind {
                assert!(bounds.is_sorted() && metric.name.ends_with("_seconds"));
            }
        }
    }

    #[test]
    fn the_page_has_a_row_of_each() {
        let page = reference();
        assert!(METRICS.iter().all(|metric| page.contains(&format!("| `{}` |", metric.name))));
    }
}
