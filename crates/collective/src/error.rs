//! What can go wrong between the members of a generation.

use std::time::Duration;

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

use crate::Operation;

/// The result of a collective call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a collective could not be formed or broke. Peers are named by rank and address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The address for the neighbours' connections cannot be had.
    #[error("failed to listen for collective connections on `{address}`: {reason}")]
    Bind {
        /// What was asked for.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// The members did not all find each other in time.
    #[error("rank {rank} failed to join generation {generation} within {waited:.1?}: {reason}")]
    Join {
        /// Who tried.
        rank: u32,
        /// Which generation.
        generation: u64,
        /// How long it tried.
        waited: Duration,
        /// Which link is missing and what was last heard of it.
        reason: String,
    },
    /// A neighbour's connection closed.
    #[error("lost {peer} during {operation} {sequence}: {reason}")]
    PeerLost {
        /// Rank and address.
        peer: String,
        /// What was going on.
        operation: Operation,
        /// The number of that operation in the generation.
        sequence: u64,
        /// What the system said.
        reason: String,
    },
    /// A neighbour sent what does not belong here.
    #[error("{peer} sent something else than {operation} {sequence}: {found}")]
    Unexpected {
        /// Rank and address.
        peer: String,
        /// What was going on here.
        operation: Operation,
        /// The number of that operation in the generation.
        sequence: u64,
        /// What came instead.
        found: String,
    },
    /// A neighbour makes the same call with another length.
    #[error(
        "{peer} brought {theirs_bytes} bytes to {operation} {sequence}, this rank has {ours_bytes} bytes"
    )]
    LengthMismatch {
        /// Rank and address.
        peer: String,
        /// The operation.
        operation: Operation,
        /// Its number in the generation.
        sequence: u64,
        /// The length here.
        ours_bytes: u64,
        /// The length there.
        theirs_bytes: u64,
    },
    /// [`AbortHandle::abort`](crate::AbortHandle::abort) was called.
    #[error("collective aborted: {reason}")]
    Aborted {
        /// As given to `abort`.
        reason: String,
    },
    /// A call took longer than it may.
    #[error("{operation} {sequence} did not end within {limit:.1?}, waiting for {peer}")]
    Deadline {
        /// Rank and address.
        peer: String,
        /// What was going on.
        operation: Operation,
        /// The number of that operation in the generation.
        sequence: u64,
        /// The limit.
        limit: Duration,
    },
    /// The caller's arguments do not fit together.
    #[error("wrong argument to {operation}: {reason}")]
    Argument {
        /// The call.
        operation: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// An earlier call failed; the generation is over.
    #[error("the collective broke earlier: {first}")]
    Broken {
        /// The first error.
        first: String,
    },
}

impl Error {
    /// The code that `shanty explain` knows.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "SH0780",
            Self::Join { .. } => "SH0781",
            Self::PeerLost { .. } => "SH0782",
            Self::Unexpected { .. } => "SH0783",
            Self::LengthMismatch { .. } => "SH0784",
            Self::Aborted { .. } => "SH0785",
            Self::Deadline { .. } => "SH0786",
            Self::Argument { .. } => "SH0787",
            Self::Broken { .. } => "SH0788",
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let (kind, hint) = match self {
            Self::Bind { .. } => {
                (Kind::User, Some("choose an address of this machine and a free port, or port 0"))
            }
            Self::Join { .. } => (
                Kind::Transient,
                Some("check that every worker's collective address can be reached from every other worker"),
            ),
            Self::PeerLost { .. } => {
                (Kind::Transient, Some("`shanty status` and the log of that worker say why it ended"))
            }
            Self::Deadline { .. } => (Kind::Transient, None),
            Self::Aborted { .. } | Self::Broken { .. } => (Kind::Transient, None),
            Self::Unexpected { .. } | Self::LengthMismatch { .. } => {
                (Kind::Internal, Some("check that all workers run the same version of shanty"))
            }
            Self::Argument { .. } => (Kind::Internal, None),
        };
        let diagnostic = Diagnostic::new(self.code(), self).kind(kind);
        match hint {
            Some(hint) => diagnostic.hint(hint),
            None => diagnostic,
        }
    }
}
