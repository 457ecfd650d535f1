//! Groups of workers that share one base: a job whose base is in N parts trains in whole groups of N, and rank r holds part r mod N. Where
//! each worker has a base of its own, a group is one worker.
//!
//! A worker is given its part before it loads, and holds any group's part as well as another's of the same number; so whom it is grouped with is
//! decided anew with each generation, and only who must load another part loads anything.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use shanty_proto::WorkerId;

use super::{
    Machine,
    effect::Message,
    job::{Forming, Holder, Job, Origin, Phase},
};

impl Job {
    /// How many workers share a base.
    pub fn parts(&self) -> usize {
        self.spec.base.shard.parts().max(1) as usize
    }

    /// Members of the newest generation whose group has lost somebody, or somebody's part, so that what the group added to its sums is void. `holders`: who
    /// is left of the generation.
    pub fn of_broken_groups(&self, holders: &BTreeMap<WorkerId, Holder>) -> BTreeSet<WorkerId> {
        let Some(generation) = &self.generation else { return BTreeSet::new() };
        let groups = generation.members.chunks(self.parts());
        let is_void = |worker: &WorkerId| holders.get(worker).is_none_or(|holder| holder.moved);
        let broken = groups.filter(|group| group.iter().any(|member| is_void(&member.worker)));
        broken.flatten().map(|member| member.worker.clone()).collect()
    }
}

/// Puts workers, listed by part, together to whole groups: the first of each part, then the second of each, at most `most` groups.
pub(super) fn whole_groups(by_part: &[Vec<WorkerId>], most: usize) -> Vec<WorkerId> {
    let groups = by_part.iter().map(Vec::len).min().unwrap_or(0).min(most);
    (0..groups).flat_map(|group| by_part.iter().map(move |part| part[group].clone())).collect()
}

impl Machine {
    /// Workers by the part that they hold, in the order given. One whose stream is gone holds none.
    pub(super) fn by_part(
        &self,
        job: &Job,
        workers: impl IntoIterator<Item = WorkerId>,
    ) -> Vec<Vec<WorkerId>> {
        let mut by_part = vec![Vec::new(); job.parts()];
        for worker in workers {
            let part = self.sessions.get(&worker).map(|session| session.part as usize);
            if let Some(part) = part.and_then(|part| by_part.get_mut(part)) {
                part.push(worker);
            }
        }
        by_part
    }

    /// Who could form a generation, as whole groups by rank. First of each part come those who hold the newest state, groups that are whole
    /// ahead of others, then `joiners`, last slow holders. Empty where that would leave the newest state behind.
    pub(super) fn line_up(
        &self,
        job: &Job,
        holders: &BTreeMap<WorkerId, Holder>,
        joiners: Vec<WorkerId>,
    ) -> Vec<WorkerId> {
        let newest = holders.values().map(|holder| holder.applied).max().unwrap_or_default();
        let broken = job.of_broken_groups(holders);
        let mut holding: Vec<(&WorkerId, &Holder)> =
            holders.iter().filter(|(worker, _)| self.is_ready(worker, job)).collect();
        holding
            .sort_by_key(|(worker, holder)| (holder.applied < newest, broken.contains(*worker), holder.rank));
        let holding: Vec<WorkerId> = holding.into_iter().map(|(worker, _)| worker.clone()).collect();
        let groups = |line: Vec<WorkerId>| whole_groups(&self.by_part(job, line), usize::MAX);
        let has_newest =
            |worker: &WorkerId| holders.get(worker).is_some_and(|holder| holder.applied == newest);
        let most = job.bounds().1;
        let keeps = |line: &Vec<WorkerId>| holders.is_empty() || line.iter().take(most).any(has_newest);
        let is_slow = |worker: &WorkerId| self.sessions.get(worker).is_some_and(|session| session.slow);
        let (slow, quick): (Vec<WorkerId>, Vec<WorkerId>) = holding.iter().cloned().partition(is_slow);
        let replaced = groups(quick.into_iter().chain(joiners.clone()).chain(slow).collect());
        if keeps(&replaced) {
            return replaced;
        }
        Some(groups(holding.into_iter().chain(joiners).collect())).filter(keeps).unwrap_or_default()
    }

    fn is_ready(&self, worker: &WorkerId, job: &Job) -> bool {
        self.sessions.get(worker).is_some_and(|session| session.is_ready_for(job))
    }

