//! One device's process: the session and the trainer's thread.

use std::{
    fmt,
    sync::{Arc, mpsc::channel},
    time::Duration,
};

use shanty_access::Credentials;
use shanty_collective::tcp::Listener;
use shanty_proto::v1::{Hello, LogLine, worker_service_client::WorkerServiceClient};
use shanty_telemetry::trace::Tracer;
use tokio::sync::{
    mpsc::{Receiver, unbounded_channel},
    oneshot,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tracing::{info, warn};

use crate::{
    Error,
    control::Control,
    engine::EngineLoader,
    facts::Facts,
    failpoint::Failpoints,
    rows::RowClient,
    session::Session,
    trainer::{Command, Surroundings, Trainer, trace::Traces},
};

/// How long an attempt to connect may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// A connection that is silent is asked after this time whether it lives.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(2);
/// And is given up after this time without an answer.
const KEEP_ALIVE_WITHIN: Duration = Duration::from_secs(5);
/// How long the trainer may take to end: a micro-batch, and a checkpoint that is being written.
const END_WITHIN: Duration = Duration::from_secs(20);
/// How long a worker that is to end waits for the coordinator to say that it may. Who asked kills it earlier if in a hurry.
const DRAIN_WITHIN: Duration = Duration::from_secs(600);
/// The largest message that is taken from the coordinator.
const LARGEST_MESSAGE_BYTES: usize = 64 << 20;

/// How one device's process works.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// URL of the coordinator.
    pub coordinator: String,
    /// What is shown to it.
    pub credentials: Credentials,
    /// Names this process, see [`new_worker_id`].
    pub worker_id: String,
    /// The device as it is shown: `cpu`, `cuda:0`, …
    pub device: String,
    /// Threads to compute with.
    pub threads: usize,
    /// Address to accept other workers' connections on; each process takes a free port of it.
    pub bind: String,
    /// Host or address that other workers connect to, where it is not `bind`.
    pub advertise: Option<String>,
    /// Bytes that a step may take; half of what is free when none. Workers that share a host should share it.
    pub memory_limit_bytes: Option<u64>,
    /// Armed failpoints.
    pub failpoints: Failpoints,
    /// Where the spans of steps go.
    pub tracer: Tracer,
    /// Cancelled to have the worker hand back what it holds and end then.
    pub drain: CancellationToken,
}

impl WorkerOptions {
    /// A worker on this machine's CPU with all its cores, a new id, and the failpoints of the environment.
    ///
    /// # Errors
    /// [`Error::Failpoint`] if `SHANTY_FAILPOINT` cannot be understood.
    pub fn new(coordinator: impl Into<String>) -> Result<Self, Error> {
        Ok(Self {
            coordinator: coordinator.into(),
            credentials: Credentials::default(),
            worker_id: new_worker_id(),
            device: "cpu".to_owned(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            bind: "127.0.0.1".to_owned(),
            advertise: None,
            memory_limit_bytes: None,
            failpoints: Failpoints::from_environment()?,
            tracer: Tracer::off(),
            drain: CancellationToken::new(),
        })
    }
}

/// An id for a worker's process, drawn anew at each call; ids sort by time.
pub fn new_worker_id() -> String {
    format!("w-{}", uuid::Uuid::now_v7().simple())
}

/// An id for a process of the worker that is called `name`, drawn anew at each call.
///
/// The name tells people that it is the same place; the suffix keeps a process apart from the one before it, which may live
/// on unseen: a pod on a host that cannot be reached is replaced while it still runs.
pub fn worker_id_of(name: &str) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{name}-{}", &id[..8])
}

