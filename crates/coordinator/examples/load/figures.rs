//! From what the workers noted to figures.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    Result,
    crew::{Log, Plan},
};

/// Ticks of `/proc/PID/stat` a second: `USER_HZ`, 100 on every Linux.
const TICKS: f64 = 100.0;

/// What a process and the machine have used up to a moment.
pub struct Usage {
    at: Instant,
    process: f64,
    own: f64,
    machine: f64,
    resident_bytes: u64,
    peak_bytes: u64,
}

impl Usage {
    pub fn of(pid: u32) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            process: cpu_seconds(&format!("/proc/{pid}/stat"))?,
            own: cpu_seconds("/proc/self/stat")?,
            machine: machine_seconds()?,
            resident_bytes: status_bytes(pid, "VmRSS:")?,
            peak_bytes: status_bytes(pid, "VmHWM:")?,
        })
    }
}

fn cpu_seconds(path: &str) -> Result<f64> {
    let text = fs::read_to_string(path)?;
    // The name in parentheses may hold anything; utime and stime are the 12th and 13th after it.
    let fields: Vec<&str> = text.rsplit_once(')').ok_or("no name")?.1.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / TICKS)
}

/// Seconds that all cores were busy.
fn machine_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let first = text.lines().next().ok_or("/proc/stat is empty")?;
    let ticks: Vec<f64> = first.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq, steal
    Ok((ticks[..3].iter().sum::<f64>() + ticks[5..8].iter().sum::<f64>()) / TICKS)
}

fn status_bytes(pid: u32, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|line| line.starts_with(key)).ok_or("no such line")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse::<u64>()? * 1024)
}

/// Milliseconds at p50, p99 and the maximum.
pub fn spread(mut times: Vec<Duration>) -> Value {
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
        times.get(index).map_or(0.0, |time| (time.as_secs_f64() * 1e5).round() / 100.0)
    };
    json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
}

/// From each worker's report to the moment when everybody held the next credit.
pub fn commits(logs: &[Log]) -> Vec<Duration> {
    let steps = logs.iter().map(|log| log.turns.len()).min().unwrap_or(0);
    let mut times = Vec::with_capacity(steps * logs.len());
    for step in 0..steps {
        let turns = logs.iter().map(|log| log.turns[step]);
        if let Some(last) = turns.clone().map(|turn| turn.credited).max() {
            times.extend(turns.map(|turn| last.duration_since(turn.reported)));
        }
    }
    times
}

/// The object that scripts read.
pub fn object(plan: &Plan, logs: &[Log], before: &Usage, after: &Usage) -> Value {
    let own = logs.iter().flat_map(|log| &log.turns).map(|turn| turn.credited - turn.reported).collect();
    let leases = logs.iter().flat_map(|log| log.leases.iter().copied()).collect();
    let wall = (after.at - before.at).as_secs_f64();
    let cores = |from: f64, to: f64| ((to - from) / wall * 1000.0).round() / 1000.0;
    let coordinator = after.process - before.process;
    let generator = after.own - before.own;
    let others = (after.machine - before.machine - coordinator - generator).max(0.0);
    let a_turn = (plan.workers as f64) * (plan.steps as f64);
    json!({
        "workers": plan.workers,
        "steps": plan.steps,
        "commit_ms": spread(commits(logs)),
        "own_ms": spread(own),
        "lease_ms": spread(leases),
        "cpu_cores": cores(before.process, after.process),
        "cpu_us_per_worker_step": (coordinator / a_turn * 1e6).round(),
        "generator_cpu_cores": cores(before.own, after.own),
        "others_cpu_cores": (others / wall * 1000.0).round() / 1000.0,
        "memory_bytes": after.peak_bytes,
        "resident_bytes": after.resident_bytes,
        "rows": logs.iter().map(|log| log.rows).sum::<u64>(),
        "bytes_per_worker_step": logs.iter().map(|log| log.message_bytes).sum::<u64>() as f64 / a_turn,
    })
}
