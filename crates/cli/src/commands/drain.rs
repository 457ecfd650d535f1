//! `shanty drain`: a worker hands back what it holds and ends; its job goes on.

use serde_json::json;
use shanty_proto::v1::DrainWorkerRequest;

use crate::{
    client::{Target, block_on, wire},
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Have a worker finish its step, hand back what it holds, and end; its job goes on
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty drain w-0198f2c4
  shanty drain w-0198f2c4 --coordinator http://head:7411

`shanty status JOB` names the workers of a job. The last worker of a job writes a checkpoint before it ends.")]
pub(crate) struct Args {
    /// The worker's id
    worker: String,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let client = args.target.connect().await?;
        let request = DrainWorkerRequest { worker_id: args.worker.clone() };
        let answer = client.jobs().drain_worker(request).await.map_err(wire)?.into_inner();
        let job = (!answer.job_id.is_empty()).then_some(answer.job_id);
        let text = match &job {
            Some(job) => format!("{}: ends after its step; {job} goes on", args.worker),
            None => format!("{}: ends; it works for no job", args.worker),
        };
        ui.data(&json!({ "worker": args.worker, "job": job }), |_| text.clone())?;
        Ok(Exit::Done)
    })
}
