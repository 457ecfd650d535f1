//! What outlives the coordinator: plain records, as the store keeps them.

use serde::{Deserialize, Serialize};
use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

pub use super::health::{HealthRecord, RecoveryRecord};

/// The life of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Accepted; waits for its turn.
    Queued,
    /// Its data is being prepared.
    Preparing,
    /// Waits for workers.
    Forming,
    /// A generation trains.
    Running,
    /// A generation ended early; the next one is being agreed on.
    Recovering,
    /// Ended: the adapter is written.
    Succeeded,
    /// Ended: it cannot be carried out.
    Failed,
    /// Ended by its user.
    Cancelled,
}

impl JobState {
    /// Whether nothing more happens to the job by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The state in one word, as scripts see it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Forming => "forming",
            Self::Running => "running",
            Self::Recovering => "recovering",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What the prepared data is, as far as order, lease and ledger need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFacts {
    /// Hash of the prepared data.
    pub hash: String,
    /// Hash of the tokenizer's files.
    pub tokenizer_hash: String,
    /// Packed training rows.
    pub train_rows: u64,
    /// Packed held-out rows.
    pub eval_rows: u64,
    /// Tokens of the training rows.
    pub train_tokens: u64,
    /// Those of them that are training targets.
    pub train_trained_tokens: u64,
    /// How an epoch is dealt from weighted sources; empty where each row comes once.
    #[serde(default)]
    pub train_mix: Vec<shanty_data::MixPart>,
    /// What must be said aloud: dropped records, lost answers, a missing end token.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// One fixed membership, with all that its announcement says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationRecord {
    /// Its number.
    pub generation: Generation,
    /// By rank.
    pub members: Vec<MemberRecord>,
    /// Authenticates the collective's connections. Not stored: it follows from the machine's secret.
    #[serde(skip)]
    pub token: [u8; 32],
    /// What it starts from.
    pub start: StartPoint,
}

/// A member of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The worker.
    pub worker: WorkerId,
    /// Where it accepts its neighbours.
    pub address: String,
}

/// What a generation starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartPoint {
    /// Updates already applied.
    pub applied: Step,
    /// Where their result is.
    pub source: Source,
    /// Rows of the first step by rank, when they are not the regular slices.
    pub rows: Vec<RankRows>,
    /// Last evaluated step of the lineage.
    pub evaluated: Option<Step>,
    /// Last step of the lineage that has a checkpoint.
    pub checkpoint: Option<Step>,
    /// What a loss spike is measured by: the usual loss, and of how many steps it is known.
    #[serde(default)]
    pub usual_loss: (f64, u64),
    /// Steps that are passed over.
    #[serde(default)]
    pub skip: Vec<Step>,
}

impl StartPoint {
    /// Whether the generation counts on a state that this rank brings.
    pub fn counts_on(&self, rank: Rank) -> bool {
        matches!(&self.source, Source::Members { receivers, .. } if !receivers.contains(&rank))
    }
}

/// Where a generation's first state is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Initialised from the seed.
    Fresh,
    /// In a checkpoint, below the job's store.
    Checkpoint(String),
    /// With members: one gives it to those that lack it.
    Members {
        /// Who gives.
        donor: Rank,
        /// Who receives.
        receivers: Vec<Rank>,
    },
}

/// A rank's part of a generation's first step.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RankRows {
    /// Rows whose sum it holds.
    pub kept: Vec<u64>,
    /// Rows that it still has to compute.
    pub compute: Vec<u64>,
}

/// Why a job failed; [`Diagnostic`] itself does not store its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// The error.
    pub error: Diagnostic,
    /// Whether it is a defect (as opposed to wrong input).
    pub internal: bool,
}

impl From<Diagnostic> for FailureRecord {
    fn from(error: Diagnostic) -> Self {
        // The kind is not stored with the error: kept apart, and the same before and after a restart.
        Self { internal: error.kind == Kind::Internal, error: error.kind(Kind::User) }
    }
}

