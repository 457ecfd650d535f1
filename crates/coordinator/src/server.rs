//! The coordinator as a service: options in, a handle out, runs until it is told to stop.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use shanty_proto::{
    JobId,
    v1::{
        FILE_DESCRIPTOR_SET, job_service_server::JobServiceServer,
        status_service_server::StatusServiceServer, worker_service_server::WorkerServiceServer,
    },
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_web::GrpcWebLayer;

use crate::{
    engine::{self, Works},
    error::{Error, Result},
    hub::Hub,
    leases::Leases,
    machine::{self, Event, Machine},
    pages,
    services::{Jobs, Statuses, Workers},
    store::{Closing, Store},
};

/// Longest message, either way. Rows of a large step are the longest.
pub const LONGEST_MESSAGE: usize = 256 * 1024 * 1024;
/// Longest message of a user: a job file.
const LONGEST_JOB: usize = 4 * 1024 * 1024;

/// How a coordinator runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 takes any.
    pub listen: SocketAddr,
    /// Whether it may listen beyond loopback, with neither encryption nor tokens.
    pub insecure: bool,
    /// Its state.
    pub state_folder: PathBuf,
    /// Where the stores of jobs lie that name none.
    pub runs_folder: PathBuf,
    /// The command that prepares data; see [`crate::prepare`].
    pub prepare_command: Vec<OsString>,
    /// Time-outs and bounds of the step protocol.
    pub protocol: machine::Options,
}

impl Options {
    /// Defaults: 127.0.0.1:7070, loopback only.
    pub fn new(state_folder: PathBuf, runs_folder: PathBuf, prepare_command: Vec<OsString>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            insecure: false,
            state_folder,
            runs_folder,
            prepare_command,
            protocol: machine::Options::default(),
        }
    }
}

/// What others may know of a running coordinator.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Where it listens.
    pub address: SocketAddr,
}

impl Handle {
    /// The address as clients write it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// A coordinator that listens and has its state, but does not serve yet.
pub struct Coordinator {
    options: Options,
    listener: TcpListener,
    handle: Handle,
    store: Store,
    closing: Closing,
    stored: Vec<machine::StoredJob>,
}

impl Coordinator {
    /// Takes the address and the state folder.
    ///
    /// # Errors
    /// [`Error::NotLoopback`], [`Error::Listen`], and those of [`Store::open`].
    pub async fn bind(options: Options) -> Result<Self> {
        let address = options.listen;
        if !address.ip().is_loopback() {
            if !options.insecure {
                return Err(Error::NotLoopback { address });
            }
            tracing::warn!(%address, "listens beyond loopback without encryption or tokens: everybody there can run jobs");
        }
        let folder = options.state_folder.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open(&folder)).await;
        let (store, stored, closing) = opened.map_err(|_| Error::Stopping)??;
        let listener =
            TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        let address = listener.local_addr().map_err(|source| Error::Listen { address, source })?;
        Ok(Self { options, listener, handle: Handle { address }, store, closing, stored })
    }

    /// What others may know of it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Binds and serves; `ready` gets the handle once clients can connect.
    ///
    /// # Errors
    /// Those of [`Coordinator::bind`] and [`Coordinator::serve`].
    pub async fn run(
        options: Options,
        shutdown: CancellationToken,
        ready: impl FnOnce(Handle),
    ) -> Result<()> {
        let coordinator = Self::bind(options).await?;
        ready(coordinator.handle());
        coordinator.serve(shutdown).await
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// [`Error::Serve`], or what made the store fail.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<()> {
        let Self { options, listener, handle, store, closing, stored } = self;
        let started = Instant::now();
        let mut machine = Machine::new(options.protocol.clone(), seed());
        let (hub, leases) = (Arc::new(Hub::default()), Arc::new(Leases::default()));
        for job in stored {
            machine.restore(engine::now(started), job);
        }
        let broken = open_data(&machine, &leases).await;
        for job in machine.views(engine::now(started)) {
            hub.set_status(job);
        }
        let stop = shutdown.child_token();
        let works = Works {
            machine,
            store: store.clone(),
            hub: Arc::clone(&hub),
            leases: Arc::clone(&leases),
            prepare_command: options.prepare_command.clone(),
            started,
        };
        let (engine, task) = engine::build(works);
        for (job, error) in broken {
            engine.tell(Event::DataLost { job, error }).await?;
        }
        let machine_task = tokio::spawn({
            let stop = stop.clone();
            async move {
                let outcome = task.run(stop.clone()).await;
                stop.cancel();
                outcome
            }
        });
        tracing::info!(address = %handle.address, "coordinator listens");
        let served = serve_grpc(listener, &options, engine, store, hub, leases, stop.clone()).await;
        stop.cancel();
        let ran = machine_task.await.unwrap_or(Err(Error::Stopping));
        // Every handle on the store is gone with the services and the task; the lock is free after this.
        let _ = tokio::task::spawn_blocking(move || closing.join()).await;
        ran.and(served)
    }
}

/// Opens the prepared data of jobs that were at work; those whose data cannot be opened are given back.
async fn open_data(machine: &Machine, leases: &Leases) -> Vec<(JobId, shanty_diagnostic::Diagnostic)> {
    let mut broken = Vec::new();
    for job in machine.unfinished() {
        let (Some(spec), Some(hash)) = (machine.spec(&job), machine.data_hash(&job)) else { continue };
        leases.allow(&job, machine.leasable(&job));
        if let Err(error) = leases.open(&job, &spec, Some(hash)).await {
            broken.push((job, shanty_diagnostic::Diagnose::diagnostic(&error)));
        }
    }
    broken
}

/// Secret, and new for each process.
fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    seed[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    seed[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    seed
}

async fn serve_grpc(
    listener: TcpListener,
    options: &Options,
    engine: engine::Engine,
    store: Store,
    hub: Arc<Hub>,
    leases: Arc<Leases>,
    stop: CancellationToken,
) -> Result<()> {
    let jobs = JobServiceServer::new(Jobs { engine: engine.clone(), runs: options.runs_folder.clone() })
        .max_decoding_message_size(LONGEST_JOB);
    let statuses = StatusServiceServer::new(Statuses {
        engine: engine.clone(),
        store: store.clone(),
        hub: Arc::clone(&hub),
        shutdown: stop.clone(),
    });
    // No compression: packed token ids hardly shrink, and rows are on the way of every step.
    let workers = WorkerServiceServer::new(Workers {
        engine,
        store,
        hub,
        leases,
        sessions: Arc::new(AtomicU64::new(0)),
        shutdown: stop.clone(),
    })
    .max_decoding_message_size(LONGEST_MESSAGE)
    .max_encoding_message_size(LONGEST_MESSAGE);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<JobServiceServer<Jobs>>().await;
    reporter.set_serving::<StatusServiceServer<Statuses>>().await;
    reporter.set_serving::<WorkerServiceServer<Workers>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors come from the same build");
    // One port for all: native gRPC, gRPC-web for browsers, and the pages that speak it.
    let routes = Routes::new(health)
        .add_service(reflection)
        .add_service(jobs)
        .add_service(statuses)
        .add_service(workers)
        .into_axum_router()
        .layer(GrpcWebLayer::new())
        .fallback(pages::answer);
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(2)))
        .http2_keepalive_timeout(Some(Duration::from_secs(3)))
        .add_routes(Routes::from(routes))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled())
        .await
        .map_err(Error::Serve)
}