    /// How many workers that are assigned to a job hold or load each part.
    fn part_counts(&self, job: &Job) -> Vec<usize> {
        let mut counts = vec![0; job.parts()];
        for session in self.sessions.values().filter(|session| session.is_assigned_to(job)) {
            if let Some(count) = counts.get_mut(session.part as usize) {
                *count += 1;
            }
        }
        counts
    }

    /// The part that fewest workers hold or load; of several, the one that `worker` has loaded already.
    pub(super) fn scarcest_part(&self, job: &Job, worker: &WorkerId) -> u32 {
        let counts = self.part_counts(job);
        let loaded = self.sessions.get(worker).and_then(|session| session.info.part);
        let known = |part: usize| loaded == u32::try_from(part).ok();
        let scarcest = counts.iter().enumerate().min_by_key(|(part, count)| (**count, !known(*part), *part));
        scarcest.map_or(0, |(part, _)| part as u32)
    }

    /// Parts that no ready worker holds, for people.
    pub(super) fn parts_missing(&self, job: &Job) -> Vec<String> {
        let mut ready = vec![false; job.parts()];
        for session in self.sessions.values().filter(|session| session.is_ready_for(job)) {
            if let Some(part) = ready.get_mut(session.part as usize) {
                *part = true;
            }
        }
        let missing = ready.iter().enumerate().filter(|(_, ready)| !**ready);
        missing.map(|(part, _)| part.to_string()).collect()
    }

    /// While a job waits and there are workers enough for the least number of groups, but too few of some part: has others take on that
    /// part. Those without a state go first; those with the newest state last.
    pub(super) fn level_parts(&mut self, job: &mut Job) {
        let parts = job.parts();
        let Phase::Forming(forming) = &job.phase else { return };
        if parts == 1 {
            return;
        }
        let holders = match &forming.origin {
            Origin::Holders(holders) => holders.clone(),
            _ => BTreeMap::new(),
        };
        let needed = job.bounds().0 / parts;
        loop {
            let counts = self.part_counts(job);
            let scarce = counts.iter().position(|count| *count < needed);
            let (Some(scarce), true) = (scarce, counts.iter().sum::<usize>() >= needed * parts) else {
                return;
            };
            let applied = |worker: &WorkerId| holders.get(worker).map(|holder| holder.applied);
            let spare = self
                .sessions
                .iter()
                .filter(|(worker, session)| {
                    let has_more = counts.get(session.part as usize).is_some_and(|count| *count > needed);
                    session.is_assigned_to(job) && !session.draining && has_more && !job.is_to_say(worker)
                })
                .min_by_key(|(worker, session)| (applied(worker), Reverse(session.number)));
            let Some(worker) = spare.map(|(worker, _)| worker.clone()) else { return };
            if let Some(session) = self.sessions.get_mut(&worker) {
                session.part = scarce as u32;
                session.ready_since = None;
            }
            if let Phase::Forming(Forming { origin: Origin::Holders(holders), .. }) = &mut job.phase
                && let Some(holder) = holders.get_mut(&worker)
            {
                holder.moved = true;
            }
            self.changed.insert(job.id.clone());
            self.send_assignment(job, &worker);
        }
    }

    /// Asks a worker to load its part of a job's base.
    pub(super) fn send_assignment(&mut self, job: &Job, worker: &WorkerId) {
        let (Some(facts), Some(session)) = (&job.facts, self.sessions.get(worker)) else { return };
        let assign = Message::Assign {
            job: job.id.clone(),
            attempt: job.attempt,
            spec_json: std::sync::Arc::clone(&job.spec_json),
            facts: facts.clone(),
            steps: job.steps(),
            part: (job.parts() > 1).then_some(session.part),
        };
        self.send(worker, assign);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(names: &[&str]) -> Vec<WorkerId> {
        names.iter().map(|name| WorkerId::new(*name).expect("a valid id")).collect()
    }

    #[test]
    fn groups_are_whole_and_ranks_go_by_part() {
        let by_part = [workers(&["a", "c", "e"]), workers(&["b", "d"])];
        assert_eq!(whole_groups(&by_part, 9), workers(&["a", "b", "c", "d"]));
        assert_eq!(whole_groups(&by_part, 1), workers(&["a", "b"]));
        assert!(whole_groups(&[workers(&["a"]), Vec::new()], 9).is_empty());
        let alone = [workers(&["a", "b"])];
        assert_eq!(whole_groups(&alone, 9), workers(&["a", "b"]), "each is its own group");
    }
}
