//! The files of the services: what a coordinator and a worker need to know.
//!
//! Same layers and same answers as the job file. A file is not required: the defaults serve one machine.

use std::{net::SocketAddr, path::Path, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Errors},
    job::Device,
    layers::{Layers, folder_of, process_environment},
    loaded::Loaded,
    paths::absolute,
    place::Place,
    shape::described,
};

/// What the names of a coordinator's environment variables begin with.
pub const COORDINATOR_PREFIX: &str = "SHANTY_COORDINATOR__";

/// A worker's `bind` that leaves the address to the way to the coordinator.
pub const AUTO: &str = "auto";

/// What the names of a worker's environment variables begin with.
pub const WORKER_PREFIX: &str = "SHANTY_WORKER__";

described! {
    /// The coordinator's file.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct CoordinatorFile {
        /// Address and port to listen on; port 0 takes a free one.
        pub listen: String,
        /// Folder of the state that outlives the process.
        pub state_dir: PathBuf,
        /// Whether nobody is asked who it is. Anybody who reaches the port can then run jobs; without it, TLS is needed to listen beyond this machine.
        pub insecure: bool,
        /// The coordinator's certificate, PEM; turns TLS on.
        pub cert: Option<PathBuf>,
        /// Its key, PEM, readable by its owner alone.
        pub key: Option<PathBuf>,
        /// Certificate of the authority whose client certificates are known, PEM; without it tokens alone are.
        pub ca: Option<PathBuf>,
        /// What that authority has taken back, PEM; read again whenever it changes.
        pub revoked: Option<PathBuf>,
        /// Address and port where health alone is answered, in clear and to everybody, for probes that speak no TLS.
        pub health_listen: Option<String>,
        /// How often a worker reports that it is alive, milliseconds.
        pub beat_interval_ms: u64,
        /// Silence after which a worker counts as lost though its connection is up, milliseconds.
        pub lost_after_ms: u64,
        /// How long a worker may go on without the coordinator, milliseconds.
        pub credit_ms: u64,
        /// How long to wait for more workers once the least number is ready, milliseconds.
        pub gather_ms: u64,
        /// How many steps a worker may go beyond the last step that is known to be committed.
        pub steps_ahead: u64,
        /// How many jobs may run at a time; 0: as many as there are workers for.
        pub max_jobs: u32,
        /// How many jobs of one owner may run at a time; 0: any number.
        pub max_jobs_per_owner: u32,
        /// What goes to others about steps.
        pub telemetry: TelemetrySpec,
    }

    /// What goes to others about steps.
    #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct TelemetrySpec {
        /// A collector that takes the traces of steps, OTLP over gRPC, such as `http://127.0.0.1:4317`; no traces when absent.
        pub otlp: Option<String>,
    }

    /// The worker's file.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct WorkerFile {
        /// URL of the coordinator; where no layer names one, that of the host where the launching engine has it.
        pub coordinator: String,
        /// What this worker is called, with a suffix of its own for each process; after the launching engine's rank or pod when absent.
        pub name: Option<String>,
        /// Certificate of the authority that the coordinator is known by, PEM; the system's authorities when absent.
        pub ca: Option<PathBuf>,
        /// This worker's certificate, PEM.
        pub cert: Option<PathBuf>,
        /// Its key, PEM, readable by its owner alone.
        pub key: Option<PathBuf>,
        /// File of this worker's token, readable by its owner alone; read again when it changes.
        pub token_file: Option<PathBuf>,
        /// Where to compute.
        pub device: Device,
        /// Threads to compute with; all cores when absent.
        pub threads: Option<usize>,
        /// Folder of row logs and of what is being received.
        pub state_dir: PathBuf,
        /// Folder of the log files; `logs` in `state_dir` when absent.
        pub logs: Option<PathBuf>,
        /// Address on which other workers reach this one for reductions; each process takes a free port of it. `auto`: the one from
        /// which this machine reaches the coordinator.
        pub bind: String,
        /// Host or address that other workers are told, where it is not `bind`.
        pub advertise: Option<String>,
        /// What goes to others about steps.
        pub telemetry: TelemetrySpec,
    }
}

