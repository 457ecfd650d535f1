//! `shanty coordinator`: the service that jobs and workers come to.

use std::path::PathBuf;

use serde_json::json;
use shanty_config::CoordinatorFile;
use shanty_coordinator::{Coordinator, Options};
use shanty_worker::supervisor::shutdown_on_signals;

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    job_file::all,
    run::host::prepare_command,
    ui::Ui,
};

/// Serve jobs and workers on one port
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty coordinator
  shanty coordinator --config coordinator.toml --listen 127.0.0.1:7461

It may be killed and started again at any time: workers go on and come back.")]
pub(crate) struct Args {
    /// The coordinator's file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Folder of the state that outlives the process
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Listen beyond this machine without TLS: anybody who reaches the port can then run jobs
    #[arg(long)]
    insecure: bool,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let flags = [
        ("listen", args.listen),
        ("state_dir", args.state_dir.map(|folder| folder.display().to_string())),
        ("insecure", args.insecure.then(|| "true".to_owned())),
    ];
    let overrides: Vec<(String, String)> =
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
    let file =
        shanty_config::load_coordinator(args.config.as_deref(), &overrides).map_err(|errors| all(&errors))?;
    let options = options(&file.value)?;
    let _guard = shanty_telemetry::init(shanty_telemetry::Options {
        format: if ui.is_json() {
            shanty_telemetry::Format::Json
        } else {
            shanty_telemetry::Format::Terminal
        },
        ..Default::default()
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "the runtime", source })?;
    runtime.block_on(async {
        let shutdown = shutdown_on_signals()?;
        let coordinator = Coordinator::bind(options).await?;
        let address = coordinator.handle().url();
        ui.data(&json!({ "event": "listening", "address": address }), |_| format!("listening on {address}"))?;
        Box::pin(coordinator.serve(shutdown.clone())).await?;
        Ok(if shutdown.is_cancelled() { Exit::Interrupted } else { Exit::Done })
    })
}

fn options(file: &CoordinatorFile) -> CommandResult<Options> {
    let runs = std::env::current_dir().unwrap_or_default().join("runs");
    let mut options = Options::new(file.state_dir.clone(), runs, prepare_command()?);
    options.listen = file.address().map_err(|error| Error::Impossible {
        flag: "--listen",
        value: file.listen.clone(),
        rule: format!("must be an address and a port: {error}"),
    })?;
    options.insecure = file.insecure;
    options.protocol.beat_interval = file.beat_interval();
    options.protocol.lost_after = file.lost_after();
    options.protocol.credit = file.credit();
    options.protocol.gather = file.gather();
    options.protocol.steps_ahead = file.steps_ahead;
    options.protocol.most_jobs = file.max_jobs;
    options.protocol.most_jobs_an_owner = file.max_jobs_per_owner;
    Ok(options)
}
