//! Preparing data in a child process: tokenising takes memory and all cores, and must not take the coordinator down.
//!
//! The child reads a [`PrepareRequest`] as JSON from its standard input, until the end, and writes
//! [`PrepareLine`]s to its standard output, one JSON object a line; the last is `done` or `failed`. What it
//! writes to standard error goes to the coordinator's log.

use std::{ffi::OsString, path::PathBuf, process::Stdio};

use serde::{Deserialize, Serialize};
use shanty_config::{JobSpec, job::Format};
use shanty_data::Summary;
use shanty_diagnostic::{Diagnostic, Kind};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    machine::record::DataFacts,
};

/// What the child is asked to do. The fields are those of `shanty_data::PrepareOptions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    /// The model folder: tokenizer and chat template.
    pub model_dir: PathBuf,
    /// Training data: a path or a glob.
    pub train: String,
    /// Held-out data: a path or a glob.
    pub eval: Option<String>,
    /// Form of the rows.
    pub format: Format,
    /// Longest row, tokens.
    pub max_length: usize,
    /// Whether several samples share a row.
    pub packing: bool,
    /// Virtual tokens in front of every sample.
    #[serde(default)]
    pub virtual_tokens: usize,
    /// The folder to write.
    pub out: PathBuf,
    /// Threads; 0: one a core.
    pub threads: usize,
}

impl PrepareRequest {
    /// What a job needs prepared.
    pub fn of(spec: &JobSpec, out: PathBuf) -> Self {
        Self {
            model_dir: spec.base.model.clone(),
            train: spec.data.train.clone(),
            eval: spec.data.eval.clone(),
            format: spec.data.format,
            max_length: spec.data.max_length,
            packing: spec.data.packing,
            virtual_tokens: spec.adapter.virtual_tokens(),
            out,
            threads: 0,
        }
    }
}

/// A line of the child's standard output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "a few a second at most")]
pub enum PrepareLine {
    /// It goes on.
    Progress {
        /// What it does, in words: `tokenises train`.
        stage: String,
        /// Bytes of input behind it, in this stage.
        bytes_done: u64,
        /// Bytes of input in this stage.
        bytes_total: u64,
        /// Samples written so far, in this stage.
        samples: u64,
    },
    /// The folder is complete.
    Done {
        /// What it amounts to.
        summary: Summary,
    },
    /// It cannot be prepared.
    Failed {
        /// Why.
        error: Diagnostic,
        /// Whether a repeat may help: [`Kind::Transient`].
        retryable: bool,
        /// Whether it is a defect: [`Kind::Internal`].
        internal: bool,
    },
}

impl PrepareLine {
    /// The line for an error.
    pub fn failed(error: Diagnostic) -> Self {
        Self::Failed {
            retryable: error.kind == Kind::Transient,
            internal: error.kind == Kind::Internal,
            error,
        }
    }
}

/// What the machine needs to know of prepared data.
pub fn facts(summary: &Summary) -> DataFacts {
    DataFacts {
        hash: summary.hash.clone(),
        tokenizer_hash: summary.tokenizer_hash.clone(),
        train_rows: summary.train.rows,
        eval_rows: summary.eval.as_ref().map_or(0, |eval| eval.rows),
        train_tokens: summary.train.tokens,
        train_trained_tokens: summary.train.trained_tokens,
        warnings: summary.warnings.clone(),
    }
}

/// Runs the child to its end; gives what it found, or why it could not. `progress` gets words for people.
pub(crate) async fn run(
    command: &[OsString],
    request: &PrepareRequest,
    stop: &CancellationToken,
    progress: impl FnMut(String),
) -> Result<DataFacts, Diagnostic> {
    let outcome = tokio::select! {
        outcome = converse(command, request, progress) => outcome,
        () = stop.cancelled() => Err(Error::Prepare { what: "it was stopped".to_owned() }),
    };
    match outcome {
        Ok(Ok(facts)) => Ok(facts),
        Ok(Err(diagnostic)) => Err(diagnostic),
        Err(error) => Err(shanty_diagnostic::Diagnose::diagnostic(&error)),
    }
}

/// The inner result is what the child said. Dropping the future kills the child.
async fn converse(
    command: &[OsString],
    request: &PrepareRequest,
    mut progress: impl FnMut(String),
) -> Result<Result<DataFacts, Diagnostic>> {
    let mut child = spawn(command)?;
    let failed = |what: &str, error: std::io::Error| Error::Prepare { what: format!("{what}: {error}") };
    let json = serde_json::to_vec(request).expect("paths of a job file are text");
    let mut input = child.stdin.take().expect("it is piped");
    // A child that dies at once closes the pipe; its exit says more than the broken pipe does.
    let _ = input.write_all(&json).await;
    drop(input);
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    let mut last = None;
    while let Some(line) =
        lines.next_line().await.map_err(|error| failed("its output cannot be read", error))?
    {
        let parsed: PrepareLine = serde_json::from_str(&line)
            .map_err(|error| Error::Prepare { what: format!("it wrote `{line}`: {error}") })?;
        match parsed {
            PrepareLine::Progress { stage, bytes_done, bytes_total, samples } => {
                let percent = bytes_done.saturating_mul(100).checked_div(bytes_total).unwrap_or(0);
                progress(format!("{stage} ({percent} %, {samples} samples)"));
            }
            PrepareLine::Done { summary } => last = Some(Ok(facts(&summary))),
            PrepareLine::Failed { error, retryable, internal } => {
                let kind = match (retryable, internal) {
                    (true, _) => Kind::Transient,
                    (_, true) => Kind::Internal,
                    _ => Kind::User,
                };
                last = Some(Err(error.kind(kind)));
            }
        }
    }
    let status = child.wait().await.map_err(|error| failed("it cannot be waited for", error))?;
    last.ok_or_else(|| Error::Prepare { what: format!("{}: {status}", command[0].display()) })
}

fn spawn(command: &[OsString]) -> Result<Child> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Error::Prepare { what: "this coordinator was given no command for it".to_owned() });
    };
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Error::Prepare { what: format!("failed to start {}: {error}", program.display()) })
}
