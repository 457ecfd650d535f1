//! What follows from [`queue`]: jobs begin, shrink and give way, and workers are dealt out.

use std::{cmp::Reverse, time::Duration};

use shanty_proto::{JobId, WorkerId};

use super::{
    Machine,
    effect::Message,
    event::Moment,
    job::{Cause, Forming, Job, Origin, Phase},
    queue::{self, Asking, Pool, Turn},
    record::JobState,
    sessions::Session,
};

/// A job's standing in the queue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    /// Whether it had its turn.
    pub active: bool,
    /// Whether its data is prepared, ahead of its turn.
    pub prepared: bool,
    /// Workers that are its.
    pub share: u32,
    /// Younger jobs of its priority that began before it.
    pub overtaken: u32,
    /// Its place among those that wait, from 1.
    pub place: Option<u32>,
    /// It is about to make room.
    pub giving_way: Option<GivingWay>,
    /// Not to be disturbed before this moment.
    pub settled_until: Duration,
    /// Since when it has fewer workers than it needs.
    pub lacking_since: Option<Duration>,
    /// Not tried again before this moment.
    pub not_before: Duration,
    /// Failures of its preparation in a row.
    pub prepare_failures: u32,
    /// Failures in a row to look for its newest checkpoint.
    pub search_failures: u32,
}

/// A job makes room for another: its members leave, one of them writes a checkpoint, and it waits for its next turn.
#[derive(Debug, Clone)]
pub(crate) struct GivingWay {
    /// For whom.
    pub to: JobId,
    /// Who was asked to write the checkpoint.
    pub writer: Option<WorkerId>,
}

impl Job {
    /// Its priority.
    pub fn priority(&self) -> i32 {
        // From 0 to 100, where it was checked.
        i32::try_from(self.spec.cluster.priority).unwrap_or(i32::MAX)
    }

    /// For whom it runs.
    pub fn owner(&self) -> &str {
        self.spec.cluster.owner.as_deref().unwrap_or_default()
    }

    /// Fewest and most workers that the job file asks for; where some share a base, whole groups of them.
    fn wanted(&self) -> (u32, u32) {
        let (bounds, parts) = (self.spec.cluster.workers, self.parts() as u32);
        let min = bounds.min.max(1).next_multiple_of(parts);
        (min, (bounds.max / parts * parts).max(min))
    }

    /// Fewest and most workers, as things stand.
    pub fn bounds(&self) -> (usize, usize) {
        let (min, max) = self.wanted();
        let parts = self.parts();
        let share = self.standing.share.max(min) as usize / parts * parts;
        (min as usize, (max as usize).min(share))
    }

    /// Whether so few steps are left that it is not worth breaking its generation.
    fn is_near_end(&self) -> bool {
        matches!(self.phase, Phase::Running) && self.watermark.0 + 1 >= self.steps().0
    }
}

impl Machine {
    /// Says whose turn it is, and sees to it.
    pub(super) fn take_turns(&mut self, now: Moment) {
        let (asking, pool) = self.asking(now);
        if asking.is_empty() {
            return;
        }
        let turns = queue::turns(&asking, pool);
        self.count_overtaken(&asking, &turns);
        // Whoever connects next is its worker, too: it may wait for more than there are now.
        let alone = turns.of.len() == 1;
        for (id, turn) in &turns.of {
            let place = turns.waiting.iter().position(|waiting| waiting == id);
            let place = place.and_then(|place| u32::try_from(place + 1).ok());
            let _ = self.with_job(id, |machine, job| {
                if job.standing.place != place {
                    job.standing.place = place;
                    machine.changed.insert(job.id.clone());
                }
                machine.follow(now, job, turn, alone);
            });
        }
        self.prepare_ahead(now, &turns.waiting);
    }