impl FailureRecord {
    /// The error, with its kind.
    pub fn diagnostic(&self) -> Diagnostic {
        self.error.clone().kind(if self.internal { Kind::Internal } else { Kind::User })
    }
}

/// All that is durable of a job, but for its history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its id.
    pub id: JobId,
    /// Its place in the order of submission.
    pub sequence: u64,
    /// Chosen by the client that submitted it.
    pub request_id: String,
    /// The job file as JSON.
    pub spec_json: String,
    /// Its state.
    pub state: JobState,
    /// Why it is in this state, in words.
    pub reason: String,
    /// Why it failed.
    pub failure: Option<FailureRecord>,
    /// The current try, from 1.
    pub attempt: Attempt,
    /// Known once the data is prepared.
    pub facts: Option<DataFacts>,
    /// Highest step known to be committed.
    pub watermark: Step,
    /// The newest generation; its number is never given again.
    pub generation: Option<GenerationRecord>,
    /// Last evaluated step of the lineage.
    pub evaluated: Option<Step>,
    /// Last step of the lineage with a checkpoint.
    pub checkpoint: Option<Step>,
    /// Rows that moved to another worker because theirs was lost.
    pub requeued: u64,
    /// Rows trained again after a return to a checkpoint.
    pub recomputed: u64,
    /// Highest step ever committed in this attempt, returns to a checkpoint notwithstanding.
    pub furthest: Step,
    /// Losses of all members since a new step was last reached.
    pub total_losses: u32,
    /// The finished adapter's folder.
    pub adapter: String,
    /// Milliseconds since the Unix epoch, for people.
    pub submitted_unix_ms: u64,
    /// When its first generation formed; 0 before.
    pub started_unix_ms: u64,
    /// When it ended; 0 before.
    pub ended_unix_ms: u64,
    /// What its crew went through.
    #[serde(default)]
    pub health: HealthRecord,
    /// Younger jobs of its priority that began while it waited.
    #[serde(default)]
    pub overtaken: u32,
}

/// A committed step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step.
    pub step: Step,
    /// The attempt that committed it.
    pub attempt: Attempt,
    /// The generation that committed it.
    pub generation: Generation,
    /// Mean loss a trained token.
    pub loss: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Global norm before clipping.
    pub gradient_norm: f64,
    /// Trained tokens.
    pub tokens: u64,
    /// Trained tokens a second.
    pub tokens_per_second: f64,
    /// Members that took part.
    pub workers: u32,
    /// When it was reported.
    pub unix_ms: u64,
    /// Nothing of it is in the adapter.
    #[serde(default)]
    pub skipped: bool,
}

/// An evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// After this step.
    pub step: Step,
    /// Mean loss a trained token.
    pub loss: f64,
    /// Trained tokens.
    pub tokens: u64,
}

/// A checkpoint whose manifest exists.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// The attempt that wrote it.
    pub attempt: Attempt,
    /// After this step.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Below the job's store.
    pub path: String,
    /// Bytes of all its files.
    pub size_bytes: u64,
    /// Time it took to write.
    pub seconds: f64,
    /// When.
    pub unix_ms: u64,
    /// Mean loss of the held-out rows with it, where they were evaluated.
    #[serde(default)]
    pub loss: Option<f64>,
}

/// Something that happened to a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// When.
    pub unix_ms: u64,
    /// `submitted`, `prepared`, `formed`, `member_lost`, …
    pub kind: String,
    /// In words.
    pub text: String,
    /// The worker it is about.
    pub worker: Option<WorkerId>,
    /// The watermark at that moment.
    pub step: Step,
    /// From the last sign of life to the moment a loss was noticed.
    pub detection_ms: Option<f64>,
    /// From the moment a break was noticed to the next committed step.
    pub stall_ms: Option<f64>,
}
