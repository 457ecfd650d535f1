//! Models of the Hugging Face hub, in the cache that Python's `huggingface_hub` uses.
//!
//! ```text
//! $HF_HUB_CACHE (else $HF_HOME/hub, else ~/.cache/huggingface/hub)
//!   models--org--name/
//!     refs/main                 the commit that the branch was at
//!     blobs/ETAG                the files, by hash
//!     blobs/ETAG.incomplete     what has arrived of one
//!     snapshots/COMMIT/FILE     links to blobs
//!   .locks/models--org--name/ETAG.lock
//! ```
//!
//! What transformers downloaded is used, and what is downloaded here is used by transformers. Only what training needs is
//! fetched: configuration, tokenizer, chat template, safetensors. Each file is checked by the hash that the hub names
//! (SHA-256 of large files, git's SHA-1 of small ones); a download that was cut off goes on where it stopped.

mod cache;
mod download;
mod options;
mod repository;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use self::options::HubOptions;
use self::{
    cache::Cache,
    download::{Fetch, fetch_all},
    repository::{Repository, needed},
};
use crate::Error;

/// What the name of a model begins with, once it is known to be of the hub.
pub const SCHEME: &str = "hf://";

/// A model of the hub: `org/name`, at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// `org/name`.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl ModelId {
    /// Reads `hf://org/name` or `hf://org/name@revision`; nothing for any other path.
    pub fn parse(reference: &Path) -> Option<Self> {
        let rest = reference.to_str()?.strip_prefix(SCHEME)?;
        let (id, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        Some(Self { id: id.to_owned(), revision: revision.to_owned() })
    }

    /// `hf://org/name@COMMIT`: the same model whatever its branches do.
    pub fn at(&self, commit: &str) -> PathBuf {
        PathBuf::from(format!("{SCHEME}{}@{commit}", self.id))
    }

    /// `org/name@revision`, for people.
    pub fn shown(&self) -> String {
        format!("{}@{}", self.id, self.revision)
    }

    fn is_commit(&self) -> bool {
        self.revision.len() == 40 && self.revision.bytes().all(|byte| byte.is_ascii_hexdigit())
    }
}

/// A model that lies in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its folder, in Hugging Face layout.
    pub folder: PathBuf,
    /// Its commit.
    pub commit: String,
    /// Why the hub was not asked, where it should have been: it could not be reached.
    pub doubt: Option<String>,
}

/// What a download would fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The model's commit.
    pub commit: String,
    /// Files that are not in the cache.
    pub files: u64,
    /// Bytes of them that have not arrived yet.
    pub bytes: u64,
}

/// How far a download is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that have arrived, those of earlier tries included.
    pub bytes_done: u64,
    /// Bytes of all files that were missing.
    pub bytes_total: u64,
    /// Files that are complete.
    pub files_done: u64,
    /// Files that were missing.
    pub files_total: u64,
    /// What holds it up, if something does.
    pub note: Option<String>,
}

/// The hub, and the cache on this machine.
#[derive(Debug, Clone)]
pub struct Hub {
    options: HubOptions,
}