    fn asking(&mut self, now: Moment) -> (Vec<Asking>, Pool) {
        let mut asking = Vec::new();
        let mut workers = 0;
        let patience = self.options.patience;
        for job in self.jobs.values_mut().filter(|job| !job.is_ended()) {
            if !job.standing.active && now.monotonic < job.standing.not_before {
                continue;
            }
            let assigned = self.sessions.values().filter(|session| session.is_assigned_to(job)).count();
            // After a restart of the coordinator members are on their way back.
            let is_alive = matches!(job.phase, Phase::Running | Phase::Leaving(_));
            let awaited = job.crew.members.iter().filter(|member| {
                is_alive && !member.attached && member.lost.is_none() && member.back_by.is_some()
            });
            let awaited = awaited.count();
            workers += awaited;
            let (min, max) = job.wanted();
            let holds = u32::try_from(assigned + awaited).unwrap_or(u32::MAX).min(max);
            let lacks = job.formed && job.wants_workers() && holds < min;
            job.standing.lacking_since = lacks.then(|| job.standing.lacking_since.unwrap_or(now.monotonic));
            let lacking_for = job.standing.lacking_since.map(|since| now.monotonic.saturating_sub(since));
            asking.push(Asking {
                job: job.id.clone(),
                owner: job.owner().to_owned(),
                priority: job.priority(),
                sequence: job.sequence,
                min,
                max,
                holds: if job.standing.active { holds } else { 0 },
                active: job.standing.active,
                settled: job.is_near_end() || now.monotonic < job.standing.settled_until,
                hopeful: lacking_for.is_some_and(|time| time < patience),
                overtaken: job.standing.overtaken,
            });
        }
        let is_fit = |session: &&Session| {
            session.assigned.is_some() || !session.draining && session.unfit_until <= now.monotonic
        };
        workers += self.sessions.values().filter(is_fit).count();
        let pool = Pool {
            workers: u32::try_from(workers).unwrap_or(u32::MAX),
            most_jobs: self.options.most_jobs,
            most_jobs_an_owner: self.options.most_jobs_an_owner,
        };
        (asking, pool)
    }

    fn count_overtaken(&mut self, asking: &[Asking], turns: &queue::Turns) {
        let begins =
            |job: &&Asking| !job.active && matches!(turns.of.get(&job.job), Some(Turn::Works { .. }));
        for begun in asking.iter().filter(begins) {
            for passed in turns.waiting.iter() {
                let Some(job) = self.jobs.get_mut(passed) else { continue };
                if job.priority() == begun.priority && job.sequence < begun.sequence {
                    job.standing.overtaken += 1;
                    self.unsaved.insert(passed.clone());
                }
            }
        }
    }

    fn follow(&mut self, now: Moment, job: &mut Job, turn: &Turn, alone: bool) {
        match turn {
            Turn::Works { workers } => {
                job.standing.share = if alone { u32::MAX } else { *workers };
                if job.standing.giving_way.take().is_some() {
                    self.note(now, job, "stays", "its workers are not needed elsewhere any more".to_owned());
                }
                if !job.standing.active {
                    self.begin(now, job);
                }
            }
            Turn::Waits(why) => {
                job.standing.share = 0;
                if matches!(job.phase, Phase::Queued) {
                    self.set_reason(job, why.to_string());
                }
            }
            Turn::GivesWay { to } => self.give_way(now, job, to),
        }
    }

    /// A job's turn has come.
    fn begin(&mut self, now: Moment, job: &mut Job) {
        job.standing.active = true;
        job.standing.overtaken = 0;
        match job.phase {
            Phase::Queued if job.standing.prepared => self.start_forming(now, job),
            Phase::Queued => self.start_preparing(now, job),
            // Its data is being prepared ahead of its turn, which has come now.
            _ => self.save(job),
        }
    }

    /// Prepares the data of the first waiting job that needs it, one at a time, so that no worker waits for that.
    fn prepare_ahead(&mut self, now: Moment, waiting: &[JobId]) {
        let is_preparing = |job: &Job| matches!(job.phase, Phase::Preparing);
        if self.jobs.values().any(is_preparing) {
            return;
        }
        let is_due = |id: &&JobId| {
            let job = self.jobs.get(*id);
            job.is_some_and(|job| matches!(job.phase, Phase::Queued) && !job.standing.prepared)
        };
        if let Some(next) = waiting.iter().find(is_due).cloned() {
            let _ = self.with_job(&next, |machine, job| machine.start_preparing(now, job));
        }
    }

