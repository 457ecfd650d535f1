//! How a generation ends early: a member is lost, says so, or others are to join.

use std::{collections::BTreeMap, time::Duration};

use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Step, WorkerId};

use super::{
    Machine,
    crew::{Credit, LeftWith, Member},
    effect::Message,
    event::{Moment, Within},
    job::{Break, Cause, Forming, Holder, Job, Leaving, Origin, Phase},
    retry,
};

/// A job that cannot be carried out.
const HOPELESS: &str = "SH0777";

impl Machine {
    /// A worker that had to do with the job is gone. `silent`: since its last sign of life.
    pub(super) fn member_gone(
        &mut self,
        now: Moment,
        job: &mut Job,
        worker: &WorkerId,
        reason: &str,
        silent: Option<Duration>,
    ) {
        self.member_lost(now, job, worker, "lost", reason, silent);
    }

    /// A worker that had to do with the job is gone, for a reason of some kind.
    pub(super) fn member_lost(
        &mut self,
        now: Moment,
        job: &mut Job,
        worker: &WorkerId,
        kind: &'static str,
        reason: &str,
        silent: Option<Duration>,
    ) {
        let Some(member) = job.crew.of_mut(worker) else { return };
        member.attached = false;
        member.left = None;
        if member.lost.is_some() {
            return;
        }
        member.lost = Some(reason.to_owned());
        if job.is_ended() {
            return;
        }
        // What it was asked to write it may not have heard of.
        job.health.keeper.take_if(|keeper| keeper == worker);
        if let Some(giving) = &mut job.standing.giving_way {
            giving.writer.take_if(|writer| writer == worker);
        }
        let detection_ms = silent.map(|silent| silent.as_secs_f64() * 1e3);
        let event = job.event(now, "member_lost", format!("{worker}: {reason}"));
        event.worker = Some(worker.clone());
        event.detection_ms = detection_ms;
        self.publish_event(job);
        job.health.record.losses += 1;
        let cause = Cause::new(kind, format!("{worker} was lost: {reason}")).of(worker, detection_ms);
        match &mut job.phase {
            Phase::Running => self.start_leaving(now, job, cause),
            Phase::Leaving(leaving) if leaving.after.is_some() => self.harden(now, job, cause),
            Phase::Leaving(_) => self.finish_leaving(now, job),
            Phase::Forming(Forming { origin: Origin::Holders(holders), .. }) => {
                holders.remove(worker);
                if holders.is_empty() {
                    self.all_lost(now, job);
                }
            }
            _ => {}
        }
    }

    pub(super) fn broken(&mut self, now: Moment, worker: &WorkerId, within: &Within, error: &str) {
        let _ = self.with_job(&within.job, |machine, job| {
            if Self::rank_within(job, worker, within).is_none() || !job.is_stepping() {
                return;
            }
            let text = format!("{worker} reports: {error}");
            job.event(now, "broken", text.clone()).worker = Some(worker.clone());
            machine.publish_event(job);
            machine.start_leaving(now, job, Cause::new("broken", text).of(worker, None));
        });
    }

    /// Asks every member that can to leave the generation at once.
    pub(super) fn start_leaving(&mut self, now: Moment, job: &mut Job, cause: Cause) {
        if !job.advanced {
            job.fruitless += 1;
            if job.fruitless >= self.options.fruitless_generations {
                let count = job.fruitless;
                let message = format!(
                    "{count} generations in a row ended before their first step; the last: {}",
                    cause.text
                );
                let hint = "look at the workers' logs; `shanty resume` goes on from the last checkpoint";
                let error = Diagnostic::new(HOPELESS, message).kind(Kind::Internal).hint(hint);
                return self.fail(now, job, error);
            }
        }
        self.leave(now, job, cause, None);
    }

    /// Asks every member that can to leave the generation: at once, or after a step.
    pub(super) fn leave(&mut self, now: Moment, job: &mut Job, cause: Cause, after: Option<Step>) {
        let reason = cause.text.clone();
        let requeued_before = job.requeued;
        // A loss counts, also where members were leaving for another reason when it came.
        let goes_on =
            job.broken.take().filter(|over| over.cause.kind == cause.kind || over.cause.is_unwanted());
        job.broken =
            Some(goes_on.unwrap_or(Break { noticed: now.monotonic, cause, steps_lost: 0, requeued_before }));
        let generation = job.generation_number();
        for member in job.crew.staying().filter(|member| member.attached) {
            let leave = Message::Leave {
                job: job.id.clone(),
                attempt: job.attempt,
                generation,
                reason: reason.clone(),
                after,
            };
            self.send(&member.worker, leave);
        }
        job.phase = Phase::Leaving(Leaving { since: now.monotonic, cause: reason, after });
        self.save(job);
        self.finish_leaving(now, job);
    }

