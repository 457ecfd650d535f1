//! `shanty worker`: joins a crew with the devices of this machine.

use std::{ffi::OsString, path::PathBuf};

use serde_json::json;
use shanty_launch::Surroundings;
use shanty_worker::supervisor::{DeviceCommand, Supervisor, SupervisorOptions, ended_well, signals};
use tokio_util::sync::CancellationToken;

use crate::{
    client::Identity,
    error::Error,
    failure::{CommandResult, Exit},
    job_file::all,
    launched::{LOOK_AGAIN, Launched, bind_address},
    ui::Ui,
};

/// Join a coordinator's crew with this machine
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty worker
  shanty worker --coordinator https://head:7461 --ca ca.pem --cert node-7.pem --key node-7.key
  shanty worker --coordinator https://head:7461 --ca ca.pem --token-file worker.token --threads 8

It needs the coordinator's address and a token. What no flag, variable (SHANTY_COORDINATOR, SHANTY_TOKEN, SHANTY_CA) or file says is
read from the engine that launched it: Slurm, torchrun, Kubernetes, a TrainJob, SkyPilot, dstack.
It works until it is interrupted, or drained: it finishes its step, hands back what it holds, and ends; a job that it was
part of goes on without it. Interrupted again, it ends at once.")]
pub(crate) struct Args {
    /// The coordinator, as https://host:port
    #[arg(long, env = "SHANTY_COORDINATOR", value_name = "URL")]
    coordinator: Option<String>,
    #[command(flatten)]
    identity: Identity,
    /// What this worker is called; after the launching engine's rank or pod when absent
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The worker's file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to compute: auto, cpu or cuda
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// End when the standard input closes: it is a connection from whoever started this
    #[arg(long, hide = true)]
    end_with_stdin: bool,
    /// Address on which other workers reach this one; the one that the coordinator is reached from when absent
    #[arg(long, value_name = "HOST")]
    bind: Option<String>,
    /// Host or address that other workers are told, where it is not `--bind`
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let flags = [
        ("coordinator", args.coordinator),
        ("name", args.name),
        ("device", args.device),
        ("threads", args.threads.map(|threads| threads.to_string())),
        ("bind", args.bind),
        ("advertise", args.advertise),
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
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let found = Surroundings::of_process()?;
    let launched = Launched::of(&file, &found, processors)?;
    let program = std::env::current_exe().map_err(|source| Error::Start { what: "a worker", source })?;
    let mut arguments: Vec<OsString> = ["worker-device", "--log-to-stderr"].map(OsString::from).to_vec();
    let mut add = |flag: &str, value: OsString| arguments.extend([OsString::from(flag), value]);
    add("--coordinator", launched.coordinator.clone().into());
    add("--threads", launched.threads.to_string().into());
    if let Some(advertise) = &worker.advertise {
        add("--advertise", advertise.into());
    }
    add("--log-folder", worker.logs_dir().into());
    if let Some(otlp) = &worker.telemetry.otlp {
        add("--otlp", otlp.into());
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
        if args.end_with_stdin {
            cancelled_with_stdin(shutdown.clone())?;
        }
        let bind = tokio::select! {
            bind = wait_for_address(&worker.bind, &launched.coordinator, ui) => bind,
            () = shutdown.cancelled() => return Ok(Exit::Interrupted),
        };
        let commands = launched.devices(worker.device).into_iter().map(|(device, name)| {
            let mut arguments = arguments.clone();
            arguments.extend(["--device".into(), device.into(), "--bind".into(), bind.clone().into()]);
            if let Some(name) = name {
                arguments.extend(["--name".into(), name.into()]);
            }
            DeviceCommand { program: program.clone(), arguments, environment: Vec::new() }
        });
        let options = SupervisorOptions { kill: asked.again, ..SupervisorOptions::new(commands.collect()) };
        let supervisor = Supervisor::spawn(options)?;
        if ui.is_json() {
            ui.json(&json!({
                "event": "started", "coordinator": launched.coordinator, "pids": supervisor.pids(),
                "engine": found.engine.map(shanty_launch::Engine::name), "name": launched.name,
                "bind": bind, "restarts": found.restarts,
            }))?;
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

/// Asks the worker to end once the standard input closes.
fn cancelled_with_stdin(shutdown: CancellationToken) -> CommandResult<()> {
    let watch = move || {
        // Whatever may come is passed over; only the end counts.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        shutdown.cancel();
    };
    std::thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(watch)
        .map(|_| ())
        .map_err(|source| Error::Start { what: "the thread that watches the standard input", source }.into())
}

/// The address to reach other workers by. A coordinator that starts later than its workers may have no name yet: then it is
/// looked up until it has.
async fn wait_for_address(bind: &str, coordinator: &str, ui: &Ui) -> String {
    let mut told = false;
    loop {
        let (named, to) = (bind.to_owned(), coordinator.to_owned());
        // A look-up may take seconds, and a signal must not wait for it.
        let looked = tokio::task::spawn_blocking(move || bind_address(&named, &to)).await;
        if let Some(address) = looked.ok().flatten() {
            return address;
        }
        if !std::mem::replace(&mut told, true) {
            ui.warn(format!("{coordinator}: no such host, or no way to it; it is looked for again"));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn path(path: Option<PathBuf>) -> Option<String> {
    path.map(|path| path.display().to_string())
}