    /// Makes room for a job of higher priority.
    fn give_way(&mut self, now: Moment, job: &mut Job, to: &JobId) {
        if let Some(giving) = &mut job.standing.giving_way {
            giving.to = to.clone();
            return;
        }
        let has_state = match &job.phase {
            Phase::Running | Phase::Leaving(_) => true,
            Phase::Forming(forming) => matches!(forming.origin, Origin::Holders(_)),
            Phase::Queued | Phase::Preparing | Phase::Ended(_) => false,
        };
        if !has_state {
            return self.step_back(now, job, to);
        }
        job.standing.giving_way = Some(GivingWay { to: to.clone(), writer: None });
        let cause = format!("gives way to job {to}");
        self.note(now, job, "gives_way", format!("to job {to}, after step {}", job.watermark));
        if matches!(job.phase, Phase::Running) {
            self.part(now, job, Cause::new("gives_way", cause));
        }
    }

    /// Everybody has left: has the state written where it is not yet, then lets the workers go.
    pub(super) fn park(&mut self, now: Moment, job: &mut Job) {
        let (Some(giving), Phase::Forming(forming)) = (&job.standing.giving_way, &job.phase) else { return };
        let to = giving.to.clone();
        let Origin::Holders(holders) = &forming.origin else { return self.step_back(now, job, &to) };
        let applied = holders.values().map(|holder| holder.applied).max().unwrap_or_default();
        if applied.0 == 0 || job.checkpoint == Some(applied) {
            return self.step_back(now, job, &to);
        }
        let current = |worker: &WorkerId| holders.get(worker).is_some_and(|holder| holder.applied == applied);
        let reason = format!("gives way to job {to}; writes a checkpoint of step {applied}");
        if giving.writer.as_ref().is_some_and(current) {
            return self.set_reason(job, reason);
        }
        let writer = holders.iter().find(|(_, holder)| holder.applied == applied);
        let Some(writer) = writer.map(|(worker, _)| worker.clone()) else { return };
        let message = Message::Keep {
            job: job.id.clone(),
            attempt: job.attempt,
            generation: job.generation_number(),
            step: applied,
        };
        job.standing.giving_way = Some(GivingWay { to, writer: Some(writer.clone()) });
        self.send(&writer, message);
        self.set_reason(job, reason);
    }

    /// The state of a job that gives way cannot be written: it goes on, and is left alone for a while.
    pub(super) fn cannot_give_way(&mut self, now: Moment, job: &mut Job, writer: &WorkerId) {
        let giving = job.standing.giving_way.as_ref();
        if giving.is_some_and(|giving| giving.writer.as_ref() == Some(writer)) {
            job.standing.giving_way = None;
            job.standing.settled_until = now.monotonic + self.options.patience;
            let text = "no checkpoint can be written, so it does not give way".to_owned();
            self.note(now, job, "stays", text);
        }
    }

    /// Goes back into the queue. Its checkpoints and its prepared data stay.
    fn step_back(&mut self, now: Moment, job: &mut Job, to: &JobId) {
        let reason = format!("gave way to job {to}");
        self.release_all(job, &reason);
        if !matches!(job.phase, Phase::Preparing | Phase::Queued) {
            job.phase = Phase::Queued;
            job.standing.prepared = true;
            job.formed = false;
        }
        job.standing.active = false;
        job.standing.share = 0;
        job.standing.giving_way = None;
        job.broken = None;
        job.reason = reason.clone();
        self.note(now, job, "gave_way", format!("{reason}, after step {}", job.watermark));
        self.save(job);
    }

    fn release_all(&mut self, job: &Job, reason: &str) {
        for (worker, _) in self.assigned_to(&job.id, job.attempt) {
            self.release(job, &worker, reason);
        }
    }

    /// Lets a worker go that is no member of a living generation.
    fn release(&mut self, job: &Job, worker: &WorkerId, reason: &str) {
        let release = Message::Release {
            job: job.id.clone(),
            attempt: job.attempt,
            succeeded: false,
            reason: reason.to_owned(),
        };
        self.send(worker, release);
        if let Some(session) = self.sessions.get_mut(worker) {
            session.assigned = None;
            session.ready_since = None;
        }
        self.changed.insert(job.id.clone());
    }

