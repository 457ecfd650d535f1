//! What a user-facing error carries: code, place, hint, and whether to try again.
//!
//! Each crate keeps its own `thiserror` enum and says through [`Diagnose`] how a variant looks to a user.
//! The edges (terminal, JSON, gRPC status) render a [`Diagnostic`] and know none of the enums.
//!
//! Codes by range: `SH01xx` job and service files, `SH02xx` data, `SH03xx` base models, `SH04xx` adapters,
//! `SH05xx` checkpoints, `SH06xx` training steps, `SH07xx` coordinator, workers and collectives,
//! `SH08xx` devices, `SH09xx` the command line and its surroundings.
//! Every code has a page `docs/errors/SHxxxx.md`; `cargo xtask tidy` checks both directions.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// A user-facing error, ready to be shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// For example `SH0102`.
    pub code: String,
    /// What was tried, on what, and what came of it. Lower case, no full stop.
    pub message: String,
    /// The file that is at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Line in `file`, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// Column in `line`, characters from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<usize>,
    /// How many characters are at fault, for the caret; at least 1.
    #[serde(skip)]
    pub width: Option<usize>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whose fault it is, and so whether a repeat may help.
    #[serde(skip)]
    pub kind: Kind,
}

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Wrong input or wrong use: a repeat gives the same. Exit code 2.
    #[default]
    User,
    /// The surroundings (network, disk, a lost process): a repeat may help. Exit code 1.
    Transient,
    /// A defect or a broken promise: stop and report. Exit code 1.
    Internal,
}

impl Kind {
    /// Whether trying again may help.
    pub fn is_retryable(self) -> bool {
        self == Self::Transient
    }

    /// The exit code of a program that ends with such an error.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::User => 2,
            Self::Transient | Self::Internal => 1,
        }
    }
}

/// An error that knows how it looks to a user.
pub trait Diagnose: std::error::Error {
    /// The error as it is shown.
    fn diagnostic(&self) -> Diagnostic;
}

impl Diagnostic {
    /// A diagnostic with a code and a message, at no place, without a hint, of kind [`Kind::User`].
    pub fn new(code: &str, message: impl fmt::Display) -> Self {
        Self {
            code: code.to_owned(),
            message: message.to_string(),
            file: None,
            line: None,
            column: None,
            width: None,
            hint: None,
            kind: Kind::User,
        }
    }

    /// Adds the file at fault.
    #[must_use]
    pub fn in_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.file = Some(file.into());
        self
    }

    /// Adds the line at fault, from 1.
    #[must_use]
    pub fn at_line(mut self, line: usize) -> Self {
        self.line = Some(line);
        self
    }

    /// Adds the column at fault, from 1, and how many characters are at fault.
    #[must_use]
    pub fn at_column(mut self, column: usize, width: usize) -> Self {
        self.column = Some(column);
        self.width = Some(width.max(1));
        self
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Sets the kind.
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)
    }
}

impl std::error::Error for Diagnostic {}

impl Diagnose for Diagnostic {
    fn diagnostic(&self) -> Diagnostic {
        self.clone()
    }
}
