//! Loads a job file.

use std::path::Path;

use shanty_diagnostic::Diagnostic;

use crate::{
    error::Errors,
    files,
    job::JobSpec,
    json::impossible,
    layers::{Layers, process_environment},
    loaded::Loaded,
    paths, validate,
};

/// What the names of a job's environment variables begin with; `SHANTY_JOB__TRAIN__STEPS` is `train.steps`.
pub const JOB_PREFIX: &str = "SHANTY_JOB__";

pub(crate) const JOB_REQUIRED: &[(&str, &str)] =
    &[("name", "\"my-job\""), ("base.model", "\"models/tiny\""), ("data.train", "\"data/train.jsonl\"")];

/// Loads a job file: its text, below environment variables (`SHANTY_JOB__…`), below `overrides` (dotted key and value,
/// as [`parse_override`](crate::parse_override) splits them). Paths come out absolute: those of the file
/// count from its folder, the others from the current folder. The store is named even where the file does not.
///
/// Checks everything that needs no other file; see [`check_files`] for the rest.
///
/// # Errors
/// All that is wrong, each with its place.
pub fn load_job(path: &Path, overrides: &[(String, String)]) -> Result<Loaded<JobSpec>, Errors> {
    load_job_with(path, process_environment(), overrides)
}

/// [`load_job`] with the environment given.
///
/// # Errors
/// As [`load_job`].
pub fn load_job_with(
    path: &Path,
    environment: Vec<(String, String)>,
    overrides: &[(String, String)],
) -> Result<Loaded<JobSpec>, Errors> {
    let layers = Layers {
        file: Some(path),
        prefix: JOB_PREFIX,
        environment,
        flags: overrides,
        flag: |key, value| format!("--set {key}={value}"),
        required: JOB_REQUIRED,
    };
    let (mut spec, sources) = layers.load::<JobSpec>()?;
    Errors::check(impossible(&spec, |key| sources.locate(key)))?;
    let warnings = validate::warnings(&spec, |key| sources.names(key))
        .into_iter()
        .map(|warning| {
            let diagnostic = Diagnostic::new(warning.code, warning.message).hint(warning.hint);
            sources.locate(&warning.key).attach(diagnostic)
        })
        .collect();
    paths::resolve_job(&mut spec, &sources);
    Ok(Loaded { value: spec, warnings, sources })
}

/// Checks the files that a job names, on this machine: the model's folder, the data, `max_length` against the model's
/// context, and whether the store can be written to.
///
/// # Errors
/// All that is wrong, each at the key that names it.
pub fn check_files(job: &Loaded<JobSpec>) -> Result<(), Errors> {
    Errors::check(files::check(job))
}
