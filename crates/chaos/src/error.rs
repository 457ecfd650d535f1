//! What can go wrong with going wrong.

use std::path::PathBuf;

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A fault that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process is gone, or is somebody else's.
    #[error("failed to {action} process {pid}: {source}")]
    Process {
        /// What was tried.
        action: &'static str,
        /// On which.
        pid: u32,
        /// Why not.
        source: std::io::Error,
    },
    /// Cutting its link would cut everybody's.
    #[error("process {pid} shares this network with everybody else: its link cannot be cut alone")]
    SharedNetwork {
        /// The process.
        pid: u32,
    },
    /// A program of the system that is needed failed.
    #[error("`{command}` failed: {reason}")]
    Command {
        /// Which.
        command: String,
        /// How.
        reason: String,
    },
    /// The disk is too large to be filled by accident.
    #[error("the disk of {} has {free_bytes} bytes free; at most {most_bytes} are filled", folder.display())]
    LargeDisk {
        /// A folder on it.
        folder: PathBuf,
        /// What is free.
        free_bytes: u64,
        /// The limit.
        most_bytes: u64,
    },
    /// The filler could not be written or removed.
    #[error("failed to {action} {}: {source}", path.display())]
    Disk {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// No process here listens there.
    #[error("no process of this machine listens on port {port}")]
    NobodyListens {
        /// The port.
        port: u16,
    },
    /// There is no such fault.
    #[error("there is no fault `{name}`")]
    UnknownFault {
        /// What was asked for.
        name: String,
    },
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let say = |code: &str, kind: Kind| Diagnostic::new(code, self).kind(kind);
        match self {
            Self::Process { .. } => say("SH0940", Kind::Transient)
                .hint("faults are made on the machine where the process runs, by its user or root"),
            Self::SharedNetwork { .. } => say("SH0941", Kind::User).hint(
                "start the worker in a network namespace of its own: `ip netns exec NAME shanty worker …`",
            ),
            Self::Command { .. } => {
                say("SH0941", Kind::User).hint("cutting a link takes root, `ip` and `nsenter`")
            }
            Self::LargeDisk { .. } => say("SH0942", Kind::User)
                .hint("give the run a small disk of its own, for example a tmpfs, or raise --most-bytes"),
            Self::Disk { .. } => say("SH0942", Kind::User),
            Self::NobodyListens { .. } => {
                say("SH0943", Kind::User).hint("the coordinator must run on this machine")
            }
            Self::UnknownFault { .. } => say("SH0943", Kind::User)
                .hint("there are kill, stop, partition, slow, coordinator and disk-full"),
        }
    }
}
