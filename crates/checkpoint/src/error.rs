//! What can go wrong with checkpoints.

use std::fmt;

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// The result of a checkpoint operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A checkpoint that was passed over, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The checkpoint's folder below the store.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.path, self.reason)
    }
}

/// Why a checkpoint could not be written, found or used. Paths are below the store unless they are
/// the store's own.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A store of a kind that this version cannot use.
    #[error("checkpoint store `{location}` is not supported yet: scheme `{scheme}`")]
    UnsupportedScheme {
        /// The store as it was given.
        location: String,
        /// Its scheme.
        scheme: String,
    },
    /// A store that cannot be one.
    #[error("`{location}` cannot be a checkpoint store: {reason}")]
    BadLocation {
        /// The store as it was given.
        location: String,
        /// Why not.
        reason: String,
    },
    /// The store did not do what was asked.
    #[error("failed to {action} `{path}`: {source}")]
    Store {
        /// What was tried: read, write, list, delete.
        action: &'static str,
        /// On what.
        path: String,
        /// What the store said.
        source: object_store::Error,
    },
    /// There is no room.
    #[error("failed to write `{path}`: the store is full ({reason})")]
    Full {
        /// On what.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// The store lets nobody in, or not this one.
    #[error("failed to {action} `{path}`: the store refuses ({reason})")]
    Denied {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: String,
        /// What the store said.
        reason: String,
    },
    /// A checkpoint is not what its manifest says, or the manifest itself is not whole.
    #[error("checkpoint `{path}` is damaged: {reason}")]
    Damaged {
        /// The checkpoint's folder.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint belongs to something else than the job at hand.
    #[error("checkpoint `{path}` was made with another {what}: it has `{found}`, the job has `{expected}`")]
    Mismatch {
        /// The checkpoint's folder.
        path: String,
        /// What differs: base, tokenizer, …
        what: &'static str,
        /// What the job has.
        expected: String,
        /// What the checkpoint has.
        found: String,
    },
    /// A newer version wrote it.
    #[error("checkpoint `{path}` has format {found}, this version reads up to {supported}")]
    FutureFormat {
        /// The checkpoint's folder.
        path: String,
        /// Its format.
        found: u32,
        /// The newest format known here.
        supported: u32,
    },
    /// Another writer was first.
    #[error("checkpoint `{path}` exists already")]
    Exists {
        /// The checkpoint's folder.
        path: String,
    },
    /// There are checkpoints, and every one is damaged.
    #[error("none of the {} checkpoints in `{store}` is whole: {}", skipped.len(), list(skipped))]
    NoneGood {
        /// The store.
        store: String,
        /// Each of them, newest first.
        skipped: Vec<Skipped>,
    },
    /// What is to be written does not fit together.
    #[error("cannot write checkpoint `{path}`: {reason}")]
    BadSnapshot {
        /// The checkpoint's folder.
        path: String,
        /// What does not fit.
        reason: String,
    },
    /// The writer's own check said no.
    #[error("checkpoint `{path}` was given up: {reason}")]
    GivenUp {
        /// The checkpoint's folder.
        path: String,
        /// What the check said.
        reason: String,
    },
    /// There is no runtime to work on, or one of its threads died.
    #[error("checkpoint thread failed: {reason}")]
    Runtime {
        /// What happened.
        reason: String,
    },
}

fn list(skipped: &[Skipped]) -> String {
    skipped.iter().map(Skipped::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// The code that `shanty explain` knows.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnsupportedScheme { .. } => "SH0501",
            Self::BadLocation { .. } => "SH0502",
            Self::Store { .. } => "SH0503",
            Self::Damaged { .. } => "SH0504",
            Self::Mismatch { .. } => "SH0505",
            Self::FutureFormat { .. } => "SH0506",
            Self::Exists { .. } => "SH0507",
            Self::NoneGood { .. } => "SH0508",
            Self::BadSnapshot { .. } => "SH0509",
            Self::GivenUp { .. } => "SH0510",
            Self::Runtime { .. } => "SH0511",
            Self::Full { .. } => "SH0530",
            Self::Denied { .. } => "SH0531",
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let (kind, hint) = match self {
            Self::UnsupportedScheme { .. } => {
                (Kind::User, Some("use a folder, or a URL of `s3://`, `gs://` or `az://`"))
            }
            Self::BadLocation { .. } => {
                (Kind::User, Some("give a folder, or the URL of an object store, in `checkpoint.store`"))
            }
            Self::Full { .. } => (
                Kind::Transient,
                Some("make room; the job goes on meanwhile, and the newest whole checkpoint stays"),
            ),
            Self::Denied { .. } => (
                Kind::User,
                Some(
                    "set the store's credentials for the coordinator and for every worker (`AWS_…`, `GOOGLE_…`, `AZURE_…`)",
                ),
            ),
            Self::Store { .. } => {
                (Kind::Transient, Some("check that the store exists, is writable and has room"))
            }
            Self::Damaged { .. } => (
                Kind::User,
                Some("`shanty checkpoints` lists the others; `shanty resume` uses the newest that is whole"),
            ),
            Self::Mismatch { .. } => (
                Kind::User,
                Some(
                    "resume with the model and data that the job began with, or start a new job with another name",
                ),
            ),
            Self::FutureFormat { .. } => {
                (Kind::User, Some("use the version of shanty that wrote it, or a newer one"))
            }
            Self::NoneGood { .. } => (
                Kind::User,
                Some("restore one of them from a backup, or move them away to start from the beginning"),
            ),
            Self::Exists { .. } | Self::BadSnapshot { .. } | Self::Runtime { .. } => (Kind::Internal, None),
            Self::GivenUp { .. } => (Kind::Transient, None),
        };
        let mut diagnostic = Diagnostic::new(self.code(), self).kind(kind);
        if let Self::Damaged { path, .. } | Self::Mismatch { path, .. } | Self::FutureFormat { path, .. } =
            self
        {
            diagnostic = diagnostic.in_file(path);
        }
        match hint {
            Some(hint) => diagnostic.hint(hint),
            None => diagnostic,
        }
    }
}
