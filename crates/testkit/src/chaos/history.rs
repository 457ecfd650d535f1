//! What the coordinator wrote down, and what follows from it.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context;
use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};
use shanty_chaos::Fault;

use super::{Report, storm::Strike};

/// How much earlier an event may be noted than its fault was, by clocks that tick in milliseconds.
const TICK_MS: u64 = 2;
/// A fault explains a loss for as long as this.
const EXPLAINS_MS: u64 = 20_000;

#[derive(Debug, Clone, Deserialize)]
struct Event {
    unix_ms: u64,
    kind: String,
    worker: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Step {
    step: u64,
    generation: u64,
    loss: f64,
    unix_ms: u64,
}

#[derive(Debug, Default)]
struct OfJob {
    events: Vec<Event>,
    steps: Vec<Step>,
    generation: u64,
    requeued: u64,
    recomputed: u64,
}

/// What the coordinator wrote down of some jobs.
#[derive(Debug, Default)]
pub(super) struct History {
    jobs: BTreeMap<String, OfJob>,
}

/// Milliseconds at p50, p99 and the maximum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Spread {
    /// How many.
    pub count: usize,
    /// Median.
    pub p50: u64,
    /// 99 of 100 are at most this.
    pub p99: u64,
    /// Longest.
    pub max: u64,
}

/// One kind of fault.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Kind {
    /// How many struck.
    pub faults: u64,
    /// From the fault to the coordinator's word that the worker is lost.
    pub detection_ms: Spread,
    /// From the fault to the next step of a later generation (after a restart of the coordinator: to the next step).
    pub stall_ms: Spread,
    /// The same where nothing else struck from five seconds before until the step.
    pub lone_stall_ms: Spread,
}

