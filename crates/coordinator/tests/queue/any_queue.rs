//! What holds for any queue.

use std::collections::BTreeMap;

use proptest::prelude::*;
use shanty_coordinator::machine::queue::{OVERTAKES, Why};

use super::*;

const OWNERS: [&str; 3] = ["ada", "bob", "eve"];

fn any_jobs() -> impl Strategy<Value = (Vec<Asking>, Pool)> {
    let one = (0..3usize, 0..3i32, 1..5u32, 0..4u32, any::<bool>(), 0..6u32, 0..12u32, 0..8u32);
    let jobs = proptest::collection::vec(one, 1..9);
    (jobs, 0..12u32, 0..4u32, 0..3u32).prop_map(|(jobs, spare, most_jobs, most_jobs_an_owner)| {
        let asking: Vec<Asking> = jobs
            .into_iter()
            .zip(b'a'..)
            .map(|((owner, priority, min, more, active, holds, overtaken, mood), name)| {
                let max = min + more;
                let job = job(&(name as char).to_string(), OWNERS[owner], priority, min, max);
                Asking {
                    active,
                    holds: if active { holds.min(max) } else { 0 },
                    overtaken,
                    settled: active && mood == 0,
                    hopeful: active && mood == 1,
                    ..job
                }
            })
            .collect();
        let held: u32 = asking.iter().map(|job| job.holds).sum();
        (asking, Pool { workers: held + spare, most_jobs, most_jobs_an_owner })
    })
}

fn share(turns: &Turns, job: &Asking) -> u32 {
    match turns.of[&job.job] {
        Turn::Works { workers } => workers,
        _ => 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_worker_is_promised_twice_and_every_job_has_its_turn_or_a_reason((jobs, pool) in any_jobs()) {
        let turns = turns(&jobs, pool);
        prop_assert_eq!(turns.of.len(), jobs.len());
        let sum: u32 = jobs.iter().map(|job| share(&turns, job)).sum();
        prop_assert!(sum <= pool.workers, "{sum} of {}", pool.workers);
        for job in &jobs {
            let turn = &turns.of[&job.job];
            match turn {
                Turn::Works { workers } => {
                    prop_assert!(*workers <= job.max);
                    // Below its least number only who has no more, and nobody was put to work for it.
                    let lacks = *workers < job.min;
                    let gathers = job.min > pool.workers;
                    prop_assert!(!lacks || gathers || job.holds < job.min || job.settled, "{job:?}: {turn:?}");
                    prop_assert!(!lacks || *workers <= job.holds || gathers, "{job:?}: {turn:?}");
                }
                Turn::Waits(why) => {
                    prop_assert!(!job.active, "who had its turn is at work or gives way");
                    prop_assert!(!why.to_string().is_empty());
                    prop_assert!(turns.waiting.contains(&job.job));
                }
                Turn::GivesWay { .. } => prop_assert!(job.active && !job.settled),
            }
        }
    }

    #[test]
    fn priority_is_respected((jobs, pool) in any_jobs()) {
        let turns = turns(&jobs, pool);
        for job in &jobs {
            // A whole job at work is sent home only for one of a strictly higher priority that gets more than it had.
            if let Turn::GivesWay { to } = &turns.of[&job.job] {
                let taker = jobs.iter().find(|other| other.job == *to).unwrap();
                prop_assert!(share(&turns, taker) > taker.holds, "{to} takes nothing");
                let whole = job.holds >= job.min;
                prop_assert!(!whole || taker.priority > job.priority, "{} for {to}", job.job);
            }
            // A job that waits for workers would not fit beside those of its own or a higher priority and those that
            // must not be disturbed, or stands behind one of its priority that does not.
            if let Turn::Waits(Why::Workers { behind: None, .. }) = &turns.of[&job.job]
                && job.min <= pool.workers
            {
                let least = |other: &Asking| match other {
                    other if other.settled && other.active => share(&turns, other),
                    // Beyond its least number a job keeps what it holds from those of a lower priority.
                    other if other.priority > job.priority => share(&turns, other).min(other.min.max(other.holds)),
                    other if other.priority == job.priority => share(&turns, other).min(other.min),
                    _ => 0,
                };
                let taken: u32 = jobs.iter().map(least).sum();
                prop_assert!(taken + job.min > pool.workers, "{} could have begun", job.job);
            }
        }
    }

    #[test]
    fn bounds_are_never_passed_by_a_job_that_begins((jobs, pool) in any_jobs()) {
        let turns = turns(&jobs, pool);
        let works = |job: &&Asking| matches!(turns.of[&job.job], Turn::Works { .. });
        let begins = jobs.iter().filter(works).any(|job| !job.active);
        let count = jobs.iter().filter(works).count() as u32;
        prop_assert!(!begins || pool.most_jobs == 0 || count <= pool.most_jobs.max(count_active(&jobs)));
        for owner in OWNERS {
            let own = || jobs.iter().filter(works).filter(|job| job.owner == owner);
            let most = pool.most_jobs_an_owner;
            let active = own().filter(|job| job.active).count() as u32;
            prop_assert!(most == 0 || own().count() as u32 <= most.max(active), "{owner}");
        }
    }

    /// Jobs of one priority come in for ever; whoever waits is passed by a bounded number of younger ones.
    #[test]
    fn nobody_waits_for_ever(
        seed in proptest::collection::vec((0..3usize, 1..4u32, 1..6u32), 60..120),
        workers in 3..6u32,
    ) {
        let mut waiting: Vec<Asking> = Vec::new();
        let mut running: Vec<(Asking, u32)> = Vec::new();
        let mut passed: BTreeMap<JobId, u32> = BTreeMap::new();
        let mut coming = seed.into_iter().enumerate();
        let mut rounds = 0;
        loop {
            rounds += 1;
            prop_assert!(rounds < 5000, "the queue does not drain");
            for (number, (owner, min, length)) in coming.by_ref().take(2) {
                let mut asking = job(&format!("j{number}"), OWNERS[owner], 0, min.min(workers), min.min(workers));
                asking.sequence = number as u64;
                // How long it runs travels in a field that the queue does not look at here.
                asking.max = asking.min;
                waiting.push(asking);
                passed.insert(JobId::new(format!("j{number}")).unwrap(), length);
            }
            let all: Vec<Asking> = running.iter().map(|(job, _)| job.clone()).chain(waiting.clone()).collect();
            if all.is_empty() {
                break;
            }
            let turns = turns(&all, pool(workers));
            let begun: Vec<Asking> =
                waiting.iter().filter(|job| matches!(turns.of[&job.job], Turn::Works { .. })).cloned().collect();
            waiting.retain(|job| !begun.contains(job));
            for job in begun {
                for other in waiting.iter_mut().filter(|other| other.sequence < job.sequence) {
                    other.overtaken += 1;
                    prop_assert!(other.overtaken <= OVERTAKES, "{} was passed by {}", other.job, job.job);
                }
                let length = passed[&job.job];
                let holds = share(&turns, &job);
                running.push((at_work(job, holds), length));
            }
            for (_, left) in &mut running {
                *left -= 1;
            }
            running.retain(|(_, left)| *left > 0);
        }
    }
}

fn count_active(jobs: &[Asking]) -> u32 {
    jobs.iter().filter(|job| job.active).count() as u32
}
