//! `shanty worker`: joins a crew with the devices of this machine.

use std::{ffi::OsString, path::PathBuf};

use serde_json::json;
use shanty_config::job::Device;
use shanty_peft_core::backend::cuda;
use shanty_worker::supervisor::{DeviceCommand, Supervisor, SupervisorOptions, ended_well, signals};

use crate::{
    client::Identity,
    error::Error,
    failure::{CommandResult, Exit},
    job_file::all,
    ui::Ui,
};

/// Join a coordinator's crew with this machine
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty worker
  shanty worker --coordinator https://head:7461 --ca ca.pem --cert node-7.pem --key node-7.key --bind 10.0.0.12
  shanty worker --coordinator https://head:7461 --ca ca.pem --token-file worker.token --threads 8

It works until it is interrupted, or drained: it finishes its step, hands back what it holds, and ends; a job that it was
part of goes on without it. Interrupted again, it ends at once.")]
pub(crate) struct Args {
    /// The coordinator, as https://host:port
    #[arg(long, env = "SHANTY_COORDINATOR", value_name = "URL")]
    coordinator: Option<String>,
    #[command(flatten)]
    identity: Identity,
    /// The worker's file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to compute: auto, cpu or cuda
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Address on which other workers reach this one
    #[arg(long, value_name = "HOST")]
    bind: Option<String>,
    /// Host or address that other workers are told, where it is not `--bind`
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let flags = [
        ("coordinator", args.coordinator),
        ("device", args.device),
        ("threads", args.threads.map(|threads| threads.to_string())),
        ("bind", args.bind),
        ("ca", path(args.identity.ca)),
        ("cert", path(args.identity.cert)),
        ("key", path(args.identity.key)),
        ("token_file", path(args.identity.token_file)),
    ];
    let overrides: Vec<(String, String)> =
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
    let file =
        shanty_config::load_worker(args.config.as_deref(), &overrides).map_err(|errors| all(&errors))?;
    let worker = &file.value;
    let threads =
        worker.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let program = std::env::current_exe().map_err(|source| Error::Start { what: "a worker", source })?;
    let mut arguments: Vec<OsString> = ["worker-device", "--log-to-stderr"].map(OsString::from).to_vec();
    let mut add = |flag: &str, value: OsString| arguments.extend([OsString::from(flag), value]);
    add("--coordinator", worker.coordinator.clone().into());
    add("--threads", threads.to_string().into());
    add("--bind", worker.bind.clone().into());
    if let Some(advertise) = args.advertise {
        add("--advertise", advertise.into());
    }
    // Files alone: a token that the environment holds is inherited, and stands in no argument.
    let files = [
        ("--ca", &worker.ca),
        ("--cert", &worker.cert),
        ("--key", &worker.key),
        ("--token-file", &worker.token_file),
    ];
    for (flag, file) in files {
        if let Some(file) = file {
            add(flag, file.into());
        }
    }

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "the runtime", source })?;
    runtime.block_on(async {
        let asked = signals()?;
        let shutdown = asked.first;
        let commands = devices(worker.device).into_iter().map(|device| {
            let mut arguments = arguments.clone();
            arguments.extend(["--device".into(), device.into()]);
            DeviceCommand { program: program.clone(), arguments, environment: Vec::new() }
        });
        let options = SupervisorOptions { kill: asked.again, ..SupervisorOptions::new(commands.collect()) };
        let supervisor = Supervisor::spawn(options)?;
        if ui.is_json() {
            ui.json(
                &json!({ "event": "started", "coordinator": worker.coordinator, "pids": supervisor.pids() }),
            )?;
        }
        let exits = supervisor.run(shutdown.clone()).await;
        if shutdown.is_cancelled() {
            return Ok(Exit::Interrupted);
        }
        // The child said on stderr what went wrong; its exit code is the answer.
        let usage = exits.iter().any(|exit| exit.status.code() == Some(2));
        Ok(if ended_well(&exits) {
            Exit::Done
        } else if usage {
            Exit::Usage
        } else {
            Exit::Failed
        })
    })
}

fn path(path: Option<PathBuf>) -> Option<String> {
    path.map(|path| path.display().to_string())
}

/// The devices of this machine that a worker works on, as a command line names them: its cards where the engine can use
/// them, else the CPU. A job for cards without a card gets one that the engine says is not there.
pub(crate) fn devices(device: Device) -> Vec<String> {
    let cards = || (0..cuda::cards().max(1)).map(|index| format!("cuda:{index}")).collect();
    match device {
        Device::Auto if cuda::is_available() => cards(),
        Device::Auto | Device::Cpu => vec!["cpu".to_owned()],
        Device::Cuda => cards(),
    }
}
