//! `shanty cancel`: stops a job; its checkpoints stay.

use serde_json::json;
use shanty_proto::v1::{CancelJobRequest, JobState};

use crate::{
    client::{Target, block_on, wire},
    error::Error,
    failure::{CommandResult, Exit},
    progress,
    ui::Ui,
};

/// Stop a job; its checkpoints stay, and it can be resumed
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty cancel shakespeare
  shanty cancel shakespeare-0198f2 --coordinator http://head:7411")]
pub(crate) struct Args {
    /// The job's id or name
    job: String,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let (connection, job_id) = args.target.connect_for(&args.job).await?;
        if connection.is_past() {
            return Err(Error::NotRunning { job: job_id }.into());
        }
        let request = CancelJobRequest { job_id: job_id.clone() };
        let answer = connection.client.jobs().cancel_job(request).await.map_err(wire)?.into_inner();
        let state = progress::state_name(JobState::try_from(answer.state).unwrap_or_default());
        ui.data(&json!({ "job": job_id, "state": state }), |_| format!("{job_id}: {state}"))?;
        Ok(Exit::Done)
    })
}
