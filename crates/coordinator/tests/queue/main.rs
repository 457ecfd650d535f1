//! Whose turn it is: a table of cases, and what holds for any queue.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod any_queue;
mod cases;

use shanty_coordinator::machine::queue::{Asking, Pool, Turn, Turns, turns};
use shanty_proto::JobId;

/// A waiting job, in short: owner, priority, least and most workers. Jobs are submitted in the order of their names.
fn job(name: &str, owner: &str, priority: i32, min: u32, max: u32) -> Asking {
    Asking {
        job: JobId::new(name).unwrap(),
        owner: owner.to_owned(),
        priority,
        sequence: name.bytes().fold(0, |sum, byte| sum * 256 + u64::from(byte)),
        min,
        max,
        holds: 0,
        active: false,
        settled: false,
        hopeful: false,
        overtaken: 0,
    }
}

/// The same at work, with so many workers.
fn at_work(job: Asking, holds: u32) -> Asking {
    Asking { active: true, holds, ..job }
}

fn pool(workers: u32) -> Pool {
    Pool { workers, ..Pool::default() }
}

/// Every job's turn in words: `a works with 2`, `b gives way to a`, `c: needs …`.
fn told(jobs: &[Asking], pool: Pool) -> Vec<String> {
    let Turns { of, .. } = turns(jobs, pool);
    of.into_iter()
        .map(|(job, turn)| match turn {
            Turn::Works { workers } => format!("{job} works with {workers}"),
            Turn::GivesWay { to } => format!("{job} gives way to {to}"),
            Turn::Waits(why) => format!("{job}: {why}"),
        })
        .collect()
}
