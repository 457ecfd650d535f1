//! Where checkpoints lie, and what is there.

use std::{
    cmp::Reverse,
    path::{Path as FilePath, PathBuf},
    sync::{Arc, OnceLock},
};

use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path, prefix::PrefixStore};
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
    place: Place,
}

/// Where the objects are.
#[derive(Debug)]
enum Place {
    Folder {
        folder: PathBuf,
        /// Set once the folder is there.
        objects: OnceLock<Arc<LocalFileSystem>>,
    },
    Remote(Arc<dyn ObjectStore>),
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
    /// Names a store: a folder, or a URL (`file://`, `s3://`, `gs://`, `az://`). Nothing is made, nobody is asked, and
    /// the folder may not exist yet. Credentials and endpoints of object stores come from the environment, as for data.
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
            Some(("s3" | "gs" | "az", _)) => {
                let remote = shanty_remote::open_store(location).map_err(|error| bad(error.to_string()))?;
                return Ok(Self::of_objects(location, Arc::new(PrefixStore::new(remote.store, remote.path))));
            }
            Some((scheme, _)) => {
                let (location, scheme) = (location.to_owned(), scheme.to_owned());
                return Err(Error::UnsupportedScheme { location, scheme });
            }
        };
        let folder = std::path::absolute(folder).map_err(|error| bad(error.to_string()))?;
        if folder.exists() && !folder.is_dir() {
            return Err(bad("it is a file".to_owned()));
        }
        let place = Place::Folder { folder, objects: OnceLock::new() };
        Ok(Self { inner: Arc::new(Inner { location: location.to_owned(), place }) })
    }

    /// A store over objects that the caller has; `location` is its name for people.
    pub fn of_objects(location: &str, objects: Arc<dyn ObjectStore>) -> Self {
        let inner = Inner { location: location.to_owned(), place: Place::Remote(objects) };
        Self { inner: Arc::new(inner) }
    }

    /// Whether it is an object store, and no folder of this machine.
    pub fn is_remote(&self) -> bool {
        matches!(self.inner.place, Place::Remote(_))
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
    pub(crate) fn objects(&self) -> Result<Option<Arc<dyn ObjectStore>>> {
        let (folder, objects) = match &self.inner.place {
            Place::Remote(objects) => return Ok(Some(Arc::clone(objects))),
            Place::Folder { folder, objects } => (folder, objects),
        };
        let location = &self.inner.location;
        if let Some(objects) = objects.get() {
            return Ok(Some(Arc::<LocalFileSystem>::clone(objects)));
        }
        if !folder.exists() {
            return Ok(None);
        }
        // Synced to disk: a checkpoint that exists survives the loss of power. Empty folders are no use.
        let opened = LocalFileSystem::new_with_prefix(folder)
            .map_err(failed("open", location))?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        Ok(Some(Arc::<LocalFileSystem>::clone(objects.get_or_init(|| Arc::new(opened)))))
    }

    /// As [`Store::objects`], making the folder.
    pub(crate) fn objects_to_write(&self) -> Result<Arc<dyn ObjectStore>> {
        let location = &self.inner.location;
        let bad = |reason: String| Error::BadLocation { location: location.clone(), reason };
        if let Place::Folder { folder, .. } = &self.inner.place {
            std::fs::create_dir_all(folder).map_err(|source| made(folder, source, &bad))?;
        }
        self.objects()?.ok_or_else(|| bad("it vanished".to_owned()))
    }

    /// A checkpoint's folder on disk, if the store is on disk.
    pub(crate) fn folder_of(&self, key: Key) -> Option<PathBuf> {
        match &self.inner.place {
            Place::Folder { folder, .. } => Some(folder.join(FilePath::new(&key.path()))),
            Place::Remote(_) => None,
        }
    }
}

/// Why a folder cannot be made: a full disk is no wrong name.
fn made(folder: &FilePath, source: std::io::Error, bad: &impl Fn(String) -> Error) -> Error {
    if is_full(&source) {
        return Error::Full { path: folder.display().to_string(), reason: source.to_string() };
    }
    bad(source.to_string())
}

/// A file of a checkpoint.
pub(crate) fn file_path(key: Key, name: &str) -> Path {
    Path::from(format!("{}/{name}", key.path()))
}

/// Wraps what the store says.
pub(crate) fn failed(action: &'static str, path: &str) -> impl FnOnce(object_store::Error) -> Error {
    let path = path.to_owned();
    move |source| {
        let denied = matches!(
            source,
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }
        );
        if denied {
            return Error::Denied { action, path, reason: line_of(&source) };
        }
        match full(&source) {
            Some(reason) => Error::Full { path, reason },
            None => Error::Store { action, path, source },
        }
    }
}

/// What the system said, if an error is about room.
fn full(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<std::io::Error>().filter(|error| is_full(error)) {
            return Some(found.to_string());
        }
        cause = error.source();
    }
    None
}

fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// Object stores answer in XML: one line of it is enough.
fn line_of(error: &object_store::Error) -> String {
    const MOST: usize = 240;
    let text = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Why a checkpoint is not used, without its name.
pub(crate) fn reason_of(error: Error) -> String {
    match error {
        Error::Damaged { reason, .. } => reason,
        other => other.to_string(),
    }
}
