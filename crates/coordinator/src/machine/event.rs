//! What the machine is told.

use std::{sync::Arc, time::Duration};

use shanty_config::JobSpec;
use shanty_diagnostic::Diagnostic;
use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::record::{CheckpointRecord, DataFacts};

/// A moment, as the caller's clocks show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moment {
    /// Monotonic; what every decision is made by.
    pub monotonic: Duration,
    /// Milliseconds since the Unix epoch; copied into records for people, never compared.
    pub unix_ms: u64,
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Time passed.
    Tick,
    /// A user hands in a job.
    Submit {
        /// Names the answer.
        request: u64,
        /// Repeats of one submission carry the same.
        request_id: String,
        /// The job.
        spec: Arc<JobSpec>,
        /// The same as JSON.
        spec_json: Arc<str>,
    },
    /// A user stops a job.
    Cancel {
        /// Names the answer.
        request: u64,
        /// The job.
        job: JobId,
    },
    /// A user starts the next attempt.
    Resume {
        /// Names the answer.
        request: u64,
        /// The job.
        job: JobId,
        /// The job file as it is now, if the user has one.
        job_file: Option<serde_json::Value>,
    },
    /// Preparing the data goes on.
    PrepareProgress {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// How far it is, in words.
        text: String,
    },
    /// Preparing the data ended.
    PrepareEnded {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// What came of it.
        outcome: Result<DataFacts, Diagnostic>,
    },
    /// The prepared data of a job at work cannot be opened any more.
    DataLost {
        /// The job.
        job: JobId,
        /// Why.
        error: Diagnostic,
    },
    /// The newest good checkpoint was looked for.
    CheckpointFound {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// What was found; nothing if there is none.
        outcome: Result<Option<CheckpointRecord>, Diagnostic>,
        /// Checkpoints that are there but cannot be used, with the reason.
        damaged: Vec<String>,
    },
    /// A worker's stream began.
    Hello {
        /// The worker.
        worker: WorkerId,
        /// Number of its stream; grows.
        session: u64,
        /// What it is.
        info: WorkerInfo,
        /// The generation it believes to belong to.
        attachment: Option<Attachment>,
    },
    /// A worker said something.
    Said {
        /// The worker.
        worker: WorkerId,
        /// Its stream.
        session: u64,
        /// What it said.
        message: Said,
    },
    /// A user asks a worker to hand back what it holds and to end.
    Drain {
        /// Names the answer.
        request: u64,
        /// The worker.
        worker: WorkerId,
    },
    /// A worker's stream ended.
    Down {
        /// The worker.
        worker: WorkerId,
        /// Its stream.
        session: u64,
        /// How.
        reason: String,
    },
}

/// What a worker is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkerInfo {
    /// Host name.
    pub host: String,
    /// Process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// `cpu`, `cuda:0`, …
    pub device: String,
    /// Where it accepts its neighbours' connections.
    pub address: String,
    /// The part of a shared base that it has loaded.
    pub part: Option<u32>,
    /// The one job that it may work for; any, if none is named.
    pub only: Option<JobId>,
    /// It was asked to end before this stream began.
    pub draining: bool,
}

/// A worker's claim to belong to a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The generation.
    pub generation: Generation,
    /// The worker's place in it.
    pub rank: Rank,
    /// Updates applied.
    pub applied: Step,
}

/// Which generation a message is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Within {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The generation.
    pub generation: Generation,
}

/// What a step's reduction must amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Announcement {
    /// Trained tokens.
    pub tokens: u64,
    /// Rows.
    pub rows: u64,
    /// Wrapping sum of the hashes of the row ids.
    pub row_hash: u64,
}

/// Where a worker's time went.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Timings {
    /// Waiting for rows.
    pub data_seconds: f64,
    /// Forward and backward.
    pub compute_seconds: f64,
    /// All-reduce.
    pub reduce_seconds: f64,
    /// Optimizer.
    pub update_seconds: f64,
    /// Tokens that the worker computed.
    pub tokens: u64,
}

/// What a member does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are those of the wire's MemberPhase, documented there")]
pub enum MemberPhase {
    #[default]
    Idle,
    Loading,
    Ready,
    Forming,
    Computing,
    Reducing,
    Evaluating,
    Waiting,
    Lost,
    Writing,
}

impl MemberPhase {
    /// Whether a member in this phase is at work on a step.
    pub(crate) fn is_of_a_step(self) -> bool {
        matches!(self, Self::Computing | Self::Reducing)
    }

