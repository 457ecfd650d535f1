//! `shanty worker-device`: the process of one device, started by `shanty worker` and `shanty run`.

use std::path::{Path, PathBuf};

use shanty_access::Credentials;
use shanty_proto::v1::LogLine;
use shanty_telemetry::{Forward, trace::Tracer};
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
/// Log files that stay in a folder; each process that works begins one.
const LOG_FILES: usize = 64;

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
    /// Where spans of steps go
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Folder of a log file that is named after the worker
    #[arg(long, value_name = "DIR", conflicts_with = "log_file")]
    log_folder: Option<PathBuf>,
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
    let (log_file, no_file) = match &args.log_folder {
        Some(folder) => log_file_in(folder, &options.worker_id),
        None => (args.log_file, None),
    };
    let _guard = shanty_telemetry::init(shanty_telemetry::Options {
        format: if args.log_to_stderr {
            shanty_telemetry::Format::Terminal
        } else {
            shanty_telemetry::Format::None
        },
        file: log_file,
        forward: Some(forward),
        ..Default::default()
    })?;
    if let Some(reason) = no_file {
        tracing::warn!(reason, "this worker writes no log file");
    }
    end_with_parent()?;
    // The session, its transport and the lease of rows; training has a thread of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "the runtime", source })?;
    runtime.block_on(async {
        if let Some(otlp) = &args.otlp {
            options.tracer = Tracer::to(otlp, "shanty-worker", &options.worker_id)?;
        }
        let asked = signals()?;
        options.drain = asked.first;
        Box::pin(run_worker(options, Box::new(PeftEngines), logs, asked.again)).await?;
        Ok(Exit::Done)
    })
}

/// The log file of a worker in the folder of all of them, where the oldest make room; or why there is none. A folder that
/// cannot be written to keeps nobody from work: stderr and the coordinator have the lines too.
fn log_file_in(folder: &Path, worker_id: &str) -> (Option<PathBuf>, Option<String>) {
    let file = folder.join(format!("{worker_id}.jsonl"));
    let opened = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::File::options().create(true).append(true).open(&file));
    match opened {
        Ok(_) => {
            shanty_telemetry::keep_newest(folder, LOG_FILES);
            (Some(file), None)
        }
        Err(error) => (None, Some(format!("`{}`: {error}", file.display()))),
    }
}
