//! What can go wrong when logging starts.

use std::{io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// What can go wrong when logging starts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter cannot be read (SH0115).
    #[error("failed to read {named} `{filter}`: {reason}")]
    Filter {
        /// Where it stands: `SHANTY_LOG`, or a level that the program was given.
        named: String,
        /// The filter.
        filter: String,
        /// What the parser said.
        reason: String,
    },
    /// The log file cannot be opened (SH0116).
    #[error("failed to open the log file `{}`: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Spans cannot be sent there (SH0982).
    #[error("failed to send traces to `{endpoint}`: {reason}")]
    Trace {
        /// Where to.
        endpoint: String,
        /// Why not.
        reason: String,
    },
    /// The process logs already (SH0117).
    #[error("failed to start logging: this process logs already")]
    Twice,
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        match self {
            Self::Filter { .. } => Diagnostic::new("SH0115", self)
                .hint("use error, warn, info, debug, trace, or a filter such as info,shanty_worker=debug"),
            Self::File { .. } => Diagnostic::new("SH0116", self)
                .hint("name a folder that this user may write to")
                .kind(Kind::Transient),
            Self::Trace { .. } => Diagnostic::new("SH0982", self)
                .hint("write it as `http://127.0.0.1:4317`: a collector's port for OTLP over gRPC"),
            Self::Twice => Diagnostic::new("SH0117", self).kind(Kind::Internal),
        }
    }
}
