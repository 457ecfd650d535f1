//! What can be wrong with the environment that an engine gives.

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// The result of reading the environment.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the environment of an engine cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A variable that should hold a number holds something else.
    #[error("`{name}={value}` of {engine} is no number")]
    Number {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// Whose convention it is.
        engine: &'static str,
    },
    /// A list of hosts that nobody can expand.
    #[error("the host list `{list}` cannot be read: {reason}")]
    HostList {
        /// As it was given.
        list: String,
        /// Where it goes wrong.
        reason: String,
    },
    /// An engine launched this process, and nobody said where the coordinator is.
    #[error("launched by {engine}, which does not say where the coordinator is")]
    NoCoordinator {
        /// Which engine.
        engine: &'static str,
    },
    /// Something that files are to be made of does not fit.
    #[error("`{what}` is {value}, {rule}")]
    Unfit {
        /// The flag or key.
        what: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        rule: String,
    },
    /// A file that describes hosts cannot be read.
    #[error("failed to read `{file}`: {reason}")]
    ClusterFile {
        /// Which file.
        file: String,
        /// Why not.
        reason: String,
    },
    /// A program that is needed is not there, or failed.
    #[error("`{program}` failed: {reason}")]
    Program {
        /// The program.
        program: String,
        /// How it failed.
        reason: String,
    },
}

impl Error {
    /// The code that `shanty explain` knows.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Number { .. } => "SH0960",
            Self::HostList { .. } => "SH0961",
            Self::NoCoordinator { .. } => "SH0962",
            Self::Unfit { .. } => "SH0963",
            Self::ClusterFile { .. } => "SH0964",
            Self::Program { .. } => "SH0965",
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let diagnostic = Diagnostic::new(self.code(), self);
        match self {
            Self::Number { .. } | Self::HostList { .. } => diagnostic.hint(
                "name the coordinator with `--coordinator`: then the engine's variables are not needed",
            ),
            Self::NoCoordinator { .. } => diagnostic
                .hint("set SHANTY_COORDINATOR where the process is described, or say `--coordinator URL`"),
            Self::Unfit { .. } | Self::ClusterFile { .. } => diagnostic,
            Self::Program { .. } => diagnostic.kind(Kind::Transient),
        }
    }
}
