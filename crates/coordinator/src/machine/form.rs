//! How a generation begins: who is asked to load the base, who takes part, and from what state.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use shanty_data::order;
use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::{
    Machine,
    crew::{Crew, Member},
    deal,
    effect::{Change, Effect, Message},
    event::Moment,
    job::{Holder, Job, Origin, Phase},
    record::{CheckpointRecord, GenerationRecord, MemberRecord, RankRows, Source, StartPoint},
    retry::{self, Cause},
};

impl Machine {
    /// Asks at most so many idle workers to load the job's base, or a part of it; says how many.
    pub(super) fn assign(&mut self, now: Moment, job: &mut Job, most: usize) -> usize {
        if job.facts.is_none() || !job.wants_workers() {
            return 0;
        }
        let tries = self.options.worker_tries;
        let most = most.min(self.places(job));
        let is_idle = |session: &super::sessions::Session| {
            let may = session.info.only.as_ref().is_none_or(|only| *only == job.id);
            let is_free =
                session.assigned.is_none() && !session.draining && session.unfit_until <= now.monotonic;
            is_free && may && session.failures_in(job) < tries
        };
        let idle = self.sessions.iter().filter(|(_, session)| is_idle(session));
        let asked: Vec<WorkerId> = idle.map(|(worker, _)| worker.clone()).take(most).collect();
        for worker in &asked {
            let part = self.scarcest_part(job, worker);
            if let Some(session) = self.sessions.get_mut(worker) {
                session.assigned = Some((job.id.clone(), job.attempt));
                session.part = part;
                session.ready_since = None;
            }
            self.send_assignment(job, worker);
            self.changed.insert(job.id.clone());
        }
        asked.len()
    }

    /// How many more workers may load the job's base: members and spares.
    fn places(&self, job: &Job) -> usize {
        let Some(spares) = job.spec.cluster.spares else { return usize::MAX };
        let most = (job.spec.cluster.workers.max + spares) as usize;
        let stays = |session: &&super::sessions::Session| session.is_assigned_to(job) && !session.draining;
        most.saturating_sub(self.sessions.values().filter(stays).count())
    }

