//! What outlives the coordinator: SQLite on a thread of its own, behind a [`Store`] handle.
//!
//! Every commit is synchronous (`synchronous = FULL`, write-ahead log); what has queued up meanwhile goes into
//! one commit. A lock is held for as long as the store is open: a second coordinator is refused.
//! A failed write stops the coordinator: what is not durable must not be announced.

mod inline;
mod read;
mod schema;
mod write;

use std::{
    fs::{File, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use rusqlite::{Connection, ErrorCode};
use shanty_proto::JobId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    access::TokenRecord,
    error::{Error, Result},
    machine::{
        Change, StoredJob,
        record::{EventRecord, StepRecord},
    },
};

pub use inline::Database;

/// The store's file in the state folder.
pub const FILE: &str = "coordinator.sqlite";
/// The file whose lock says that a coordinator has the folder; in it is which.
pub const LOCK: &str = "coordinator.lock";

/// Requests that may wait for the disk.
const QUEUE: usize = 1024;
/// Requests that share a commit.
const BATCH: usize = 256;

/// A line that a worker logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// When, by the worker's clock.
    pub unix_ms: u64,
    /// Which worker.
    pub worker: String,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// What.
    pub text: String,
}

type Query = Box<dyn FnOnce(&Connection) + Send>;

enum Request {
    Changes { changes: Vec<Change>, done: Option<oneshot::Sender<()>> },
    Logs { job: JobId, lines: Vec<LogLine> },
    Query(Query),
}

/// A handle on the store. Cheap to clone; the store closes with the last one.
#[derive(Clone)]
pub struct Store {
    requests: mpsc::Sender<Request>,
    failure: watch::Receiver<Option<String>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store of a state folder, made if absent, and starts its thread. Also gives what it knows. Blocks.
    ///
    /// # Errors
    /// [`Error::StateInUse`], [`Error::StateFolder`], [`Error::StoreVersion`], [`Error::Store`], [`Error::Record`]
    pub fn open(folder: &Path) -> Result<(Self, Vec<StoredJob>, Closing)> {
        std::fs::create_dir_all(folder)
            .map_err(|source| Error::StateFolder { folder: folder.to_owned(), source })?;
        let lock = take_lock(folder)?;
        let connection = connect(folder)?;
        let jobs = read::jobs(&connection)?;
        let (requests, queue) = mpsc::channel(QUEUE);
        let (fail, failure) = watch::channel(None);
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                serve(connection, queue, &fail);
                // Free for the next one only after the connection is closed.
                drop(lock);
            })
            .map_err(|source| Error::StateFolder { folder: folder.to_owned(), source })?;
        Ok((Self { requests, failure }, jobs, Closing { thread: Some(thread) }))
    }

    /// Makes changes durable, in order; returns once they are on disk.
    ///
    /// # Errors
    /// [`Error::Stopping`] if the store failed: [`Store::failed`] says why.
    pub async fn persist(&self, changes: Vec<Change>) -> Result<()> {
        let (done, wait) = oneshot::channel();
        self.request(Request::Changes { changes, done: Some(done) }).await?;
        wait.await.map_err(|_| Error::Stopping)
    }

    /// Makes changes durable, in order, some time soon.
    ///
    /// # Errors
    /// As [`Store::persist`].
    pub async fn record(&self, changes: Vec<Change>) -> Result<()> {
        self.request(Request::Changes { changes, done: None }).await
    }

    /// Keeps lines of a job's log.
    ///
    /// # Errors
    /// As [`Store::persist`].
    pub async fn log(&self, job: JobId, lines: Vec<LogLine>) -> Result<()> {
        self.request(Request::Logs { job, lines }).await
    }

    /// At most `limit` committed steps of a job from `from` on, evenly spaced.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Record`], [`Error::Stopping`]
    pub async fn steps(&self, job: JobId, from: u64, limit: u32) -> Result<Vec<StepRecord>> {
        self.query(move |connection| read::steps(connection, job.as_str(), from, limit)).await
    }

    /// A job's newest events, oldest first.
    ///
    /// # Errors
    /// As [`Store::steps`].
    pub async fn events(&self, job: JobId, limit: u32) -> Result<Vec<EventRecord>> {
        self.query(move |connection| read::events(connection, job.as_str(), limit)).await
    }

    /// All tokens that were made and not taken back.
    ///
    /// # Errors
    /// As [`Store::steps`].
    pub async fn tokens(&self) -> Result<Vec<TokenRecord>> {
        self.query(read::tokens).await
    }

    /// A job's newest log lines, oldest first; of one worker, if it is named.
    ///
    /// # Errors
    /// As [`Store::steps`].
    pub async fn logs(&self, job: JobId, worker: String, limit: u32) -> Result<Vec<LogLine>> {
        self.query(move |connection| read::logs(connection, job.as_str(), &worker, limit)).await
    }

    /// Returns once a write has failed, with the reason. Never, if none does.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure.clone();
        let reason = match failure.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone(),
            Err(_) => None,
        };
        match reason {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    async fn request(&self, request: Request) -> Result<()> {
        self.requests.send(request).await.map_err(|_| Error::Stopping)
    }

    async fn query<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, wait) = oneshot::channel();
        let query: Query = Box::new(move |connection| drop(answer.send(read(connection))));
        self.request(Request::Query(query)).await?;
        wait.await.map_err(|_| Error::Stopping)?
    }
}

