//! Reading checkpoints, trusting nothing.

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use tracing::warn;

use crate::{
    error::{Error, Result, Skipped},
    manifest::{Expectations, FileEntry, Key, Manifest},
    snapshot::{OPTIMIZER, Optimizer, Snapshot, is_plain_name},
    store::{Store, failed, file_path, reason_of},
    transfer,
};

/// A checkpoint that was checked, with its content.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Its content.
    pub snapshot: Snapshot,
    /// Its manifest.
    pub manifest: Manifest,
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

impl Store {
    /// Reads a checkpoint, checking size and hash of every file.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Store`]
    pub async fn load(&self, manifest: &Manifest) -> Result<Snapshot> {
        check_names(manifest)?;
        let key = manifest.key();
        let damaged = |reason: String| Error::Damaged { path: key.path(), reason };
        let (mut files, mut optimizer) = (Vec::with_capacity(manifest.files.len()), None);
        for entry in &manifest.files {
            let mut whole = BytesMut::with_capacity(usize::try_from(entry.bytes).unwrap_or_default());
            self.read_file(key, entry, |chunk| whole.extend_from_slice(chunk)).await?;
            let content = whole.freeze();
            let found = hash(content.clone()).await?;
            check_content(key, entry, content.len() as u64, &found)?;
            if entry.name == OPTIMIZER {
                let read = Optimizer::from_bytes(&content);
                optimizer = Some(read.map_err(|reason| damaged(format!("{OPTIMIZER}: {reason}")))?);
            } else {
                files.push((entry.name.clone(), content));
            }
        }
        let optimizer = optimizer.ok_or_else(|| damaged(format!("it has no {OPTIMIZER}")))?;
        Ok(Snapshot { job: manifest.job.clone(), key, files, optimizer, state: manifest.state.clone() })
    }

    /// Checks size and hash of every file of a checkpoint, holding none of them in memory.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Store`]
    pub async fn verify(&self, manifest: &Manifest) -> Result<()> {
        check_names(manifest)?;
        for entry in &manifest.files {
            self.verify_file(manifest.key(), entry).await?;
        }
        Ok(())
    }

    /// The newest checkpoint that is whole, with its content, and which newer ones are not. `None` when
    /// there is no checkpoint at all.
    ///
    /// # Errors
    /// [`Error::NoneGood`] when all are damaged; [`Error::Mismatch`] when it was made from something else
    /// than expected; [`Error::FutureFormat`] when a newer version wrote a newer one, so that nobody goes back
    /// without knowing; [`Error::Store`].
    pub async fn newest_good(&self, expect: &Expectations) -> Result<Option<Found>> {
        let mut skipped = Vec::new();
        for key in self.keys().await? {
            let Some(manifest) = self.usable(key, expect, &mut skipped).await? else { continue };
            match self.load(&manifest).await {
                Ok(snapshot) => return Ok(Some(Found { snapshot, manifest, skipped })),
                Err(error) => skip(key, error, &mut skipped)?,
            }
        }
        self.none_left(skipped)
    }

    /// As [`Store::newest_good`], without its content.
    ///
    /// # Errors
    /// Those of [`Store::newest_good`].
    pub async fn newest_verified(&self, expect: &Expectations) -> Result<Option<Verified>> {
        let mut skipped = Vec::new();
        for key in self.keys().await? {
            let Some(manifest) = self.usable(key, expect, &mut skipped).await? else { continue };
            match self.verify(&manifest).await {
                Ok(()) => return Ok(Some(Verified { manifest, skipped })),
                Err(error) => skip(key, error, &mut skipped)?,
            }
        }
        self.none_left(skipped)
    }

    /// The manifest of `key` if it is whole. One that belongs to something else is an error even if its files
    /// are damaged: then the one before does too.
    async fn usable(
        &self,
        key: Key,
        expect: &Expectations,
        skipped: &mut Vec<Skipped>,
    ) -> Result<Option<Manifest>> {
        match self.read_manifest(key).await {
            Ok(Some(manifest)) => {
                manifest.check(expect)?;
                Ok(Some(manifest))
            }
            Ok(None) => Ok(None),
            Err(error) => skip(key, error, skipped).map(|()| None),
        }
    }

