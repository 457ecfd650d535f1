//! Reads, tokenises, packs and writes, ahead of the first step.

use std::path::PathBuf;

use crate::{Error, Format, Split, Summary};

/// What to prepare, and where to.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// The model folder: tokenizer and chat template.
    pub model_dir: PathBuf,
    /// Training data: a path or a glob.
    pub train: String,
    /// Held-out data: a path or a glob.
    pub eval: Option<String>,
    /// Form of the rows.
    pub format: Format,
    /// Longest row, tokens; at least 2.
    pub max_length: u32,
    /// Whether several samples share a row.
    pub packing: bool,
    /// The day that chat templates see as today, in seconds since the Unix epoch. Absent: templates have no clock
    /// (`strftime_now` is undefined, and templates fall back to the date that they carry), so that the
    /// same data gives the same tokens on every day.
    pub template_time: Option<i64>,
    /// The folder to write. Created, reused if it holds the same already, replaced if it holds other prepared data.
    pub out: PathBuf,
    /// Threads for tokenising; 0: one a core.
    pub threads: usize,
}

/// How far [`prepare`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// What it does.
    pub stage: Stage,
    /// Bytes of input behind it, in this stage.
    pub bytes_done: u64,
    /// Bytes of input in this stage.
    pub bytes_total: u64,
    /// Samples written so far, in this stage.
    pub samples: u64,
}

/// What [`prepare`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Hashes the input files, to see whether the folder holds what they give.
    Hashing,
    /// The folder holds what is asked for; it is used as it is. Last.
    Reused,
    /// The folder is damaged (the text says how); it is made anew.
    Damaged(String),
    /// Tokenises and packs a split.
    Tokenising(Split),
    /// The folder is complete. Last.
    Done,
}

/// Prepares data: writes the folder `options.out`, or finds it there already.
///
/// # Errors
/// Anything wrong with input, tokenizer or template, with file and line; nothing is left behind then.
pub fn prepare(options: &PrepareOptions, progress: &mut dyn FnMut(&Progress)) -> Result<Summary, Error> {
    let _ = progress;
    Err(Error::NotPrepared { path: options.out.clone(), reason: "not built yet".to_owned() })
}
