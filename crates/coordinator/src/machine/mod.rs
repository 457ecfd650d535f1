//! The coordinator's half of the step protocol (`docs/concepts/step-protocol.md`) as a pure function:
//! [`Machine::apply`] takes the time and an event, and says what is to be done. It has no clock, no randomness
//! and no input or output, so that a test can play any schedule.
//!
//! Where to look: `users` what users ask for and how data is prepared; [`queue`] whose turn it is, `turns` what
//! follows from that, [`retry`] what is tried again; `sessions` what workers say; `reports` what members report;
//! `breakup` how a generation ends early, `part` how it does so at a step's boundary; `form` how one begins; `hang`,
//! `straggler`, `diverge` and `spoilt` what is done about members and steps that are not as they should be, `drain` about
//! members that are to go;
//! [`deal()`] and [`ledger`] the arithmetic of rows; `view` what status shows.

mod breakup;
mod crew;
mod deal;
mod diverge;
mod drain;
mod edits;
mod effect;
mod event;
mod form;
mod hang;
mod health;
mod job;
pub mod ledger;
mod options;
mod pace;
mod part;
pub mod queue;
pub mod record;
mod reports;
mod restore;
pub mod retry;
mod sessions;
mod shard;
mod spoilt;
mod straggler;
mod turns;
mod users;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use shanty_diagnostic::Diagnostic;
use shanty_proto::{Attempt, JobId, Step, WorkerId};

pub use self::{
    deal::deal,
    edits::Ignored,
    effect::{Change, CreditGiven, Effect, Message, Point, Refusal, Reply},
    event::{
        Announcement, Attachment, Event, KeptSum, MemberPhase, Moment, Said, StepReport, Timings, Within,
        WorkerInfo,
    },
    options::Options,
    restore::StoredJob,
    straggler::Straggler,
    view::{CrewView, JobView, MemberView},
};
use self::{
    job::{Job, Phase},
    record::JobState,
    sessions::Session,
};

/// Jobs and workers, and what is to become of them.
#[derive(Debug)]
pub struct Machine {
    options: Options,
    /// Secret, and kept apart from the store; the tokens of generations are made from it.
    seed: [u8; 32],
    jobs: BTreeMap<JobId, Job>,
    sessions: BTreeMap<WorkerId, Session>,
    /// Ended jobs whose members may still hold a credit: few, however many have ended.
    fading: BTreeSet<JobId>,
    next_sequence: u64,
    last_applied: Option<Duration>,
    effects: Vec<Effect>,
    /// Jobs whose record is to be made durable with this event's effects.
    unsaved: BTreeSet<JobId>,
    /// Jobs whose status changed with this event.
    changed: BTreeSet<JobId>,
}

