//! `shanty coordinator`: the service that jobs and workers come to.

use std::path::PathBuf;

use serde_json::json;
use shanty_access::{Role, local_key::LocalKey};
use shanty_config::CoordinatorFile;
use shanty_coordinator::{Coordinator, Options, TlsFiles};
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
  shanty coordinator --listen 0.0.0.0:7461 --cert certs/head.pem --key certs/head.key --ca certs/ca.pem --revoked certs/revoked.pem

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
    /// Ask nobody who it is, and do without TLS: anybody who reaches the port can then run jobs
    #[arg(long)]
    insecure: bool,
    /// The coordinator's certificate; turns TLS on
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// The authority whose client certificates are known
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// What that authority has taken back; read again whenever it changes
    #[arg(long, value_name = "FILE")]
    revoked: Option<PathBuf>,
    /// Where health alone is answered, in clear, for probes that speak no TLS
    #[arg(long, value_name = "HOST:PORT")]
    health_listen: Option<String>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let flags = [
        ("listen", args.listen),
        ("state_dir", args.state_dir.map(|folder| folder.display().to_string())),
        ("insecure", args.insecure.then(|| "true".to_owned())),
        ("cert", path(args.cert)),
        ("key", path(args.key)),
        ("ca", path(args.ca)),
        ("revoked", path(args.revoked)),
        ("health_listen", args.health_listen),
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
        let any_port = options.listen.port() == 0;
        let asks = !options.insecure;
        let mut coordinator = Coordinator::bind(options).await?;
        let handle = coordinator.handle();
        let key = if asks { leave_key(&mut coordinator, handle.address.port()) } else { None };
        let address = handle.url();
        let event = json!({
            "event": "listening", "address": address, "asks_who": asks,
            "local_key": key.as_ref().map(|key| key.path()), "health_address": handle.health_address,
        });
        ui.data(&event, |_| format!("listening on {address}"))?;
        if !asks {
            ui.warn("asks nobody who it is: everybody who reaches that address can run jobs, and read along");
        }
        let served = Box::pin(coordinator.serve(shutdown.clone())).await;
        // Nobody comes back to a port that was any; to a fixed one, workers do, with the key that they have.
        if let Some(key) = key.filter(|_| any_port) {
            key.remove();
        }
        served?;
        Ok(if shutdown.is_cancelled() { Exit::Interrupted } else { Exit::Done })
    })
}

/// Leaves a key for this user's commands on this machine, with the right to everything.
fn leave_key(coordinator: &mut Coordinator, port: u16) -> Option<LocalKey> {
    match LocalKey::for_port(port) {
        Ok(key) => {
            coordinator.add_key(key.secret(), "the coordinator's own user", Role::Admin);
            tracing::info!(key = %key.path().display(), "this user's commands on this machine are let in by a key");
            Some(key)
        }
        Err(error) => {
            tracing::warn!(%error, "no key could be left for this user: tokens and certificates alone are let in");
            None
        }
    }
}

fn path(path: Option<PathBuf>) -> Option<String> {
    path.map(|path| path.display().to_string())
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
    options.health_listen = file.health_address().map_err(|error| Error::Impossible {
        flag: "--health-listen",
        value: file.health_listen.clone().unwrap_or_default(),
        rule: format!("must be an address and a port: {error}"),
    })?;
    options.tls = file.cert.clone().zip(file.key.clone()).map(|(certificate, key)| TlsFiles {
        certificate,
        key,
        client_ca: file.ca.clone(),
        revoked: file.revoked.clone(),
    });
    options.protocol.beat_interval = file.beat_interval();
    options.protocol.lost_after = file.lost_after();
    options.protocol.credit = file.credit();
    options.protocol.gather = file.gather();
    options.protocol.steps_ahead = file.steps_ahead;
    options.protocol.most_jobs = file.max_jobs;
    options.protocol.most_jobs_an_owner = file.max_jobs_per_owner;
    Ok(options)
}
