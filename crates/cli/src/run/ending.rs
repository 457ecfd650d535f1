//! How a run ends: its exit code, its result in words, and the command that uses it.

use shanty_config::JobSpec;
use shanty_diagnostic::Kind;
use shanty_proto::v1::{JobState, JobStatus};

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    format,
    job_file::{quote, short},
    progress::evaluations,
    ui::{Paint, Ui, paint},
};

/// The exit code that a finished job stands for, or what it failed of.
pub(crate) fn end_of_job(status: &JobStatus) -> CommandResult<Exit> {
    match status.state() {
        JobState::Succeeded => Ok(Exit::Done),
        JobState::Cancelled => Ok(Exit::Cancelled),
        _ => Err(match &status.error {
            Some(detail) => shanty_proto::from_detail(detail, blame(&detail.code)).into(),
            None => Error::JobFailed {
                job: status.job_id.clone(),
                code: status.error_code.clone(),
                reason: status.reason.clone(),
            }
            .into(),
        }),
    }
}

/// Files, data, bases and adapters are the user's; what goes wrong beyond is not.
fn blame(code: &str) -> Kind {
    let is_input = ["SH01", "SH02", "SH03", "SH04"].iter().any(|range| code.starts_with(range));
    if is_input { Kind::User } else { Kind::Internal }
}

/// What came of a job, for people.
pub(crate) fn tell_result(ui: &Ui, spec: &JobSpec, status: &JobStatus, seconds: f64) -> CommandResult<()> {
    let color = ui.color_on_stdout();
    let steps = format!("{} steps in {}", format::count(status.step), format::seconds(seconds));
    ui.line(format!("{} {steps}", paint(color, Paint::Green, "done:")))?;
    if let (Some(before), Some(after)) = evaluations(status) {
        ui.line(format!("held-out loss  {before:.4} before, {after:.4} after"))?;
    }
    let adapter = short(status.adapter.as_ref());
    ui.line(format!("adapter        {}", paint(color, Paint::Bold, &adapter)))?;
    let prompt = spec.sample.prompt.as_deref().unwrap_or("Once upon a time");
    ui.line(format!(
        "use it         shanty generate --model {} --adapter {} --prompt {}",
        quote(&short(&spec.base.model)),
        quote(&adapter),
        quote(prompt)
    ))
}

#[cfg(test)]
mod tests {
    use shanty_proto::v1::ErrorDetail;

    use super::*;

    fn ended(state: JobState, code: &str) -> JobStatus {
        let error =
            ErrorDetail { code: code.to_owned(), message: "it broke".to_owned(), ..ErrorDetail::default() };
        let error = (!code.is_empty()).then_some(error);
        JobStatus { state: state.into(), error, ..JobStatus::default() }
    }

    #[test]
    fn states_have_their_exit_codes() {
        let exit = |state, code| end_of_job(&ended(state, code)).unwrap_or_else(|failure| failure.exit());
        assert_eq!(exit(JobState::Succeeded, ""), Exit::Done);
        assert_eq!(exit(JobState::Cancelled, ""), Exit::Cancelled);
        assert_eq!(exit(JobState::Failed, "SH0204"), Exit::Usage);
        assert_eq!(exit(JobState::Failed, "SH0601"), Exit::Failed);
        assert_eq!(exit(JobState::Failed, ""), Exit::Failed);
    }
}
