//! How a generation is left at a step's boundary: all members apply one step more, and then leave with nothing in hand.
//! That is how workers join, how one that is to end goes, and how a spare takes a slow member's place.

use shanty_proto::{Step, WorkerId};

use super::{
    Machine,
    event::Moment,
    job::{Cause, Job, Phase},
    shard::whole_groups,
};

/// Members hear of the step after which they leave within this time, or leave in the middle of the next.
const HEARD_WITHIN_SECONDS: f64 = 0.05;

impl Machine {
    /// Leaves a running generation at the next boundary if workers are to go or to join.
    pub(super) fn let_change(&mut self, now: Moment, job: &mut Job) {
        let all_here = job.crew.members.iter().all(|member| member.attached);
        let gives_way = job.standing.giving_way.is_some();
        if !matches!(job.phase, Phase::Running) || !all_here || gives_way || job.watermark >= job.steps() {
            return;
        }
        self.let_drain(now, job);
        self.let_join(now, job);
        self.let_replace(now, job);
    }

    /// Members that were asked to end leave.
    fn let_drain(&mut self, now: Moment, job: &mut Job) {
        let members = job.crew.members.iter().map(|member| &member.worker);
        let going: Vec<WorkerId> = members.filter(|worker| self.is_draining(worker)).cloned().collect();
        let Some(first) = going.first() else { return };
        let names: Vec<&str> = going.iter().map(WorkerId::as_str).collect();
        let cause = Cause::new("drained", format!("{} to end", names.join(", "))).of(first, None);
        self.note(now, job, "draining", format!("{} after step {}", cause.text, job.watermark));
        self.part(now, job, cause);
    }

    /// Ready workers join, once the generation has made a step and has more than one before it.
    fn let_join(&mut self, now: Moment, job: &mut Job) {
        let near_end = job.watermark.0 + 1 >= job.steps().0;
        if !matches!(job.phase, Phase::Running) || !job.advanced || near_end {
            return;
        }
        let (_, max) = job.bounds();
        let ready = self.ready_for(job).into_iter().filter(|worker| job.crew.of(worker).is_none());
        let room = max.saturating_sub(job.crew.members.len()) / job.parts();
        let joiners = whole_groups(&self.by_part(job, ready), room);
        if joiners.is_empty() {
            return;
        }
        let full = job.crew.members.len() + joiners.len() >= max;
        let first_ready = joiners.iter().filter_map(|worker| self.sessions.get(worker)?.ready_since).min();
        let waited = first_ready.is_some_and(|since| now.monotonic >= since + self.options.join_gather);
        if !full && !waited {
            return;
        }
        let names: Vec<&str> = joiners.iter().map(WorkerId::as_str).collect();
        let cause = Cause::new("joined", format!("{} to join", names.join(", "))).of(&joiners[0], None);
        self.note(now, job, "member_joined", format!("{} after step {}", cause.text, job.watermark));
        self.part(now, job, cause);
    }

    /// A spare takes a straggler's place, if the job wants it.
    fn let_replace(&mut self, now: Moment, job: &mut Job) {
        let near_end = job.watermark.0 + 1 >= job.steps().0;
        let wanted = job.spec.cluster.replace_stragglers && job.advanced && !near_end;
        if !wanted || !matches!(job.phase, Phase::Running) {
            return;
        }
        let Some(slow) = job.crew.members.iter().find(|member| member.figures.is_straggler()) else { return };
        let slow = slow.worker.clone();
        // Where a base is shared, only one with the same part can take its place.
        let part = self.sessions.get(&slow).map(|session| session.part);
        let fresh = |worker: &WorkerId| {
            self.sessions.get(worker).is_some_and(|session| !session.slow && Some(session.part) == part)
        };
        let spare =
            self.ready_for(job).into_iter().find(|worker| job.crew.of(worker).is_none() && fresh(worker));
        let Some(spare) = spare else { return };
        if let Some(session) = self.sessions.get_mut(&slow) {
            session.slow = true;
        }
        let cause = Cause::new("straggler", format!("{spare} takes the place of {slow}")).of(&slow, None);
        self.note(now, job, "member_replaced", cause.text.clone());
        self.part(now, job, cause);
    }

    /// Lets all members leave after the step that follows the furthest known one, or a few later where steps are short.
    pub(super) fn part(&mut self, now: Moment, job: &mut Job, cause: Cause) {
        let furthest = job.crew.members.iter().map(|member| member.step).max().unwrap_or_default();
        let furthest = furthest.max(job.watermark);
        let underway =
            if job.seconds_per_step > 0.0 { HEARD_WITHIN_SECONDS / job.seconds_per_step } else { 0.0 };
        let ahead = 1 + (underway as u64).min(self.options.steps_ahead.saturating_sub(2));
        let after = Step((furthest.0 + ahead).min(job.steps().0));
        self.leave(now, job, cause, Some(after));
    }
}
