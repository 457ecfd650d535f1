//! `shanty worker-device`: the process of one device, started by `shanty worker` and `shanty run`.

use std::path::PathBuf;

use shanty_access::Credentials;
use shanty_proto::v1::LogLine;
use shanty_telemetry::Forward;
use shanty_worker::{
    WorkerOptions,
    engine::PeftEngines,
    run_worker,
    supervisor::{end_with_parent, signals},
    worker_id_of,
};
use tokio::sync::mpsc;

use crate::{
    client::token_of_environment,
    error::Error,
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Log lines that wait for the coordinator at most; more are dropped and counted.
const QUEUE: usize = 1024;

/// Work for a coordinator on one device, as long as the parent lives
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long, value_name = "URL")]
    coordinator: String,
    /// What the worker is called; the process's id is made of it
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long)]
    threads: usize,
    /// What a step may take of the device
    #[arg(long, value_name = "BYTES")]
    memory: Option<u64>,
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    bind: String,
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// What stderr gets: nothing where the parent shows a live region
    #[arg(long)]
    log_to_stderr: bool,
}

pub(crate) fn execute(args: Args, _: &Ui) -> CommandResult<Exit> {
    let mut options = WorkerOptions::new(args.coordinator)?;
    options.credentials = Credentials {
        ca: args.ca,
        certificate: args.cert,
        key: args.key,
        token_file: args.token_file,
        token: token_of_environment(),
    };
    if let Some(name) = &args.name {
        options.worker_id = worker_id_of(name);
    }
    options.device = args.device;
    options.threads = args.threads;
    options.memory_limit_bytes = args.memory;
    options.bind = args.bind;
    options.advertise = args.advertise;

    let (sender, logs) = mpsc::channel(QUEUE);
    let worker_id = options.worker_id.clone();
    let forward = Forward::new(move |line| {
        let line = LogLine {
            unix_ms: line.unix_ms,
            worker_id: worker_id.clone(),
            level: line.level.to_string(),
            text: line.text,
        };
        // What the transport logs while it sends lines must not become a line.
        sender.try_send(line).is_ok()
    });
    let _guard = shanty_telemetry::init(shanty_telemetry::Options {
        format: if args.log_to_stderr {
            shanty_telemetry::Format::Terminal
        } else {
            shanty_telemetry::Format::None
        },
        file: args.log_file,
        forward: Some(forward),
        ..Default::default()
    })?;
    end_with_parent()?;
    // The session, its transport and the lease of rows; training has a thread of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "the runtime", source })?;
    runtime.block_on(async {
        let asked = signals()?;
        options.drain = asked.first;
        Box::pin(run_worker(options, Box::new(PeftEngines), logs, asked.again)).await?;
        Ok(Exit::Done)
    })
}
