//! Workers' streams: who is there, what they say, and when they are lost.

use std::time::Duration;

use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::{
    Machine,
    crew::Credit,
    effect::{CreditGiven, Effect, Message},
    event::{Attachment, MemberPhase, Moment, Said, WorkerInfo},
    job::{Job, Phase},
};

/// Workers whose returns are counted; beyond them, those that are not connected are forgotten.
const MOST_RETURNS: usize = 4096;

/// A worker whose stream is up.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// Number of its stream; grows.
    pub number: u64,
    pub info: WorkerInfo,
    pub last_heard: Duration,
    pub phase: MemberPhase,
    /// The job whose base it was asked to load.
    pub assigned: Option<(JobId, Attempt)>,
    /// The part of that base that it loads, where several workers share one; else 0.
    pub part: u32,
    /// Since when that base is loaded.
    pub ready_since: Option<Duration>,
    /// Passing failures, and of which attempt.
    pub failures: Option<(JobId, Attempt, u32)>,
    /// Not asked before this moment.
    pub unfit_until: Duration,
    /// It was asked to end; takes up nothing new.
    pub draining: bool,
    /// It was told that it may.
    pub drained: bool,
    /// Others waited for it step after step: it is the last to be chosen.
    pub slow: bool,
}

impl Session {
    /// Whether its base is loaded for this attempt.
    pub fn is_ready_for(&self, job: &Job) -> bool {
        self.ready_since.is_some() && self.is_assigned_to(job)
    }

    pub fn is_assigned_to(&self, job: &Job) -> bool {
        self.assigned.as_ref().is_some_and(|(to, attempt)| *to == job.id && *attempt == job.attempt)
    }

    /// Failures in this attempt.
    pub fn failures_in(&self, job: &Job) -> u32 {
        match &self.failures {
            Some((of, attempt, count)) if *of == job.id && *attempt == job.attempt => *count,
            _ => 0,
        }
    }
}

/// What becomes of an attachment.
enum Reattached {
    /// It holds no longer.
    No,
    /// It holds.
    Yes,
    /// It holds; the generation is being left.
    Leave { job: JobId, attempt: Attempt, generation: Generation, reason: String },
    /// It holds; the generation is left after a step.
    Parting { job: JobId },
    /// The worker is a member of the newest generation and has not heard of it.
    Form { job: JobId },
    /// The worker is a member of the newest generation, which counts on a state that it has dropped.
    WithoutState { job: JobId },
}

impl Machine {
    pub(super) fn is_current(&self, worker: &WorkerId, session: u64) -> bool {
        self.sessions.get(worker).is_some_and(|known| known.number == session)
    }

    pub(super) fn hello(
        &mut self,
        now: Moment,
        worker: WorkerId,
        number: u64,
        info: WorkerInfo,
        attachment: Option<Attachment>,
    ) {
        if let Some(known) = self.sessions.get(&worker) {
            if known.number >= number {
                return;
            }
            let (old, reason) = (known.number, "connected again".to_owned());
            self.effects.push(Effect::Close { worker: worker.clone(), session: old, reason: reason.clone() });
            self.lose(now, &worker, reason);
        }
        let session = Session {
            number,
            draining: info.draining,
            info,
            last_heard: now.monotonic,
            phase: MemberPhase::Idle,
            assigned: None,
            part: 0,
            ready_since: None,
            failures: None,
            unfit_until: Duration::ZERO,
            drained: false,
            slow: false,
        };
        self.sessions.insert(worker.clone(), session);
        self.count_return(&worker);
        let outcome = self.reattach(now, &worker, attachment.as_ref());
        let refused = matches!(outcome, Reattached::No | Reattached::WithoutState { .. });
        let attached = attachment.is_some() && !refused;
        self.send(&worker, Message::Welcome { attached });
        match outcome {
            Reattached::No => {}
            Reattached::Yes => {
                let of = attachment.map(|attachment| attachment.job);
                let _ =
                    of.and_then(|job| self.with_job(&job, |machine, job| machine.ask_to_save(job, &worker)));
            }
            Reattached::Leave { job, attempt, generation, reason } => {
                self.send(&worker, Message::Leave { job, attempt, generation, reason, after: None });
            }
            Reattached::Parting { job } => {
                let _ = self.with_job(&job, |machine, job| machine.ask_to_leave(job, &worker));
            }
            Reattached::Form { job } => {
                let _ = self.with_job(&job, |machine, job| {
                    machine.announce_to(job, &worker);
                    machine.ask_to_save(job, &worker);
                    machine.ask_to_leave(job, &worker);
                });
            }
            Reattached::WithoutState { job } => {
                let reason = "it came back without its state";
                let _ =
                    self.with_job(&job, |machine, job| machine.member_gone(now, job, &worker, reason, None));
            }
        }
    }

