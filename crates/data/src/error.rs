//! What can be wrong with data, tokenizers, templates and prepared folders.

use std::{fmt, io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

use crate::{Format, Split};

/// A record of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The data file.
    pub file: PathBuf,
    /// Line of the file (of a Parquet file: the row), from 1.
    pub line: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` line {}", self.file.display(), self.line)
    }
}

/// ` in FILE line N`, or nothing where there is no record at fault.
struct In<'a>(&'a Option<Place>);

impl fmt::Display for In<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(place) => write!(f, " for {place}"),
            None => Ok(()),
        }
    }
}

/// What went wrong in this crate. Codes `SH02xx`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A path or glob leads to no file.
    #[error("failed to find data at `{pattern}`: {reason}")]
    NoInput {
        /// What the job file says.
        pattern: String,
        /// Why it leads nowhere.
        reason: String,
    },
    /// A file cannot be read.
    #[error("failed to read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A data file in a store cannot be read.
    #[error(transparent)]
    Remote(#[from] shanty_remote::Error),
    /// A data file has no record.
    #[error("data file `{}` has no rows", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// Bytes that are no UTF-8.
    #[error("{place} is not valid UTF-8 at column {column}")]
    InvalidUtf8 {
        /// The line.
        place: Place,
        /// Column of the first bad byte, characters from 1.
        column: usize,
    },
    /// A line is no JSON object.
    #[error("{place} is not a JSON object: {reason}")]
    InvalidJson {
        /// The line.
        place: Place,
        /// Column, characters from 1.
        column: usize,
        /// What the parser says.
        reason: String,
    },
    /// The columns of the first record are of no form, or of several.
    #[error("columns {} of {place} {reason}", list(found))]
    UnknownForm {
        /// The first record.
        place: Place,
        /// Its columns.
        found: Vec<String>,
        /// Why they say nothing.
        reason: String,
    },
    /// A record lacks a column that its form has.
    #[error("{place} has no column `{column}`, which {form} rows have; it has {}", list(found))]
    MissingColumn {
        /// The record.
        place: Place,
        /// What it lacks.
        column: &'static str,
        /// The form of the rows.
        form: &'static str,
        /// What it has.
        found: Vec<String>,
    },
    /// A column holds something else than its form says.
    #[error("{column} of {place} is {found}, not {expected}")]
    WrongType {
        /// The record.
        place: Place,
        /// The column, or the path inside it.
        column: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A Parquet file cannot be read.
    #[error("failed to read Parquet file `{}`: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        reason: String,
    },
    /// The tokenizer cannot be loaded or fails on a text.
    #[error("failed to use tokenizer `{}`{}: {reason}", path.display(), In(place))]
    Tokenizer {
        /// The file, or the model folder.
        path: PathBuf,
        /// The record that it failed on.
        place: Option<Place>,
        /// Why.
        reason: String,
    },
    /// `messages` need a chat template, and the model has none.
    #[error("model `{}` has no chat template", model_dir.display())]
    NoChatTemplate {
        /// The model folder.
        model_dir: PathBuf,
    },
    /// The chat template is broken, or refuses a conversation.
    #[error("chat template of `{}` failed{}: {reason}", model_dir.display(), In(place))]
    Template {
        /// The model folder.
        model_dir: PathBuf,
        /// The conversation that it refuses; absent where the template itself is broken.
        place: Option<Place>,
        /// Why.
        reason: String,
    },
    /// Where an answer begins and ends cannot be told from the rendered text.
    #[error("cannot tell what the assistant wrote in message {message}{}: {reason}", In(place))]
    NotPrefixStable {
        /// The conversation.
        place: Option<Place>,
        /// Number of the message, from 1.
        message: usize,
        /// Why.
        reason: String,
    },
    /// A token that template or configuration rely on falls into several ids.
    #[error("`{token}` is no token of the vocabulary: it falls into {pieces} ids{}", In(place))]
    SplitToken {
        /// The token's text.
        token: String,
        /// How many ids it becomes.
        pieces: usize,
        /// The conversation that uses it; absent where the configuration names it.
        place: Option<Place>,
    },
    /// Nothing is left to train on.
    #[error("no {split} sample has a token to train: {reason}")]
    NothingToTrain {
        /// The split.
        split: Split,
        /// What became of the samples.
        reason: String,
    },
    /// All records have tokens, and none of them is a target.
    #[error("every {split} token is masked: {reason}")]
    AllMasked {
        /// The split.
        split: Split,
        /// What became of the samples.
        reason: String,
    },
    /// No sample trains a token that ends generation.
    #[error("none of {samples} samples trains an end token, so the model never learns to stop: {reason}")]
    EndNeverTrained {
        /// Samples in all.
        samples: u64,
        /// Why.
        reason: String,
    },
    /// A prepared folder is not what its manifest says.
    #[error("prepared data `{}` is damaged: {reason}", path.display())]
    Damaged {
        /// The file at fault.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// A folder holds no prepared data, or of another version.
    #[error("`{}` is not prepared data: {reason}", path.display())]
    NotPrepared {
        /// The folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The prepared data cannot be written.
    #[error("failed to write prepared data `{}`: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Neither JSON Lines nor Parquet.
    #[error("data file `{}` is neither JSON Lines nor Parquet{reason}", path.display())]
    FileType {
        /// The file.
        path: PathBuf,
        /// More about it, with its own punctuation; may be empty.
        reason: String,
    },
    /// An option that leaves nothing sensible to do.
    #[error("impossible `{option}`: {reason}")]
    Impossible {
        /// Its name.
        option: &'static str,
        /// Why it cannot be.
        reason: String,
    },
    /// Somebody asks for a row that there is not.
    #[error("no {split} row {id}: there are {rows}")]
    NoSuchRow {
        /// The split.
        split: Split,
        /// The row asked for.
        id: u64,
        /// How many there are.
        rows: u64,
    },
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "(none)".to_owned();
    }
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

impl Error {
    /// A file that cannot be read; the network's own error, where that is why.
    pub(crate) fn read(path: &std::path::Path, source: io::Error) -> Self {
        match shanty_remote::Error::inside(source) {
            Ok(error) => Self::Remote(error),
            Err(source) => Self::Read { path: path.to_owned(), source },
        }
    }

    /// Says which record an error of template or tokenizer is about, where it does not say so yet.
    #[must_use]
    pub(crate) fn at(mut self, at: impl FnOnce() -> Place) -> Self {
        match &mut self {
            Self::Tokenizer { place, .. }
            | Self::Template { place, .. }
            | Self::NotPrefixStable { place, .. }
            | Self::SplitToken { place, .. }
                if place.is_none() =>
            {
                *place = Some(at());
            }
            _ => {}
        }
        self
    }

    fn code(&self) -> &'static str {
        match self {
            Self::NoInput { .. } | Self::Read { .. } | Self::Remote(_) => "SH0201",
            Self::EmptyFile { .. } => "SH0202",
            Self::InvalidUtf8 { .. } => "SH0203",
            Self::InvalidJson { .. } => "SH0204",
            Self::UnknownForm { .. } => "SH0205",
            Self::MissingColumn { .. } => "SH0206",
            Self::WrongType { .. } => "SH0207",
            Self::Parquet { .. } => "SH0208",
            Self::Tokenizer { .. } => "SH0209",
            Self::NoChatTemplate { .. } => "SH0210",
            Self::Template { .. } => "SH0211",
            Self::NotPrefixStable { .. } => "SH0212",
            Self::SplitToken { .. } => "SH0213",
            Self::NothingToTrain { .. } => "SH0214",
            Self::Damaged { .. } => "SH0215",
            Self::NotPrepared { .. } => "SH0216",
            Self::Write { .. } => "SH0217",
            Self::FileType { .. } => "SH0218",
            Self::Impossible { .. } => "SH0219",
            Self::NoSuchRow { .. } => "SH0220",
            Self::AllMasked { .. } => "SH0221",
            Self::EndNeverTrained { .. } => "SH0222",
        }
    }

    fn place(&self) -> Option<&Place> {
        match self {
            Self::InvalidUtf8 { place, .. }
            | Self::InvalidJson { place, .. }
            | Self::UnknownForm { place, .. }
            | Self::MissingColumn { place, .. }
            | Self::WrongType { place, .. } => Some(place),
            Self::Tokenizer { place, .. }
            | Self::Template { place, .. }
            | Self::NotPrefixStable { place, .. }
            | Self::SplitToken { place, .. } => place.as_ref(),
            _ => None,
        }
    }

    fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::Read { path, .. }
            | Self::EmptyFile { path }
            | Self::Parquet { path, .. }
            | Self::Tokenizer { path, .. }
            | Self::Damaged { path, .. }
            | Self::NotPrepared { path, .. }
            | Self::Write { path, .. }
            | Self::FileType { path, .. } => Some(path),
            Self::NoChatTemplate { model_dir } | Self::Template { model_dir, .. } => Some(model_dir),
            _ => None,
        }
    }

    fn column(&self) -> Option<usize> {
        match self {
            Self::InvalidUtf8 { column, .. } | Self::InvalidJson { column, .. } => Some(*column),
            _ => None,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoInput { .. } => {
                "`data.train` and `data.eval` take a path, a glob or a URL; relative ones start at the job file"
                    .to_owned()
            }
            Self::InvalidUtf8 { .. } => "convert the file, for example with `iconv -t UTF-8`".to_owned(),
            Self::InvalidJson { .. } => "JSON Lines have one whole JSON object on each line".to_owned(),
            Self::UnknownForm { .. } => format!(
                "rows are `text`; `prompt` and `completion`; `messages`; `instruction` and `output`; or \
                 `conversations`. `data.format` ({}) says which where there are several",
                Format::NAMES.join(", ")
            ),
            Self::MissingColumn { .. } => "all rows of all files must be of the same form".to_owned(),
            Self::Tokenizer { .. } => {
                "the model folder must hold the `tokenizer.json` of a fast tokenizer".to_owned()
            }
            Self::NoChatTemplate { .. } => {
                "add `chat_template.jinja` to the model folder, or give the data as prompt and completion"
                    .to_owned()
            }
            Self::NotPrefixStable { .. } => {
                "mark the assistant's words with {% generation %} … {% endgeneration %} in the chat template"
                    .to_owned()
            }
            Self::SplitToken { .. } => {
                "template and tokenizer are of different models, or the token was never added; \
                 use the template that belongs to the tokenizer"
                    .to_owned()
            }
            Self::NothingToTrain { .. } => {
                "raise `data.max_length`, or check that the rows hold answers".to_owned()
            }
            Self::AllMasked { .. } => {
                "answers are messages of the role `assistant` (`gpt` in sharegpt); `weight = 0` leaves one out, and \
                 `data.train_on = \"all\"` trains everything"
                    .to_owned()
            }
            Self::EndNeverTrained { .. } => {
                "let the chat template end answers with the end token (`eos_token`), or raise `data.max_length`; \
                 `data.require_end_token = false` trains it all the same"
                    .to_owned()
            }
            Self::Damaged { .. } => "delete the folder and prepare the data again".to_owned(),
            Self::FileType { .. } => "name files `.jsonl` (or `.json`, `.ndjson`) or `.parquet`".to_owned(),
            _ => return None,
        };
        Some(hint)
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Write { .. } => Kind::Transient,
            Self::Damaged { .. } | Self::NoSuchRow { .. } => Kind::Internal,
            _ => Kind::User,
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        if let Self::Remote(error) = self {
            return error.diagnostic();
        }
        let mut diagnostic = Diagnostic::new(self.code(), self).kind(self.kind());
        match (self.place(), self.file()) {
            (Some(place), _) => {
                diagnostic = diagnostic.in_file(&place.file).at_line(place.line as usize);
            }
            (None, Some(file)) => diagnostic = diagnostic.in_file(file),
            (None, None) => {}
        }
        if let Some(column) = self.column() {
            diagnostic = diagnostic.at_column(column, 1);
        }
        if let Some(hint) = self.hint() {
            diagnostic = diagnostic.hint(hint);
        }
        diagnostic
    }
}
