//! Talks to a coordinator, wherever it is.

use std::{
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use shanty_access::{Channel, Credentials, Secret};
use shanty_proto::v1::{
    self, access_service_client::AccessServiceClient, job_service_client::JobServiceClient,
    status_service_client::StatusServiceClient,
};
use tonic::transport::Endpoint;
use tonic_health::pb::health_client::HealthClient;

use crate::{error::Error, failure::CommandResult, prepared::Scratch, run::host::Host};

/// How long a coordinator may take to answer the door.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Below a run folder: where the coordinator of `shanty run` says that it listens.
pub(crate) const ADDRESS_FILE: &str = "coordinator/address";

/// What is shown to a coordinator, and by what it is known.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Identity")]
pub(crate) struct Identity {
    /// Certificate of the authority that the coordinator is known by; the system's authorities when absent
    #[arg(long, env = "SHANTY_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// The certificate to show
    #[arg(long, env = "SHANTY_CERT", value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// Its key
    #[arg(long, env = "SHANTY_KEY", value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// File of the token to show; `-` reads it from stdin. SHANTY_TOKEN holds one without a file
    #[arg(long, env = "SHANTY_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

impl Identity {
    pub(crate) fn credentials(&self) -> Credentials {
        Credentials {
            ca: self.ca.clone(),
            certificate: self.cert.clone(),
            key: self.key.clone(),
            token_file: self.token_file.clone(),
            token: token_of_environment(),
        }
    }
}

/// The token that the environment holds.
pub(crate) fn token_of_environment() -> Option<Secret> {
    let text = std::env::var(shanty_config::env_vars::SHANTY_TOKEN).ok()?;
    Some(Secret::new(&text)).filter(|token| !token.expose().is_empty())
}

/// Which coordinator is meant.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Target {
    /// The coordinator, as http://host:port; the local run's when absent
    #[arg(long, env = "SHANTY_COORDINATOR", value_name = "URL")]
    pub(crate) coordinator: Option<String>,

    /// The run folder whose coordinator is meant; all below ./runs are tried when absent
    #[arg(long, value_name = "DIR", conflicts_with = "coordinator")]
    pub(crate) store: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) identity: Identity,
}

/// A connection to a coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    address: String,
}

impl Client {
    /// Connects, or says why not.
    pub(crate) async fn connect(address: &str, credentials: &Credentials) -> CommandResult<Self> {
        let unreachable = |reason: String| Error::Unreachable { address: address.to_owned(), reason };
        let endpoint = Endpoint::from_shared(address.to_owned())
            .ok()
            .filter(|endpoint| endpoint.uri().host().is_some() && endpoint.uri().scheme().is_some())
            .ok_or_else(|| Error::Address { address: address.to_owned() })?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        let url = url::Url::parse(address).map_err(|_| Error::Address { address: address.to_owned() })?;
        let (endpoint, bearer) = credentials.prepare(&url, endpoint)?;
        let channel = endpoint.connect().await.map_err(|error| unreachable(innermost(&error)))?;
        let channel = Channel::new(channel, bearer);
        Ok(Self { channel, address: address.to_owned() })
    }

    /// Connects to a coordinator of a local run, which left a key for this user.
    pub(crate) async fn connect_here(address: &str) -> CommandResult<Self> {
        Self::connect(address, &Credentials::default()).await
    }

    /// The address that was connected to.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// For clients that make themselves.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(crate) fn access(&self) -> AccessServiceClient<Channel> {
        AccessServiceClient::new(self.channel.clone())
    }

    pub(crate) fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    pub(crate) fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone())
    }

    pub(crate) fn status(&self) -> StatusServiceClient<Channel> {
        StatusServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Where a job stands.
    pub(crate) async fn job_status(&self, job_id: &str) -> CommandResult<v1::JobStatus> {
        let request = v1::GetStatusRequest { job_id: job_id.to_owned() };
        let response = self.status().get_status(request).await.map_err(wire)?.into_inner();
        Ok(response.status.ok_or_else(|| Error::Answer { reason: "a status without status".to_owned() })?)
    }

    /// All jobs that the coordinator knows.
    pub(crate) async fn list(&self) -> CommandResult<Vec<v1::JobSummary>> {
        Ok(self.jobs().list_jobs(v1::ListJobsRequest {}).await.map_err(wire)?.into_inner().jobs)
    }
}

/// A connection, and where it is to a run that has ended, the coordinator that answers for it.
pub(crate) struct Connection {
    pub(crate) client: Client,
    past: Option<PastRun>,
}

struct PastRun {
    _host: Host,
    _copy: Scratch,
}

impl From<Client> for Connection {
    fn from(client: Client) -> Self {
        Self { client, past: None }
    }
}

