//! What can go wrong in the coordinator.

use std::{net::SocketAddr, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};
use shanty_proto::JobId;

use crate::machine::{Refusal, record::JobState};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the coordinator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such job.
    #[error("there is no job `{job}`")]
    NoSuchJob {
        /// The job.
        job: JobId,
    },
    /// Another coordinator has the state folder.
    #[error("another coordinator uses the state folder {}{}", folder.display(), named(holder))]
    StateInUse {
        /// The folder.
        folder: PathBuf,
        /// Which process, if it is known.
        holder: String,
    },
    /// The address is not loopback.
    #[error(
        "refuses to listen on {address} without TLS: everybody on that network could read along and run jobs here"
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// Neither a token nor a certificate says who asks.
    #[error("who asks is not known: {what}")]
    Unauthenticated {
        /// What was shown, or not.
        what: &'static str,
    },
    /// Whoever asks may not do that.
    #[error("{caller} has the role `{role}`; `{call}` takes {least}")]
    NotAllowed {
        /// Who asks.
        caller: String,
        /// The role.
        role: shanty_access::Role,
        /// What was asked for.
        call: String,
        /// The least role that may.
        least: &'static str,
    },
    /// The rights on which a call was let in are over.
    #[error("the token or certificate that this was allowed by is expired or revoked")]
    RightsEnded,
    /// A worker reaches beyond what its identity is for.
    #[error("{what}")]
    NotYours {
        /// What for.
        what: String,
    },
    /// Too much of something at once.
    #[error("{caller} has {count} {what}: more are not let in")]
    TooMany {
        /// Who.
        caller: String,
        /// How many are there.
        count: usize,
        /// Of what.
        what: &'static str,
    },
    /// There is no such token.
    #[error("no token has the number or the name `{token}`")]
    NoSuchToken {
        /// What was asked for.
        token: String,
    },
    /// Certificates or tokens cannot be used.
    #[error(transparent)]
    Access(#[from] shanty_access::Error),
    /// The address cannot be had.
    #[error("failed to listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The server failed.
    #[error("the server failed: {0}")]
    Serve(#[source] tonic::transport::Error),
    /// The state folder cannot be made.
    #[error("failed to make the state folder {}: {source}", folder.display())]
    StateFolder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The store failed.
    #[error("failed to {action} in the state store: {source}")]
    Store {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: rusqlite::Error,
    },
    /// A record of the store makes no sense.
    #[error("failed to read {what} in the state store: {source}")]
    Record {
        /// Which.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The store was written by a newer version.
    #[error("the state store has version {found}, this program knows versions up to {known}")]
    StoreVersion {
        /// The store's.
        found: i64,
        /// This program's.
        known: i64,
    },
    /// A job's state does not allow what was asked for.
    #[error("cannot {action} job `{job}`: it is {}", state.as_str())]
    WrongState {
        /// The job.
        job: JobId,
        /// What was asked for.
        action: &'static str,
        /// Its state.
        state: JobState,
    },
    /// The request id belongs to another submission.
    #[error("the request id was used before, for job `{job}` with another job file")]
    OtherSpec {
        /// The job it belongs to.
        job: JobId,
    },
    /// Two jobs in one store would overwrite each other.
    #[error("job `{job}` has the same store")]
    StoreTaken {
        /// The job that has it.
        job: JobId,
    },
    /// No such worker is connected.
    #[error("no worker `{worker}` is connected")]
    NoSuchWorker {
        /// The worker.
        worker: shanty_proto::WorkerId,
    },
    /// The coordinator ended a worker's stream; the worker may come again.
    #[error("the coordinator ended the stream: {reason}")]
    StreamEnded {
        /// Why.
        reason: String,
    },
    /// A message makes no sense.
    #[error("{what}")]
    BadMessage {
        /// What is wrong with it.
        what: String,
    },
    /// A worker asks for rows in a generation that is over, or not begun.
    #[error("rows are leased to the running generation alone: {what}")]
    StaleLease {
        /// Which generation asked, and which runs.
        what: String,
    },
    /// The coordinator is shutting down.
    #[error("the coordinator is shutting down")]
    Stopping,
    /// Preparing the data ended without a result.
    #[error("preparing the data ended without a result: {what}")]
    Prepare {
        /// How it ended.
        what: String,
    },
    /// The prepared data failed.
    #[error(transparent)]
    Data(#[from] shanty_data::Error),
    /// A checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] shanty_checkpoint::Error),
}

fn named(holder: &str) -> String {
    if holder.is_empty() { String::new() } else { format!(" ({holder})") }
}

impl Error {
    pub(crate) fn bad(what: impl std::fmt::Display) -> Self {
        Self::BadMessage { what: what.to_string() }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let say = |code: &str, kind: Kind| Diagnostic::new(code, self).kind(kind);
        match self {
            Self::NoSuchJob { .. } => say("SH0770", Kind::User).hint("`shanty jobs` lists them"),
            Self::StateInUse { folder, .. } => say("SH0771", Kind::User)
                .in_file(folder)
                .hint("stop the other one, or give this one a folder of its own"),
            Self::NotLoopback { .. } => say("SH0772", Kind::User).hint(
                "give it a certificate (`shanty certs init`, then --cert and --key), or say --insecure if the network \
                 is yours alone",
            ),
            Self::Unauthenticated { .. } => say("SH0740", Kind::User).hint(
                "show a token (--token-file, SHANTY_TOKEN_FILE, SHANTY_TOKEN) or a certificate (--cert, --key); an \
                 admin makes one with `shanty token create`",
            ),
            Self::NotAllowed { .. } => {
                say("SH0741", Kind::User).hint("ask an admin for a token of a role that may")
            }
            Self::RightsEnded => {
                say("SH0742", Kind::User).hint("ask an admin for another: `shanty token create`")
            }
            Self::NotYours { .. } => say("SH0743", Kind::User),
            Self::TooMany { .. } => {
                say("SH0744", Kind::Transient).hint("close some, or give each machine a token of its own")
            }
            Self::NoSuchToken { .. } => say("SH0747", Kind::User).hint("`shanty token list` shows them"),
            Self::Access(error) => error.diagnostic(),
            Self::Listen { .. } => say("SH0772", Kind::User).hint("port 0 takes any that is free"),
            Self::Serve(_) => say("SH0776", Kind::Transient),
            Self::StateFolder { folder, .. } => say("SH0773", Kind::User).in_file(folder),
            Self::Store { .. } => say("SH0773", Kind::Internal)
                .hint("is the disk full or read-only? the folder's state is as it was"),
            Self::Record { .. } => say("SH0773", Kind::Internal),
            Self::StoreVersion { .. } => {
                say("SH0773", Kind::User).hint("use the version that wrote it, or another state folder")
            }
            Self::WrongState { action: "resume", .. } => say("SH0774", Kind::User)
                .hint("a job that ended well has nothing to resume, one that runs need not be"),
            Self::WrongState { .. } => say("SH0774", Kind::User),
            Self::OtherSpec { .. } => {
                say("SH0774", Kind::User).hint("a new submission takes a new request id")
            }
            Self::StoreTaken { job } => say("SH0774", Kind::User).hint(format!(
                "`shanty resume {job}` goes on with it; a new job takes another `checkpoint.store`"
            )),
            Self::NoSuchWorker { .. } => {
                say("SH0760", Kind::User).hint("`shanty status JOB` names the workers of a job")
            }
            Self::StreamEnded { .. } => say("SH0761", Kind::Transient),
            Self::BadMessage { .. } => say("SH0775", Kind::User),
            Self::StaleLease { .. } => say("SH0775", Kind::Transient),
            Self::Stopping => say("SH0776", Kind::Transient),
            Self::Prepare { .. } => {
                say("SH0778", Kind::Internal).hint("see the coordinator's log; was it out of memory?")
            }
            Self::Data(error) => error.diagnostic(),
            Self::Checkpoint(error) => error.diagnostic(),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoSuchJob(job) => Self::NoSuchJob { job },
            Refusal::WrongState { job, action, state } => Self::WrongState { job, action, state },
            Refusal::BadName(name) => Self::bad(format!("no job id can be made of the name `{name}`")),
            Refusal::StoreTaken(job) => Self::StoreTaken { job },
            Refusal::OtherSpec(job) => Self::OtherSpec { job },
            Refusal::NoSuchWorker(worker) => Self::NoSuchWorker { worker },
        }
    }
}
