//! What can go wrong on the command line and around it: codes SH09xx.

use std::{io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{message}")]
    Usage { message: String, hint: String },

    #[error("run folder `{}` of job `{job}` is taken: it holds a finished or interrupted run", store.display())]
    StoreTaken { store: PathBuf, job: String, resume: String },

    #[error("job `{job}` in `{}` has succeeded: nothing is left to do", store.display())]
    Finished { store: PathBuf, job: String },

    #[error("nothing to resume in `{}`", store.display())]
    NothingToResume { store: PathBuf, run: String },

    #[error("no coordinator to ask")]
    NoCoordinator,

    #[error("failed to reach the coordinator at {address}: {reason}")]
    Unreachable { address: String, reason: String },

    #[error("nobody works on job `{job}`: its run has ended or was interrupted")]
    NotRunning { job: String },

    #[error("no error has the code `{code}`")]
    UnknownCode { code: String, nearest: Option<String> },

    #[error("failed to {action} `{}`: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },

    #[error("failed to write to stdout: {source}")]
    Stdout { source: io::Error },

    #[error("`--ids` is no list of equally long lists of token ids: {reason}")]
    Ids { reason: String },

    #[error("no worker is left: {reason}")]
    WorkersGone { reason: String },

    #[error("job `{job}` failed: {reason}")]
    JobFailed { job: String, code: String, reason: String },

    #[error("the request on stdin is not what `prepare-data` takes: {reason}")]
    PrepareRequest { reason: String },

    #[error("failed to start {what}: {source}")]
    Start { what: &'static str, source: io::Error },

    #[error("`{address}` is no address of a coordinator")]
    Address { address: String },

    #[error("`{flag}` is {value}, {rule}")]
    Impossible { flag: &'static str, value: String, rule: String },

    #[error("no adapter is called `{name}`; there is: {}", listed(known))]
    UnknownAdapter { name: String, known: Vec<String> },

    #[error("two adapters are called `{name}`, or one is called as the bare base is")]
    AdapterName { name: String },

    #[error("line {line} of `{}` is no prompt: {reason}", file.display())]
    Prompts { file: PathBuf, line: usize, reason: String },

    #[error("row {row} of `{data}` cannot be scored: {reason}")]
    Choices { data: String, row: u64, reason: String },

    #[error("the coordinator's answer makes no sense: {reason}")]
    Answer { reason: String },
}

impl Error {
    pub(crate) fn json(source: serde_json::Error) -> Self {
        Self::Answer { reason: format!("failed to write JSON: {source}") }
    }
}

/// Names with commas between, `base` at the end.
fn listed(names: &[String]) -> String {
    names.iter().map(String::as_str).chain(["base"]).collect::<Vec<_>>().join(", ")
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let new = |code: &str| Diagnostic::new(code, self);
        match self {
            Self::Usage { hint, .. } => new("SH0901").hint(hint),
            Self::StoreTaken { resume, .. } => new("SH0902").hint(format!(
                "go on with `{resume}`, or choose another folder with `--set checkpoint.store=…`"
            )),
            Self::Finished { .. } => new("SH0903").hint(
                "to train it anew, choose another folder: `shanty run … --set checkpoint.store=…`",
            ),
            Self::NothingToResume { run, .. } => new("SH0903").hint(format!("start it with `{run}`")),
            Self::NoCoordinator => new("SH0904").hint(
                "say `--coordinator URL`, set SHANTY_COORDINATOR, or give the run folder with `--store runs/NAME`",
            ),
            Self::Unreachable { .. } => new("SH0905")
                .kind(Kind::Transient)
                .hint("is it running, and does its address start with http://host:port?"),
            Self::NotRunning { .. } => new("SH0917").hint("`shanty status` shows how it stands"),
            Self::UnknownCode { nearest: Some(nearest), .. } => {
                new("SH0906").hint(format!("did you mean {nearest}? `shanty explain` lists all"))
            }
            Self::UnknownCode { nearest: None, .. } => new("SH0906").hint("`shanty explain` lists all"),
            Self::File { path, source, .. } => {
                let kind = match source.kind() {
                    io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::AlreadyExists
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::IsADirectory => Kind::User,
                    _ => Kind::Transient,
                };
                new("SH0907").in_file(path).kind(kind)
            }
            Self::Stdout { .. } => new("SH0907").kind(Kind::Transient),
            Self::Ids { .. } => new("SH0908").hint("for example --ids '[[1, 2, 3], [4, 5, 6]]'"),
            Self::WorkersGone { .. } => new("SH0909")
                .kind(Kind::Transient)
                .hint("the workers' logs lie in the run folder below `logs`"),
            Self::JobFailed { code, .. } => {
                let code = if code.is_empty() { "SH0910" } else { code };
                new(code).kind(Kind::Internal)
            }
            Self::PrepareRequest { .. } => {
                new("SH0911").hint("`prepare-data` is started by the coordinator, not by people")
            }
            Self::Start { .. } => new("SH0912").kind(Kind::Transient),
            Self::Address { .. } => new("SH0916").hint("for example http://127.0.0.1:7461"),
            Self::Impossible { .. } => new("SH0915"),
            Self::UnknownAdapter { .. } => new("SH0920").hint("give it with --adapter NAME=DIR"),
            Self::AdapterName { .. } => new("SH0921").hint("give each a name of its own: --adapter NAME=DIR"),
            Self::Prompts { file, line, .. } => new("SH0922").in_file(file).at_line(*line).hint(
                "a line is {\"prompt\": \"…\"} or {\"messages\": […]}, with \"adapter\": \"NAME\" if it is to choose",
            ),
            Self::Choices { .. } => {
                new("SH0923").hint("`completion` must be one of `choices`, which are texts, at least two of them")
            }
            Self::Answer { .. } => new("SH0914").kind(Kind::Internal),
        }
    }
}
