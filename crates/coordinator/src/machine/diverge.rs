//! Members whose states are not the same, where they must be: the minority takes the majority's.

use std::collections::BTreeMap;

use shanty_proto::{Attempt, Step, WorkerId};

use super::{
    Machine,
    effect::Message,
    event::{Moment, Within},
    job::{Cause, Holder, Job},
};

/// A worker whose state differed so often is not asked again: its hardware is at fault.
const MOST_DIVERGENCES: u32 = 2;

impl Machine {
    /// The ranks compared their adapters. All of them say so; the first word counts.
    pub(super) fn diverged(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        within: &Within,
        step: Step,
        hashes: &[String],
    ) {
        let _ = self.with_job(&within.job, |machine, job| {
            if Self::rank_within(job, worker, within).is_none() || !job.is_stepping() {
                return;
            }
            let names = |hash: &String| {
                let of_hash = job.crew.members.iter().zip(hashes).filter(|(_, other)| *other == hash);
                let names: Vec<&str> = of_hash.map(|(member, _)| member.worker.as_str()).collect();
                format!("{} ({})", names.join(", "), hash.get(..8).unwrap_or(hash))
            };
            let mut distinct: Vec<&String> = hashes.iter().collect();
            distinct.sort();
            distinct.dedup();
            let sides: Vec<String> = distinct.into_iter().map(names).collect();
            let text = format!("adapters differ after step {step}: {}", sides.join(" against "));
            machine.note(now, job, "diverged", text.clone());
            machine.start_leaving(now, job, Cause::new("diverged", text));
        });
    }

    /// Of those who hold the newest state, the minority loses it. Says whether anybody keeps one: without a majority
    /// nobody knows who is right.
    pub(super) fn settle_divergence(
        &mut self,
        now: Moment,
        job: &mut Job,
        holders: &mut BTreeMap<WorkerId, Holder>,
    ) -> bool {
        let newest = holders.values().map(|holder| holder.applied).max().unwrap_or_default();
        let mut sides: BTreeMap<String, Vec<WorkerId>> = BTreeMap::new();
        for (worker, holder) in holders.iter().filter(|(_, holder)| holder.applied == newest) {
            sides.entry(holder.hash.clone()).or_default().push(worker.clone());
        }
        if sides.len() <= 1 {
            return true;
        }
        let voters: usize = sides.values().map(Vec::len).sum();
        let majority = sides.iter().find(|(_, side)| side.len() * 2 > voters).map(|(hash, _)| hash.clone());
        let names =
            |workers: &[WorkerId]| workers.iter().map(WorkerId::as_str).collect::<Vec<_>>().join(", ");
        let Some(majority) = majority else {
            let all: Vec<WorkerId> = sides.into_values().flatten().collect();
            let text = format!(
                "the states of {} differ after step {newest}, and no majority says which is right: back to a checkpoint",
                names(&all)
            );
            self.note(now, job, "diverged", text);
            return false;
        };
        let wrong: Vec<WorkerId> =
            sides.into_iter().filter(|(hash, _)| *hash != majority).flat_map(|(_, side)| side).collect();
        for worker in wrong {
            holders.remove(&worker);
            let count = job.health.divergences.entry(worker.clone()).or_default();
            *count += 1;
            let again = *count >= MOST_DIVERGENCES;
            let text = format!(
                "the state of {worker} differs from the majority's after step {newest}: {}",
                if again { "for the second time, so it is not asked again" } else { "it takes theirs" }
            );
            job.event(now, "diverged", text.clone()).worker = Some(worker.clone());
            self.publish_event(job);
            if again {
                self.refuse_worker(job, &worker, job.attempt, text);
            }
        }
        true
    }

    /// Lets a worker go from a job for good.
    pub(super) fn refuse_worker(&mut self, job: &Job, worker: &WorkerId, attempt: Attempt, reason: String) {
        if let Some(session) = self.sessions.get_mut(worker) {
            session.assigned = None;
            session.ready_since = None;
            session.failures = Some((job.id.clone(), attempt, u32::MAX));
        }
        let release = Message::Release { job: job.id.clone(), attempt, succeeded: false, reason };
        self.send(worker, release);
    }
}