    /// Members were to leave after a step, which they cannot make any more: they leave at once.
    pub(super) fn harden(&mut self, now: Moment, job: &mut Job, cause: Cause) {
        if matches!(&job.phase, Phase::Leaving(leaving) if leaving.after.is_some()) {
            self.leave(now, job, cause, None);
        }
    }

    /// Asks a member to leave, if the generation is being left.
    pub(super) fn ask_to_leave(&mut self, job: &Job, worker: &WorkerId) {
        if let Phase::Leaving(leaving) = &job.phase {
            let leave = Message::Leave {
                job: job.id.clone(),
                attempt: job.attempt,
                generation: job.generation_number(),
                reason: leaving.cause.clone(),
                after: leaving.after,
            };
            self.send(worker, leave);
        }
    }

    pub(super) fn left(&mut self, now: Moment, worker: &WorkerId, within: &Within, with: LeftWith) {
        let _ = self.with_job(&within.job, |machine, job| {
            let Some(rank) = Self::rank_within(job, worker, within) else { return };
            machine.raise(job, with.applied);
            let begun_from = job.begun_from();
            let member = job.crew.of_mut(worker).expect("it has a rank");
            member.credit = Credit::Out;
            member.step = member.step.max(with.applied);
            member.left = Some(with.clone());
            let holds_state = holds_state(member, begun_from);
            // One that was told that it may end does so, whatever it holds.
            let is_drained = machine.sessions.get(worker).is_some_and(|session| session.drained);
            match &mut job.phase {
                Phase::Running => {
                    let cause = Cause::new("left", format!("{worker} left by itself")).of(worker, None);
                    machine.start_leaving(now, job, cause);
                }
                // The others wait for it in a step that it does not make.
                Phase::Leaving(leaving) if leaving.after.is_some_and(|after| with.applied < after) => {
                    let cause = Cause::new("left", format!("{worker} left early")).of(worker, None);
                    machine.harden(now, job, cause);
                }
                Phase::Leaving(_) => machine.finish_leaving(now, job),
                Phase::Forming(forming) if holds_state && !is_drained => {
                    // Somebody thought lost came back before the next generation was made.
                    let holder = Holder {
                        rank,
                        applied: with.applied,
                        kept: with.kept,
                        hash: with.hash,
                        moved: false,
                    };
                    match &mut forming.origin {
                        Origin::Holders(holders) => drop(holders.insert(worker.clone(), holder)),
                        other => *other = Origin::Holders(BTreeMap::from([(worker.clone(), holder)])),
                    }
                }
                _ => {}
            }
        });
    }

    /// Goes on once nobody is left in the generation.
    pub(super) fn finish_leaving(&mut self, now: Moment, job: &mut Job) {
        let Phase::Leaving(leaving) = &job.phase else { return };
        let waits_for: Vec<&str> = job.crew.staying().map(|member| member.worker.as_str()).collect();
        if !waits_for.is_empty() {
            let generation = job.generation_number();
            let reason =
                format!("{}; {} to leave generation {generation}", leaving.cause, waits_for.join(", "));
            return self.set_reason(job, reason);
        }
        if let Some(over) = job.broken.as_mut().filter(|over| !over.cause.is_unwanted()) {
            // Up to here steps were made.
            over.noticed = now.monotonic;
        }
        job.crew.parted = leaving.after.is_some();
        let begun_from = job.begun_from();
        let mut holders = BTreeMap::new();
        for member in job.crew.members.iter().filter(|member| holds_state(member, begun_from)) {
            let (Some(left), None) = (&member.left, &member.lost) else { continue };
            let rank = job.crew.rank_of(&member.worker).expect("it is a member");
            holders.insert(
                member.worker.clone(),
                Holder {
                    rank,
                    applied: left.applied,
                    kept: left.kept.clone(),
                    hash: left.hash.clone(),
                    moved: false,
                },
            );
        }
        if holders.is_empty() {
            return self.all_lost(now, job);
        }
        if let Some(step) = job.health.back_to {
            return self.go_back_to(now, job, step);
        }
        if !self.settle_divergence(now, job, &mut holders) {
            return self.all_lost(now, job);
        }
        job.phase = Phase::Forming(Forming { origin: Origin::Holders(holders), enough_since: None });
        self.save(job);
    }

