//! What can be wrong with a file, a variable or a flag.

use std::{fmt, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic};

use crate::place::Place;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The file cannot be read (SH0101).
    #[error("failed to read `{}`: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A key that no such file has (SH0102).
    #[error("unknown key `{key}`")]
    UnknownKey {
        /// The dotted key.
        key: String,
        /// The key that was meant, or the keys that there are.
        hint: Option<String>,
        /// Where it stands.
        place: Place,
    },
    /// A value of the wrong type (SH0103).
    #[error("`{key}` must be {expected}, not {found}")]
    WrongType {
        /// The dotted key.
        key: String,
        /// What it may hold.
        expected: String,
        /// What it holds.
        found: String,
        /// What to do.
        hint: Option<String>,
        /// Where it stands.
        place: Place,
    },
    /// A value that cannot be (SH0104).
    #[error("`{key}` is {value}, {rule}")]
    Impossible {
        /// The dotted key.
        key: String,
        /// Its value.
        value: String,
        /// What it must or cannot be.
        rule: String,
        /// What to do.
        hint: Option<String>,
        /// Where it stands.
        place: Place,
    },
    /// A required key is absent (SH0105).
    #[error("missing key `{key}`")]
    Missing {
        /// The dotted key.
        key: String,
        /// How to write it.
        hint: String,
        /// The table that lacks it, or the file.
        place: Place,
    },
    /// The file is no TOML (SH0106).
    #[error("failed to parse: {reason}")]
    Syntax {
        /// What the parser said.
        reason: String,
        /// What to do.
        hint: Option<String>,
        /// Where it stopped.
        place: Place,
    },
    /// A word that is none of the words there are (SH0107).
    #[error("`{key}` is `{value}`, which is none of {words}")]
    UnknownWord {
        /// The dotted key.
        key: String,
        /// Its value.
        value: String,
        /// The words there are.
        words: String,
        /// The word that was meant.
        hint: Option<String>,
        /// Where it stands.
        place: Place,
    },
    /// The file is not UTF-8 (SH0108).
    #[error("`{}` is not UTF-8: {found}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// What was found.
        found: String,
        /// The first bad byte.
        place: Place,
    },
    /// An override that names no key and value (SH0109).
    #[error("failed to read the override `{text}`: {reason}")]
    Override {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The base model's folder is missing or incomplete (SH0110).
    #[error("failed to open the base model `{}`: {reason}", path.display())]
    BaseModel {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        hint: String,
        /// Where it is named.
        place: Place,
    },
    /// Data that is not there (SH0111).
    #[error("failed to find `{key}` `{pattern}`: {reason}")]
    Data {
        /// `data.train` or `data.eval`.
        key: String,
        /// The path or glob, resolved.
        pattern: String,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        hint: String,
        /// Where it is named.
        place: Place,
    },
    /// Rows longer than the model's context (SH0112).
    #[error("`data.max_length` is {max_length}, above the model's context of {context} tokens")]
    ContextExceeded {
        /// What was asked for.
        max_length: usize,
        /// What `config.json` says.
        context: u64,
        /// Where it is said.
        place: Place,
    },
    /// A folder that cannot be written to (SH0113).
    #[error("failed to write to `{key}` `{}`: {reason}", path.display())]
    Unwritable {
        /// The dotted key.
        key: String,
        /// The folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// Where it is named.
        place: Place,
    },
    /// A resolved job, as JSON, that cannot be read (SH0114).
    #[error("failed to read the job's JSON: {reason}")]
    Json {
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// The error's code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "SH0101",
            Self::UnknownKey { .. } => "SH0102",
            Self::WrongType { .. } => "SH0103",
            Self::Impossible { .. } => "SH0104",
            Self::Missing { .. } => "SH0105",
            Self::Syntax { .. } => "SH0106",
            Self::UnknownWord { .. } => "SH0107",
            Self::NotUtf8 { .. } => "SH0108",
            Self::Override { .. } => "SH0109",
            Self::BaseModel { .. } => "SH0110",
            Self::Data { .. } => "SH0111",
            Self::ContextExceeded { .. } => "SH0112",
            Self::Unwritable { .. } => "SH0113",
            Self::Json { .. } => "SH0114",
        }
    }

    /// Where it stands.
    pub fn place(&self) -> &Place {
        match self {
            Self::Unreadable { .. } | Self::Override { .. } | Self::Json { .. } => &Place::Elsewhere,
            Self::UnknownKey { place, .. }
            | Self::WrongType { place, .. }
            | Self::Impossible { place, .. }
            | Self::Missing { place, .. }
            | Self::Syntax { place, .. }
            | Self::UnknownWord { place, .. }
            | Self::NotUtf8 { place, .. }
            | Self::BaseModel { place, .. }
            | Self::Data { place, .. }
            | Self::ContextExceeded { place, .. }
            | Self::Unwritable { place, .. } => place,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Unreadable { hint, .. }
            | Self::UnknownKey { hint, .. }
            | Self::WrongType { hint, .. }
            | Self::Impossible { hint, .. }
            | Self::Syntax { hint, .. }
            | Self::UnknownWord { hint, .. } => hint.clone(),
            Self::Missing { hint, .. } | Self::BaseModel { hint, .. } | Self::Data { hint, .. } => {
                Some(hint.clone())
            }
            Self::NotUtf8 { .. } => Some("save the file as UTF-8".to_owned()),
            Self::Override { .. } => Some("write it as `--set train.steps=5`".to_owned()),
            Self::ContextExceeded { context, .. } => Some(format!("set `max_length` to {context} or less")),
            Self::Unwritable { .. } => Some("name a folder that this user may write to".to_owned()),
            Self::Json { .. } => Some("use the same version of shanty on both sides".to_owned()),
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let mut diagnostic = Diagnostic::new(self.code(), self);
        diagnostic.hint = self.hint();
        match self {
            Self::Unreadable { path, .. } => diagnostic.in_file(path),
            _ => self.place().attach(diagnostic),
        }
    }
}

/// All that is wrong with a file, in the order of the file; never empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Errors {
    first: Box<Error>,
    rest: Vec<Error>,
}

impl Errors {
    /// Sorts what was found by place; `Ok` where nothing was.
    ///
    /// # Errors
    /// What was found, if anything.
    pub fn check(mut found: Vec<Error>) -> Result<(), Self> {
        if found.is_empty() {
            return Ok(());
        }
        found.sort_by_key(|error| error.place().order());
        let first = Box::new(found.remove(0));
        Err(Self { first, rest: found })
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Error> {
        std::iter::once(&*self.first).chain(&self.rest)
    }

    /// Each of them, as it is shown.
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        self.iter().map(Diagnose::diagnostic).collect()
    }
}

impl From<Error> for Errors {
    fn from(error: Error) -> Self {
        Self { first: Box::new(error), rest: Vec::new() }
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.rest.is_empty() { Ok(()) } else { write!(f, " (and {} more)", self.rest.len()) }
    }
}

impl std::error::Error for Errors {}

impl Diagnose for Errors {
    /// The first of them; [`Errors::diagnostics`] gives all.
    fn diagnostic(&self) -> Diagnostic {
        self.first.diagnostic()
    }
}
