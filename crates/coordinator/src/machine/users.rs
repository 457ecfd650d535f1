//! What users ask for, the queue, and preparing data.

use std::sync::Arc;

use shanty_config::JobSpec;
use shanty_diagnostic::{Diagnose, Diagnostic};
use shanty_proto::{Attempt, JobId, Step};

use super::{
    Machine,
    edits::{self, Ignored},
    effect::{Effect, Refusal, Reply},
    event::Moment,
    job::{Job, Phase},
    record::{DataFacts, JobState},
    retry::{self, Cause},
    turns::Standing,
};

/// Longest job name that is taken over into the id as it is.
const LONGEST_SLUG: usize = 60;

impl Machine {
    fn reply(&mut self, request: u64, outcome: Result<Reply, Refusal>) {
        self.effects.push(Effect::Reply { request, outcome });
    }

    pub(super) fn submit(
        &mut self,
        now: Moment,
        request: u64,
        request_id: String,
        spec: Arc<JobSpec>,
        spec_json: Arc<str>,
    ) {
        let known = self.jobs.values().find(|job| !request_id.is_empty() && job.request_id == request_id);
        if let Some(job) = known {
            let outcome = if job.spec_json == spec_json {
                Ok(Reply::Submitted(job.id.clone()))
            } else {
                Err(Refusal::OtherSpec(job.id.clone()))
            };
            return self.reply(request, outcome);
        }
        let same_store = |job: &&Job| {
            let (one, other) = (&job.spec.checkpoint, &spec.checkpoint);
            let same_folder = one.folder(&job.spec.name) == other.folder(&spec.name);
            other.store.is_some() && (one.store == other.store || same_folder)
        };
        if let Some(job) = self.jobs.values().find(same_store) {
            let refusal = Refusal::StoreTaken(job.id.clone());
            return self.reply(request, Err(refusal));
        }
        let Some(id) = self.new_id(&spec.name) else {
            return self.reply(request, Err(Refusal::BadName(spec.name.clone())));
        };
        let sequence = self.take_sequence();
        // Empty request ids would all be the same; such a submission cannot be repeated.
        let request_id = if request_id.is_empty() { format!("job:{id}") } else { request_id };
        let mut job = Job::new(id.clone(), sequence, request_id, spec, spec_json);
        job.submitted_unix_ms = now.unix_ms;
        self.note(now, &mut job, "submitted", format!("job {id}"));
        self.save(&job);
        self.jobs.insert(id.clone(), job);
        self.reply(request, Ok(Reply::Submitted(id)));
    }