impl Spread {
    fn of(mut times: Vec<u64>) -> Self {
        times.sort_unstable();
        let at = |share: f64| {
            let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
            times.get(index).copied().unwrap_or(0)
        };
        Self { count: times.len(), p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl History {
    /// Reads the store of a coordinator that has ended.
    pub(super) fn read(state: &Path, jobs: &[String]) -> anyhow::Result<Self> {
        let path = state.join("coordinator.sqlite");
        let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_WRITE)
            .with_context(|| format!("failed to open `{}`", path.display()))?;
        let mut history = Self::default();
        for job in jobs {
            let record: serde_json::Value = serde_json::from_str(&connection.query_row(
                "SELECT record FROM jobs WHERE id = ?1",
                [job],
                |row| row.get::<_, String>(0),
            )?)?;
            let number = |key: &str| record[key].as_u64().unwrap_or(0);
            history.jobs.insert(
                job.clone(),
                OfJob {
                    events: records(&connection, "events", "number", job)?,
                    steps: records(&connection, "steps", "step", job)?,
                    generation: record["generation"]["generation"].as_u64().unwrap_or(0),
                    requeued: number("requeued"),
                    recomputed: number("recomputed"),
                },
            );
        }
        Ok(history)
    }

    pub(super) fn final_loss(&self, job: &str, step: u64) -> Option<f64> {
        self.jobs.get(job)?.steps.iter().find(|record| record.step == step).map(|record| record.loss)
    }

    /// Figures of the faults. The rest of the report is the caller's to fill in.
    pub(super) fn report(&self, strikes: &[Strike]) -> Report {
        let mut kinds = BTreeMap::new();
        let (mut detections, mut stalls) = (Vec::new(), Vec::new());
        for fault in Fault::ALL {
            let of_kind: Vec<&Strike> = strikes.iter().filter(|strike| strike.fault == fault).collect();
            if of_kind.is_empty() {
                continue;
            }
            let (mut noticed, mut stalled, mut lone) = (Vec::new(), Vec::new(), Vec::new());
            for strike in &of_kind {
                let lost = self.lost(strike);
                noticed.extend(lost.map(|at| at.saturating_sub(strike.unix_ms)));
                let Some(step) = self.next_step(strike, lost) else { continue };
                let stall = step.saturating_sub(strike.unix_ms);
                stalled.push(stall);
                let near = |other: &Strike| {
                    !std::ptr::eq(other, *strike)
                        && other.unix_ms + 5000 > strike.unix_ms
                        && other.unix_ms <= step
                };
                if !strikes.iter().any(near) {
                    lone.push(stall);
                }
            }
            detections.extend(&noticed);
            stalls.extend(&stalled);
            let kind = Kind {
                faults: of_kind.len() as u64,
                detection_ms: Spread::of(noticed),
                stall_ms: Spread::of(stalled),
                lone_stall_ms: Spread::of(lone),
            };
            kinds.insert(fault.as_str(), kind);
        }
        let sum = |count: fn(&OfJob) -> u64| self.jobs.values().map(count).sum();
        Report {
            faults: strikes.len() as u64,
            detection_ms: Spread::of(detections),
            stall_ms: Spread::of(stalls),
            kinds,
            generations: sum(|job| job.generation),
            requeued: sum(|job| job.requeued),
            recomputed: sum(|job| job.recomputed),
            steps_lost: 0,
            duplicates: 0,
            omissions: 0,
            loss_difference: 0.0,
            jobs: 0,
            steps: 0,
            unexplained_exits: 0,
            not_made: Vec::new(),
            seconds: 0.0,
            seed: 0,
        }
    }

    /// When the coordinator said that the struck worker is lost.
    fn lost(&self, strike: &Strike) -> Option<u64> {
        let worker = strike.worker.as_ref()?;
        let window = strike.unix_ms.saturating_sub(TICK_MS)..strike.unix_ms + EXPLAINS_MS;
        let is_it = |event: &&Event| {
            event.kind == "member_lost"
                && event.worker.as_ref() == Some(worker)
                && window.contains(&event.unix_ms)
        };
        self.jobs.get(&strike.job)?.events.iter().find(is_it).map(|event| event.unix_ms)
    }

    /// When the next step was committed: of a later generation if a member was lost, any if the coordinator was.
    fn next_step(&self, strike: &Strike, lost: Option<u64>) -> Option<u64> {
        let job = self.jobs.get(&strike.job)?;
        let before = job.steps.iter().filter(|step| step.unix_ms <= strike.unix_ms);
        let generation = before.map(|step| step.generation).max().unwrap_or(0);
        let counts = |step: &&Step| match (strike.fault, lost) {
            (Fault::Coordinator, _) => step.unix_ms > strike.unix_ms,
            (_, Some(lost)) => step.unix_ms >= lost && step.generation > generation,
            (_, None) => false,
        };
        job.steps.iter().filter(counts).map(|step| step.unix_ms).min()
    }
}

fn records<T: for<'a> Deserialize<'a>>(
    connection: &Connection,
    table: &str,
    order: &str,
    job: &str,
) -> anyhow::Result<Vec<T>> {
    let query = format!("SELECT record FROM {table} WHERE job = ?1 ORDER BY {order}");
    let mut statement = connection.prepare(&query)?;
    let rows = statement.query_map([job], |row| row.get::<_, String>(0))?;
    rows.map(|json| Ok(serde_json::from_str(&json?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let step = |step, generation, unix_ms| Step { step, generation, loss: 1.0, unix_ms };
        let event = |unix_ms, worker: &str| Event {
            unix_ms,
            kind: "member_lost".to_owned(),
            worker: Some(worker.to_owned()),
        };
        let job = OfJob {
            events: vec![event(1040, "a"), event(9000, "b")],
            steps: vec![step(1, 1, 900), step(2, 1, 1005), step(3, 2, 1300), step(4, 2, 9001)],
            ..OfJob::default()
        };
        History { jobs: BTreeMap::from([("j".to_owned(), job)]) }
    }

    fn strike(unix_ms: u64, fault: Fault, worker: &str) -> Strike {
        Strike { unix_ms, fault, job: "j".to_owned(), worker: Some(worker.to_owned()) }
    }

    #[test]
    fn a_report_that_was_under_way_is_no_recovery() {
        let report = history().report(&[strike(1000, Fault::Kill, "a")]);
        let kill = &report.kinds["kill"];
        assert_eq!((kill.detection_ms.max, kill.stall_ms.max, kill.lone_stall_ms.count), (40, 300, 1));
    }

    #[test]
    fn after_a_restart_of_the_coordinator_any_step_counts() {
        let report =
            history().report(&[strike(1000, Fault::Coordinator, "x"), strike(1001, Fault::Kill, "a")]);
        let coordinator = &report.kinds["coordinator"];
        assert_eq!((coordinator.stall_ms.max, coordinator.lone_stall_ms.count), (5, 0));
    }

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        assert_eq!(Spread::of((1..=100).rev().collect()), Spread { count: 100, p50: 50, p99: 99, max: 100 });
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}
