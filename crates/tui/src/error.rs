//! What can go wrong with a terminal.

use std::io;

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// What can go wrong with a terminal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be drawn on (SH0980).
    #[error("failed to {action} the terminal: {source}")]
    Terminal {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The coordinator could not be asked for what one page takes (SH0981).
    #[error("failed to ask the coordinator at {address}: {reason}")]
    Ask {
        /// Where it is.
        address: String,
        /// In words.
        reason: String,
    },
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        match self {
            Self::Terminal { .. } => Diagnostic::new("SH0980", self)
                .hint("`shanty top --once` prints one page without a terminal, `shanty status JOB --watch` follows a job"),
            Self::Ask { .. } => Diagnostic::new("SH0981", self)
                .hint("`shanty doctor` says what is in the way of a connection")
                .kind(Kind::Transient),
        }
    }
}