    /// Workers that loaded the job's base and are to stay, in the order in which they came, the slow ones last.
    pub(super) fn ready_for(&self, job: &Job) -> Vec<WorkerId> {
        let mut ready: Vec<((bool, u64), &WorkerId)> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_ready_for(job) && !session.draining)
            .map(|(worker, session)| ((session.slow, session.number), worker))
            .collect();
        ready.sort_unstable();
        ready.into_iter().map(|(_, worker)| worker.clone()).collect()
    }

    /// Forms the next generation, if all that it needs is there; else says what is missing.
    pub(super) fn try_form(&mut self, now: Moment, job: &mut Job) {
        let Phase::Forming(forming) = &job.phase else { return };
        if job.standing.giving_way.is_some() {
            return self.park(now, job);
        }
        if now.monotonic < job.standing.not_before {
            let pause = job.standing.not_before - now.monotonic;
            let why = match job.total_losses {
                0 => "the store does not answer".to_owned(),
                times => format!("all workers were lost {times} times in a row"),
            };
            return self
                .set_reason(job, format!("{why}; tries again in {:.0} s", pause.as_secs_f64().ceil()));
        }
        let holders = match &forming.origin {
            Origin::Fenced => return self.wait_for_fence(now, job),
            Origin::Searching => {
                return self.set_reason(job, "looks for the newest good checkpoint".to_owned());
            }
            Origin::Holders(holders) => holders.clone(),
            Origin::Fresh | Origin::Checkpoint(_) => BTreeMap::new(),
        };
        let enough_since = forming.enough_since;
        let (min, max) = job.bounds();
        let mut joiners = self.ready_for(job);
        joiners.retain(|worker| !holders.contains_key(worker));
        let Some(holders) = self.part_with_drained(now, job, holders, joiners.len()) else { return };
        let line_up = match job.parts() {
            1 => Vec::new(),
            _ => self.line_up(job, &holders, joiners.clone()),
        };
        let count = if job.parts() == 1 { holders.len() + joiners.len() } else { line_up.len() };
        if count < min {
            self.set_enough_since(job, None);
            let reason = self.missing(job, count, min);
            return self.set_reason(job, reason);
        }
        let since = enough_since.unwrap_or(now.monotonic);
        // Those who hold a sum wait for nobody: others can join at any later step.
        let gathered = !holders.is_empty() || count >= max || now.monotonic >= since + self.options.gather;
        if !gathered {
            self.set_enough_since(job, Some(since));
            let seconds = self.options.gather.as_secs_f64();
            let reason =
                format!("{count} of at most {max} workers are ready; waits up to {seconds:.1} s for more");
            return self.set_reason(job, reason);
        }
        let members = match job.parts() {
            1 => self.choose(&holders, joiners, max),
            _ => line_up.into_iter().take(max).collect(),
        };
        self.form(now, job, &members, &holders);
    }

    /// The next members, by rank: those who hold the state, then ready ones. A slow holder has the last place, unless
    /// nobody else holds as much.
    fn choose(
        &self,
        holders: &BTreeMap<WorkerId, Holder>,
        joiners: Vec<WorkerId>,
        max: usize,
    ) -> Vec<WorkerId> {
        let is_slow = |worker: &WorkerId| self.sessions.get(worker).is_some_and(|session| session.slow);
        let newest = holders.values().map(|holder| holder.applied).max();
        let holds_newest = |worker: &WorkerId| holders.get(worker).map(|holder| holder.applied) == newest;
        let others_hold = holders.keys().any(|worker| holds_newest(worker) && !is_slow(worker));
        let (last, first): (BTreeMap<WorkerId, Holder>, BTreeMap<WorkerId, Holder>) =
            holders.clone().into_iter().partition(|(worker, _)| others_hold && is_slow(worker));
        let (first, last) = (who_stays(&first, max), who_stays(&last, max));
        first.into_iter().chain(joiners).chain(last).take(max).collect()
    }

    fn set_enough_since(&mut self, job: &mut Job, since: Option<Duration>) {
        if let Phase::Forming(forming) = &mut job.phase {
            forming.enough_since = since;
        }
    }

    fn wait_for_fence(&mut self, now: Moment, job: &mut Job) {
        if job.crew.fence(now.monotonic).is_some() {
            let generation = job.generation_number();
            let reason = format!(
                "no member of generation {generation} said that it left; waits until the credits given to it have run out"
            );
            return self.set_reason(job, reason);
        }
        if let Phase::Forming(forming) = &mut job.phase {
            forming.origin = Origin::Searching;
        }
        let up_to = job.health.back_to;
        self.effects.push(Effect::FindCheckpoint { job: job.id.clone(), attempt: job.attempt, up_to });
        self.set_reason(job, "looks for the newest good checkpoint".to_owned());
    }

    pub(super) fn checkpoint_found(
        &mut self,
        now: Moment,
        job: &JobId,
        attempt: Attempt,
        outcome: Result<Option<CheckpointRecord>, shanty_diagnostic::Diagnostic>,
        damaged: Vec<String>,
    ) {
        let _ = self.with_job(job, |machine, job| {
            let Phase::Forming(forming) = &mut job.phase else { return };
            if job.attempt != attempt || forming.origin != Origin::Searching {
                return;
            }
            let text = match outcome {
                Ok(Some(checkpoint)) => {
                    let text = format!("goes on from step {} ({})", checkpoint.step, checkpoint.path);
                    forming.origin = Origin::Checkpoint(checkpoint);
                    text
                }
                Ok(None) => {
                    forming.origin = Origin::Fresh;
                    "there is no checkpoint; starts from the beginning".to_owned()
                }
                Err(error) => return machine.search_failed(now, job, error),
            };
            job.standing.search_failures = 0;
            for reason in damaged {
                machine.note(now, job, "checkpoint_damaged", reason);
            }
            machine.note(now, job, "checkpoint_chosen", text);
        });
    }

    /// A store that does not answer may do so later.
    fn search_failed(&mut self, now: Moment, job: &mut Job, error: shanty_diagnostic::Diagnostic) {
        job.standing.search_failures += 1;
        let (times, bound) = (job.standing.search_failures, self.options.total_losses);
        let Some(pause) = retry::again(Cause::from(error.kind), times, bound, self.options.retry_pause)
        else {
            return self.fail(now, job, error);
        };
        let text = format!("the newest checkpoint cannot be looked for: {}: {}", error.code, error.message);
        self.note(now, job, "checkpoint_search_failed", text);
        job.standing.not_before = now.monotonic + pause;
        if let Phase::Forming(forming) = &mut job.phase {
            forming.origin = Origin::Fenced;
        }
    }

    /// Why there are not enough workers.
    fn missing(&self, job: &Job, count: usize, min: usize) -> String {
        let names = |wanted: &dyn Fn(&super::sessions::Session) -> bool| {
            let matching = self.sessions.iter().filter(|(_, session)| wanted(session));
            matching.map(|(worker, _)| worker.as_str()).collect::<Vec<_>>().join(", ")
        };
        let loading = names(&|session| session.is_assigned_to(job) && session.ready_since.is_none());
        let failed = names(&|session| !session.is_assigned_to(job) && session.failures_in(job) > 0);
        let mut reason = format!("{count} of at least {min} workers are ready");
        if !loading.is_empty() {
            reason += &format!("; loading the base: {loading}");
        }
        if !failed.is_empty() {
            reason += &format!("; failed: {failed}");
        }
        let missing = self.parts_missing(job);
        if job.parts() > 1 && !missing.is_empty() {
            reason += &format!("; of a base in {} parts nobody has part {}", job.parts(), missing.join(", "));
        }
        let known = self.sessions.len();
        if known < min {
            reason += &format!("; {} more must connect", min - known);
        }
        reason
    }

    fn form(
        &mut self,
        now: Moment,
        job: &mut Job,
        members: &[WorkerId],
        holders: &BTreeMap<WorkerId, Holder>,
    ) {
        let Phase::Forming(forming) = &job.phase else { return };
        let origin = forming.origin.clone();
        let start = match origin {
            Origin::Checkpoint(checkpoint) => {
                self.go_back(job, checkpoint.step);
                job.checkpoint = Some(checkpoint.step);
                start_point(job, checkpoint.step, Source::Checkpoint(checkpoint.path), Vec::new())
            }
            Origin::Holders(_) => self.start_from_holders(job, members, holders),
            _ => {
                self.go_back(job, Step(0));
                job.checkpoint = None;
                start_point(job, Step(0), Source::Fresh, Vec::new())
            }
        };
        let number = job.generation_number().next();
        let address =
            |worker: &WorkerId| self.sessions.get(worker).map(|session| session.info.address.clone());
        let record = |worker: &WorkerId| MemberRecord {
            worker: worker.clone(),
            address: address(worker).unwrap_or_default(),
        };
        let generation = GenerationRecord {
            generation: number,
            members: members.iter().map(record).collect(),
            token: self.token(&job.id, number),
            start,
        };
        let applied = generation.start.applied;
        if !matches!(generation.start.source, Source::Members { .. }) {
            job.health.record.lineage_from = number;
        }
        job.health.record.handed_over = false;
        job.health.record.all_lost = false;
        job.health.back_to = None;
        job.health.pace.least = self.options.hang_least;
        job.health.keeper = None;
        job.health.keep_failed = false;
        job.crew = Crew::new(members.iter().map(|worker| self.new_member(now, worker, holders)).collect());
        job.generation = Some(Arc::new(generation));
        job.phase = Phase::Running;
        job.formed = true;
        job.advanced = false;
        job.reason = format!("generation {number} of {} workers", members.len());
        if job.started_unix_ms == 0 {
            job.started_unix_ms = now.unix_ms;
        }
        let names: Vec<&str> = members.iter().map(WorkerId::as_str).collect();
        let text = format!("generation {number} from step {applied}: {}", names.join(", "));
        self.note(now, job, "formed", text);
        self.save(job);
        for worker in members {
            self.announce_to(job, worker);
            self.ask_to_save(job, worker);
        }
    }

    fn new_member(&self, now: Moment, worker: &WorkerId, holders: &BTreeMap<WorkerId, Holder>) -> Member {
        let mut member = Member::new(worker.clone());
        member.attached = true;
        member.progressed = now.monotonic;
        member.had = holders.get(worker).map(|holder| holder.applied);
        member.step = member.had.unwrap_or_default();
        if let Some(session) = self.sessions.get(worker) {
            member.host = session.info.host.clone();
            member.pid = session.info.pid;
            member.device = session.info.device.clone();
        }
        member
    }

    /// Tells a member of the newest generation that it begins.
    pub(super) fn announce_to(&mut self, job: &Job, worker: &WorkerId) {
        let (Some(generation), Some(rank)) = (&job.generation, job.crew.rank_of(worker)) else { return };
        let form = Message::Form {
            job: job.id.clone(),
            attempt: job.attempt,
            rank,
            generation: Arc::clone(generation),
        };
        self.send(worker, form);
    }

    fn go_back(&mut self, job: &mut Job, step: Step) {
        if job.watermark > step {
            job.return_to(step);
        }
        // Also without a watermark beyond it: an evaluation may have been made there.
        self.effects.push(Effect::Record(Change::Truncate(job.id.clone(), step)));
    }

    /// Members with the highest applied step keep what they have; what nobody keeps of the next step is dealt again.
    fn start_from_holders(
        &mut self,
        job: &mut Job,
        members: &[WorkerId],
        holders: &BTreeMap<WorkerId, Holder>,
    ) -> StartPoint {
        let applied = holders.values().map(|holder| holder.applied).max().unwrap_or_default();
        let step = applied.next();
        self.raise(job, applied);
        job.recorded.retain(|recorded| *recorded <= applied);
        // A lost member voids what its group added.
        let broken = if job.parts() > 1 { job.of_broken_groups(holders) } else { BTreeSet::new() };
        let up_to_date =
            |worker: &WorkerId| holders.get(worker).is_some_and(|holder| holder.applied == applied);
        let kept_by = |worker: &WorkerId| {
            let kept = holders.get(worker).filter(|holder| holder.applied == applied)?.kept.as_ref()?;
            (kept.step == step && !broken.contains(worker)).then(|| kept.rows.clone())
        };
        let kept: Vec<Vec<u64>> = members.iter().map(|worker| kept_by(worker).unwrap_or_default()).collect();
        let rows_of_step = match &job.order {
            Some(order) if step <= job.steps() => order.step_rows(step.0),
            _ => Vec::new(),
        };
        let rows = deal(&rows_of_step, &kept);
        let stays = |worker: &WorkerId| members.contains(worker) && !broken.contains(worker);
        // Who left at a boundary had no rows of the next step.
        if !job.crew.parted {
            job.requeued += requeued(job, step, &rows_of_step, stays, &rows);
        }
        let ranks = (0u32..).zip(members);
        let (givers, receivers): (Vec<_>, Vec<_>) = ranks.partition(|(_, worker)| up_to_date(worker));
        let source = Source::Members {
            donor: givers.first().map_or(Rank(0), |(rank, _)| Rank(*rank)),
            receivers: receivers.into_iter().map(|(rank, _)| Rank(rank)).collect(),
        };
        start_point(job, applied, source, rows)
    }

    /// A generation's secret: from the machine's, and never the same twice since numbers are not reused.
    pub(super) fn token(&self, job: &JobId, generation: Generation) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.seed);
        hasher.update(job.as_str().as_bytes());
        hasher.update(&generation.0.to_le_bytes());
        *hasher.finalize().as_bytes()
    }
}

