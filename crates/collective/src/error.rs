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
    /// A part of an encrypted link was not made by the neighbour, or was changed on its way.
    #[error("what came from {peer} during {operation} {sequence} is not what it sent")]
    Forged {
        /// Rank and address.
        peer: String,
        /// What was going on.
        operation: Operation,
        /// The number of that operation in the generation.
        sequence: u64,
    },
    /// A library of CUDA is not there.
    #[error("failed to load lib{library}: {reason} (looked in {})", looked_in.join(", "))]
    NoLibrary {
        /// Its name without prefix.
        library: &'static str,
        /// Folders or files.
        looked_in: Vec<String>,
        /// What the loader said last.
        reason: String,
    },
    /// A library lacks a function.
    #[error("`{file}` has no `{symbol}`")]
    NoSymbol {
        /// The library.
        file: String,
        /// The function.
        symbol: &'static str,
    },
    /// NCCL is older than what can be used.
    #[error("`{file}` is NCCL {version}, 2.14 or newer is needed")]
    TooOld {
        /// The library.
        file: String,
        /// Its version.
        version: String,
    },
    /// A call of the CUDA driver failed.
    #[error("{operation} failed: {reason}")]
    Device {
        /// The call.
        operation: &'static str,
        /// What it said.
        reason: String,
    },
    /// A call of NCCL failed, or something that it does by itself.
    #[error("{call} failed: {reason}")]
    Nccl {
        /// The call.
        call: &'static str,
        /// What NCCL said.
        reason: String,
        /// Whether NCCL says that it is used wrongly, as it does when two ranks share a device.
        is_usage: bool,
    },
    /// Two members compute on one device.
    #[error("ranks {first} and {second} share one GPU, which NCCL cannot reduce between")]
    SharedDevice {
        /// The lower rank.
        first: u32,
        /// The other.
        second: u32,
    },
    /// The collective that is asked for cannot be had with these members.
    #[error("the members cannot reduce with {wish}: {reason}")]
    Refused {
        /// What is asked for.
        wish: &'static str,
        /// Who cannot and why.
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
            Self::NoLibrary { .. } => "SH0720",
            Self::NoSymbol { .. } => "SH0721",
            Self::TooOld { .. } => "SH0722",
            Self::Device { .. } => "SH0723",
            Self::Nccl { .. } => "SH0724",
            Self::SharedDevice { .. } => "SH0725",
            Self::Refused { .. } => "SH0726",
            Self::Forged { .. } => "SH0727",
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
            Self::Forged { .. } => {
                (Kind::Transient, Some("somebody or something changes data between these two machines"))
            }
            Self::NoLibrary { .. } | Self::NoSymbol { .. } | Self::TooOld { .. } => (
                Kind::User,
                Some(
                    "install NCCL 2.14 or newer (it is in the wheel `nvidia-nccl-cu13`) and name its folder in \
                     SHANTY_CUDA_LIBRARIES, or set `collective = \"tcp\"` in [cluster]",
                ),
            ),
            Self::Device { .. } => (Kind::Transient, Some("`shanty doctor` looks at driver and card")),
            Self::Nccl { is_usage: true, .. } | Self::SharedDevice { .. } | Self::Refused { .. } => (
                Kind::User,
                Some(
                    "set `collective = \"auto\"` or \"tcp\" in [cluster], or give each worker a GPU of its own",
                ),
            ),
            Self::Nccl { .. } => (
                Kind::Transient,
                Some("NCCL_DEBUG=WARN in the workers' environment makes NCCL say more on standard error"),
            ),
        };
        let diagnostic = Diagnostic::new(self.code(), self).kind(kind);
        match hint {
            Some(hint) => diagnostic.hint(hint),
            None => diagnostic,
        }
    }
}