/// Works for the coordinator until `shutdown`. `logs` is the other end of [`logs::forward`](crate::logs::forward).
///
/// # Errors
/// [`Error::Address`], [`Error::Process`] and that nothing can listen, before anything began; [`Error::Refused`] if the
/// coordinator does not want this worker.
pub async fn run_worker(
    options: WorkerOptions,
    loader: Box<dyn EngineLoader>,
    logs: Receiver<LogLine>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let not_one = || Error::Address { address: options.coordinator.clone() };
    let address = url::Url::parse(&options.coordinator).map_err(|_| not_one())?;
    let endpoint = Endpoint::from_shared(options.coordinator.clone())
        .map_err(|_| not_one())?
        .connect_timeout(CONNECT_WITHIN)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_WITHIN)
        .keep_alive_while_idle(true);
    let (endpoint, bearer) =
        options.credentials.prepare(&address, endpoint).map_err(|error| Error::part(&error))?;
    let client = WorkerServiceClient::with_interceptor(endpoint.connect_lazy(), bearer)
        .max_decoding_message_size(LARGEST_MESSAGE_BYTES);
    let bind = Address { host: &options.bind, port: 0 }.to_string();
    let listener = Listener::bind(&bind).map_err(|error| Error::part(&error))?;
    let hello = hello(&options, &listener);
    info!(worker_id = %options.worker_id, collective = %hello.collective_address, "worker started");

    let control = Arc::new(Control::default());
    let (commands, commanded) = channel();
    let (reports, reported) = unbounded_channel();
    let tracer = options.tracer.clone();
    let facts = Some(Facts::of(&options.device));
    let traces = Traces {
        tracer: options.tracer.clone(),
        worker_id: options.worker_id.clone(),
        device: options.device.clone(),
    };
    let around = Surroundings {
        worker_id: options.worker_id.clone(),
        threads: options.threads,
        device: options.device,
        memory_limit_bytes: options.memory_limit_bytes,
        control: Arc::clone(&control),
        reports,
        rows: RowClient::new(client.clone(), tokio::runtime::Handle::current()),
        listener,
        failpoints: options.failpoints,
        traces,
    };
    let (ended, mut end) = oneshot::channel();
    let trainer = Trainer::new(around, loader, commanded);
    std::thread::Builder::new()
        .name("trainer".to_owned())
        .spawn(move || {
            // Nobody waits any more if the session ended first.
            let _ = ended.send(trainer.run());
        })
        .map_err(|source| Error::Process { what: "the training thread".to_owned(), source })?;

    let session = Session {
        client,
        address: options.coordinator,
        hello,
        control: Arc::clone(&control),
        commands: commands.clone(),
        reports: reported,
        logs,
        facts,
        drain: options.drain.clone(),
    };
    let shutdown = end_after_drain(shutdown, options.drain);
    let result = tokio::select! {
        biased;
        () = control.dead.cancelled() => return Err(Error::Killed),
        result = &mut end => return result.unwrap_or(Err(Error::TrainerGone)),
        result = Box::pin(session.run(shutdown)) => result,
    };
    if matches!(result, Err(Error::Hung { .. })) {
        // Nothing that the thread holds can be had back but by the end of the process.
        return result;
    }
    control.drop_membership("the worker ends");
    // A trainer that has ended needs no command.
    let _ = commands.send(Command::Close);
    let _ = tokio::time::timeout(END_WITHIN, end).await;
    let _ = tokio::task::spawn_blocking(move || tracer.flush()).await;
    result
}

/// Ends with `shutdown`, or when a drain takes too long: whoever asked for it counts on an end.
fn end_after_drain(shutdown: CancellationToken, drain: CancellationToken) -> CancellationToken {
    let end = shutdown.child_token();
    let ended = end.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = ended.cancelled() => return,
            () = drain.cancelled() => {}
        }
        tokio::select! {
            () = ended.cancelled() => {}
            () = tokio::time::sleep(DRAIN_WITHIN) => {
                warn!(?DRAIN_WITHIN, "what this worker holds was not taken over in time; it ends");
                ended.cancel();
            }
        }
    });
    end
}

fn hello(options: &WorkerOptions, listener: &Listener) -> Hello {
    let bound = listener.local_addr();
    let collective_address = match &options.advertise {
        Some(host) => Address { host, port: bound.port() }.to_string(),
        None => bound.to_string(),
    };
    let memory = rustix::system::sysinfo();
    Hello {
        worker_id: options.worker_id.clone(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device: options.device.clone(),
        threads: u32::try_from(options.threads).unwrap_or(u32::MAX),
        memory_bytes: memory.totalram.saturating_mul(memory.mem_unit.into()),
        collective_address,
        attachment: None,
        shard_part: None,
        draining: false,
    }
}

/// `host:port`, with brackets around an IPv6 address.
struct Address<'a> {
    host: &'a str,
    port: u16,
}

impl fmt::Display for Address<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') && !self.host.starts_with('[') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_hosts_become_addresses() {
        let show = |host| Address { host, port: 70 }.to_string();
        assert_eq!(show("node-3"), "node-3:70");
        assert_eq!(show("fe80::1"), "[fe80::1]:70");
    }

    #[test]
    fn worker_ids_differ_and_are_short_words() {
        let (one, other) = (new_worker_id(), new_worker_id());
        assert_ne!(one, other);
        assert!(one.starts_with("w-") && one.len() == 34, "{one}");
    }
}
