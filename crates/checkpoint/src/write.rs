//! Writing a checkpoint: the files, then the manifest.

use std::{
    collections::HashSet,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};

use crate::{
    error::{Error, Result},
    manifest::{FileEntry, MANIFEST, Manifest},
    read::hash,
    snapshot::{OPTIMIZER, Snapshot, is_plain_name},
    store::{Store, failed, file_path},
};

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

impl Store {
    /// Writes a checkpoint: the files, then the manifest. Returns once it is on disk. Nothing that is
    /// there is ever overwritten; a write that broke off can be repeated.
    ///
    /// # Errors
    /// [`Error::Exists`] when another writer was first, [`Error::BadSnapshot`], [`Error::Store`],
    /// [`Error::BadLocation`] when the store's folder cannot be made.
    pub async fn write(&self, snapshot: &Snapshot) -> Result<Written> {
        self.write_with(snapshot, &mut |_| Ok(())).await
    }

    /// As [`Store::write`], with `hook` called at each [`WritePoint`]: the place to check that the
    /// generation may still write, and for failpoints.
    ///
    /// # Errors
    /// Those of [`Store::write`], and [`Error::GivenUp`] when the hook says no.
    pub async fn write_with(
        &self,
        snapshot: &Snapshot,
        hook: &mut (dyn FnMut(WritePoint) -> Result<(), String> + Send),
    ) -> Result<Written> {
        let start = Instant::now();
        let path = snapshot.key.path();
        let files = contents(snapshot).map_err(|reason| Error::BadSnapshot { path: path.clone(), reason })?;
        let objects = self.objects_to_write()?;
        let manifest_path = file_path(snapshot.key, MANIFEST);
        match objects.head(&manifest_path).await {
            Ok(_) => return Err(Error::Exists { path }),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(failed("look for", manifest_path.as_ref())(error)),
        }

        let mut entries = Vec::with_capacity(files.len());
        for (name, content) in files {
            let blake3 = hash(content.clone()).await?;
            let entry = FileEntry { name, bytes: content.len() as u64, blake3 };
            let file = file_path(snapshot.key, &entry.name);
            if !self.create_file(&*objects, &file, content).await? && !self.has(snapshot, &entry).await? {
                return Err(Error::Exists { path });
            }
            entries.push(entry);
        }

        hook(WritePoint::BeforeManifest).map_err(|reason| Error::GivenUp { path: path.clone(), reason })?;
        let manifest = Manifest {
            format: Manifest::format_of(&snapshot.state),
            job: snapshot.job.clone(),
            attempt: snapshot.key.attempt,
            step: snapshot.key.step,
            generation: snapshot.key.generation,
            created_unix_ms: unix_ms(),
            files: entries,
            state: snapshot.state.clone(),
        };
        let sealed = Bytes::from(manifest.seal());
        if !create(&*objects, &manifest_path, sealed.clone()).await? {
            // A server may have taken it and lost the answer; the repeat then finds its own.
            let there = objects.get(&manifest_path).await.map_err(failed("read", manifest_path.as_ref()))?;
            let there = there.bytes().await.map_err(failed("read", manifest_path.as_ref()))?;
            if there != sealed {
                return Err(Error::Exists { path });
            }
        }
        // It exists now, whatever the hook says.
        let _ = hook(WritePoint::AfterManifest);
        Ok(Written { path, bytes: manifest.size_bytes(), seconds: start.elapsed().as_secs_f64() })
    }

    /// Whether a file that an earlier try left is the one that we would write.
    async fn has(&self, snapshot: &Snapshot, entry: &FileEntry) -> Result<bool> {
        match self.verify_file(snapshot.key, entry).await {
            Ok(()) => Ok(true),
            Err(Error::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The files of a snapshot by name, the optimizer last.
fn contents(snapshot: &Snapshot) -> Result<Vec<(String, Bytes)>, String> {
    let mut files = snapshot.files.clone();
    files.push((OPTIMIZER.to_owned(), snapshot.optimizer.to_bytes()?));
    let mut seen = HashSet::new();
    for (name, _) in &files {
        if !is_plain_name(name) {
            return Err(format!("`{name}` cannot be the name of one of its files"));
        }
        if !seen.insert(name) {
            return Err(format!("there are two files `{name}`"));
        }
    }
    Ok(files)
}

/// Creates a file whole or not at all. Says `false` when there is one.
pub(crate) async fn create(objects: &dyn ObjectStore, path: &Path, content: Bytes) -> Result<bool> {
    let options = PutOptions::from(PutMode::Create);
    match objects.put_opts(path, content.into(), options).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
        Err(error) => Err(failed("write", path.as_ref())(error)),
    }
}

fn unix_ms() -> u64 {
    // A clock before 1970 is no reason to lose a checkpoint: the time is for people.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
