//! The store in memory and without a thread: the same tables and the same code, for a simulation.

use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;
use tokio::sync::{mpsc, watch};

use super::{BATCH, QUEUE, Store, carry_out, read, schema};
use crate::{
    error::{Error, Result},
    machine::StoredJob,
};

/// What outlives a simulated coordinator.
#[derive(Debug, Clone)]
pub struct Database(Arc<Mutex<Connection>>);

impl Database {
    /// An empty one.
    ///
    /// # Errors
    /// [`Error::Store`]
    pub fn in_memory() -> Result<Self> {
        let opened = Connection::open_in_memory();
        let mut connection = opened.map_err(|source| Error::Store { action: "open the file", source })?;
        schema::upgrade(&mut connection)?;
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    /// What it knows of all jobs.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Record`]
    pub fn jobs(&self) -> Result<Vec<StoredJob>> {
        read::jobs(&self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        // A transaction that a panic left open is rolled back when it is dropped.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// A store on `database`, served by a task of this runtime. What is not committed when the runtime ends is lost, as when
    /// a process is killed.
    pub fn inline(database: &Database) -> Self {
        let (requests, mut queue) = mpsc::channel(QUEUE);
        let (fail, failure) = watch::channel(None);
        let database = database.clone();
        tokio::spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while queue.recv_many(&mut batch, BATCH).await > 0 {
                if !carry_out(&mut database.lock(), &mut batch, &fail) {
                    return;
                }
            }
        });
        Self { requests, failure }
    }
}