    fn none_left<T>(&self, skipped: Vec<Skipped>) -> Result<Option<T>> {
        if skipped.is_empty() {
            return Ok(None);
        }
        Err(Error::NoneGood { store: self.location().to_owned(), skipped })
    }

    /// Checks one file, chunk by chunk.
    pub(crate) async fn verify_file(&self, key: Key, entry: &FileEntry) -> Result<()> {
        let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
        let read = |chunk: &[u8]| {
            hasher.update(chunk);
            bytes += chunk.len() as u64;
        };
        self.read_file(key, entry, read).await?;
        check_content(key, entry, bytes, &hasher.finalize().to_hex())
    }

    /// Reads a file of the size that the manifest says, chunk by chunk.
    async fn read_file(&self, key: Key, entry: &FileEntry, mut take: impl FnMut(&[u8])) -> Result<()> {
        let missing = || Error::Damaged { path: key.path(), reason: format!("{} is missing", entry.name) };
        let path = file_path(key, &entry.name);
        let objects = self.objects()?.ok_or_else(missing)?;
        let said = |error: object_store::Error| match error {
            object_store::Error::NotFound { .. } => missing(),
            error => failed("read", path.as_ref())(error),
        };
        if self.is_remote() {
            check_size(key, entry, objects.head(&path).await.map_err(said)?.size)?;
            let mut chunks = transfer::in_ranges(&objects, &path, entry.bytes);
            while let Some(chunk) = chunks.try_next().await.map_err(said)? {
                take(&chunk);
            }
            return Ok(());
        }
        let found = objects.get(&path).await.map_err(said)?;
        check_size(key, entry, found.meta.size)?;
        let mut chunks = found.into_stream();
        while let Some(chunk) = chunks.try_next().await.map_err(said)? {
            take(&chunk);
        }
        Ok(())
    }
}

/// Notes a damaged checkpoint; other errors stay errors.
fn skip(key: Key, error: Error, skipped: &mut Vec<Skipped>) -> Result<()> {
    let Error::Damaged { .. } = error else { return Err(error) };
    let (path, reason) = (key.path(), reason_of(error));
    warn!(path, reason, "checkpoint is damaged");
    skipped.push(Skipped { path, reason });
    Ok(())
}

/// A manifest's names come from a file: none of them may lead out of the folder.
fn check_names(manifest: &Manifest) -> Result<()> {
    let mut seen = HashSet::new();
    for FileEntry { name, .. } in &manifest.files {
        if !is_plain_name(name) || !seen.insert(name) {
            let reason = format!("its manifest has a file `{name}`, or has it twice");
            return Err(Error::Damaged { path: manifest.path(), reason });
        }
    }
    Ok(())
}

fn check_size(key: Key, entry: &FileEntry, bytes: u64) -> Result<()> {
    if bytes == entry.bytes {
        return Ok(());
    }
    let reason = format!("{} has {bytes} bytes, its manifest says {}", entry.name, entry.bytes);
    Err(Error::Damaged { path: key.path(), reason })
}

fn check_content(key: Key, entry: &FileEntry, bytes: u64, blake3: &str) -> Result<()> {
    check_size(key, entry, bytes)?;
    if blake3 == entry.blake3 {
        return Ok(());
    }
    let reason = format!("{} does not have the hash that its manifest says", entry.name);
    Err(Error::Damaged { path: key.path(), reason })
}

/// BLAKE3, hexadecimal; on a thread where it blocks nobody.
pub(crate) async fn hash(content: Bytes) -> Result<String> {
    let hashing = tokio::task::spawn_blocking(move || blake3::hash(&content).to_hex().to_string());
    hashing.await.map_err(|error| Error::Runtime { reason: error.to_string() })
}
