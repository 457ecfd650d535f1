//! One object of a store, read in ranges from plain threads.

use std::ops::Range;

use bytes::Bytes;
use futures::StreamExt;
use object_store::{GetOptions, GetRange, ObjectStoreExt};

use crate::{
    Error, Reader,
    client::{later, wait},
    store::{Environment, Location, failed, open_store_in, shown},
};

/// Whether a text is a URL rather than a path.
pub fn is_url(text: &str) -> bool {
    text.contains("://")
}

/// An object as it was when it was opened. Reads of it fail if it changes.
#[derive(Debug, Clone)]
pub struct Object {
    location: Location,
    size: u64,
    e_tag: Option<String>,
    modified: i64,
    serves_ranges: bool,
}

impl Object {
    /// Asks a store about an object.
    ///
    /// # Errors
    /// What the store says, in our words.
    pub fn open(url: &str) -> Result<Self, Error> {
        Self::open_in(url, &Environment::of_process())
    }

    /// [`Object::open`] with the environment given.
    ///
    /// # Errors
    /// As [`Object::open`].
    pub fn open_in(url: &str, environment: &Environment) -> Result<Self, Error> {
        let location = open_store_in(url, environment)?;
        wait(async move {
            let meta =
                location.store.head(&location.path).await.map_err(|source| failed(&location.url, source))?;
            let mut object = Self {
                size: meta.size,
                e_tag: meta.e_tag,
                modified: meta.last_modified.timestamp(),
                serves_ranges: true,
                location,
            };
            // Object stores serve ranges; a web server may not, and says so only when it is asked.
            if object.size > 0 && object.location.url.starts_with("http") {
                match object.read(0..1).await {
                    Err(Error::NoRanges { .. }) => object.serves_ranges = false,
                    other => drop(other?),
                }
            }
            Ok(object)
        })
    }

    /// Its URL, without a signature.
    pub fn url(&self) -> String {
        shown(&self.location.url)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What tells this content from another under the same name: the store's tag, or size and time of change.
    pub fn version(&self) -> String {
        match &self.e_tag {
            Some(tag) => format!("etag {tag}"),
            None => format!("size {} changed {}", self.size, self.modified),
        }
    }

    /// Whether any range can be read; otherwise there is [`Object::reader`] alone.
    pub fn serves_ranges(&self) -> bool {
        self.serves_ranges
    }

    /// Reads a range of bytes, which must lie within the object.
    ///
    /// # Errors
    /// What the store says; [`Error::Changed`] if the object is another by now.
    pub fn range(&self, range: Range<u64>) -> Result<Bytes, Error> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let object = self.clone();
        wait(async move { object.read(range).await })
    }

    /// Starts to read a range, to be received later.
    pub(crate) fn range_later(
        &self,
        range: Range<u64>,
    ) -> Result<std::sync::mpsc::Receiver<Result<Bytes, Error>>, Error> {
        let object = self.clone();
        later(async move { object.read(range).await })
    }

    /// Reads it from its first byte to its last.
    pub fn reader(&self) -> Reader {
        Reader::new(self.clone())
    }

    async fn read(&self, range: Range<u64>) -> Result<Bytes, Error> {
        let url = &self.location.url;
        let expected = range.end - range.start;
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: self.e_tag.clone(),
            ..GetOptions::default()
        };
        let result = self.location.store.get_opts(&self.location.path, options).await;
        let result = result.map_err(|source| failed(url, source))?;
        let has_changed =
            result.meta.size != self.size || (self.e_tag.is_some() && result.meta.e_tag != self.e_tag);
        if has_changed {
            return Err(Error::Changed { url: shown(url) });
        }
        let bytes = result.bytes().await.map_err(|source| failed(url, source))?;
        if bytes.len() as u64 != expected {
            let reason = format!("{} bytes arrived of {expected}", bytes.len());
            return Err(Error::Unreachable { url: shown(url), reason });
        }
        Ok(bytes)
    }

    /// The whole body, piece by piece, for servers without ranges.
    pub(crate) fn stream(&self) -> Result<std::sync::mpsc::Receiver<Result<Bytes, Error>>, Error> {
        /// Pieces on their way at most; each is what the connection gave at once.
        const PIECES: usize = 32;
        let object = self.clone();
        let (sender, receiver) = std::sync::mpsc::sync_channel(PIECES);
        drop(later(async move {
            let url = object.location.url.clone();
            let got = object.location.store.get(&object.location.path).await;
            let mut pieces = match got {
                Ok(got) => got.into_stream(),
                Err(source) => {
                    let _ = sender.send(Err(failed(&url, source)));
                    return Ok(());
                }
            };
            while let Some(piece) = pieces.next().await {
                let piece = piece.map_err(|source| failed(&url, source));
                // The channel blocks while the reader is behind: this thread has nothing else to do.
                let sent = tokio::task::block_in_place(|| sender.send(piece));
                if sent.is_err() {
                    break;
                }
            }
            Ok(())
        })?);
        Ok(receiver)
    }
}

/// The objects that a URL with a glob in its key leads to, sorted; a URL without one leads to itself.
///
/// # Errors
/// [`Error::NotFound`] if nothing matches; [`Error::Url`] for a glob on a web server, which lists nothing.
pub fn expand(url: &str) -> Result<Vec<String>, Error> {
    expand_in(url, &Environment::of_process())
}

/// [`expand`] with the environment given.
///
/// # Errors
/// As [`expand`].
pub fn expand_in(url: &str, environment: &Environment) -> Result<Vec<String>, Error> {
    let first_glob = url.find(['*', '?', '[']);
    let is_web = url.starts_with("http");
    let Some(first_glob) = first_glob.filter(|at| !is_web || url[*at..].starts_with('*')) else {
        return Ok(vec![url.to_owned()]);
    };
    let refuse = |reason: &str| Error::Url { url: url.to_owned(), reason: reason.to_owned() };
    if is_web {
        return Err(refuse("a web server lists no files: name each of them"));
    }
    let (_, rest) = url.split_once("://").ok_or_else(|| refuse("it has no scheme"))?;
    let bucket_end = url.len() - rest.len() + rest.find('/').ok_or_else(|| refuse("it names no key"))?;
    if first_glob < bucket_end {
        return Err(refuse("a glob cannot name the bucket"));
    }
    let pattern = glob::Pattern::new(&url[bucket_end + 1..]).map_err(|source| refuse(source.msg))?;
    // Everything up to the last `/` before the glob is the prefix that is listed.
    let prefix_end = url[..first_glob].rfind('/').unwrap_or(bucket_end).max(bucket_end);
    let location = open_store_in(&url[..prefix_end], environment)?;
    let root = url[..bucket_end].to_owned();
    let shown_url = url.to_owned();
    let mut found: Vec<String> = wait(async move {
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let mut listed = location.store.list(Some(&location.path));
        let mut found = Vec::new();
        while let Some(meta) = listed.next().await {
            let key = meta.map_err(|source| failed(&shown_url, source))?.location.to_string();
            if pattern.matches_with(&key, options) {
                found.push(format!("{root}/{key}"));
            }
        }
        Ok(found)
    })?;
    if found.is_empty() {
        return Err(Error::NotFound { url: url.to_owned(), reason: "no object matches".to_owned() });
    }
    found.sort_unstable();
    Ok(found)
}
