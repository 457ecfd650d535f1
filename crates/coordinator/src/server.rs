//! The coordinator as a service: options in, a handle out, runs until it is told to stop.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use shanty_access::{Role, Secret};
use shanty_proto::v1::{
    FILE_DESCRIPTOR_SET, access_service_server::AccessServiceServer, job_service_server::JobServiceServer,
    status_service_server::StatusServiceServer, worker_service_server::WorkerServiceServer,
};
use tokio::{net::TcpListener, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Access, Limits, guard::Guard},
    at_work::{self, Beginning, Services},
    error::{Error, Result},
    listen::{self, Tls, TlsFiles},
    machine::{self, Change},
    outside::Files,
    services::{Jobs, Statuses, Workers},
    store::{Closing, Store},
};

/// Longest answer. Rows of a large step are the longest.
pub const LONGEST_ANSWER: usize = 256 * 1024 * 1024;
/// Longest message that is taken: a job file, or the numbers of a lease's rows.
pub const LONGEST_MESSAGE: usize = 4 * 1024 * 1024;
/// Longest block of headers that is taken.
const LONGEST_HEADERS: u32 = 16 * 1024;
/// The file of the machine's secret in the state folder.
const SEED_FILE: &str = "seed.key";

/// How a coordinator runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 takes any.
    pub listen: SocketAddr,
    /// Whether nobody is asked who it is. Without it everybody needs a token or a certificate, and nothing but loopback is
    /// listened on without TLS.
    pub insecure: bool,
    /// Certificates; none for connections in clear.
    pub tls: Option<TlsFiles>,
    /// Where health alone is answered, in clear and to everybody: probes speak no TLS.
    pub health_listen: Option<SocketAddr>,
    /// How much one may have at once.
    pub limits: Limits,
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
    /// Defaults: 127.0.0.1:7070, loopback only, closed to all but those who are given a key or a token.
    pub fn new(state_folder: PathBuf, runs_folder: PathBuf, prepare_command: Vec<OsString>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            insecure: false,
            tls: None,
            health_listen: None,
            limits: Limits::default(),
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
    /// Whether it speaks TLS.
    pub encrypted: bool,
    /// Where it answers for its health, in clear.
    pub health_address: Option<SocketAddr>,
}

impl Handle {
    /// The address as clients write it.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.encrypted { "https" } else { "http" }, self.address)
    }
}

/// A coordinator that listens and has its state, but does not serve yet.
pub struct Coordinator {
    options: Options,
    listener: TcpListener,
    health: Option<TcpListener>,
    tls: Option<Arc<Tls>>,
    access: Access,
    seed: [u8; 32],
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
        if !address.ip().is_loopback() && options.tls.is_none() && !options.insecure {
            return Err(Error::NotLoopback { address });
        }
        if options.insecure {
            tracing::warn!(%address, "asks nobody who it is: everybody who reaches this address can run jobs");
        }
        let folder = options.state_folder.clone();
        let tls_files = options.tls.clone();
        let opened = tokio::task::spawn_blocking(move || -> Result<_> {
            let tls = tls_files.map(Tls::load).transpose()?.map(Arc::new);
            let store = Store::open(&folder)?;
            Ok((tls, store, seed(&folder)?))
        });
        let (tls, (store, stored, closing), seed) = opened.await.map_err(|_| Error::Stopping)??;
        let (listener, address) = listen_on(address).await?;
        let (health, health_address) = match options.health_listen {
            Some(address) => listen_on(address).await.map(|(listener, at)| (Some(listener), Some(at)))?,
            None => (None, None),
        };
        let handle = Handle { address, encrypted: tls.is_some(), health_address };
        let access = Access::new(options.insecure, &options.limits);
        Ok(Self { options, listener, health, tls, access, seed, handle, store, closing, stored })
    }

    /// Lets in whoever shows this token, as long as the coordinator lives; it is not stored.
    pub fn add_key(&mut self, secret: &Secret, name: &str, role: Role) {
        self.access.add_key(secret, name, role);
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
        let Self { options, listener, health, tls, access, seed, handle, store, closing, stored } = self;
        let started = Instant::now();
        let machine = at_work::restored(options.protocol.clone(), seed, stored, started);
        let unfinished = machine.unfinished();
        let gone = access.restore(store.tokens().await?, |job| !unfinished.contains(job));
        store.record(gone.into_iter().map(Change::TokenGone).collect()).await?;
        let access = Arc::new(access);
        let stop = shutdown.child_token();
        let beginning = Beginning {
            machine,
            store: store.clone(),
            outside: Arc::new(Files { prepare_command: options.prepare_command.clone() }),
            access: Arc::clone(&access),
            encrypted: tls.is_some(),
            started,
            stop: stop.clone(),
        };
        let (services, machine_task) = beginning.begin().await?;
        let watching = tokio::spawn({
            let stop = stop.clone();
            async move { access.watch(&store, &stop).await }
        });
        if let Some(tls) = &tls {
            tokio::spawn(Arc::clone(tls).watch(stop.clone()));
        }
        tracing::info!(address = %handle.address, encrypted = handle.encrypted, "coordinator listens");
        let served = match health {
            None => serve(services, listener, tls, &options).await,
            Some(health) => {
                let (served, probed) = tokio::join!(
                    serve(services, listener, tls, &options),
                    serve_health(health, &options.limits, stop.clone())
                );
                served.and(probed)
            }
        };
        stop.cancel();
        let _ = watching.await;
        let ran = at_work::ended(machine_task).await;
        // Every handle on the store is gone with the services and the task; the lock is free after this.
        let _ = tokio::task::spawn_blocking(move || closing.join()).await;
        ran.and(served)
    }
}

