//! What can go wrong in a worker.

use std::{io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};
use shanty_proto::v1::ErrorDetail;

/// What can go wrong in a worker.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The reduction of a step amounts to something else than the lease announced.
    #[error(
        "step {step} reduced {got_rows} rows, {got_tokens} trained tokens, row hash {got_hash:016x}; \
         announced were {rows} rows, {tokens} trained tokens, row hash {hash:016x}"
    )]
    WrongSum {
        /// The step.
        step: u64,
        /// Rows announced.
        rows: u64,
        /// Trained tokens announced.
        tokens: u64,
        /// Row hash announced.
        hash: u64,
        /// Rows reduced.
        got_rows: u64,
        /// Trained tokens reduced.
        got_tokens: u64,
        /// Row hash reduced.
        got_hash: u64,
    },
    /// Loss or gradient is not a number.
    #[error("{what} of step {step} is not finite{}", in_rows(.rows))]
    NotFinite {
        /// `the loss` or `the gradient`.
        what: &'static str,
        /// The step.
        step: u64,
        /// Rows of this worker that it comes from; empty if it comes from another rank.
        rows: Vec<u64>,
    },
    /// Two members hold different bits where they must hold the same.
    #[error("state of step {step} that rank {donor} gave differs from {what}")]
    StateDiffers {
        /// Updates in the state.
        step: u64,
        /// The rank that gave it.
        donor: u32,
        /// What it was compared with.
        what: &'static str,
    },
    /// The coordinator sent something that the step protocol does not allow.
    #[error("the coordinator's {message} cannot be followed: {reason}")]
    Protocol {
        /// The message.
        message: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Leased rows are not what was asked for.
    #[error("rows leased for step {step} are not those asked for: {reason}")]
    WrongRows {
        /// The step.
        step: u64,
        /// What is wrong with them.
        reason: String,
    },
    /// The row log cannot be written or read.
    #[error("failed to use row log `{}`: {source}", path.display())]
    RowLog {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The finished adapter cannot be written.
    #[error("failed to write adapter `{}`: {source}", path.display())]
    WriteAdapter {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The coordinator's address is not one.
    #[error("`{address}` is not a coordinator's address")]
    Address {
        /// The address.
        address: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator at {address} refused this worker: {reason}")]
    Refused {
        /// The coordinator's address.
        address: String,
        /// What it said.
        reason: String,
    },
    /// The device's name makes no sense.
    #[error("device `{device}` is unknown")]
    UnknownDevice {
        /// The device.
        device: String,
    },
    /// A thread or process of the worker could not be started, or ended by itself.
    #[error("failed to run {what}: {source}")]
    Process {
        /// What was to run.
        what: String,
        /// Why it could not.
        source: io::Error,
    },
    /// The trainer's thread ended without a word.
    #[error("the training thread ended unexpectedly")]
    TrainerGone,
    /// `SHANTY_FAILPOINT` cannot be understood.
    #[error("failpoint `{text}` cannot be understood")]
    Failpoint {
        /// The text.
        text: String,
    },
    /// The trainer does not answer any more.
    #[error(
        "the training thread has not answered for {seconds:.0} s: it hangs in the driver, or in a collective"
    )]
    Hung {
        /// For how long.
        seconds: f64,
    },
    /// A loss is out of all proportion.
    #[error("{reason} in step {step}")]
    LossSpike {
        /// The step.
        step: u64,
        /// The loss beside the usual one.
        reason: String,
    },
    /// A test simulated the death of this worker.
    #[error("killed at a failpoint")]
    Killed,
    /// From the engine, the data, the checkpoints or the collective, which have codes of their own.
    #[error("{0}")]
    Part(Box<Diagnostic>),
}

impl Error {
    /// Takes over an error of another crate with its code.
    pub fn part(error: &dyn Diagnose) -> Self {
        Self::Part(Box::new(error.diagnostic()))
    }

    /// The error as it travels to the coordinator.
    pub(crate) fn detail(&self) -> ErrorDetail {
        shanty_proto::to_detail(&self.diagnostic())
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let (code, kind, hint) = match self {
            Self::Part(diagnostic) => return diagnostic.as_ref().clone(),
            Self::WrongSum { .. } => ("SH0601", Kind::Internal, None),
            Self::NotFinite { .. } => (
                "SH0602",
                Kind::User,
                Some("lower `train.learning_rate`, set `train.warmup_steps`, or look at the named rows"),
            ),
            Self::StateDiffers { .. } => {
                ("SH0603", Kind::Internal, Some("start all workers from the same program"))
            }
            Self::Protocol { .. } => {
                ("SH0604", Kind::Internal, Some("coordinator and workers must be of the same version"))
            }
            Self::WrongRows { .. } => ("SH0605", Kind::Internal, None),
            Self::RowLog { .. } => {
                ("SH0606", Kind::Transient, Some("is the disk full, or the job's store read-only?"))
            }
            Self::WriteAdapter { .. } => (
                "SH0607",
                Kind::Transient,
                Some("free the disk, then `shanty resume`: the last checkpoint is whole"),
            ),
            Self::TrainerGone => ("SH0608", Kind::Internal, None),
            Self::Hung { .. } => (
                "SH0641",
                Kind::Transient,
                Some("the process ends so that its device is free again; look at the driver's log"),
            ),
            Self::LossSpike { .. } => (
                "SH0642",
                Kind::User,
                Some("lower `train.learning_rate`, or set `train.on_bad_step = \"skip\"`"),
            ),
            Self::Failpoint { .. } | Self::Killed => (
                "SH0609",
                Kind::User,
                Some("for example after_reduction@step=5,rank=1; unset SHANTY_FAILPOINT"),
            ),
            Self::Address { .. } => ("SH0750", Kind::User, Some("for example http://127.0.0.1:7461")),
            Self::Process { .. } => ("SH0751", Kind::Transient, None),
            Self::Refused { .. } => {
                ("SH0752", Kind::User, Some("coordinator and workers must be of the same version"))
            }
            Self::UnknownDevice { .. } => {
                ("SH0809", Kind::User, Some("there are `cpu`, `cuda` and `cuda:1`, `cuda:2`, …"))
            }
        };
        let diagnostic = Diagnostic::new(code, self).kind(kind);
        match hint {
            Some(hint) => diagnostic.hint(hint),
            None => diagnostic,
        }
    }
}

fn in_rows(rows: &[u64]) -> String {
    match rows {
        [] => " in the rows of another worker".to_owned(),
        [row] => format!(" in row {row}"),
        rows => format!(" in one of rows {}", rows.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
    }
}