/// Waits for the store's thread when it is dropped or joined, so that the lock is free afterwards.
#[derive(Debug)]
pub struct Closing {
    thread: Option<JoinHandle<()>>,
}

impl Closing {
    /// Blocks until the store is closed, which is after the last handle is gone.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's thread panicked");
        }
    }
}

/// Takes the folder for this process, until the file is closed: by this process, or by the system at its end.
fn take_lock(folder: &Path) -> Result<File> {
    let failed = |source| Error::StateFolder { folder: folder.to_owned(), source };
    let path = folder.join(LOCK);
    let mut file =
        File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only for people; who cannot be read is not named.
            let _ = file.read_to_string(&mut holder);
            return Err(Error::StateInUse { folder: folder.to_owned(), holder: holder.trim().to_owned() });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "process {}", std::process::id()));
    written.map_err(failed)?;
    Ok(file)
}

fn connect(folder: &Path) -> Result<Connection> {
    let path: PathBuf = folder.join(FILE);
    let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Error::StateInUse { folder: folder.to_owned(), holder: String::new() }
        }
        _ => Error::Store { action: "open the file", source },
    };
    let mut connection = Connection::open(&path).map_err(failed)?;
    connection.busy_timeout(std::time::Duration::ZERO).map_err(failed)?;
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE").map_err(failed)?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    // Takes the lock now and keeps it, as the mode is exclusive.
    connection.execute_batch("BEGIN EXCLUSIVE; COMMIT").map_err(failed)?;
    schema::upgrade(&mut connection)?;
    Ok(connection)
}

fn serve(
    mut connection: Connection,
    mut queue: mpsc::Receiver<Request>,
    fail: &watch::Sender<Option<String>>,
) {
    let mut batch = Vec::with_capacity(BATCH);
    while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
        if !carry_out(&mut connection, &mut batch, fail) {
            return;
        }
    }
}

/// Carries out what has queued up, in one commit; says whether the store is sound.
fn carry_out(
    connection: &mut Connection,
    batch: &mut Vec<Request>,
    fail: &watch::Sender<Option<String>>,
) -> bool {
    if let Err(source) = commit(connection, batch) {
        let error = Error::Store { action: "write", source };
        tracing::error!(%error, "the store failed");
        // Requests that wait are dropped with the queue, which tells them.
        fail.send_replace(Some(error.to_string()));
        return false;
    }
    for request in batch.drain(..) {
        match request {
            Request::Changes { done: Some(done), .. } => drop(done.send(())),
            Request::Query(query) => query(connection),
            Request::Changes { .. } | Request::Logs { .. } => {}
        }
    }
    true
}

fn commit(connection: &mut Connection, batch: &[Request]) -> rusqlite::Result<()> {
    if batch.iter().all(|request| matches!(request, Request::Query(_))) {
        return Ok(());
    }
    let transaction = connection.transaction()?;
    for request in batch {
        match request {
            Request::Changes { changes, .. } => {
                for change in changes {
                    write::apply(&transaction, change)?;
                }
            }
            Request::Logs { job, lines } => write::logs(&transaction, job.as_str(), lines)?,
            Request::Query(_) => {}
        }
    }
    transaction.commit()
}