impl Connection {
    /// Connects to the coordinator of a run. Where it runs no more, one answers from a copy of what it left: nothing is
    /// changed, and no worker can find it.
    async fn to_run(store: &Path) -> CommandResult<Self> {
        if let Some(address) = read_address(store)
            && let Ok(client) = Client::connect_here(&address).await
        {
            return Ok(client.into());
        }
        let copy = Scratch::new();
        copy_folder(&store.join("coordinator"), copy.path())?;
        let host = Host::start_to_look(copy.path()).await?;
        let client = host.connect().await?;
        Ok(Self { client, past: Some(PastRun { _host: host, _copy: copy }) })
    }

    /// Whether nobody works on its jobs.
    pub(crate) fn is_past(&self) -> bool {
        self.past.is_some()
    }
}

fn copy_folder(from: &Path, to: &Path) -> CommandResult<()> {
    let copy = || -> std::io::Result<()> {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    };
    copy().map_err(|source| Error::File { action: "read", path: from.to_owned(), source }.into())
}

impl Target {
    /// Connects to the one coordinator that is meant: the named one, or the first that runs below here.
    pub(crate) async fn connect(&self) -> CommandResult<Client> {
        if let Some(url) = &self.coordinator {
            return Client::connect(url, &self.identity.credentials()).await;
        }
        let mut last = None;
        for address in self.stores().iter().filter_map(|store| read_address(store)) {
            match Client::connect_here(&address).await {
                Ok(client) => return Ok(client),
                Err(failure) => last = Some(failure),
            }
        }
        Err(last.unwrap_or_else(|| Error::NoCoordinator.into()))
    }

    /// Connects to the one coordinator that is meant; where none runs, to what the first run left.
    pub(crate) async fn connect_any(&self) -> CommandResult<Connection> {
        let failure = match self.connect().await {
            Ok(client) => return Ok(client.into()),
            Err(failure) => failure,
        };
        match self.stores().first() {
            Some(store) if self.coordinator.is_none() => Connection::to_run(store).await,
            _ => Err(failure),
        }
    }

    /// What is shown to the coordinator: a local run's left a key for this user.
    pub(crate) fn credentials(&self) -> Credentials {
        if self.coordinator.is_some() { self.identity.credentials() } else { Credentials::default() }
    }

    /// Connects to all coordinators that may be meant. Runs that have ended answer from what they left.
    pub(crate) async fn connect_all(&self) -> CommandResult<Vec<Connection>> {
        if let Some(url) = &self.coordinator {
            return Ok(vec![Client::connect(url, &self.identity.credentials()).await?.into()]);
        }
        let mut connections = Vec::new();
        for store in self.stores() {
            connections.push(Connection::to_run(&store).await?);
        }
        if connections.is_empty() { Err(Error::NoCoordinator.into()) } else { Ok(connections) }
    }

    /// Connects to the coordinator that knows `job`, an id or the name of a job; gives its id, too.
    pub(crate) async fn connect_for(&self, job: &str) -> CommandResult<(Connection, String)> {
        let mut connections = self.connect_all().await?;
        for index in 0..connections.len() {
            if let Some(id) = resolve(&connections[index].client, job).await? {
                return Ok((connections.swap_remove(index), id));
            }
        }
        // Whoever is asked last says that there is no such job.
        let last = connections.pop().ok_or(Error::NoCoordinator)?;
        Ok((last, job.to_owned()))
    }

    /// The run folders that may be meant.
    pub(crate) fn stores(&self) -> Vec<PathBuf> {
        if let Some(store) = &self.store {
            return vec![store.clone()];
        }
        let mut stores: Vec<PathBuf> = std::fs::read_dir("runs")
            .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
            .unwrap_or_default();
        stores.retain(|store| store.join("coordinator").is_dir());
        stores.sort();
        stores
    }
}

/// The id that `job` stands for: itself, or that of the newest job whose name it is.
async fn resolve(client: &Client, job: &str) -> CommandResult<Option<String>> {
    let mut jobs = client.list().await?;
    jobs.sort_by_key(|summary| std::cmp::Reverse(summary.submitted_unix_ms));
    let exact = jobs.iter().find(|summary| summary.job_id == job);
    let named = || jobs.iter().find(|summary| summary.job_id.starts_with(&format!("{job}-")));
    Ok(exact.or_else(named).map(|summary| summary.job_id.clone()))
}

/// The address that a run's coordinator left in its folder.
pub(crate) fn read_address(store: &Path) -> Option<String> {
    let text = std::fs::read_to_string(store.join(ADDRESS_FILE)).ok()?;
    let address = text.trim();
    (!address.is_empty()).then(|| address.to_owned())
}

/// An error that came over the wire, with the code and hint that it was sent with.
pub(crate) fn wire(status: tonic::Status) -> crate::failure::Failure {
    crate::failure::Failure::from(shanty_proto::from_status(&status))
}

/// The innermost cause: "connection refused" says more than "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Runs a command's asynchronous part on this thread.
pub(crate) fn block_on<T>(work: impl Future<Output = CommandResult<T>>) -> CommandResult<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "the runtime", source })?;
    runtime.block_on(work)
}
