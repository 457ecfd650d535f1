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
    diagnostic: Box<Diagnostic>,
    exit: Exit,
    silent: bool,
}

/// What commands give back.
pub(crate) type CommandResult<T = Exit> = Result<T, Failure>;

impl Failure {
    /// What is shown.
    pub(crate) fn diagnostic(&self) -> &Diagnostic {
        &self.diagnostic
    }

    /// The exit code that goes with it.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Whether there is nothing to say: the reader of stdout went away.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent
    }

    /// An end without a word.
    pub(crate) fn silent() -> Self {
        let diagnostic = Diagnostic::new("SH0900", "stdout was closed");
        Self { diagnostic: Box::new(diagnostic), exit: Exit::Failed, silent: true }
    }
}

impl<E: Diagnose> From<E> for Failure {
    fn from(error: E) -> Self {
        let diagnostic = Box::new(error.diagnostic());
        let exit = if diagnostic.kind.exit_code() == 2 { Exit::Usage } else { Exit::Failed };
        Self { diagnostic, exit, silent: false }
    }
}