impl Default for CoordinatorFile {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7461".to_owned(),
            state_dir: PathBuf::from(".shanty/coordinator"),
            insecure: false,
            cert: None,
            key: None,
            ca: None,
            revoked: None,
            health_listen: None,
            beat_interval_ms: 250,
            lost_after_ms: 3_000,
            credit_ms: 20_000,
            gather_ms: 3_000,
            steps_ahead: 12,
            max_jobs: 0,
            max_jobs_per_owner: 0,
            telemetry: TelemetrySpec::default(),
        }
    }
}

impl Default for WorkerFile {
    fn default() -> Self {
        Self {
            coordinator: "http://127.0.0.1:7461".to_owned(),
            name: None,
            ca: None,
            cert: None,
            key: None,
            token_file: None,
            device: Device::Auto,
            threads: None,
            state_dir: PathBuf::from(".shanty/worker"),
            logs: None,
            bind: AUTO.to_owned(),
            advertise: None,
            telemetry: TelemetrySpec::default(),
        }
    }
}

impl CoordinatorFile {
    /// The address to listen on.
    ///
    /// # Errors
    /// Where `listen` is none; [`load_coordinator`] lets no such file through.
    pub fn address(&self) -> Result<SocketAddr, std::net::AddrParseError> {
        self.listen.parse()
    }

    /// The address on which health alone is answered.
    ///
    /// # Errors
    /// Where `health_listen` is none; [`load_coordinator`] lets no such file through.
    pub fn health_address(&self) -> Result<Option<SocketAddr>, std::net::AddrParseError> {
        self.health_listen.as_deref().map(str::parse).transpose()
    }

    /// How often a worker reports that it is alive.
    pub fn beat_interval(&self) -> Duration {
        Duration::from_millis(self.beat_interval_ms)
    }

    /// Silence after which a worker counts as lost.
    pub fn lost_after(&self) -> Duration {
        Duration::from_millis(self.lost_after_ms)
    }

    /// How long a worker may go on without the coordinator.
    pub fn credit(&self) -> Duration {
        Duration::from_millis(self.credit_ms)
    }

    /// How long to wait for more workers.
    pub fn gather(&self) -> Duration {
        Duration::from_millis(self.gather_ms)
    }
}

impl WorkerFile {
    /// The folder of the log files.
    pub fn logs_dir(&self) -> PathBuf {
        self.logs.clone().unwrap_or_else(|| self.state_dir.join("logs"))
    }
}

/// Loads a coordinator's file (or the defaults), below `SHANTY_COORDINATOR__…`, below `overrides`.
///
/// # Errors
/// All that is wrong, each with its place.
pub fn load_coordinator(
    file: Option<&Path>,
    overrides: &[(String, String)],
) -> Result<Loaded<CoordinatorFile>, Errors> {
    load_coordinator_with(file, process_environment(), overrides)
}

pub(crate) fn load_coordinator_with(
    file: Option<&Path>,
    environment: Vec<(String, String)>,
    overrides: &[(String, String)],
) -> Result<Loaded<CoordinatorFile>, Errors> {
    let layers = Layers {
        file,
        prefix: COORDINATOR_PREFIX,
        environment,
        flags: overrides,
        flag: own_flag,
        required: &[],
    };
    let (mut value, sources) = layers.load::<CoordinatorFile>()?;
    Errors::check(coordinator_errors(&value, |key| sources.locate(key)))?;
    value.state_dir =
        absolute(&folder_of(&sources.locate_named("state_dir"), &sources.path), &value.state_dir);
    let paths = [
        ("cert", &mut value.cert),
        ("key", &mut value.key),
        ("ca", &mut value.ca),
        ("revoked", &mut value.revoked),
    ];
    for (key, path) in paths {
        if let Some(path) = path {
            *path = absolute(&folder_of(&sources.locate_named(key), &sources.path), path);
        }
    }
    Ok(Loaded { value, warnings: Vec::new(), sources })
}