    /// Nobody who has the state is left: back to a checkpoint, or the job is given up.
    fn all_lost(&mut self, now: Moment, job: &mut Job) {
        job.total_losses += 1;
        job.health.record.all_lost = true;
        let cause = job.broken.as_ref().map(|broken| broken.cause.text.clone()).unwrap_or_default();
        let text = format!("nobody of generation {} is left who has its state", job.generation_number());
        self.note(now, job, "all_lost", text);
        let bound = job.spec.cluster.retries.map_or(self.options.total_losses, |retries| retries + 1);
        let pause = retry::again(retry::Cause::Lost, job.total_losses, bound, self.options.retry_pause);
        let Some(pause) = pause else {
            let (times, step) = (job.total_losses, job.furthest);
            let message = format!(
                "all workers were lost {times} times without getting beyond step {step}; the last: {cause}"
            );
            let hint =
                "look at the workers' logs for what ends them (memory, a kernel fault); then `shanty resume`";
            let error = Diagnostic::new(HOPELESS, message).kind(Kind::Internal).hint(hint);
            return self.fail(now, job, error);
        };
        job.standing.not_before = now.monotonic + pause;
        job.phase = Phase::Forming(Forming { origin: Origin::Fenced, enough_since: None });
        self.save(job);
    }

    /// Members that should have left, or come back, by now.
    pub(super) fn lose_overdue(&mut self, now: Moment, job: &mut Job) {
        let (since, after) = match &job.phase {
            Phase::Leaving(leaving) => (Some(leaving.since), leaving.after),
            Phase::Running => (None, None),
            _ => return,
        };
        // A step that all were to make and then leave: each member is watched while it does; this is the last resort.
        if let (Some(since), Some(after)) = (since, after) {
            let within = job.health.pace.cold_deadline() + self.options.leave_within;
            if now.monotonic >= since + within {
                let cause = Cause::new("hung", format!("step {after} was not made within {within:.0?}"));
                return self.harden(now, job, cause);
            }
        }
        let begun_from = job.begun_from();
        let mut overdue = Vec::new();
        for member in job.crew.staying() {
            if member.back_by.is_some_and(|by| now.monotonic >= by) {
                overdue.push((
                    member.worker.clone(),
                    "did not come back after a restart of the coordinator".to_owned(),
                ));
            } else if let (true, Some(since), None) = (member.attached, since, after) {
                let within = self.options.leave_within;
                let within = within.min(job.health.pace.deadline_of(member.is_warm(begun_from)));
                if now.monotonic >= since + within {
                    let seconds = within.as_secs_f64();
                    let reason = format!("did not leave its generation within {seconds:.0} s");
                    overdue.push((member.worker.clone(), reason));
                }
            }
        }
        for (worker, reason) in overdue {
            let silent =
                self.sessions.get(&worker).map(|session| now.monotonic.saturating_sub(session.last_heard));
            let answers = self.sessions.contains_key(&worker);
            self.drop_member(now, job, &worker, "lost", &reason, silent);
            if let Some(member) = job.crew.of_mut(&worker).filter(|_| answers) {
                member.hung = true;
            }
        }
    }

    /// Calls a member lost and ends its stream, if it has one. Its process has to come anew.
    pub(super) fn drop_member(
        &mut self,
        now: Moment,
        job: &mut Job,
        worker: &WorkerId,
        kind: &'static str,
        reason: &str,
        silent: Option<Duration>,
    ) {
        if let Some(session) = self.sessions.remove(worker) {
            let (worker, session) = (worker.clone(), session.number);
            self.effects.push(super::Effect::Close { worker, session, reason: reason.to_owned() });
        }
        self.member_lost(now, job, worker, kind, reason, silent);
    }
}

/// Whether a member that left holds a state of this lineage. One that left before it was given the generation's has
/// what it came with: nothing, or what it left the generation before with.
fn holds_state(member: &Member, begun_from: Step) -> bool {
    member.left.as_ref().is_some_and(|left| {
        left.holds_state && (left.applied >= begun_from || member.had == Some(left.applied))
    })
}
