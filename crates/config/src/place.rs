//! Where a value comes from.

use std::path::PathBuf;

use shanty_diagnostic::Diagnostic;

/// Where a value comes from, and so where its error is to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file; at a position where one is known.
    File {
        /// As the user named it.
        path: PathBuf,
        /// Where in the file.
        at: Option<Position>,
    },
    /// An environment variable.
    Environment {
        /// Its name.
        variable: String,
    },
    /// A flag of the command line.
    Flag {
        /// As it would be typed.
        text: String,
    },
    /// Built in, or sent by another program.
    Elsewhere,
}

/// A place in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// From 1.
    pub line: usize,
    /// Characters from 1.
    pub column: usize,
    /// Characters at fault, at least 1, all in this line.
    pub width: usize,
}

impl Place {
    /// Writes the place into a diagnostic: file, line, column and width, or the variable or flag into its message.
    #[must_use]
    pub fn attach(&self, diagnostic: Diagnostic) -> Diagnostic {
        match self {
            Self::File { path, at } => {
                let diagnostic = diagnostic.in_file(path);
                match at {
                    Some(at) => diagnostic.at_line(at.line).at_column(at.column, at.width),
                    None => diagnostic,
                }
            }
            Self::Environment { variable } => {
                let message = format!("{} (from environment variable `{variable}`)", diagnostic.message);
                Diagnostic { message, ..diagnostic }
            }
            Self::Flag { text } => {
                let message = format!("{} (from `{text}`)", diagnostic.message);
                Diagnostic { message, ..diagnostic }
            }
            Self::Elsewhere => diagnostic,
        }
    }

    /// For sorting errors as a reader meets them: the file from top to bottom, then variables, then flags.
    pub(crate) fn order(&self) -> (u8, usize, usize) {
        match self {
            Self::File { at: Some(at), .. } => (0, at.line, at.column),
            Self::File { at: None, .. } => (1, 0, 0),
            Self::Environment { .. } => (2, 0, 0),
            Self::Flag { .. } => (3, 0, 0),
            Self::Elsewhere => (4, 0, 0),
        }
    }
}
