//! What can be wrong with the environment that an engine gives.

use shanty_diagnostic::{Diagnose, Diagnostic};

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
}

impl Error {
    /// The code that `shanty explain` knows.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Number { .. } => "SH0960",
            Self::HostList { .. } => "SH0961",
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        Diagnostic::new(self.code(), self)
            .hint("name the coordinator with `--coordinator`: then the engine's variables are not needed")
    }
}
