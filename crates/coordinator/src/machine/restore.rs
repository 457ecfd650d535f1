//! Taking up after a restart of the coordinator.

use std::{collections::BTreeSet, sync::Arc};

use shanty_config::JobSpec;
use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

use super::{
    Machine,
    crew::{Credit, Crew, Member},
    event::Moment,
    job::{Forming, Job, Origin, Phase},
    record::{
        CheckpointRecord, EvaluationRecord, EventRecord, GenerationRecord, JobRecord, JobState, StepRecord,
    },
};

/// What the store knows of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredJob {
    /// The job.
    pub record: JobRecord,
    /// Its newest steps, oldest first; enough to tell repeats from news.
    pub steps: Vec<StepRecord>,
    /// Its evaluations, in order.
    pub evaluations: Vec<EvaluationRecord>,
    /// Its newest checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointRecord>,
    /// Its newest events, oldest first.
    pub events: Vec<EventRecord>,
}

impl Machine {
    /// Takes a stored job over. Members of a generation that was alive get a full credit's time to come back; the
    /// predecessor may have answered them up to the moment before it died.
    pub fn restore(&mut self, now: Moment, stored: StoredJob) {
        let StoredJob { record, steps, evaluations, checkpoints, events } = stored;
        let spec: Result<JobSpec, _> = serde_json::from_str(&record.spec_json);
        let (spec, unreadable) = match spec {
            Ok(spec) => (spec, None),
            Err(error) => (unreadable_spec(&record), Some(error.to_string())),
        };
        self.next_sequence = self.next_sequence.max(record.sequence + 1);
        let id = record.id.clone();
        let mut job = Job::new(
            id.clone(),
            record.sequence,
            record.request_id,
            Arc::new(spec),
            Arc::from(record.spec_json.as_str()),
        );
        job.reason = record.reason;
        job.failure = record.failure;
        job.attempt = record.attempt;
        job.watermark = record.watermark;
        job.furthest = record.furthest;
        job.evaluated = record.evaluated;
        job.checkpoint = record.checkpoint;
        job.requeued = record.requeued;
        job.recomputed = record.recomputed;
        job.total_losses = record.total_losses;
        job.adapter = record.adapter;
        job.submitted_unix_ms = record.submitted_unix_ms;
        job.started_unix_ms = record.started_unix_ms;
        job.ended_unix_ms = record.ended_unix_ms;
        job.health.record = record.health;
        job.health.record.time.catch_up(&steps);
        job.health.pace.least = self.options.hang_least;
        for pair in steps.windows(2) {
            let step = &pair[1];
            let follows = pair[0].generation == step.generation && step.tokens_per_second > 0.0;
            if follows {
                job.health.pace.learn(step.tokens as f64 / step.tokens_per_second, false);
            }
            if !step.skipped {
                job.health.usual_loss.learn(step.loss);
            }
        }
        job.standing.overtaken = record.overtaken;
        job.standing.active =
            matches!(record.state, JobState::Forming | JobState::Running | JobState::Recovering);
        job.recorded = steps.iter().map(|step| step.step).collect::<BTreeSet<_>>();
        job.last_step = steps.last().cloned();
        job.tokens_per_second = steps.last().map_or(0.0, |step| step.tokens_per_second);
        job.evaluations = evaluations;
        job.checkpoints = checkpoints;
        job.events = events;
        if let Some(mut generation) = record.generation {
            // It is not stored.
            if generation.token == [0; 32] {
                generation.token = self.token(&id, generation.generation);
            }
            job.crew = self.crew_of(now, &generation);
            job.generation = Some(Arc::new(generation));
        }
        let facts = record.facts.map_or(Ok(()), |facts| job.set_facts(facts));
        let impossible = match (facts, unreadable) {
            (Err(error), _) => Some(error.diagnostic()),
            (_, Some(reason)) => {
                let message = format!("the stored job file of {id} cannot be read: {reason}");
                Some(Diagnostic::new("SH0773", message).kind(Kind::Internal))
            }
            _ => None,
        };
        let had_generation = job.generation.is_some();
        job.phase = match record.state {
            JobState::Queued | JobState::Preparing => Phase::Queued,
            JobState::Forming if had_generation => {
                Phase::Forming(Forming { origin: Origin::Fenced, enough_since: None })
            }
            JobState::Forming => Phase::Forming(Forming { origin: Origin::Fresh, enough_since: None }),
            // Everybody had gone, in good order: there is nobody to wait for.
            JobState::Recovering if job.health.record.handed_over => {
                job.formed = true;
                job.crew.all_out();
                Phase::Forming(Forming { origin: Origin::Fenced, enough_since: None })
            }
            // Whoever comes back with the state after all is heard; nobody is lost a second time.
            JobState::Recovering if job.health.record.all_lost => {
                job.formed = true;
                job.health.record.coordinator_restarts += 1;
                Phase::Forming(Forming { origin: Origin::Fenced, enough_since: None })
            }
            JobState::Running | JobState::Recovering => {
                job.formed = true;
                job.health.record.coordinator_restarts += 1;
                job.reason = "the coordinator was restarted; waits for the members to come back".to_owned();
                Phase::Running
            }
            state => Phase::Ended(state),
        };
        if job.is_ended() {
            self.fading.insert(id.clone());
        } else {
            let text = format!("taken up in state {} at step {}", record.state.as_str(), job.watermark);
            self.note(now, &mut job, "coordinator_restarted", text);
            if let Some(error) = impossible {
                self.fail(now, &mut job, error);
            }
        }
        self.jobs.insert(id, job);
    }

    fn crew_of(&self, now: Moment, generation: &GenerationRecord) -> Crew {
        let until = now.monotonic + self.options.credit;
        let member = |record: &super::record::MemberRecord| {
            let mut member = Member::new(record.worker.clone());
            member.credit = Credit::Until(until);
            member.back_by = Some(until);
            member.step = generation.start.applied;
            member.progressed = now.monotonic;
            member
        };
        Crew::new(generation.members.iter().map(member).collect())
    }
}

/// Stands in for a spec that this version cannot read, so that the job can still be listed.
fn unreadable_spec(record: &JobRecord) -> JobSpec {
    let json = serde_json::json!({
        "name": record.id.as_str(),
        "base": { "model": "" },
        "adapter": {},
        "data": { "train": "" },
    });
    serde_json::from_value(json).expect("a job file needs no more than this")
}