/// At most `most` of those who hold a state, by rank. Where some have to go, those with the last step and a sum stay.
fn who_stays(holders: &BTreeMap<WorkerId, Holder>, most: usize) -> Vec<WorkerId> {
    let mut stay: Vec<(&WorkerId, &Holder)> = holders.iter().collect();
    stay.sort_by_key(|(_, holder)| {
        let kept = holder.kept.as_ref().map_or(0, |kept| kept.rows.len());
        (std::cmp::Reverse((holder.applied, kept)), holder.rank)
    });
    stay.truncate(most);
    stay.sort_by_key(|(_, holder)| holder.rank);
    stay.into_iter().map(|(worker, _)| worker.clone()).collect()
}

fn start_point(job: &Job, applied: Step, source: Source, rows: Vec<RankRows>) -> StartPoint {
    StartPoint {
        applied,
        source,
        rows,
        // A member that is lost may have been a step ahead of all who live.
        evaluated: job.evaluated.filter(|step| *step <= applied),
        checkpoint: job.checkpoint.filter(|step| *step <= applied),
        usual_loss: (job.health.usual_loss.mean, job.health.usual_loss.steps),
        skip: job.health.record.skip.iter().filter(|step| **step > applied).copied().collect(),
    }
}

/// How many rows of `step` members of the old generation had that do not stay in the new one with what they had, and that no
/// sum keeps.
fn requeued(
    job: &Job,
    step: Step,
    rows_of_step: &[u64],
    stays: impl Fn(&WorkerId) -> bool,
    dealt: &[RankRows],
) -> u64 {
    let Some(old) = &job.generation else { return 0 };
    let world_size = old.members.len() as u32;
    let explicit = old.start.applied.next() == step && !old.start.rows.is_empty();
    let mut count = 0;
    for (rank, member) in (0u32..).zip(&old.members) {
        if stays(&member.worker) {
            continue;
        }
        let had: Vec<u64> = match old.start.rows.get(rank as usize) {
            Some(rows) if explicit => rows.kept.iter().chain(&rows.compute).copied().collect(),
            _ => order::slice(rows_of_step, world_size, rank).to_vec(),
        };
        let is_kept = |row: &u64| dealt.iter().any(|rank| rank.kept.contains(row));
        count += had.iter().filter(|row| !is_kept(row)).count() as u64;
    }
    count
}