impl Hub {
    /// As the environment says: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::new(HubOptions::from_env())
    }

    /// As the options say.
    pub fn new(options: HubOptions) -> Self {
        Self { options }
    }

    /// The folder of the cache.
    pub fn cache(&self) -> &Path {
        &self.options.cache
    }

    /// Brings what a tokenizer needs (and the configuration) into the cache, or finds it there; no weights.
    ///
    /// # Errors
    /// As [`Hub::snapshot`].
    pub fn small_files(
        &self,
        model: &ModelId,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Snapshot, Error> {
        let cache = Cache::of(&self.options.cache, &model.id);
        let here = |commit: String| {
            let folder = cache.snapshot(&commit);
            let is_here = folder.join("config.json").is_file() && folder.join("tokenizer.json").is_file();
            is_here.then_some(Snapshot { folder, commit, doubt: None })
        };
        let commit =
            if model.is_commit() { Some(model.revision.clone()) } else { cache.commit_of(&model.revision) };
        let cached = commit.and_then(here);
        if model.is_commit() || self.options.offline {
            match cached {
                Some(cached) => return Ok(cached),
                None if self.options.offline => return Err(self.not_cached(model)),
                None => {}
            }
        }
        let repository = match (repository::ask(&self.options, model), cached) {
            (Ok(repository), _) => repository,
            (Err(error @ Error::HubUnreachable { .. }), Some(cached)) => {
                return Ok(Snapshot { doubt: Some(error.to_string()), ..cached });
            }
            (Err(error), _) => return Err(error),
        };
        let commit = repository.commit.clone();
        let mut files = needed(&repository, model, None)?;
        files.retain(|file| repository::SMALL.contains(&file.name.as_str()));
        let fetch = Fetch {
            options: self.options.clone(),
            cache: cache.clone(),
            model: model.clone(),
            commit: commit.clone(),
        };
        fetch_all(fetch, files, progress)?;
        if !model.is_commit() {
            cache.note_commit(&model.revision, &commit)?;
        }
        let folder = cache.snapshot(&commit);
        Ok(Snapshot { folder, commit, doubt: None })
    }

    fn not_cached(&self, model: &ModelId) -> Error {
        Error::NotCached {
            model: model.shown(),
            cache: self.options.cache.clone(),
            why: "HF_HUB_OFFLINE forbids to ask the hub".to_owned(),
        }
    }

    /// Where a model lies in the cache, if all of it does. Asks nobody; a branch is where it was when it was last asked for.
    pub fn cached(&self, model: &ModelId) -> Option<Snapshot> {
        let cache = Cache::of(&self.options.cache, &model.id);
        let commit =
            if model.is_commit() { model.revision.clone() } else { cache.commit_of(&model.revision)? };
        let folder = cache.snapshot(&commit);
        is_complete(&folder).then_some(Snapshot { folder, commit, doubt: None })
    }

    /// What a download would fetch; nothing where the cache holds the model.
    ///
    /// # Errors
    /// What the hub says; [`Error::NotCached`] in offline mode.
    pub fn missing(&self, model: &ModelId) -> Result<Option<Missing>, Error> {
        if self.without_asking(model)?.is_some() {
            return Ok(None);
        }
        let Ok(repository) = self.ask(model)? else { return Ok(None) };
        let cache = Cache::of(&self.options.cache, &model.id);
        let mut missing = Missing { commit: repository.commit.clone(), files: 0, bytes: 0 };
        for file in needed(&repository, model, None)? {
            if !cache.snapshot(&repository.commit).join(&file.name).exists() {
                let arrived = cache.arrived(file.etag.as_deref().unwrap_or_default());
                missing.files += 1;
                missing.bytes += file.size.saturating_sub(arrived);
            }
        }
        Ok((missing.files > 0).then_some(missing))
    }

    /// Brings a model into the cache, or finds it there.
    ///
    /// # Errors
    /// What the hub says, at the last try; [`Error::NotCached`] in offline mode; [`Error::Damaged`] if what arrives is not what
    /// was announced, twice.
    pub fn snapshot(&self, model: &ModelId, progress: &mut dyn FnMut(&Progress)) -> Result<Snapshot, Error> {
        if let Some(found) = self.without_asking(model)? {
            return Ok(found);
        }
        let repository = match self.ask(model)? {
            Ok(found) => found,
            Err(cached) => return Ok(cached),
        };
        let commit = repository.commit.clone();
        let cache = Cache::of(&self.options.cache, &model.id);
        let fetch = |names: Vec<repository::RemoteFile>, progress: &mut dyn FnMut(&Progress)| {
            let fetch = Fetch {
                options: self.options.clone(),
                cache: cache.clone(),
                model: model.clone(),
                commit: commit.clone(),
            };
            fetch_all(fetch, names, progress)
        };
        // The index says which of several sets of shards is the model.
        let index = repository.files.iter().find(|file| file.name == repository::INDEX).cloned();
        let shards = match index {
            Some(index) => {
                fetch(vec![index], &mut |_| {})?;
                Some(repository::shards(&cache.snapshot(&commit).join(repository::INDEX), model)?)
            }
            None => None,
        };
        fetch(needed(&repository, model, shards.as_deref())?, progress)?;
        if !model.is_commit() {
            cache.note_commit(&model.revision, &commit)?;
        }
        let folder = cache.snapshot(&commit);
        Ok(Snapshot { folder, commit, doubt: None })
    }

    /// What is known without the network: a commit that lies in the cache; in offline mode anything that does.
    fn without_asking(&self, model: &ModelId) -> Result<Option<Snapshot>, Error> {
        let cached = self.cached(model);
        if self.options.offline && cached.is_none() {
            return Err(self.not_cached(model));
        }
        Ok(cached.filter(|_| model.is_commit() || self.options.offline))
    }

    /// Asks the hub. Where it cannot be reached, what lies in the cache serves, and says so.
    fn ask(&self, model: &ModelId) -> Result<Result<Repository, Snapshot>, Error> {
        match repository::ask(&self.options, model) {
            Ok(repository) => Ok(Ok(repository)),
            Err(error @ Error::HubUnreachable { .. }) => match self.cached(model) {
                Some(cached) => Ok(Err(Snapshot { doubt: Some(error.to_string()), ..cached })),
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }
}

/// The folder of a model: itself, or for `hf://…` the snapshot in the cache, downloaded if it is not there.
///
/// # Errors
/// As [`Hub::snapshot`].
pub fn local_folder(reference: &Path, progress: &mut dyn FnMut(&Progress)) -> Result<PathBuf, Error> {
    match ModelId::parse(reference) {
        Some(model) => Ok(Hub::from_env().snapshot(&model, progress)?.folder),
        None => Ok(reference.to_owned()),
    }
}

/// The same for whoever needs the tokenizer alone: of a model of the hub no weights are downloaded.
///
/// # Errors
/// As [`Hub::snapshot`].
pub fn tokenizer_folder(reference: &Path) -> Result<PathBuf, Error> {
    match ModelId::parse(reference) {
        Some(model) => Ok(Hub::from_env().small_files(&model, &mut |_| {})?.folder),
        None => Ok(reference.to_owned()),
    }
}

/// The name by which others know a model: `org/name` for one of the hub, also by its folder in the cache; else the path.
pub fn public_name(reference: &Path) -> String {
    if let Some(model) = ModelId::parse(reference) {
        return model.id;
    }
    let parts: Vec<_> = reference.iter().map(|part| part.to_string_lossy()).collect();
    let of_cache = parts.windows(3).next_back().filter(|last| last[1] == "snapshots");
    match of_cache.and_then(|last| {
        last[0].strip_prefix("models--")?.split_once("--").map(|(org, name)| format!("{org}/{name}"))
    }) {
        Some(name) => name,
        None => reference.display().to_string(),
    }
}

/// Whether a folder holds all that a model needs: no link leads nowhere, and all shards of the index are there.
fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    let listed = fs::read_dir(folder).into_iter().flatten().flatten();
    let has_weights = listed.into_iter().any(|entry| {
        entry.path().extension().is_some_and(|end| end == "safetensors") && entry.path().is_file()
    });
    if !has("config.json") || !has("tokenizer.json") || !has_weights {
        return false;
    }
    if !folder.join(repository::INDEX).exists() {
        return has("model.safetensors") || !folder.join("model.safetensors").is_symlink();
    }
    let index = fs::read_to_string(folder.join(repository::INDEX)).unwrap_or_default();
    repository::shard_names(&index).is_some_and(|shards| shards.iter().all(|shard| has(shard)))
}