    /// Whether a member in this phase does something by itself, so that nobody else is to blame if it gets nowhere.
    pub(crate) fn is_its_own(self) -> bool {
        matches!(self, Self::Computing | Self::Evaluating | Self::Forming | Self::Writing)
    }
}

/// A step was applied.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// In which generation.
    pub within: Within,
    /// The step.
    pub step: Step,
    /// The reporter's place.
    pub rank: Rank,
    /// Mean loss a trained token.
    pub loss: f64,
    /// What the reduction gave.
    pub reduced: Announcement,
    /// What was leased; the caller knows the prepared data.
    pub leased: Announcement,
    /// Global norm before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// How long the step took.
    pub seconds: f64,
    /// Where the time went.
    pub timings: Timings,
    /// Why the step was passed over, if it was.
    pub skipped: Option<String>,
    /// Samples of the reporter that the reason is about.
    pub bad_samples: Vec<u64>,
}

/// A gradient sum that a worker keeps, by its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptSum {
    /// The step that it is of.
    pub step: Step,
    /// Its rows.
    pub rows: Vec<u64>,
}

/// What a worker says on its stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// A sign of life.
    Beat {
        /// Counts the beats of a stream.
        sequence: u64,
        /// What the worker does.
        phase: MemberPhase,
        /// The generation that it takes part in.
        attachment: Option<Attachment>,
        /// Grows with what its trainer gets done.
        progress: u64,
    },
    /// The base is loaded.
    BaseReady {
        /// For this job,
        job: JobId,
        /// this attempt.
        attempt: Attempt,
        /// What was loaded.
        base_hash: String,
        /// How long it took.
        seconds: f64,
        /// Numbers that are trained.
        trainable_parameters: u64,
        /// The part that was loaded, where workers share a base.
        part: Option<u32>,
    },
    /// The worker cannot go on with the job.
    Failure {
        /// The job.
        job: JobId,
        /// Its attempt.
        attempt: Attempt,
        /// Why.
        error: Diagnostic,
    },
    /// A step was applied.
    Step(StepReport),
    /// The worker's collective failed.
    Broken {
        /// In which generation.
        within: Within,
        /// What happened.
        error: String,
    },
    /// The worker left a generation.
    Left {
        /// Which.
        within: Within,
        /// Updates applied.
        applied: Step,
        /// Whether it holds adapter and optimizer. One that never got the generation's state does not.
        holds_state: bool,
        /// Their hash.
        hash: String,
        /// The sum that it keeps.
        kept: Option<KeptSum>,
    },
    /// A manifest was written.
    Checkpoint {
        /// In which generation.
        within: Within,
        /// After this step.
        step: Step,
        /// Below the job's store.
        path: String,
        /// Bytes.
        size_bytes: u64,
        /// How long it took.
        seconds: f64,
        /// Checkpoints that were deleted for it, by their paths.
        removed: Vec<String>,
        /// How long a step was held up for it.
        held_seconds: f64,
    },
    /// A checkpoint could not be written.
    CheckpointFailed {
        /// In which generation.
        within: Within,
        /// After this step.
        step: Step,
        /// Why.
        error: Diagnostic,
    },
    /// An evaluation was made.
    Evaluation {
        /// In which generation.
        within: Within,
        /// After this step.
        step: Step,
        /// Mean loss a trained token.
        loss: f64,
        /// Trained tokens.
        tokens: u64,
    },
    /// The adapter is written.
    Finished {
        /// In which generation.
        within: Within,
        /// The last step.
        step: Step,
        /// The adapter's folder.
        adapter: String,
    },
    /// The worker leaves for good.
    Goodbye {
        /// Why.
        reason: String,
    },
    /// The worker was asked to end; it stays until it is told that it may.
    Draining {
        /// By whom, or why.
        reason: String,
    },
    /// The ranks compared their adapters, and they are not the same.
    Diverged {
        /// In which generation.
        within: Within,
        /// Updates applied.
        step: Step,
        /// Hash of each rank's adapter.
        hashes: Vec<String>,
    },
    /// A step that the job wants undone. Nothing of it was applied.
    BadStep {
        /// In which generation.
        within: Within,
        /// The step.
        step: Step,
        /// What is bad about it.
        reason: String,
        /// Samples of the worker that the reason is about.
        samples: Vec<u64>,
    },
}