/// Loads a worker's file (or the defaults), below `SHANTY_WORKER__…`, below `overrides`.
///
/// # Errors
/// All that is wrong, each with its place.
pub fn load_worker(
    file: Option<&Path>,
    overrides: &[(String, String)],
) -> Result<Loaded<WorkerFile>, Errors> {
    load_worker_with(file, process_environment(), overrides)
}

pub(crate) fn load_worker_with(
    file: Option<&Path>,
    environment: Vec<(String, String)>,
    overrides: &[(String, String)],
) -> Result<Loaded<WorkerFile>, Errors> {
    let layers =
        Layers { file, prefix: WORKER_PREFIX, environment, flags: overrides, flag: own_flag, required: &[] };
    let (mut value, sources) = layers.load::<WorkerFile>()?;
    Errors::check(worker_errors(&value, |key| sources.locate(key)))?;
    value.state_dir =
        absolute(&folder_of(&sources.locate_named("state_dir"), &sources.path), &value.state_dir);
    let paths = [
        ("logs", &mut value.logs),
        ("ca", &mut value.ca),
        ("cert", &mut value.cert),
        ("key", &mut value.key),
        ("token_file", &mut value.token_file),
    ];
    for (key, path) in paths {
        if let Some(path) = path {
            *path = absolute(&folder_of(&sources.locate_named(key), &sources.path), path);
        }
    }
    Ok(Loaded { value, warnings: Vec::new(), sources })
}

/// A key of a service's file as the flag of its command: `beat_interval_ms` is `--beat-interval-ms`.
fn own_flag(key: &str, value: &str) -> String {
    format!("--{} {value}", key.replace('_', "-"))
}

fn impossible(
    place: Place,
    key: &str,
    value: impl ToString,
    rule: impl ToString,
    hint: Option<&str>,
) -> Error {
    Error::Impossible {
        key: key.to_owned(),
        value: value.to_string(),
        rule: rule.to_string(),
        hint: hint.map(str::to_owned),
        place,
    }
}

fn telemetry_errors(spec: &TelemetrySpec, place: impl Fn(&str) -> Place) -> Option<Error> {
    let otlp = spec.otlp.as_ref()?;
    let is_good = url::Url::parse(otlp).is_ok_and(|url| url.scheme() == "http" && url.host().is_some());
    let hint = Some(
        "write it as `http://127.0.0.1:4317`; for one beyond this machine, run a collector here that passes on",
    );
    let key = "telemetry.otlp";
    (!is_good).then(|| {
        impossible(place(key), key, format!("`{otlp}`"), "must be a URL that begins with http://", hint)
    })
}