    pub(super) fn take_sequence(&mut self) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        sequence
    }

    /// The job's name, with a number behind it where it is taken.
    fn new_id(&self, name: &str) -> Option<JobId> {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
        let slug: String = name.chars().map(plain).take(LONGEST_SLUG).collect();
        let slug = slug.trim_matches('-');
        let numbered = (2u32..).map(|number| format!("{slug}-{number}"));
        let mut candidates = std::iter::once(slug.to_owned()).chain(numbered);
        let free = candidates.find_map(|text| match JobId::new(text) {
            Ok(id) if self.jobs.contains_key(&id) => None,
            other => Some(other.ok()),
        });
        free.flatten()
    }

    pub(super) fn cancel(&mut self, now: Moment, request: u64, id: &JobId) {
        let outcome = self.with_job(id, |machine, job| match job.phase {
            // Cancelling twice is no mistake; cancelling what has ended otherwise is.
            Phase::Ended(JobState::Cancelled) => Ok(Reply::Cancelled(JobState::Cancelled)),
            Phase::Ended(state) => Err(Refusal::WrongState { job: job.id.clone(), action: "cancel", state }),
            _ => {
                machine.end(now, job, JobState::Cancelled, "cancelled by its user".to_owned());
                Ok(Reply::Cancelled(JobState::Cancelled))
            }
        });
        self.reply(request, outcome.unwrap_or_else(|| Err(Refusal::NoSuchJob(id.clone()))));
    }

    pub(super) fn resume(
        &mut self,
        now: Moment,
        request: u64,
        id: &JobId,
        job_file: Option<&serde_json::Value>,
    ) {
        let outcome = self.with_job(id, |machine, job| {
            let ignored = edits::ignored(&job.spec_json, job_file);
            let resumed = |job: &Job, ignored: Vec<Ignored>| Reply::Resumed {
                attempt: job.attempt,
                step: job.checkpoint.unwrap_or_default(),
                ignored,
            };
            let refuse =
                |job: &Job| Refusal::WrongState { job: job.id.clone(), action: "resume", state: job.state() };
            let nobody_is_back = job.crew.members.iter().all(|member| !member.attached);
            match job.phase {
                Phase::Ended(JobState::Succeeded) => return Err(refuse(job)),
                Phase::Ended(_) => {}
                // Interrupted: the coordinator was restarted, and no member has come back yet.
                Phase::Running | Phase::Leaving(_) if nobody_is_back => {}
                Phase::Running | Phase::Leaving(_) => return Err(refuse(job)),
                // It is on its way already.
                Phase::Queued | Phase::Preparing | Phase::Forming(_) => {
                    machine.tell_ignored(now, job, &ignored);
                    return Ok(resumed(job, ignored));
                }
            }
            for (worker, _) in machine.assigned_to(&job.id, job.attempt) {
                let session = machine.sessions.get_mut(&worker).expect("it was just listed");
                session.assigned = None;
                session.ready_since = None;
            }
            job.attempt = job.attempt.next();
            job.sequence = machine.take_sequence();
            job.phase = Phase::Queued;
            job.standing = Standing::default();
            job.reason = "waits for its turn".to_owned();
            job.failure = None;
            job.formed = false;
            job.advanced = false;
            job.fruitless = 0;
            job.total_losses = 0;
            job.furthest = Step(0);
            job.broken = None;
            job.base_hash = None;
            job.adapter.clear();
            job.ended_unix_ms = 0;
            let text = format!("attempt {}", job.attempt);
            machine.note(now, job, "resumed", text);
            machine.tell_ignored(now, job, &ignored);
            machine.save(job);
            Ok(resumed(job, ignored))
        });
        self.reply(request, outcome.unwrap_or_else(|| Err(Refusal::NoSuchJob(id.clone()))));
    }

    /// A job goes on as it was submitted: what its file says now is named, so that nobody wonders.
    fn tell_ignored(&mut self, now: Moment, job: &mut Job, ignored: &[Ignored]) {
        if ignored.is_empty() {
            return;
        }
        let keys: Vec<String> = ignored.iter().map(ToString::to_string).collect();
        let text = format!("the job goes on as it was submitted; not obeyed: {}", keys.join(", "));
        self.note(now, job, "job_file_differs", text);
    }

    pub(super) fn start_preparing(&mut self, now: Moment, job: &mut Job) {
        job.phase = Phase::Preparing;
        job.reason = "prepares its data".to_owned();
        let known = job.facts.as_ref().map(|facts| facts.hash.clone());
        self.effects.push(Effect::Prepare { job: job.id.clone(), attempt: job.attempt, known });
        self.note(now, job, "preparing", "tokenises, packs and hashes the data".to_owned());
        self.save(job);
    }

    pub(super) fn prepare_progress(&mut self, job: &JobId, attempt: Attempt, text: &str) {
        let _ = self.with_job(job, |machine, job| {
            if matches!(job.phase, Phase::Preparing) && job.attempt == attempt {
                machine.set_reason(job, format!("prepares its data: {text}"));
            }
        });
    }

    pub(super) fn prepare_ended(
        &mut self,
        now: Moment,
        job: &JobId,
        attempt: Attempt,
        outcome: Result<DataFacts, Diagnostic>,
    ) {
        let _ = self.with_job(job, |machine, job| {
            if !matches!(job.phase, Phase::Preparing) || job.attempt != attempt {
                return;
            }
            let facts = match outcome {
                Ok(facts) => facts,
                Err(error) => return machine.preparation_failed(now, job, error),
            };
            job.standing.prepare_failures = 0;
            let text = format!("{} rows to train, {} to evaluate", facts.train_rows, facts.eval_rows);
            if let Some(before) = &job.facts
                && before.hash != facts.hash
                && job.watermark > Step(0)
            {
                let message = format!(
                    "the prepared data of job {} is no longer what it was trained on (hash {}, was {})",
                    job.id, facts.hash, before.hash
                );
                let hint = "submit a new job: steps of two data sets do not make one run";
                return machine.fail(now, job, Diagnostic::new("SH0774", message).hint(hint));
            }
            let warnings = facts.warnings.clone();
            if let Err(error) = job.set_facts(facts) {
                return machine.fail(now, job, error.diagnostic());
            }
            machine.note(now, job, "prepared", text);
            for warning in warnings {
                machine.note(now, job, "warning", warning);
            }
            if job.standing.active {
                return machine.start_forming(now, job);
            }
            job.phase = Phase::Queued;
            job.standing.prepared = true;
            job.reason = "its data is prepared; waits for its turn".to_owned();
            machine.save(job);
        });
    }

    /// What a repeat may help is prepared again after a while; all else fails the job.
    fn preparation_failed(&mut self, now: Moment, job: &mut Job, error: Diagnostic) {
        job.standing.prepare_failures += 1;
        let (times, bound) = (job.standing.prepare_failures, self.options.total_losses);
        let Some(pause) = retry::again(Cause::from(error.kind), times, bound, self.options.retry_pause)
        else {
            return self.fail(now, job, error);
        };
        job.phase = Phase::Queued;
        job.standing.active = false;
        job.standing.not_before = now.monotonic + pause;
        job.reason = format!(
            "its data could not be prepared ({}: {}); tried again in {:.0} s",
            error.code,
            error.message,
            pause.as_secs_f64()
        );
        let reason = job.reason.clone();
        self.note(now, job, "prepare_failed", reason);
        self.save(job);
    }

    /// Nobody can be leased rows any more: the job fails. One that still waits will prepare its data anyway.
    pub(super) fn data_lost(&mut self, now: Moment, job: &JobId, error: Diagnostic) {
        let _ = self.with_job(job, |machine, job| {
            if job.wants_workers() {
                machine.fail(now, job, error);
            }
        });
    }
}
