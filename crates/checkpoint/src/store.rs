//! Where checkpoints lie, and what is there.

use std::{
    cmp::Reverse,
    path::{Path as FilePath, PathBuf},
    sync::{Arc, OnceLock},
};

use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path};
use url::Url;

use crate::{
    error::{Error, Result, Skipped},
    manifest::{FOLDER, Key, MANIFEST, Manifest},
};

/// A job's store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    location: String,
    folder: PathBuf,
    /// Set once the folder is there.
    objects: OnceLock<Arc<LocalFileSystem>>,
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

impl Store {
    /// Names a store: a folder, or a `file://` URL. Nothing is made, and the folder may not exist yet.
    ///
    /// # Errors
    /// [`Error::UnsupportedScheme`], [`Error::BadLocation`]
    pub fn open(location: &str) -> Result<Self> {
        let bad = |reason: String| Error::BadLocation { location: location.to_owned(), reason };
        if location.is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        let folder = match location.split_once("://") {
            None => PathBuf::from(location),
            Some(("file", _)) => Url::parse(location)
                .map_err(|error| bad(error.to_string()))?
                .to_file_path()
                .map_err(|()| bad("it is not a file URL of this machine".to_owned()))?,
            Some((scheme, _)) => {
                let (location, scheme) = (location.to_owned(), scheme.to_owned());
                return Err(Error::UnsupportedScheme { location, scheme });
            }
        };
        let folder = std::path::absolute(folder).map_err(|error| bad(error.to_string()))?;
        if folder.exists() && !folder.is_dir() {
            return Err(bad("it is a file".to_owned()));
        }
        let inner = Inner { location: location.to_owned(), folder, objects: OnceLock::new() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The store as it was given to [`Store::open`].
    pub fn location(&self) -> &str {
        &self.inner.location
    }

    /// Everything in the store. An empty or missing store has nothing.
    ///
    /// # Errors
    /// [`Error::Store`]
    pub async fn scan(&self) -> Result<Listing> {
        let mut listing = Listing::default();
        for key in self.keys().await? {
            match self.read_manifest(key).await {
                Ok(Some(manifest)) => listing.manifests.push(manifest),
                Ok(None) => listing.unfinished.push(key),
                Err(error @ (Error::Damaged { .. } | Error::FutureFormat { .. })) => {
                    listing.damaged.push((key, Skipped { path: key.path(), reason: reason_of(error) }));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(listing)
    }

    /// The manifests of all checkpoints, newest first: highest step, then attempt, then generation.
    ///
    /// # Errors
    /// [`Error::Store`]
    pub async fn list(&self) -> Result<Vec<Manifest>> {
        Ok(self.scan().await?.manifests)
    }

    /// Reads the manifest of one checkpoint.
    ///
    /// # Errors
    /// [`Error::Damaged`] when there is none or it is not whole, [`Error::FutureFormat`], [`Error::Store`]
    pub async fn manifest(&self, key: Key) -> Result<Manifest> {
        let manifest = self.read_manifest(key).await?;
        manifest.ok_or_else(|| Error::Damaged { path: key.path(), reason: format!("{MANIFEST} is missing") })
    }

    /// All folders with a checkpoint's name, newest first.
    pub(crate) async fn keys(&self) -> Result<Vec<Key>> {
        let Some(objects) = self.objects()? else { return Ok(Vec::new()) };
        let folder = Path::from(FOLDER);
        let listed = objects.list_with_delimiter(Some(&folder)).await.map_err(failed("list", FOLDER))?;
        let mut keys: Vec<Key> =
            listed.common_prefixes.iter().filter_map(|prefix| prefix.as_ref().parse().ok()).collect();
        keys.sort_unstable_by_key(|key| Reverse(*key));
        Ok(keys)
    }

    /// Reads a manifest; `None` when there is none.
    pub(crate) async fn read_manifest(&self, key: Key) -> Result<Option<Manifest>> {
        let Some(objects) = self.objects()? else { return Ok(None) };
        let path = file_path(key, MANIFEST);
        let text = match objects.get(&path).await {
            Ok(found) => found.bytes().await,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => Err(error),
        };
        let text = text.map_err(failed("read", path.as_ref()))?;
        Manifest::unseal(key, &text).map(Some)
    }

    /// What does the work, if the store's folder is there.
    pub(crate) fn objects(&self) -> Result<Option<Arc<LocalFileSystem>>> {
        let Inner { location, folder, objects } = &*self.inner;
        if let Some(objects) = objects.get() {
            return Ok(Some(Arc::clone(objects)));
        }
        if !folder.exists() {
            return Ok(None);
        }
        // Synced to disk: a checkpoint that exists survives the loss of power. Empty folders are no use.
        let opened = LocalFileSystem::new_with_prefix(folder)
            .map_err(failed("open", location))?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        Ok(Some(Arc::clone(objects.get_or_init(|| Arc::new(opened)))))
    }

    /// As [`Store::objects`], making the folder.
    pub(crate) fn objects_to_write(&self) -> Result<Arc<LocalFileSystem>> {
        let Inner { location, folder, .. } = &*self.inner;
        let bad = |reason: String| Error::BadLocation { location: location.clone(), reason };
        std::fs::create_dir_all(folder).map_err(|error| bad(error.to_string()))?;
        self.objects()?.ok_or_else(|| bad("it vanished".to_owned()))
    }

    /// A checkpoint's folder on disk.
    pub(crate) fn folder_of(&self, key: Key) -> PathBuf {
        self.inner.folder.join(FilePath::new(&key.path()))
    }
}

/// A file of a checkpoint.
pub(crate) fn file_path(key: Key, name: &str) -> Path {
    Path::from(format!("{}/{name}", key.path()))
}

/// Wraps what the store says.
pub(crate) fn failed(action: &'static str, path: &str) -> impl FnOnce(object_store::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Store { action, path, source }
}

/// Why a checkpoint is not used, without its name.
pub(crate) fn reason_of(error: Error) -> String {
    match error {
        Error::Damaged { reason, .. } => reason,
        other => other.to_string(),
    }
}
