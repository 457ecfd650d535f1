//! The store for a thread without a runtime.

use std::future::Future;

use crate::{
    error::{Error, Result},
    manifest::{Expectations, Key, Manifest},
    read::{Found, Verified},
    retention::{Keep, Removed},
    snapshot::Snapshot,
    store::{Listing, Store},
    write::{WritePoint, Written},
};

/// A [`Store`] with a small runtime of its own. Not to be used on an async thread.
#[derive(Debug)]
pub struct Blocking {
    store: Store,
    runtime: tokio::runtime::Runtime,
}

impl Blocking {
    /// Wraps a store.
    ///
    /// # Errors
    /// [`Error::Runtime`] when the system gives no runtime.
    pub fn new(store: Store) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Error::Runtime { reason: source.to_string() })?;
        Ok(Self { store, runtime })
    }

    /// As [`Store::open`], wrapped.
    ///
    /// # Errors
    /// Those of [`Store::open`] and [`Blocking::new`].
    pub fn open(location: &str) -> Result<Self> {
        Self::new(Store::open(location)?)
    }

    /// The store inside.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// [`Store::write`]
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, snapshot: &Snapshot) -> Result<Written> {
        self.wait(self.store.write(snapshot))
    }

    /// [`Store::write_with`]
    ///
    /// # Errors
    /// As there.
    pub fn write_with(
        &self,
        snapshot: &Snapshot,
        hook: &mut (dyn FnMut(WritePoint) -> Result<(), String> + Send),
    ) -> Result<Written> {
        self.wait(self.store.write_with(snapshot, hook))
    }

    /// [`Store::scan`]
    ///
    /// # Errors
    /// As there.
    pub fn scan(&self) -> Result<Listing> {
        self.wait(self.store.scan())
    }

    /// [`Store::list`]
    ///
    /// # Errors
    /// As there.
    pub fn list(&self) -> Result<Vec<Manifest>> {
        self.wait(self.store.list())
    }

    /// [`Store::manifest`]
    ///
    /// # Errors
    /// As there.
    pub fn manifest(&self, key: Key) -> Result<Manifest> {
        self.wait(self.store.manifest(key))
    }

    /// [`Store::load`]
    ///
    /// # Errors
    /// As there.
    pub fn load(&self, manifest: &Manifest) -> Result<Snapshot> {
        self.wait(self.store.load(manifest))
    }

    /// [`Store::newest_good`]
    ///
    /// # Errors
    /// As there.
    pub fn newest_good(&self, expect: &Expectations) -> Result<Option<Found>> {
        self.wait(self.store.newest_good(expect))
    }

    /// [`Store::newest_verified`]
    ///
    /// # Errors
    /// As there.
    pub fn newest_verified(&self, expect: &Expectations) -> Result<Option<Verified>> {
        self.wait(self.store.newest_verified(expect))
    }

    /// [`Store::apply_retention`]
    ///
    /// # Errors
    /// As there.
    pub fn apply_retention(&self, keep: Keep, pinned: &[Key]) -> Result<Removed> {
        self.wait(self.store.apply_retention(keep, pinned))
    }

    /// [`Store::put_folder`]
    ///
    /// # Errors
    /// As there.
    pub fn put_folder(
        &self,
        name: &str,
        files: &[(String, bytes::Bytes)],
        may_go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<String> {
        self.wait(self.store.put_folder(name, files, may_go_on))
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}
