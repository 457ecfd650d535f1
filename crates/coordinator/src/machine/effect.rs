//! What the machine wants done.

use std::{sync::Arc, time::Duration};

use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::edits::Ignored;
use super::record::{
    CheckpointRecord, DataFacts, EvaluationRecord, EventRecord, GenerationRecord, JobRecord, JobState,
    StepRecord,
};

/// Something to be done. All [`Effect::Persist`] of one list are durable before anything else of it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Make durable, and wait for it.
    Persist(Change),
    /// Make durable, in order; nothing waits for it.
    Record(Change),
    /// Say something to a worker.
    Send {
        /// The worker.
        worker: WorkerId,
        /// Its stream.
        session: u64,
        /// What.
        message: Message,
    },
    /// End a worker's stream.
    Close {
        /// The worker.
        worker: WorkerId,
        /// Its stream.
        session: u64,
        /// Why.
        reason: String,
    },
    /// Prepare a job's data; ends with `PrepareEnded`.
    Prepare {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// Hash of the prepared data, if it was prepared before.
        known: Option<String>,
    },
    /// Stop preparing.
    StopPrepare {
        /// The job.
        job: JobId,
    },
    /// Find a job's newest good checkpoint; ends with `CheckpointFound`.
    FindCheckpoint {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// None beyond this step is wanted.
        up_to: Option<Step>,
    },
    /// Answer a user's request.
    Reply {
        /// Which.
        request: u64,
        /// With what.
        outcome: Result<Reply, Refusal>,
    },
    /// State, reason or members of a job changed.
    StatusChanged(JobId),
    /// Tell those who watch a job.
    Publish(JobId, Point),
}

/// A point of a job's history.
#[derive(Debug, Clone, PartialEq)]
pub enum Point {
    /// A step was committed.
    Step(StepRecord),
    /// The held-out rows were evaluated.
    Evaluation(EvaluationRecord),
    /// A checkpoint exists.
    Checkpoint(CheckpointRecord),
    /// Something else happened.
    Event(EventRecord),
}

/// A durable change.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// All of a job, but for its history.
    Job(Box<JobRecord>),
    /// A job's watermark alone.
    Watermark(JobId, Step),
    /// A committed step; a higher generation replaces a lower.
    Step(JobId, StepRecord),
    /// An evaluation.
    Evaluation(JobId, EvaluationRecord),
    /// A checkpoint.
    Checkpoint(JobId, CheckpointRecord),
    /// Checkpoints are gone, by their paths.
    CheckpointsRemoved(JobId, Vec<String>),
    /// An event.
    Event(JobId, EventRecord),
    /// Steps and evaluations after this one are no longer in the lineage.
    Truncate(JobId, Step),
    /// A token was made.
    Token(crate::access::TokenRecord),
    /// A token is no more.
    TokenGone(shanty_access::TokenId),
}

/// What a worker is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The stream is accepted.
    Welcome {
        /// Whether the worker's attachment holds.
        attached: bool,
    },
    /// A beat was heard.
    BeatAck {
        /// Which.
        sequence: u64,
        /// The credit, if any.
        credit: Option<CreditGiven>,
    },
    /// Load a job's base.
    Assign {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// The job file as JSON.
        spec_json: Arc<str>,
        /// The prepared data.
        facts: DataFacts,
        /// Updates in all.
        steps: Step,
        /// The part of the base to load, where workers share one.
        part: Option<u32>,
    },
    /// A generation begins.
    Form {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// The receiver's place.
        rank: Rank,
        /// The generation.
        generation: Arc<GenerationRecord>,
    },
    /// Leave a generation.
    Leave {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// The generation.
        generation: Generation,
        /// Why.
        reason: String,
        /// Once this step is applied, and not before; at once if nothing.
        after: Option<Step>,
    },
    /// Write a checkpoint of the state that you left a generation with.
    Keep {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// The generation.
        generation: Generation,
        /// Updates applied.
        step: Step,
    },
    /// The job needs the worker no longer.
    Release {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// Whether it ended as it should.
        succeeded: bool,
        /// Why.
        reason: String,
    },
    /// Say that you are draining, and end when you are told that you may.
    Drain {
        /// Why.
        reason: String,
    },
    /// What the worker held is in other hands: it may end.
    Drained {
        /// Why.
        reason: String,
    },
}

/// Leave to apply steps, for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreditGiven {
    /// Of this generation,
    pub generation: Generation,
    /// up to and including this step.
    pub up_to: Step,
    /// How long a member may be without progress.
    pub deadline: Duration,
}

/// The answer to a user's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The job that was made, or was there.
    Submitted(JobId),
    /// The job's state now.
    Cancelled(JobState),
    /// The job goes on.
    Resumed {
        /// The attempt that begins.
        attempt: Attempt,
        /// The step of its checkpoint.
        step: Step,
        /// What differs between the job and the job file of the request, and is not obeyed.
        ignored: Vec<Ignored>,
    },
    /// The worker is asked to end; the job that it is at work for.
    Draining(Option<JobId>),
}

/// Why a user's request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such job.
    NoSuchJob(JobId),
    /// The job's state does not allow it.
    WrongState {
        /// The job.
        job: JobId,
        /// What was asked for.
        action: &'static str,
        /// Its state.
        state: JobState,
    },
    /// The name makes no id.
    BadName(String),
    /// Another job has the same store.
    StoreTaken(JobId),
    /// The request id belongs to another job with another spec.
    OtherSpec(JobId),
    /// No such worker is connected.
    NoSuchWorker(WorkerId),
}
