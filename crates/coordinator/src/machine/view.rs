//! What status shows of a job.

use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::{
    Machine,
    event::{MemberPhase, Moment, Timings},
    job::{Job, Phase},
    ledger::Ledger,
    record::{
        CheckpointRecord, EvaluationRecord, EventRecord, FailureRecord, JobState, RecoveryRecord, StepRecord,
    },
    straggler::Straggler,
};

/// A job as status shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct JobView {
    /// Its id.
    pub id: JobId,
    /// Its state.
    pub state: JobState,
    /// For whom it runs.
    pub owner: String,
    /// The higher, the sooner.
    pub priority: i32,
    /// Its place among those that wait, from 1.
    pub place: Option<u32>,
    /// Workers that are its by the rules of the queue.
    pub share: u32,
    /// Why, in words.
    pub reason: String,
    /// The current try.
    pub attempt: Attempt,
    /// The newest generation.
    pub generation: Generation,
    /// Highest step known to be committed.
    pub step: Step,
    /// Updates in all.
    pub steps: Step,
    /// Passes over the data so far.
    pub epoch: f64,
    /// The last committed step that has a record.
    pub last_step: Option<StepRecord>,
    /// Trained tokens a second, smoothed.
    pub tokens_per_second: f64,
    /// Seconds to the last step at the present rate.
    pub eta_seconds: Option<f64>,
    /// Members, then workers that load or wait.
    pub members: Vec<MemberView>,
    /// Rows by what became of them.
    pub ledger: Ledger,
    /// Newest checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointRecord>,
    /// Evaluations, in order.
    pub evaluations: Vec<EvaluationRecord>,
    /// Newest events, oldest first.
    pub events: Vec<EventRecord>,
    /// The finished adapter's folder.
    pub adapter: String,
    /// Why it failed.
    pub failure: Option<FailureRecord>,
    /// For people.
    pub submitted_unix_ms: u64,
    /// For people; 0 before.
    pub started_unix_ms: u64,
    /// For people; 0 before.
    pub ended_unix_ms: u64,
    /// How the crew fares.
    pub crew: CrewView,
}

/// How a crew fares.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CrewView {
    /// How long a member may be without progress; nothing before it is learnt.
    pub deadline_seconds: Option<f64>,
    /// The usual step.
    pub usual_step_seconds: Option<f64>,
    /// Members that the others wait for.
    pub stragglers: Vec<Straggler>,
    /// Workers that wait to take a member's place.
    pub spares: Vec<WorkerId>,
    /// Newest first.
    pub recoveries: Vec<RecoveryRecord>,
    /// Members lost.
    pub losses: u64,
    /// Restarts of the coordinator.
    pub coordinator_restarts: u64,
}

/// A worker as status shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberView {
    /// The worker.
    pub worker: WorkerId,
    /// Its host.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// Its device.
    pub device: String,
    /// Its place, if it is a member.
    pub rank: Option<Rank>,
    /// What it does.
    pub phase: MemberPhase,
    /// Updates applied.
    pub step: Step,
    /// Seconds since it was last heard.
    pub beat_age_seconds: f64,
    /// Why it is lost.
    pub reason: String,
    /// Where its time goes.
    pub timings: Timings,
    /// Whether it waits to take a member's place.
    pub spare: bool,
    /// Whether it was asked to end.
    pub draining: bool,
}

impl Machine {
    pub(super) fn view_of(&self, now: Moment, job: &Job) -> JobView {
        let steps = job.steps();
        let remaining = steps.0.saturating_sub(job.watermark.0) as f64;
        let eta = (job.seconds_per_step > 0.0 && !job.is_ended()).then_some(remaining * job.seconds_per_step);
        let members = self.members_of(now, job);
        let steps_per_epoch = job.order.as_ref().map_or(0, |order| order.steps_per_epoch());
        JobView {
            id: job.id.clone(),
            state: job.state(),
            owner: job.owner().to_owned(),
            priority: job.priority(),
            place: job.standing.place,
            share: job.standing.share,
            reason: job.reason.clone(),
            attempt: job.attempt,
            generation: job.generation_number(),
            step: job.watermark,
            steps,
            epoch: if steps_per_epoch > 0 { job.watermark.0 as f64 / steps_per_epoch as f64 } else { 0.0 },
            last_step: job.last_step.clone(),
            tokens_per_second: job.tokens_per_second,
            eta_seconds: eta,
            crew: crew_of(job, &members),
            members,
            ledger: job.ledger(self.options.steps_ahead),
            checkpoints: job.checkpoints.clone(),
            evaluations: job.evaluations.clone(),
            events: job.events.clone(),
            adapter: job.adapter.clone(),
            failure: job.failure.clone(),
            submitted_unix_ms: job.submitted_unix_ms,
            started_unix_ms: job.started_unix_ms,
            ended_unix_ms: job.ended_unix_ms,
        }
    }

    fn members_of(&self, now: Moment, job: &Job) -> Vec<MemberView> {
        let age = |worker: &WorkerId| {
            let session = self.sessions.get(worker)?;
            Some(now.monotonic.saturating_sub(session.last_heard).as_secs_f64())
        };
        let mut views = Vec::new();
        for (rank, member) in (0u32..).zip(&job.crew.members) {
            let is_past = job.is_ended() && !member.attached && member.lost.is_none();
            if is_past || matches!(job.phase, Phase::Queued | Phase::Preparing) {
                continue;
            }
            let lost = member.lost.clone().or_else(|| (!member.attached).then(|| "not connected".to_owned()));
            views.push(MemberView {
                worker: member.worker.clone(),
                host: member.host.clone(),
                pid: member.pid,
                device: member.device.clone(),
                rank: Some(Rank(rank)),
                phase: if member.lost.is_some() { MemberPhase::Lost } else { member.phase },
                step: member.step,
                beat_age_seconds: age(&member.worker).unwrap_or_default(),
                reason: lost.unwrap_or_default(),
                timings: member.timings,
                spare: false,
                draining: self.is_draining(&member.worker),
            });
        }
        for (worker, session) in &self.sessions {
            if !session.is_assigned_to(job) || job.crew.of(worker).is_some_and(|member| member.lost.is_none())
            {
                continue;
            }
            views.retain(|view| view.worker != *worker);
            views.push(MemberView {
                worker: worker.clone(),
                host: session.info.host.clone(),
                pid: session.info.pid,
                device: session.info.device.clone(),
                rank: None,
                phase: if session.ready_since.is_some() { MemberPhase::Ready } else { MemberPhase::Loading },
                step: Step(0),
                beat_age_seconds: age(worker).unwrap_or_default(),
                reason: String::new(),
                timings: Timings::default(),
                spare: session.ready_since.is_some() && !session.draining && job.is_stepping(),
                draining: session.draining,
            });
        }
        views
    }
}

fn crew_of(job: &Job, members: &[MemberView]) -> CrewView {
    let health = &job.health;
    CrewView {
        deadline_seconds: health.pace.deadline().map(|deadline| deadline.as_secs_f64()),
        usual_step_seconds: health.pace.usual(),
        stragglers: job.stragglers(),
        spares: members.iter().filter(|view| view.spare).map(|view| view.worker.clone()).collect(),
        recoveries: health.record.recoveries.iter().rev().cloned().collect(),
        losses: health.record.losses,
        coordinator_restarts: health.record.coordinator_restarts,
    }
}