/// The machine's secret: kept beside the store, not in it, so that whoever reads the store cannot join a collective.
fn seed(folder: &Path) -> Result<[u8; 32]> {
    let path = folder.join(SEED_FILE);
    if !path.exists() {
        let seed = blake3::derive_key(
            "shanty 2026-11-24 seed of a coordinator",
            shanty_access::NewToken::draw()?.secret.expose().as_bytes(),
        );
        shanty_access::files::write_private(&path, &blake3::Hash::from_bytes(seed).to_hex())?;
    }
    let text = Secret::read(&path)?;
    let damaged = |_| shanty_access::Error::Damaged { path, what: "it is no seed".to_owned() };
    let seed = blake3::Hash::from_hex(text.expose()).map_err(damaged)?;
    Ok(*seed.as_bytes())
}

async fn listen_on(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = |source| Error::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Serves everything on one port until the services are to stop.
async fn serve(
    services: Services,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    options: &Options,
) -> Result<()> {
    let limits = &options.limits;
    let (access, stop) = (Arc::clone(&services.access), services.stop.clone());
    let jobs = JobServiceServer::new(services.jobs(options.runs_folder.clone()))
        .max_decoding_message_size(LONGEST_MESSAGE);
    let tokens = AccessServiceServer::new(services.tokens()).max_decoding_message_size(LONGEST_MESSAGE);
    let statuses = StatusServiceServer::new(services.statuses()).max_decoding_message_size(LONGEST_MESSAGE);
    // No compression: packed token ids hardly shrink, and rows are on the way of every step.
    let workers = WorkerServiceServer::new(services.into_workers())
        .max_decoding_message_size(LONGEST_MESSAGE)
        .max_encoding_message_size(LONGEST_ANSWER);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<JobServiceServer<Jobs>>().await;
    reporter.set_serving::<StatusServiceServer<Statuses>>().await;
    reporter.set_serving::<WorkerServiceServer<Workers>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors come from the same build");
    let incoming = listen::accept(listener, tls, limits, stop.clone());
    tonic::transport::Server::builder()
        .timeout(limits.call_within)
        .max_concurrent_streams(limits.calls_per_connection)
        .http2_max_header_list_size(LONGEST_HEADERS)
        .http2_keepalive_interval(Some(limits.ping_every()))
        .http2_keepalive_timeout(Some(limits.answer_within()))
        .layer(Guard { access })
        .add_service(health)
        .add_service(reflection)
        .add_service(tokens)
        .add_service(jobs)
        .add_service(statuses)
        .add_service(workers)
        .serve_with_incoming_shutdown(incoming, stop.cancelled())
        .await
        .map_err(Error::Serve)
}

/// Answers for the coordinator's health, and for nothing else, until `stop`.
async fn serve_health(listener: TcpListener, limits: &Limits, stop: CancellationToken) -> Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<JobServiceServer<Jobs>>().await;
    tonic::transport::Server::builder()
        .timeout(limits.call_within)
        .max_concurrent_streams(limits.calls_per_connection)
        .http2_max_header_list_size(LONGEST_HEADERS)
        .http2_keepalive_interval(Some(limits.ping_every()))
        .http2_keepalive_timeout(Some(limits.answer_within()))
        .max_connection_age(limits.call_within)
        .add_service(health)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled())
        .await
        .map_err(Error::Serve)
}
