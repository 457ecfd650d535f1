//! Downloads files into the cache: resumed, checked, one process at a time each.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use reqwest::{
    StatusCode,
    header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LOCATION, RANGE},
};
use ring::digest;
use url::Url;

use super::{
    HubOptions, ModelId, Progress,
    cache::{Cache, failed},
    repository::{RemoteFile, TRIES, escaped, is_hash, pause, refused},
};
use crate::{
    Error,
    client::{http, later, words},
};

/// Files on their way at a time.
const AT_ONCE: usize = 4;
/// How often progress is told.
const INTERVAL: Duration = Duration::from_millis(100);
/// Redirects that are followed.
const REDIRECTS: usize = 5;

/// What to fetch from.
#[derive(Debug, Clone)]
pub(super) struct Fetch {
    pub(super) options: HubOptions,
    pub(super) cache: Cache,
    pub(super) model: ModelId,
    pub(super) commit: String,
}

#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicU64,
    files: AtomicU64,
    note: Mutex<Option<String>>,
}

/// Fetches what is not in the snapshot yet.
pub(super) fn fetch_all(
    fetch: Fetch,
    mut files: Vec<RemoteFile>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<(), Error> {
    files.retain(|file| !fetch.cache.snapshot(&fetch.commit).join(&file.name).is_file());
    let counts = Arc::new(Counts::default());
    let (bytes_total, files_total) = (files.iter().map(|file| file.size).sum(), files.len() as u64);
    let told = |counts: &Counts| Progress {
        bytes_done: counts.bytes.load(Ordering::Relaxed),
        bytes_total,
        files_done: counts.files.load(Ordering::Relaxed),
        files_total,
        note: counts.note.lock().unwrap_or_else(PoisonError::into_inner).clone(),
    };
    if files.is_empty() {
        return Ok(());
    }
    let shared = Arc::clone(&counts);
    let outcome = later(async move {
        let fetch = Arc::new(fetch);
        futures::stream::iter(files)
            .map(|file| {
                let (fetch, counts) = (Arc::clone(&fetch), Arc::clone(&shared));
                async move {
                    fetch.file(&file, &counts).await?;
                    counts.files.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, Error>(())
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<Vec<()>>()
            .await
            .map(drop)
    })?;
    loop {
        match outcome.recv_timeout(INTERVAL) {
            Ok(outcome) => {
                progress(&told(&counts));
                return outcome;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => progress(&told(&counts)),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::Client { reason: "a download ended without a word".to_owned() });
            }
        }
    }
}

/// What the hub says of a file before it gives it.
struct Announced {
    etag: String,
    size: Option<u64>,
    /// Where the bytes are: the hub itself, or whoever it redirects to.
    url: Url,
}

impl Fetch {
    async fn file(&self, file: &RemoteFile, counts: &Counts) -> Result<(), Error> {
        let reached = AtomicU64::new(0);
        let mut tried = 0;
        let mut damaged = 0;
        loop {
            let before = reached.load(Ordering::Relaxed);
            let error = match self.once(file, counts, &reached).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            // A try that brought something on is no failure of the hub: only those in a row without any count.
            tried = if reached.load(Ordering::Relaxed) > before { 1 } else { tried + 1 };
            match error {
                Error::HubUnreachable { .. } if tried < TRIES => {
                    self.note(counts, Some(format!("{}: {error}; tries again", file.name)));
                    tokio::time::sleep(pause(tried)).await;
                }
                Error::Damaged { .. } if damaged == 0 => {
                    damaged += 1;
                    self.note(
                        counts,
                        Some(format!("{}: it arrived damaged, and is fetched anew", file.name)),
                    );
                }
                error => return Err(error),
            }
        }
    }

    fn note(&self, counts: &Counts, note: Option<String>) {
        *counts.note.lock().unwrap_or_else(PoisonError::into_inner) = note;
    }

    /// One try at a file.
    async fn once(&self, file: &RemoteFile, counts: &Counts, reached: &AtomicU64) -> Result<(), Error> {
        let announced = self.announced(&file.name).await?;
        let etag = &announced.etag;
        let lock = match self.cache.try_lock(etag)? {
            Some(lock) => lock,
            None => {
                // Somebody may hold it for hours: other files go on meanwhile.
                self.note(counts, Some(format!("{}: waits for another download of it", file.name)));
                let (cache, etag) = (self.cache.clone(), etag.clone());
                blocking(move || cache.lock(&etag)).await?
            }
        };
        let blob = self.cache.blob(etag);
        if blob.is_file() {
            counts.bytes.fetch_add(file.size, Ordering::Relaxed);
        } else {
            let path = self.cache.incomplete(etag);
            self.receive(file, &announced, &path, counts, reached).await?;
            self.check(file, &announced, &path, counts).await?;
            fs::rename(&path, &blob).map_err(failed(&blob))?;
        }
        drop(lock);
        self.note(counts, None);
        self.cache.link(&self.commit, &file.name, etag)
    }

    fn unreachable(&self, reason: String) -> Error {
        Error::HubUnreachable { model: self.model.shown(), endpoint: self.options.endpoint.clone(), reason }
    }

    fn nonsense(&self, reason: String) -> Error {
        Error::Answer { model: self.model.shown(), endpoint: self.options.endpoint.clone(), reason }
    }

    /// Asks the hub for hash, size and place of a file.
    async fn announced(&self, name: &str) -> Result<Announced, Error> {
        let parts: Vec<String> = name.split('/').map(escaped).collect();
        let address = format!(
            "{}/{}/resolve/{}/{}",
            self.options.endpoint,
            self.model.id,
            self.commit,
            parts.join("/")
        );
        let mut url =
            Url::parse(&address).map_err(|source| self.nonsense(format!("`{address}`: {source}")))?;
        for _ in 0..REDIRECTS {
            let mut request = http()?.head(url.clone()).header("Accept-Encoding", "identity");
            if let Some(token) = self.options.token.as_ref().filter(|_| self.is_hub(&url)) {
                request = request.bearer_auth(token);
            }
            let answer = request.send().await.map_err(|source| self.unreachable(words(&source)))?;
            let (status, headers) = (answer.status(), answer.headers());
            if !status.is_success() && !status.is_redirection() {
                return Err(refused(&self.options, &self.model, status, headers));
            }
            let place = text(headers, LOCATION.as_str()).map(|place| url.join(&place)).transpose();
            let place = place.map_err(|source| self.nonsense(format!("it redirects nowhere: {source}")))?;
            // A move within the hub (a renamed model) says nothing of the file yet.
            let linked = text(headers, "x-linked-etag");
            if let (Some(place), None) = (&place, &linked)
                && self.is_hub(place)
            {
                url = place.clone();
                continue;
            }
            let etag = linked.or_else(|| text(headers, ETAG.as_str())).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            if !is_hash(&etag) {
                return Err(self.nonsense(format!("the hash of `{name}` is `{etag}`")));
            }
            let size = text(headers, "x-linked-size")
                .or_else(|| text(headers, CONTENT_LENGTH.as_str()).filter(|_| place.is_none()));
            return Ok(Announced {
                etag,
                size: size.and_then(|size| size.parse().ok()),
                url: place.unwrap_or(url),
            });
        }
        Err(self.nonsense(format!("`{name}` is redirected without end")))
    }

    fn is_hub(&self, url: &Url) -> bool {
        Url::parse(&self.options.endpoint).is_ok_and(|hub| hub.origin() == url.origin())
    }

    /// Receives what is missing of a file behind what has arrived.
    async fn receive(
        &self,
        file: &RemoteFile,
        announced: &Announced,
        path: &Path,
        counts: &Counts,
        reached: &AtomicU64,
    ) -> Result<(), Error> {
        let mut output = File::options().create(true).append(true).open(path).map_err(failed(path))?;
        let mut have = output.metadata().map_err(failed(path))?.len();
        if announced.size.is_some_and(|size| have > size) {
            output.set_len(0).map_err(failed(path))?;
            have = 0;
        }
        // Counts itself back if this ends early: the next try counts anew what lies on disk.
        let mut counted = Counted { counts, bytes: 0 };
        counted.add(have);
        if announced.size == Some(have) && have > 0 {
            counted.keep();
            return Ok(());
        }
        let answer = self.body(&announced.url, have, &stored_tag(path)).await?;
        if have > 0 && answer.status() == StatusCode::OK {
            // The whole file: what there was is of another one, or the server gives no parts.
            output.set_len(0).map_err(failed(path))?;
            counted.forget();
            have = 0;
        }
        store_tag(path, text(answer.headers(), ETAG.as_str()));
        let mut pieces = answer.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|source| {
                self.unreachable(format!("`{}` broke off after {have} bytes: {}", file.name, words(&source)))
            })?;
            output.write_all(&piece).map_err(failed(path))?;
            have += piece.len() as u64;
            counted.add(piece.len() as u64);
            reached.fetch_max(have, Ordering::Relaxed);
        }
        output.sync_all().map_err(failed(path))?;
        if let Some(size) = announced.size.filter(|size| have < *size) {
            return Err(self.unreachable(format!("`{}` ended after {have} of {size} bytes", file.name)));
        }
        counted.keep();
        Ok(())
    }

    /// The answer with the bytes from `have` on, or with all of them.
    async fn body(&self, url: &Url, have: u64, tag: &Option<String>) -> Result<reqwest::Response, Error> {
        let mut url = url.clone();
        for _ in 0..REDIRECTS {
            let mut request = http()?.get(url.clone()).header("Accept-Encoding", "identity");
            if have > 0 {
                request = request.header(RANGE, format!("bytes={have}-"));
                if let Some(tag) = tag {
                    request = request.header(IF_RANGE, tag);
                }
            }
            if let Some(token) = self.options.token.as_ref().filter(|_| self.is_hub(&url)) {
                request = request.bearer_auth(token);
            }
            let answer = request.send().await.map_err(|source| self.unreachable(words(&source)))?;
            let status = answer.status();
            if status.is_redirection() {
                let place = text(answer.headers(), LOCATION.as_str()).unwrap_or_default();
                url = url
                    .join(&place)
                    .map_err(|source| self.nonsense(format!("it redirects nowhere: {source}")))?;
                continue;
            }
            if status == StatusCode::PARTIAL_CONTENT {
                let range = text(answer.headers(), CONTENT_RANGE.as_str()).unwrap_or_default();
                if !range.starts_with(&format!("bytes {have}-")) {
                    return Err(self.nonsense(format!("asked for bytes from {have}, it sends `{range}`")));
                }
            } else if !status.is_success() {
                return Err(refused(&self.options, &self.model, status, answer.headers()));
            }
            return Ok(answer);
        }
        Err(self.nonsense("a file is redirected without end".to_owned()))
    }

    /// Compares size and hash with what was announced; what differs is thrown away.
    async fn check(
        &self,
        file: &RemoteFile,
        announced: &Announced,
        path: &Path,
        counts: &Counts,
    ) -> Result<(), Error> {
        let (hashed, as_git) = (path.to_owned(), announced.etag.len() == 40);
        let (size, hash) = blocking(move || hash_of(&hashed, as_git).map_err(failed(&hashed))).await?;
        forget_tag(path);
        let reason = match announced.size {
            Some(expected) if expected != size => format!("it has {size} bytes, not {expected}"),
            _ if hash != announced.etag.to_lowercase() => {
                format!("its hash is {hash}, not {}", announced.etag)
            }
            _ => return Ok(()),
        };
        fs::remove_file(path).map_err(failed(path))?;
        counts.bytes.fetch_sub(size.min(counts.bytes.load(Ordering::Relaxed)), Ordering::Relaxed);
        Err(Error::Damaged { model: self.model.shown(), file: file.name.clone(), reason })
    }
}

/// Runs what waits for a lock or a disk where it holds no other download up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let failed = |source: tokio::task::JoinError| Error::Client { reason: source.to_string() };
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// Bytes that a try has counted; taken back when it ends early.
struct Counted<'a> {
    counts: &'a Counts,
    bytes: u64,
}