    /// Counts how often a worker has come back. Of those that are gone for good, not many are remembered.
    fn count_return(&mut self, worker: &WorkerId) {
        let returns = self.returns.entry(worker.clone()).and_modify(|count| *count += 1).or_insert(0);
        if *returns == 0 && self.returns.len() > MOST_RETURNS {
            let sessions = &self.sessions;
            self.returns.retain(|worker, _| sessions.contains_key(worker));
        }
    }

    fn reattach(&mut self, now: Moment, worker: &WorkerId, attachment: Option<&Attachment>) -> Reattached {
        let of_crew = |job: &Job| job.wants_workers() && job.formed && job.crew.of(worker).is_some();
        let job = match attachment {
            Some(attachment) => Some(attachment.job.clone()),
            None => self.jobs.values().find(|job| of_crew(job)).map(|job| job.id.clone()),
        };
        let Some(id) = job else { return Reattached::No };
        let outcome = self.with_job(&id, |machine, job| {
            if !of_crew(job) || attachment.is_some_and(|attachment| attachment.attempt != job.attempt) {
                return Reattached::No;
            }
            let outcome = machine.reattach_to(now, worker, attachment, job);
            if !matches!(outcome, Reattached::No | Reattached::WithoutState { .. }) {
                let session = machine.sessions.get_mut(worker).expect("it was just inserted");
                session.assigned = Some((job.id.clone(), job.attempt));
                session.part = job.crew.rank_of(worker).map_or(0, |rank| rank.0 % job.parts() as u32);
                session.ready_since = Some(now.monotonic);
                machine.changed.insert(job.id.clone());
            }
            outcome
        });
        outcome.unwrap_or(Reattached::No)
    }

    fn reattach_to(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        attachment: Option<&Attachment>,
        job: &mut Job,
    ) -> Reattached {
        let (attempt, newest) = (job.attempt, job.generation_number());
        let info = self.sessions.get(worker).map(|session| session.info.clone()).unwrap_or_default();
        let rank = job.crew.rank_of(worker);
        // Where a base is shared, a place goes with a part of it.
        let place = rank.map(|rank| rank.0 % job.parts() as u32);
        if job.parts() > 1 && (info.part.is_none() || info.part != place) {
            return Reattached::No;
        }
        let Some(member) = job.crew.of_mut(worker).filter(|member| !member.hung) else {
            return Reattached::No;
        };
        let Some(attachment) = attachment.filter(|attachment| attachment.generation == newest) else {
            let older = attachment.is_none_or(|attachment| attachment.generation < newest);
            let missed = matches!(job.phase, Phase::Running | Phase::Leaving(_)) && !member.attached;
            if !older || !missed || member.lost.is_some() {
                return Reattached::No;
            }
            member.attached = true;
            member.back_by = None;
            member.progressed = now.monotonic;
            (member.host, member.pid, member.device) = (info.host, info.pid, info.device);
            let needs_state =
                rank.is_some_and(|rank| job.generation.as_ref().is_some_and(|g| g.start.counts_on(rank)));
            if attachment.is_none() && needs_state {
                return Reattached::WithoutState { job: job.id.clone() };
            }
            // The generation was announced just before this coordinator's predecessor died, and not heard.
            return Reattached::Form { job: job.id.clone() };
        };
        if rank != Some(attachment.rank) {
            return Reattached::No;
        }
        member.attached = true;
        member.back_by = None;
        member.lost = None;
        member.progressed = now.monotonic;
        member.step = member.step.max(attachment.applied);
        (member.host, member.pid, member.device) = (info.host, info.pid, info.device);
        let reason = match &job.phase {
            Phase::Leaving(leaving) if leaving.after.is_some() => {
                self.raise(job, attachment.applied);
                return Reattached::Parting { job: job.id.clone() };
            }
            Phase::Leaving(leaving) => leaving.cause.clone(),
            Phase::Forming(_) => "the generation is over".to_owned(),
            _ => {
                self.raise(job, attachment.applied);
                self.note(now, job, "reattached", format!("{worker} is back in generation {newest}"));
                let count = job.crew.members.len();
                if job.crew.members.iter().all(|member| member.attached) {
                    self.set_reason(job, format!("generation {newest} of {count} workers"));
                }
                return Reattached::Yes;
            }
        };
        self.raise(job, attachment.applied);
        Reattached::Leave { job: job.id.clone(), attempt, generation: newest, reason }
    }