fn coordinator_errors(file: &CoordinatorFile, place: impl Fn(&str) -> Place) -> Vec<Error> {
    let mut errors: Vec<Error> = telemetry_errors(&file.telemetry, &place).into_iter().collect();
    let listen = format!("`{}`", file.listen);
    match file.address() {
        Err(_) => {
            let rule = "must be an address and a port";
            let hint = Some("write it as `127.0.0.1:7461`");
            errors.push(impossible(place("listen"), "listen", listen, rule, hint));
        }
        Ok(address) if !address.ip().is_loopback() && !file.insecure && file.cert.is_none() => {
            let rule = "must be an address of this machine alone where there is no TLS";
            let hint = Some(
                "give it a certificate: `shanty certs init`, then `cert` and `key`; on a network that is yours alone \
                 `insecure = true` (or `--insecure`) does without",
            );
            errors.push(impossible(place("listen"), "listen", listen, rule, hint));
        }
        Ok(_) => {}
    }
    if file.health_address().is_err() {
        let value = format!("`{}`", file.health_listen.as_deref().unwrap_or_default());
        let hint = Some("write it as `0.0.0.0:7462`");
        errors.push(impossible(
            place("health_listen"),
            "health_listen",
            value,
            "must be an address and a port",
            hint,
        ));
    }
    let shown = |path: &Option<PathBuf>| path.as_ref().map(|path| format!("`{}`", path.display()));
    let needs = [
        ("cert", shown(&file.cert), file.key.is_some(), "goes with `key`"),
        ("key", shown(&file.key), file.cert.is_some(), "goes with `cert`"),
        ("ca", shown(&file.ca), file.cert.is_some(), "needs TLS: `cert` and `key`"),
        ("revoked", shown(&file.revoked), file.ca.is_some(), "needs the authority whose list it is: `ca`"),
        (
            "cert",
            shown(&file.cert),
            !file.insecure,
            "makes no sense with `insecure`: it would ask nobody who it is",
        ),
    ];
    for (key, value, given, rule) in needs {
        if let Some(value) = value.filter(|_| !given) {
            errors.push(impossible(place(key), key, value, rule, None));
        }
    }
    let counts = [
        ("beat_interval_ms", file.beat_interval_ms),
        ("lost_after_ms", file.lost_after_ms),
        ("credit_ms", file.credit_ms),
        ("steps_ahead", file.steps_ahead),
    ];
    for (key, count) in counts {
        if count == 0 {
            errors.push(impossible(place(key), key, count, "must be at least 1", None));
        }
    }
    if errors.is_empty() {
        for (key, long) in [("lost_after_ms", file.lost_after_ms), ("credit_ms", file.credit_ms)] {
            if long < file.beat_interval_ms.saturating_mul(2) {
                let rule = format!("must be at least two beats of {} ms", file.beat_interval_ms);
                let hint = Some("one late beat must not cost a worker");
                errors.push(impossible(place(key), key, long, rule, hint));
            }
        }
    }
    errors
}

/// Whether a worker's name has room for a suffix and no letter that an id may not have.
fn may_be_called(name: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    name.len() <= 64
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(plain)
}

fn worker_errors(file: &WorkerFile, place: impl Fn(&str) -> Place) -> Vec<Error> {
    let mut errors: Vec<Error> = telemetry_errors(&file.telemetry, &place).into_iter().collect();
    let is_url = url::Url::parse(&file.coordinator)
        .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some());
    if !is_url {
        let hint = Some("write it as `http://127.0.0.1:7461`");
        let value = format!("`{}`", file.coordinator);
        errors.push(impossible(place("coordinator"), "coordinator", value, "must be a URL", hint));
    }
    let halves = [
        ("cert", &file.cert, &file.key, "goes with `key`"),
        ("key", &file.key, &file.cert, "goes with `cert`"),
    ];
    for (key, half, other, rule) in halves {
        if let (Some(half), None) = (half, other) {
            errors.push(impossible(place(key), key, format!("`{}`", half.display()), rule, None));
        }
    }
    if file.threads == Some(0) {
        let hint = Some("leave it out to use all cores");
        errors.push(impossible(place("threads"), "threads", 0, "must be at least 1", hint));
    }
    if file.bind != AUTO && file.bind.parse::<std::net::IpAddr>().is_err() {
        let value = format!("`{}`", file.bind);
        let hint = Some("write it without a port, such as `127.0.0.1`");
        errors.push(impossible(place("bind"), "bind", value, "must be an IP address or `auto`", hint));
    }
    if let Some(name) = file.name.as_ref().filter(|name| !may_be_called(name)) {
        let rule = "must be at most 64 letters, digits, `-`, `_` and `.`, and begin with a letter or digit";
        errors.push(impossible(place("name"), "name", format!("`{name}`"), rule, None));
    }
    errors
}