impl Machine {
    /// A machine that knows no job. `seed` must be secret, and the same for as long as the state that is restored.
    pub fn new(options: Options, seed: [u8; 32]) -> Self {
        Self {
            options,
            seed,
            jobs: BTreeMap::new(),
            sessions: BTreeMap::new(),
            fading: BTreeSet::new(),
            next_sequence: 1,
            last_applied: None,
            effects: Vec::new(),
            unsaved: BTreeSet::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Its time-outs and bounds.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Takes an event in; says what is to be done. `now` must not run backwards.
    pub fn apply(&mut self, now: Moment, event: Event) -> Vec<Effect> {
        self.forgive_own_absence(now.monotonic);
        // Beats and reports come by the thousand; what follows from the time alone can wait for the next tick.
        let only_news = matches!(&event, Event::Said { message: Said::Beat { .. } | Said::Step(_), .. });
        match event {
            Event::Tick => {}
            Event::Submit { request, request_id, spec, spec_json } => {
                self.submit(now, request, request_id, spec, spec_json);
            }
            Event::Cancel { request, job } => self.cancel(now, request, &job),
            Event::Resume { request, job, job_file } => self.resume(now, request, &job, job_file.as_ref()),
            Event::PrepareProgress { job, attempt, text } => self.prepare_progress(&job, attempt, &text),
            Event::PrepareEnded { job, attempt, outcome } => self.prepare_ended(now, &job, attempt, outcome),
            Event::DataLost { job, error } => self.data_lost(now, &job, error),
            Event::CheckpointFound { job, attempt, outcome, damaged } => {
                self.checkpoint_found(now, &job, attempt, outcome, damaged);
            }
            Event::Hello { worker, session, info, attachment } => {
                self.hello(now, worker, session, info, attachment);
            }
            Event::Said { worker, session, message } => self.said(now, &worker, session, message),
            Event::Drain { request, worker } => self.drain(request, &worker),
            Event::Down { worker, session, reason } => {
                if self.is_current(&worker, session) {
                    self.lose(now, &worker, reason);
                }
            }
        }
        if !only_news {
            self.advance(now);
        }
        self.take_effects()
    }

    /// What follows from the time and from what happened.
    fn advance(&mut self, now: Moment) {
        self.forget_faded(now);
        self.lose_silent(now);
        self.release_drained(now);
        self.take_turns(now);
        let ids: Vec<JobId> =
            self.jobs.iter().filter(|(_, job)| job.wants_workers()).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.with_job(&id, |machine, job| {
                machine.lose_overdue(now, job);
                machine.lose_hung(now, job);
                machine.shrink(now, job);
                machine.let_change(now, job);
                machine.try_form(now, job);
            });
        }
        self.deal_workers(now);
    }

    /// A coordinator that slept (a suspended laptop, a full machine) has heard no beat, but that is no worker's fault.
    fn forgive_own_absence(&mut self, now: Duration) {
        let last = self.last_applied.replace(now).unwrap_or(now);
        if now.saturating_sub(last) > self.options.lost_after / 3 {
            for session in self.sessions.values_mut() {
                session.last_heard = now;
            }
            let members = self.jobs.values_mut().flat_map(|job| &mut job.crew.members);
            members.for_each(|member| member.progressed = now);
        }
    }

    /// Lends a job out, so that what is done with it may use the machine too.
    fn with_job<T>(&mut self, id: &JobId, act: impl FnOnce(&mut Self, &mut Job) -> T) -> Option<T> {
        let mut job = self.jobs.remove(id)?;
        let result = act(self, &mut job);
        self.jobs.insert(id.clone(), job);
        Some(result)
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        for id in std::mem::take(&mut self.unsaved) {
            let job = self.jobs.get(&id).expect("no job is ever forgotten");
            effects.push(Effect::Persist(Change::Job(Box::new(job.record()))));
        }
        effects.append(&mut self.effects);
        effects.extend(std::mem::take(&mut self.changed).into_iter().map(Effect::StatusChanged));
        effects
    }

    fn save(&mut self, job: &Job) {
        self.unsaved.insert(job.id.clone());
        self.changed.insert(job.id.clone());
    }

    /// Sets the reason of a state; says so only if it changed.
    fn set_reason(&mut self, job: &mut Job, reason: String) {
        if job.reason != reason {
            job.reason = reason;
            self.changed.insert(job.id.clone());
        }
    }

    /// Publishes and records the event that the job noted last.
    fn publish_event(&mut self, job: &Job) {
        if let Some(event) = job.events.last() {
            self.effects.push(Effect::Record(Change::Event(job.id.clone(), event.clone())));
            self.effects.push(Effect::Publish(job.id.clone(), Point::Event(event.clone())));
            self.changed.insert(job.id.clone());
        }
    }

    fn note(&mut self, now: Moment, job: &mut Job, kind: &str, text: String) {
        job.event(now, kind, text);
        self.publish_event(job);
    }

    fn send(&mut self, worker: &WorkerId, message: Message) {
        if let Some(session) = self.sessions.get(worker) {
            self.effects.push(Effect::Send { worker: worker.clone(), session: session.number, message });
        }
    }

    /// Ends a job and lets its workers go.
    fn end(&mut self, now: Moment, job: &mut Job, state: JobState, reason: String) {
        if matches!(job.phase, Phase::Preparing) {
            self.effects.push(Effect::StopPrepare { job: job.id.clone() });
        }
        job.phase = Phase::Ended(state);
        self.fading.insert(job.id.clone());
        job.standing = turns::Standing::default();
        job.reason = reason.clone();
        job.ended_unix_ms = now.unix_ms;
        self.note(now, job, "state", format!("{}: {reason}", state.as_str()));
        for (worker, number) in self.assigned_to(&job.id, job.attempt) {
            let release = Message::Release {
                job: job.id.clone(),
                attempt: job.attempt,
                succeeded: state == JobState::Succeeded,
                reason: reason.clone(),
            };
            self.effects.push(Effect::Send { worker: worker.clone(), session: number, message: release });
            let session = self.sessions.get_mut(&worker).expect("it was just listed");
            session.assigned = None;
            session.ready_since = None;
        }
        self.save(job);
    }

    /// Fails a job for good.
    fn fail(&mut self, now: Moment, job: &mut Job, error: Diagnostic) {
        let reason = format!("{}: {}", error.code, error.message);
        job.failure = Some(error.into());
        self.end(now, job, JobState::Failed, reason);
    }

    fn assigned_to(&self, job: &JobId, attempt: Attempt) -> Vec<(WorkerId, u64)> {
        let is_assigned =
            |session: &Session| session.assigned.as_ref().is_some_and(|(to, of)| to == job && *of == attempt);
        let sessions = self.sessions.iter().filter(|(_, session)| is_assigned(session));
        sessions.map(|(worker, session)| (worker.clone(), session.number)).collect()
    }

    /// All jobs, oldest submission first.
    pub fn views(&self, now: Moment) -> Vec<JobView> {
        let mut jobs: Vec<&Job> = self.jobs.values().collect();
        jobs.sort_by_key(|job| job.submitted_unix_ms.max(1) + job.sequence);
        jobs.into_iter().map(|job| self.view_of(now, job)).collect()
    }

    /// A job as status shows it.
    pub fn view(&self, now: Moment, job: &JobId) -> Option<JobView> {
        self.jobs.get(job).map(|job| self.view_of(now, job))
    }

    /// The attempt and generation that rows are leased to.
    pub fn leasable(&self, job: &JobId) -> Option<(Attempt, shanty_proto::Generation, Step)> {
        let job = self.jobs.get(job)?;
        matches!(job.phase, Phase::Running | Phase::Leaving(_))
            .then(|| (job.attempt, job.generation_number(), job.steps()))
    }
}

/// What the server needs to know to carry effects out.
impl Machine {
    /// A job's job file.
    pub fn spec(&self, job: &JobId) -> Option<std::sync::Arc<shanty_config::JobSpec>> {
        self.jobs.get(job).map(|job| std::sync::Arc::clone(&job.spec))
    }

    /// Hash of a job's prepared data.
    pub fn data_hash(&self, job: &JobId) -> Option<String> {
        self.jobs.get(job)?.facts.as_ref().map(|facts| facts.hash.clone())
    }

    /// All jobs that have not ended.
    pub fn unfinished(&self) -> Vec<JobId> {
        self.jobs.values().filter(|job| !job.is_ended()).map(|job| job.id.clone()).collect()
    }
}
