//! Workers that are to end: they take up nothing new, and go once what they hold is in other hands.

use std::collections::BTreeMap;

use shanty_proto::{Step, WorkerId};

use super::{
    Machine,
    crew::Credit,
    effect::{Effect, Message, Refusal, Reply},
    event::Moment,
    job::{Forming, Holder, Job, Origin, Phase},
};

impl Machine {
    pub(super) fn is_draining(&self, worker: &WorkerId) -> bool {
        self.sessions.get(worker).is_some_and(|session| session.draining)
    }

    /// A user wants a worker to end.
    pub(super) fn drain(&mut self, request: u64, worker: &WorkerId) {
        let outcome = match self.sessions.get_mut(worker) {
            Some(session) => {
                session.draining = true;
                Ok(Reply::Draining(session.assigned.as_ref().map(|(job, _)| job.clone())))
            }
            None => Err(Refusal::NoSuchWorker(worker.clone())),
        };
        if outcome.is_ok() {
            self.send(worker, Message::Drain { reason: "a user drains it".to_owned() });
        }
        self.effects.push(Effect::Reply { request, outcome });
    }

    /// A worker was asked to end.
    pub(super) fn draining(&mut self, now: Moment, worker: &WorkerId, reason: &str) {
        let Some(session) = self.sessions.get_mut(worker) else { return };
        session.draining = true;
        let Some((job, _)) = session.assigned.clone() else { return };
        let _ = self.with_job(&job, |machine, job| {
            job.event(now, "worker_draining", format!("{worker}: {reason}")).worker = Some(worker.clone());
            machine.publish_event(job);
        });
    }

    /// Lets go of draining workers that no living generation needs.
    pub(super) fn release_drained(&mut self, now: Moment) {
        let draining: Vec<WorkerId> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.draining && !session.drained)
            .map(|(worker, _)| worker.clone())
            .collect();
        for worker in draining {
            if !self.jobs.values().any(|job| job.needs(&worker)) {
                self.let_go(now, &worker);
            }
        }
    }

    fn let_go(&mut self, now: Moment, worker: &WorkerId) {
        let Some(session) = self.sessions.get_mut(worker) else { return };
        session.drained = true;
        session.ready_since = None;
        let assigned = session.assigned.take();
        self.send(worker, Message::Drained { reason: "what it held is in other hands".to_owned() });
        let Some((job, _)) = assigned else { return };
        let _ = self.with_job(&job, |machine, job| {
            if let Some(member) = job.crew.of_mut(worker).filter(|member| member.left.is_some()) {
                member.credit = Credit::Out;
            }
            if !job.is_ended() {
                job.event(now, "drained", format!("{worker} may end")).worker = Some(worker.clone());
                machine.publish_event(job);
            }
        });
    }

    /// Those who hold the state, without draining ones where it is safe with others. Nothing if a checkpoint has the
    /// state now, and the job is to go on from there.
    pub(super) fn part_with_drained(
        &mut self,
        now: Moment,
        job: &mut Job,
        mut holders: BTreeMap<WorkerId, Holder>,
        joiners: usize,
    ) -> Option<BTreeMap<WorkerId, Holder>> {
        let going: Vec<WorkerId> =
            holders.keys().filter(|worker| self.is_draining(worker)).cloned().collect();
        if going.is_empty() {
            return Some(holders);
        }
        let newest = holders.values().map(|holder| holder.applied).max();
        let is_safe =
            holders.iter().any(|(worker, holder)| !going.contains(worker) && Some(holder.applied) == newest);
        if is_safe {
            holders.retain(|worker, _| !going.contains(worker));
            if let Phase::Forming(Forming { origin: Origin::Holders(known), .. }) = &mut job.phase {
                known.clone_from(&holders);
            }
            // They are let go with the next look at all sessions.
            return Some(holders);
        }
        let newest = newest.unwrap_or_default();
        let (min, max) = job.bounds();
        let others = holders.len() - going.len() + joiners;
        let giver = going.iter().find(|worker| holders[*worker].applied == newest).cloned();
        if others > 0 && others + 1 >= min && max > 1 {
            // One of them gives what it holds to the others, and goes after the step that these make with it.
            holders.retain(|worker, _| !going.contains(worker) || Some(worker) == giver.as_ref());
            if let Phase::Forming(Forming { origin: Origin::Holders(known), .. }) = &mut job.phase {
                known.clone_from(&holders);
            }
            return Some(holders);
        }
        let written = newest.0 == 0 || job.checkpoint >= Some(newest);
        if !written && !job.health.keep_failed {
            self.ask_to_keep(now, job, &holders, newest);
            return None;
        }
        let text = if written {
            format!("nobody is left; what was trained up to step {newest} is in a checkpoint")
        } else {
            format!("nobody is left, and step {newest} is in no checkpoint: none could be written")
        };
        self.note(now, job, "handed_over", text);
        job.health.record.handed_over = true;
        job.phase = Phase::Forming(Forming { origin: Origin::Fenced, enough_since: None });
        self.save(job);
        None
    }

    /// Has one of those who hold the newest state write a checkpoint of it, before they go.
    fn ask_to_keep(
        &mut self,
        now: Moment,
        job: &mut Job,
        holders: &BTreeMap<WorkerId, Holder>,
        newest: Step,
    ) {
        let holds = |worker: &WorkerId| holders.get(worker).is_some_and(|holder| holder.applied == newest);
        if job.health.keeper.as_ref().is_some_and(holds) {
            let reason = format!("its last workers end; writes a checkpoint of step {newest}");
            return self.set_reason(job, reason);
        }
        let Some(keeper) = holders.keys().find(|worker| holds(worker)).cloned() else { return };
        self.note(
            now,
            job,
            "hand_over",
            format!("{keeper} writes a checkpoint of step {newest} before it ends"),
        );
        job.health.keeper = Some(keeper.clone());
        let (attempt, generation) = (job.attempt, job.generation_number());
        self.send(&keeper, Message::Keep { job: job.id.clone(), attempt, generation, step: newest });
    }
}
