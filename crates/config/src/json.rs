//! A job as it travels: canonical JSON, every value written out, in the order of the declaration.

use crate::{
    error::{Error, Errors},
    job::JobSpec,
    place::Place,
    validate,
};

/// The job as one line of JSON. Equal jobs give equal bytes.
pub fn to_json(spec: &JobSpec) -> String {
    serde_json::to_string(spec).expect("a job has text keys and no value that JSON cannot write")
}

/// Reads what [`to_json`] wrote, and checks it as a file is checked.
///
/// # Errors
/// [`Error::Json`] for what is no job; [`Error::Impossible`] for values that cannot be.
pub fn from_json(text: &str) -> Result<JobSpec, Errors> {
    let spec: JobSpec =
        serde_json::from_str(text).map_err(|error| Error::Json { reason: error.to_string() })?;
    Errors::check(impossible(&spec, |_| Place::Elsewhere))?;
    Ok(spec)
}

/// The job's impossible values, each at its place.
pub(crate) fn impossible(spec: &JobSpec, place: impl Fn(&str) -> Place) -> Vec<Error> {
    validate::findings(spec)
        .into_iter()
        .map(|finding| Error::Impossible {
            place: place(&finding.key),
            key: finding.key,
            value: finding.value,
            rule: finding.rule,
            hint: finding.hint,
        })
        .collect()
}
