//! A model's folder in the cache.

use std::{
    fs::{self, File},
    io,
    path::{Component, Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{FlockOperation, flock};

use crate::Error;

/// A model's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

/// Held while a file is downloaded; Python's `filelock` takes the same.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

pub(super) fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Cache { path: path.to_owned(), source }
}

impl Cache {
    pub(super) fn of(cache: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The commit that a branch or tag was at when it was last asked for.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.reference(revision)?).ok()?;
        Some(text.trim().to_owned()).filter(|commit| !commit.is_empty())
    }

    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> Result<(), Error> {
        let Some(path) = self.reference(revision) else { return Ok(()) };
        if self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        create_parent(&path)?;
        // Several threads may note the same one.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{}-{number}.shanty", std::process::id()));
        fs::write(&temporary, commit).map_err(failed(&temporary))?;
        fs::rename(&temporary, &path).map_err(failed(&path))
    }

    fn reference(&self, revision: &str) -> Option<PathBuf> {
        is_plain(revision).then(|| self.root.join("refs").join(revision))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Bytes of a blob that lie here, complete or not.
    pub(super) fn arrived(&self, etag: &str) -> u64 {
        let size =
            |path: PathBuf| fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|data| data.len());
        if etag.is_empty() {
            return 0;
        }
        size(self.blob(etag)).or_else(|| size(self.incomplete(etag))).unwrap_or(0)
    }

    /// Links a file of a snapshot to its blob.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<(), Error> {
        let path = self.snapshot(commit).join(name);
        create_parent(&path)?;
        let up = "../".repeat(2 + name.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        match std::os::unix::fs::symlink(&target, &path) {
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                let points_here = fs::read_link(&path).is_ok_and(|found| found == Path::new(&target));
                if points_here {
                    return Ok(());
                }
                // A link to what was there before, or to nowhere.
                fs::remove_file(&path).map_err(failed(&path))?;
                std::os::unix::fs::symlink(&target, &path).map_err(failed(&path))
            }
            other => other.map_err(failed(&path)),
        }
    }

    /// Takes the lock of a blob, unless somebody holds it.
    pub(super) fn try_lock(&self, etag: &str) -> Result<Option<Lock>, Error> {
        let (file, path) = self.lock_file(etag)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(source) if source == rustix::io::Errno::WOULDBLOCK => Ok(None),
            Err(source) => Err(failed(&path)(source.into())),
        }
    }

    /// Takes the lock of a blob; waits for whoever holds it.
    pub(super) fn lock(&self, etag: &str) -> Result<Lock, Error> {
        let (file, path) = self.lock_file(etag)?;
        flock(&file, FlockOperation::LockExclusive).map_err(|source| failed(&path)(source.into()))?;
        Ok(Lock { _file: file })
    }

    fn lock_file(&self, etag: &str) -> Result<(File, PathBuf), Error> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let file = File::options().create(true).append(true).open(&path).map_err(failed(&path))?;
        Ok((file, path))
    }
}

/// Whether a name from the network stays below the folder that it is joined to.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

fn create_parent(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(failed(parent)),
        None => Ok(()),
    }
}