    /// Breaks a running generation to give up members that others need.
    pub(super) fn shrink(&mut self, now: Moment, job: &mut Job) {
        let all_here = job.crew.members.iter().all(|member| member.attached);
        let (_, most) = job.bounds();
        let surplus = job.crew.members.len().saturating_sub(most);
        let calm = matches!(job.phase, Phase::Running) && job.advanced && !job.is_near_end();
        if !calm || !all_here || surplus == 0 || job.standing.giving_way.is_some() {
            return;
        }
        let plural = if surplus == 1 { "" } else { "s" };
        let cause = format!("{surplus} worker{plural} to be given up for other jobs");
        self.note(now, job, "shrinks", format!("{cause}, after step {}", job.watermark));
        self.part(now, job, Cause::new("shrunk", cause));
    }

    /// Asks workers to load the bases of the jobs that they are to work for.
    pub(super) fn deal_workers(&mut self, now: Moment) {
        let mut jobs: Vec<(Reverse<i32>, u64, JobId)> = self
            .jobs
            .values()
            .filter(|job| job.wants_workers() && job.standing.giving_way.is_none() && job.facts.is_some())
            .map(|job| (Reverse(job.priority()), job.sequence, job.id.clone()))
            .collect();
        jobs.sort();
        let jobs: Vec<JobId> = jobs.into_iter().map(|(_, _, id)| id).collect();
        for id in &jobs {
            let lacks = self.with_job(id, |machine, job| {
                let lacks = machine.lacks(job);
                lacks - machine.assign(now, job, lacks)
            });
            let lacks = lacks.unwrap_or_default();
            if lacks > 0 && self.recall(&jobs, id, lacks) > 0 {
                let _ = self.with_job(id, |machine, job| machine.assign(now, job, lacks));
            }
        }
        // What nobody needs loads the first job's base, to be there when somebody is lost.
        if let Some(first) = jobs.first() {
            let _ = self.with_job(first, |machine, job| machine.assign(now, job, usize::MAX));
        }
        for id in &jobs {
            let _ = self.with_job(id, |machine, job| machine.level_parts(job));
        }
    }

    /// Workers that are a job's by its share, and that it has not been given.
    fn lacks(&self, job: &Job) -> usize {
        let assigned = self.sessions.values().filter(|session| session.is_assigned_to(job)).count();
        (job.standing.share as usize).saturating_sub(assigned)
    }

    /// Takes workers back that other jobs hold beyond their share, least important jobs first.
    fn recall(&mut self, jobs: &[JobId], wanted_by: &JobId, count: usize) -> usize {
        let mut recalled = 0;
        for id in jobs.iter().rev().filter(|id| *id != wanted_by) {
            let _ = self.with_job(id, |machine, job| {
                let assigned = machine.assigned_to(&job.id, job.attempt);
                let beyond = assigned.len().saturating_sub(job.standing.share as usize);
                // One that may work for this job alone is of no use to the other.
                let bound =
                    |worker: &WorkerId| machine.sessions.get(worker).is_some_and(|of| of.info.only.is_some());
                let is_free = |(worker, _): &(WorkerId, u64)| !job.needs(worker) && !bound(worker);
                let spare: Vec<WorkerId> =
                    assigned.into_iter().filter(is_free).map(|(worker, _)| worker).collect();
                for worker in spare.iter().rev().take(beyond.min(count - recalled)) {
                    machine.release(job, worker, &format!("job {wanted_by} needs it"));
                    recalled += 1;
                }
            });
        }
        recalled
    }

    /// Puts a prepared job to work.
    pub(super) fn start_forming(&mut self, now: Moment, job: &mut Job) {
        let origin = if job.generation.is_none() { Origin::Fresh } else { Origin::Fenced };
        job.phase = Phase::Forming(Forming { origin, enough_since: None });
        job.standing.prepared = false;
        if job.state() == JobState::Forming {
            job.reason = "waits for workers".to_owned();
        }
        self.note(now, job, "begins", format!("with up to {} workers", job.bounds().1));
        self.save(job);
    }
}
