//! How a command ends.

use std::process::ExitCode;

use shanty_diagnostic::{Diagnose, Diagnostic};

/// Exit codes, as `docs/reference/exit-codes.md` promises them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// What was asked for is done.
    Done,
    /// It was tried and failed.
    Failed,
    /// Wrong use or bad input: a repeat gives the same.
    Usage,
    /// Stopped by the user and not to be requeued.
    Cancelled,
    /// Interrupted by Ctrl-C or a termination signal.
    Interrupted,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Cancelled => 93,
            Exit::Interrupted => 130,
        })
    }
}

/// An error on its way to the user. Made with `?` from every error that knows how it looks.
#[derive(Debug)]
pub(crate) struct Failure {
    diagnostics: Vec<Diagnostic>,
    exit: Exit,
}

/// What commands give back.
pub(crate) type CommandResult<T = Exit> = Result<T, Failure>;

impl Failure {
    /// What is shown, the first first; nothing when the reader of stdout went away.
    pub(crate) fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    /// What the first error says.
    pub(crate) fn message(&self) -> String {
        self.diagnostics.first().map(|first| first.message.clone()).unwrap_or_default()
    }

    /// The exit code that goes with it.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Several errors at once; the first decides about the exit code.
    pub(crate) fn many(diagnostics: Vec<Diagnostic>) -> Self {
        let is_usage = diagnostics.first().is_some_and(|first| first.kind.exit_code() == 2);
        Self { diagnostics, exit: if is_usage { Exit::Usage } else { Exit::Failed } }
    }

    /// An end without a word.
    pub(crate) fn silent() -> Self {
        Self { diagnostics: Vec::new(), exit: Exit::Failed }
    }
}

impl<E: Diagnose> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::many(vec![error.diagnostic()])
    }
}
