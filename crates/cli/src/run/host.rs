//! The coordinator inside this process.

use std::{ffi::OsString, net::SocketAddr, path::Path, time::Duration};

use shanty_access::{Credentials, NewToken, Role, Secret, local_key::LocalKey};
use shanty_coordinator::{Coordinator, Options};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{client::Client, error::Error, failure::CommandResult};

/// How long a run waits for all of its workers before it begins with those that are there. They were all started
/// together; waiting for the slowest keeps the world size, and with it every bit, the same from run to run.
const GATHER: Duration = Duration::from_secs(60);
/// How long a worker's leave to go on lasts. A resumed run waits this long for workers of the run before it, which have
/// all died with it.
const CREDIT: Duration = Duration::from_secs(5);
/// How long the server may take to close its streams.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// A coordinator on a loopback port.
///
/// It asks everybody who it is, as any coordinator does: other users of this machine reach its port, too. This user's
/// commands find the key that it leaves for them.
pub(crate) struct Host {
    address: String,
    key: Secret,
    left: Option<LocalKey>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), shanty_coordinator::Error>>,
}

impl Host {
    /// Starts a coordinator that keeps its state in `state`, on any free port.
    pub(crate) async fn start(state: &Path) -> CommandResult<Self> {
        Self::start_with(state, prepare_command()?).await
    }

    async fn start_with(state: &Path, prepare_command: Vec<OsString>) -> CommandResult<Self> {
        let runs = std::env::current_dir().unwrap_or_default().join("runs");
        let mut options = Options::new(state.to_owned(), runs, prepare_command);
        options.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        options.protocol.gather = GATHER;
        options.protocol.credit = CREDIT;
        let mut coordinator = Coordinator::bind(options).await?;
        let address = coordinator.handle().url();
        let (key, left) = match LocalKey::for_port(coordinator.handle().address.port()) {
            Ok(left) => (left.secret().clone(), Some(left)),
            Err(error) => {
                tracing::warn!(%error, "no key is left for other commands: they cannot look at this run");
                (NewToken::draw()?.secret, None)
            }
        };
        coordinator.add_key(&key, "the user who runs it", Role::Admin);
        let stop = CancellationToken::new();
        let task = tokio::spawn(Box::pin(coordinator.serve(stop.clone())));
        Ok(Self { address, key, left, stop, task })
    }

    /// Starts a coordinator on a copy of another's state, only to be asked about it: it starts nothing.
    pub(crate) async fn start_to_look(state: &Path) -> CommandResult<Self> {
        // A job that was interrupted while its data was prepared stays there: this child does nothing, and dies
        // with the coordinator.
        Self::start_with(state, ["sleep", "3600"].map(OsString::from).to_vec()).await
    }

    /// A connection to it, with the right to everything.
    pub(crate) async fn connect(&self) -> CommandResult<Client> {
        let credentials = Credentials { token: Some(self.key.clone()), ..Credentials::default() };
        Client::connect(&self.address, &credentials).await
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Stops it; its state is on disk.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        if let Some(left) = &self.left {
            left.remove();
        }
        if tokio::time::timeout(CLOSE_WITHIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

/// The command that prepares data: this program.
pub(crate) fn prepare_command() -> CommandResult<Vec<OsString>> {
    let program = std::env::current_exe()
        .map_err(|source| Error::Start { what: "the process that prepares data", source })?;
    Ok(vec![program.into(), "prepare-data".into()])
}