    /// Raises the watermark on a member's word.
    pub(super) fn raise(&mut self, job: &mut Job, applied: Step) {
        if job.raise_watermark(applied) {
            let change = super::Change::Watermark(job.id.clone(), job.watermark);
            self.effects.push(Effect::Record(change));
            self.changed.insert(job.id.clone());
        }
    }

    pub(super) fn said(&mut self, now: Moment, worker: &WorkerId, number: u64, message: Said) {
        if !self.is_current(worker, number) {
            return;
        }
        self.sessions.get_mut(worker).expect("it is current").last_heard = now.monotonic;
        match message {
            Said::Beat { sequence, phase, attachment, progress } => {
                self.beat(now, worker, sequence, (phase, progress), attachment);
            }
            Said::BaseReady { job, attempt, base_hash, facts, part } => {
                self.base_ready(now, worker, &job, attempt, &base_hash, facts, part);
            }
            Said::Failure { job, attempt, error } => self.failure(now, worker, &job, attempt, error),
            Said::Step(report) => self.step(now, worker, report),
            Said::Broken { within, error } => self.broken(now, worker, &within, &error),
            Said::Left { within, applied, holds_state, hash, kept } => {
                let left = super::crew::LeftWith { applied, holds_state, hash, kept };
                self.left(now, worker, &within, left);
            }
            Said::Checkpoint { within, step, path, size_bytes, seconds, removed, held_seconds } => {
                let written =
                    super::reports::Written { step, path, size_bytes, seconds, removed, held_seconds };
                self.checkpoint(now, worker, &within, written);
            }
            Said::CheckpointFailed { within, step, error } => {
                self.checkpoint_failed(now, worker, &within, step, &error);
            }
            Said::Evaluation { within, step, loss, tokens } => {
                self.evaluation(now, worker, &within, step, loss, tokens);
            }
            Said::Finished { within, step, adapter } => self.finished(now, worker, &within, step, adapter),
            Said::Goodbye { reason } => self.lose(now, worker, format!("left: {reason}")),
            Said::Draining { reason } => self.draining(now, worker, &reason),
            Said::Diverged { within, step, hashes } => self.diverged(now, worker, &within, step, &hashes),
            Said::BadStep { within, step, reason, samples } => {
                self.bad_step(now, worker, &within, step, &reason, &samples);
            }
        }
    }

    fn beat(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        sequence: u64,
        (phase, progress): (MemberPhase, u64),
        attachment: Option<Attachment>,
    ) {
        let session = self.sessions.get_mut(worker).expect("it is current");
        session.phase = phase;
        let credit = match &attachment {
            Some(attachment) => self
                .with_job(&attachment.job.clone(), |machine, job| {
                    machine.member_beat(now, worker, (phase, progress), attachment, job)
                })
                .flatten(),
            None => None,
        };
        self.note_absence(worker, attachment.as_ref());
        self.send(worker, Message::BeatAck { sequence, credit });
    }

