//! Writing, listing and reading checkpoints.

use crate::{
    error::{Result, Skipped},
    manifest::{Expectations, Key, Manifest},
    snapshot::Snapshot,
};

/// A job's store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {}

/// What became of a write.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The checkpoint's folder below the store.
    pub path: String,
    /// Size of the files, without the manifest.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// A moment in a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritePoint {
    /// All files but the manifest are written. An `Err` here gives the checkpoint up.
    BeforeManifest,
    /// The checkpoint exists. The result is ignored.
    AfterManifest,
}

/// What lies in a store.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Listing {
    /// Checkpoints whose manifest is whole, newest first. Their files are not looked at.
    pub manifests: Vec<Manifest>,
    /// Checkpoints whose manifest is not whole or of a newer format, newest first.
    pub damaged: Vec<(Key, Skipped)>,
    /// Folders without a manifest: a writer is at work, or died. Newest first.
    pub unfinished: Vec<Key>,
}

/// A checkpoint that was checked, with its content.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Its content.
    pub snapshot: Snapshot,
    /// Its folder below the store.
    pub path: String,
    /// Newer ones that are damaged, newest first.
    pub skipped: Vec<Skipped>,
}

/// A checkpoint that was checked, without its content.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// Its manifest.
    pub manifest: Manifest,
    /// Newer ones that are damaged, newest first.
    pub skipped: Vec<Skipped>,
}

/// What retention did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Checkpoints that were deleted, oldest first.
    pub checkpoints: Vec<Key>,
    /// Leftovers without a manifest that were deleted.
    pub unfinished: Vec<Key>,
}

impl Store {
    /// Names a store: a folder, or a `file://` URL. Nothing is read or made; the folder may not exist yet.
    ///
    /// # Errors
    /// [`Error::UnsupportedScheme`](crate::Error::UnsupportedScheme),
    /// [`Error::BadLocation`](crate::Error::BadLocation)
    pub fn open(location: &str) -> Result<Self> {
        let _ = location;
        unimplemented!()
    }

    /// Writes a checkpoint: the files, then the manifest. Returns once it is on disk.
    ///
    /// # Errors
    /// [`Error::Exists`](crate::Error::Exists) when another writer was first,
    /// [`Error::BadSnapshot`](crate::Error::BadSnapshot), [`Error::Store`](crate::Error::Store).
    pub async fn write(&self, snapshot: &Snapshot) -> Result<Written> {
        self.write_with(snapshot, &mut |_| Ok(())).await
    }

    /// As [`Store::write`], with `hook` called at each [`WritePoint`]: the place to check that the
    /// generation may still write, and for failpoints.
    ///
    /// # Errors
    /// Those of [`Store::write`], and [`Error::GivenUp`](crate::Error::GivenUp) when the hook says no.
    pub async fn write_with(
        &self,
        snapshot: &Snapshot,
        hook: &mut (dyn FnMut(WritePoint) -> Result<(), String> + Send),
    ) -> Result<Written> {
        let _ = (snapshot, hook);
        unimplemented!()
    }

    /// Everything in the store. An empty or missing store has nothing.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store)
    pub async fn scan(&self) -> Result<Listing> {
        unimplemented!()
    }

    /// The manifests of all checkpoints, newest first: highest step, then attempt, then generation.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store)
    pub async fn list(&self) -> Result<Vec<Manifest>> {
        Ok(self.scan().await?.manifests)
    }

    /// Reads the manifest of one checkpoint.
    ///
    /// # Errors
    /// [`Error::Damaged`](crate::Error::Damaged) when there is none or it is not whole,
    /// [`Error::FutureFormat`](crate::Error::FutureFormat), [`Error::Store`](crate::Error::Store)
    pub async fn manifest(&self, key: Key) -> Result<Manifest> {
        let _ = key;
        unimplemented!()
    }

    /// Reads a checkpoint, checking size and hash of every file.
    ///
    /// # Errors
    /// [`Error::Damaged`](crate::Error::Damaged), [`Error::Store`](crate::Error::Store)
    pub async fn load(&self, manifest: &Manifest) -> Result<Snapshot> {
        let _ = manifest;
        unimplemented!()
    }

    /// Checks size and hash of every file of a checkpoint, holding none of them in memory.
    ///
    /// # Errors
    /// [`Error::Damaged`](crate::Error::Damaged), [`Error::Store`](crate::Error::Store)
    pub async fn verify(&self, manifest: &Manifest) -> Result<()> {
        let _ = manifest;
        unimplemented!()
    }

    /// The newest checkpoint that is whole, with its content, and which newer ones are not. `None` when
    /// there is no checkpoint at all.
    ///
    /// # Errors
    /// [`Error::NoneGood`](crate::Error::NoneGood) when all are damaged, [`Error::Mismatch`](crate::Error::Mismatch)
    /// when it was made from something else than expected, [`Error::FutureFormat`](crate::Error::FutureFormat)
    /// when a newer version wrote a newer one, [`Error::Store`](crate::Error::Store).
    pub async fn newest_good(&self, expect: &Expectations) -> Result<Option<Found>> {
        let _ = expect;
        unimplemented!()
    }

    /// As [`Store::newest_good`], without its content.
    ///
    /// # Errors
    /// Those of [`Store::newest_good`].
    pub async fn newest_verified(&self, expect: &Expectations) -> Result<Option<Verified>> {
        let _ = expect;
        unimplemented!()
    }

    /// Deletes what [`retain`](crate::retain) says, and leftovers without a manifest that are older than the
    /// newest good checkpoint. Checks files until it has found that one.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store)
    pub async fn apply_retention(&self, keep: usize, pinned: &[Key]) -> Result<Removed> {
        let _ = (keep, pinned);
        unimplemented!()
    }
}
