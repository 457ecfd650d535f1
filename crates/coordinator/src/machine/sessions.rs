//! Workers' streams: who is there, what they say, and when they are lost.

use std::time::Duration;

use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::{
    Machine,
    crew::Credit,
    effect::{Effect, Message},
    event::{Attachment, MemberPhase, Moment, Said, WorkerInfo},
    job::{Job, Phase},
};

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
            info,
            last_heard: now.monotonic,
            phase: MemberPhase::Idle,
            assigned: None,
            part: 0,
            ready_since: None,
            failures: None,
            unfit_until: Duration::ZERO,
        };
        self.sessions.insert(worker.clone(), session);
        let outcome = self.reattach(now, &worker, attachment.as_ref());
        let refused = matches!(outcome, Reattached::No | Reattached::WithoutState { .. });
        let attached = attachment.is_some() && !refused;
        self.send(&worker, Message::Welcome { attached });
        match outcome {
            Reattached::No | Reattached::Yes => {}
            Reattached::Leave { job, attempt, generation, reason } => {
                self.send(&worker, Message::Leave { job, attempt, generation, reason });
            }
            Reattached::Form { job } => {
                let _ = self.with_job(&job, |machine, job| {
                    machine.announce_to(job, &worker);
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
        let Some(member) = job.crew.of_mut(worker) else { return Reattached::No };
        let Some(attachment) = attachment.filter(|attachment| attachment.generation == newest) else {
            let older = attachment.is_none_or(|attachment| attachment.generation < newest);
            let missed = matches!(job.phase, Phase::Running | Phase::Leaving(_)) && !member.attached;
            if !older || !missed || member.lost.is_some() {
                return Reattached::No;
            }
            member.attached = true;
            member.back_by = None;
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
        member.step = member.step.max(attachment.applied);
        (member.host, member.pid, member.device) = (info.host, info.pid, info.device);
        let reason = match &job.phase {
            Phase::Leaving(leaving) => leaving.cause.clone(),
            Phase::Forming(_) => "the generation is over".to_owned(),
            _ => {
                self.raise(job, attachment.applied);
                self.note(now, job, "reattached", format!("{worker} is back in generation {newest}"));
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
            Said::Beat { sequence, phase, attachment } => self.beat(now, worker, sequence, phase, attachment),
            Said::BaseReady { job, attempt, base_hash, seconds, trainable_parameters, part } => {
                self.base_ready(now, worker, &job, attempt, &base_hash, seconds, trainable_parameters, part);
            }
            Said::Failure { job, attempt, error } => self.failure(now, worker, &job, attempt, error),
            Said::Step(report) => self.step(now, worker, report),
            Said::Broken { within, error } => self.broken(now, worker, &within, &error),
            Said::Left { within, applied, holds_state, kept } => {
                let left = super::crew::LeftWith { applied, holds_state, kept };
                self.left(now, worker, &within, left);
            }
            Said::Checkpoint { within, step, path, size_bytes, seconds } => {
                self.checkpoint(now, worker, &within, step, path, size_bytes, seconds);
            }
            Said::Evaluation { within, step, loss, tokens } => {
                self.evaluation(now, worker, &within, step, loss, tokens);
            }
            Said::Finished { within, step, adapter } => self.finished(now, worker, &within, step, adapter),
            Said::Goodbye { reason } => self.lose(now, worker, format!("left: {reason}")),
        }
    }

    fn beat(
        &mut self,
        now: Moment,
        worker: &WorkerId,
        sequence: u64,
        phase: MemberPhase,
        attachment: Option<Attachment>,
    ) {
        let session = self.sessions.get_mut(worker).expect("it is current");
        session.phase = phase;
        let credit = match &attachment {
            Some(attachment) => self
                .with_job(&attachment.job.clone(), |machine, job| {
                    machine.member_beat(now, worker, phase, attachment, job)
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
        phase: MemberPhase,
        attachment: &Attachment,
        job: &mut Job,
    ) -> Option<(Generation, Step)> {
        if job.attempt != attachment.attempt
            || job.generation_number() != attachment.generation
            || job.is_ended()
        {
            return None;
        }
        let up_to =
            Step((job.watermark.0.max(attachment.applied.0) + self.options.steps_ahead).min(job.steps().0));
        let running = matches!(job.phase, Phase::Running);
        let member = job.crew.of_mut(worker)?;
        if !member.attached || member.lost.is_some() {
            return None;
        }
        // Steps alternate between computing and reducing: those who watch need not hear of each turn.
        let tells = member.phase.is_of_a_step() != phase.is_of_a_step() || phase == MemberPhase::Evaluating;
        let tells = tells && member.phase != phase;
        member.phase = phase;
        member.step = member.step.max(attachment.applied);
        let credit = (running && member.left.is_none()).then_some((attachment.generation, up_to));
        if credit.is_some() {
            member.credit = Credit::Until(now.monotonic + self.options.credit);
        }
        if tells {
            self.changed.insert(job.id.clone());
        }
        self.raise(job, attachment.applied);
        credit
    }

    /// A worker that was a member of a job that has ended, and beats without that generation, is out of it.
    fn note_absence(&mut self, worker: &WorkerId, attachment: Option<&Attachment>) {
        for job in self.jobs.values_mut().filter(|job| job.is_ended()) {
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