    fn member_beat(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        (phase, progress): (MemberPhase, u64),
        attachment: &Attachment,
        job: &mut Job,
    ) -> Option<CreditGiven> {
        if job.attempt != attachment.attempt
            || job.generation_number() != attachment.generation
            || job.is_ended()
        {
            return None;
        }
        let up_to =
            Step((job.watermark.0.max(attachment.applied.0) + self.options.steps_ahead).min(job.steps().0));
        let up_to = match &job.phase {
            Phase::Running => Some(up_to),
            Phase::Leaving(leaving) => leaving.after,
            _ => None,
        };
        let pace = &job.health.pace;
        let begun_from = job.generation.as_ref().map_or(Step(0), |generation| generation.start.applied);
        let member = job.crew.of_mut(worker)?;
        if !member.attached || member.lost.is_some() {
            return None;
        }
        // Steps alternate between computing and reducing: those who watch need not hear of each turn.
        let tells = member.phase.is_of_a_step() != phase.is_of_a_step() || phase == MemberPhase::Evaluating;
        let tells = tells && member.phase != phase;
        if member.phase != phase || member.progress != progress || member.step < attachment.applied {
            member.progressed = now.monotonic;
        }
        member.phase = phase;
        member.progress = progress;
        member.step = member.step.max(attachment.applied);
        let deadline = pace.deadline_of(member.is_warm(begun_from));
        let given = |up_to| CreditGiven { generation: attachment.generation, up_to, deadline };
        let credit = up_to.filter(|_| member.left.is_none()).map(given);
        if credit.is_some() {
            member.credit = Credit::Until(now.monotonic + self.options.credit);
        }
        if tells {
            self.changed.insert(job.id.clone());
        }
        self.raise(job, attachment.applied);
        credit
    }

    /// Of jobs that have ended, keeps those in mind in whose generation a step might still be applied.
    pub(super) fn forget_faded(&mut self, now: Moment) {
        let jobs = &self.jobs;
        let fades = |job: &Job| job.is_ended() && job.crew.fence(now.monotonic).is_some();
        self.fading.retain(|id| jobs.get(id).is_some_and(fades));
    }

    /// A worker that was a member of a job that has ended, and beats without that generation, is out of it.
    fn note_absence(&mut self, worker: &WorkerId, attachment: Option<&Attachment>) {
        for id in &self.fading {
            let Some(job) = self.jobs.get_mut(id).filter(|job| job.is_ended()) else { continue };
            let (attempt, newest) = (job.attempt, job.generation_number());
            let still = |attachment: &Attachment| {
                attachment.job == job.id && attachment.attempt == attempt && attachment.generation == newest
            };
            if attachment.is_some_and(still) {
                continue;
            }
            if let Some(member) = job.crew.of_mut(worker) {
                member.credit = Credit::Out;
            }
        }
    }

    /// A worker's stream is gone, or as good as gone.
    pub(super) fn lose(&mut self, now: Moment, worker: &WorkerId, reason: String) {
        let Some(session) = self.sessions.remove(worker) else { return };
        let silent = now.monotonic.saturating_sub(session.last_heard);
        let Some((id, _)) = session.assigned else { return };
        let _ = self.with_job(&id, |machine, job| {
            machine.changed.insert(job.id.clone());
            machine.member_gone(now, job, worker, &reason, Some(silent));
        });
    }

    pub(super) fn lose_silent(&mut self, now: Moment) {
        let limit = self.options.lost_after;
        let is_silent = |session: &Session| now.monotonic.saturating_sub(session.last_heard) > limit;
        let silent: Vec<WorkerId> = self
            .sessions
            .iter()
            .filter(|(_, session)| is_silent(session))
            .map(|(worker, _)| worker.clone())
            .collect();
        for worker in silent {
            let reason = format!("no beat for {:.1} s", limit.as_secs_f64());
            self.drop_session(now, &worker, reason);
        }
    }

    /// Calls a worker lost whose stream is still up, and ends the stream: it has to come anew.
    pub(super) fn drop_session(&mut self, now: Moment, worker: &WorkerId, reason: String) {
        let Some(session) = self.sessions.get(worker) else { return };
        let close = Effect::Close { worker: worker.clone(), session: session.number, reason: reason.clone() };
        self.effects.push(close);
        self.lose(now, worker, reason);
    }

    /// The rank of a worker in the newest generation, if the message is about that one.
    pub(super) fn rank_within(job: &Job, worker: &WorkerId, within: &super::Within) -> Option<Rank> {
        let current = job.attempt == within.attempt && job.generation_number() == within.generation;
        if !current || job.is_ended() || !job.formed {
            return None;
        }
        job.crew.rank_of(worker)
    }
}