impl Counted<'_> {
    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn forget(&mut self) {
        self.counts.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
    }

    fn keep(&mut self) {
        self.bytes = 0;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.forget();
    }
}

/// The tag of whoever served the bytes (not the hub's): with it a part is asked for only of the same file.
fn stored_tag(path: &Path) -> Option<String> {
    fs::read_to_string(tag_path(path)).ok().filter(|tag| tag.starts_with('"'))
}

fn store_tag(path: &Path, tag: Option<String>) {
    // Best effort: without it, the hash at the end still tells.
    let _ = match tag.filter(|tag| tag.starts_with('"')) {
        Some(tag) => fs::write(tag_path(path), tag),
        None => fs::remove_file(tag_path(path)),
    };
}

fn forget_tag(path: &Path) {
    let _ = fs::remove_file(tag_path(path));
}

fn tag_path(path: &Path) -> std::path::PathBuf {
    path.with_extension("incomplete.tag")
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Size and hash of a file: SHA-256, or git's SHA-1 of a blob.
fn hash_of(path: &Path, as_git: bool) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let algorithm = if as_git { &digest::SHA1_FOR_LEGACY_USE_ONLY } else { &digest::SHA256 };
    let mut context = digest::Context::new(algorithm);
    if as_git {
        context.update(format!("blob {size}\0").as_bytes());
    }
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        context.update(&buffer[..length]);
    }
    let hash = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((size, hash))
}
