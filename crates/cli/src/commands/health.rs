//! `shanty health`: whether a coordinator serves, for probes of containers and for scripts.

use serde_json::json;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::{
    client::{Target, block_on, wire},
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Ask a coordinator whether it serves: exit code 0 if it does, 1 if not
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty health --coordinator https://127.0.0.1:7461 --ca ca.pem
  shanty health && shanty submit job.toml

No token is needed. It is what a container's exec probe calls; a gRPC probe, which speaks no TLS, asks the port of
`shanty coordinator --health-listen`.")]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let client = args.target.connect().await?;
        let answer = client.health().check(HealthCheckRequest::default()).await.map_err(wire)?.into_inner();
        let serves = answer.status() == ServingStatus::Serving;
        let state = if serves { "serving" } else { "not serving" };
        let object = json!({ "coordinator": client.address(), "serving": serves });
        ui.data(&object, |_| format!("{}: {state}", client.address()))?;
        Ok(if serves { Exit::Done } else { Exit::Failed })
    })
}
