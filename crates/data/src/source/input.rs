//! Bytes of data files: on this machine or in an object store, plain or compressed.
//!
//! A file in a store is named by its URL, kept as a path. Nothing is held of it but the pieces that are read.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arrow::error::ArrowError;
use bytes::{Buf, Bytes};
use parquet::{
    errors::ParquetError,
    file::reader::{ChunkReader, Length},
};
use shanty_remote::Object;

use crate::Error;

/// What tells a file from another of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) bytes: u64,
    /// BLAKE3 of a file of this machine; what its store says of the version, of others.
    pub(crate) version: String,
}

/// The URL of a file that is not of this machine.
fn url(path: &Path) -> Option<&str> {
    path.to_str().filter(|name| shanty_remote::is_url(name))
}

/// The last part of a file's name, in lower case, without the query of a URL.
pub(super) fn name(path: &Path) -> String {
    let name = match url(path) {
        Some(url) if url.starts_with("http") => url.split(['?', '#']).next().unwrap_or_default(),
        Some(url) => url,
        None => &path.to_string_lossy(),
    };
    name.rsplit('/').next().unwrap_or_default().to_lowercase()
}

/// Size of a file.
pub(crate) fn size(path: &Path) -> Result<u64, Error> {
    match url(path) {
        Some(url) => Ok(Object::open(url)?.size()),
        None => fs::metadata(path).map(|data| data.len()).map_err(|source| Error::read(path, source)),
    }
}

/// What tells a file from another; a file of this machine is read for it.
pub(crate) fn identify(path: &Path, done: &mut dyn FnMut(u64)) -> Result<Identity, Error> {
    const CHUNK: usize = 1 << 20;
    if let Some(url) = url(path) {
        let object = Object::open(url)?;
        done(object.size());
        return Ok(Identity { bytes: object.size(), version: object.version() });
    }
    let failed = |source| Error::read(path, source);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let length = file.read(&mut buffer).map_err(failed)?;
        if length == 0 {
            break;
        }
        hasher.update(&buffer[..length]);
        bytes += length as u64;
        done(length as u64);
    }
    Ok(Identity { bytes, version: hasher.finalize().to_hex().to_string() })
}

/// The first four bytes of a file, or fewer.
pub(super) fn first_bytes(path: &Path) -> Result<Vec<u8>, Error> {
    let mut start = Vec::new();
    let read: Box<dyn Read> = match url(path) {
        Some(url) => {
            let object = Object::open(url)?;
            if object.serves_ranges() {
                return Ok(object.range(0..object.size().min(4))?.to_vec());
            }
            Box::new(object.reader())
        }
        None => Box::new(File::open(path).map_err(|source| Error::read(path, source))?),
    };
    read.take(4).read_to_end(&mut start).map_err(|source| Error::read(path, source))?;
    Ok(start)
}

/// A file that is read from start to end, unpacked on the way.
pub(super) struct Text {
    input: Box<dyn BufRead + Send>,
    read: Arc<AtomicU64>,
}

impl Text {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        const BUFFER: usize = 1 << 20;
        let failed = |source| Error::read(path, source);
        let input: Box<dyn Read + Send> = match url(path) {
            Some(url) => Box::new(Object::open(url)?.reader()),
            None => Box::new(File::open(path).map_err(failed)?),
        };
        let read = Arc::new(AtomicU64::new(0));
        let counted = BufReader::with_capacity(BUFFER, Counted { input, read: Arc::clone(&read) });
        let name = name(path);
        let input: Box<dyn BufRead + Send> = if name.ends_with(".gz") {
            Box::new(BufReader::with_capacity(BUFFER, flate2::bufread::MultiGzDecoder::new(counted)))
        } else if name.ends_with(".zst") {
            let unpacked = zstd::stream::read::Decoder::with_buffer(counted).map_err(failed)?;
            Box::new(BufReader::with_capacity(BUFFER, unpacked))
        } else {
            Box::new(counted)
        };
        Ok(Self { input, read })
    }

    /// Bytes of the file, as it is stored, that were read.
    pub(super) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    pub(super) fn input(&mut self) -> &mut (dyn BufRead + Send) {
        &mut self.input
    }
}

struct Counted {
    input: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.input.read(buffer)?;
        self.read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

/// A Parquet file: its parts are read where the reader jumps to.
pub(super) enum Chunks {
    File(File),
    Object(Blocks),
}

impl Chunks {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        match url(path) {
            Some(url) => {
                let object = Object::open(url)?;
                if !object.serves_ranges() {
                    return Err(shanty_remote::Error::NoRanges { url: object.url() }.into());
                }
                Ok(Self::Object(Blocks { object: Arc::new(object), held: Arc::default() }))
            }
            None => Ok(Self::File(File::open(path).map_err(|source| Error::read(path, source))?)),
        }
    }
}

/// Bytes of a block that is read at once.
const BLOCK: u64 = 2 << 20;
/// Blocks that are held: as many columns are read side by side without reading one twice.
const HELD: usize = 16;

/// An object in blocks, the last used of which are held.
#[derive(Clone)]
pub(super) struct Blocks {
    object: Arc<Object>,
    /// Number and bytes, the last used last.
    held: Arc<Mutex<Vec<(u64, Bytes)>>>,
}

impl Blocks {
    fn block(&self, number: u64) -> Result<Bytes, shanty_remote::Error> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match held.iter().position(|(held, _)| *held == number) {
            Some(index) => held.remove(index).1,
            None => {
                let start = number * BLOCK;
                self.object.range(start..(start + BLOCK).min(self.object.size()))?
            }
        };
        if held.len() >= HELD {
            held.remove(0);
        }
        held.push((number, block.clone()));
        Ok(block)
    }

    fn from(&self, at: u64) -> Result<Bytes, shanty_remote::Error> {
        if at >= self.object.size() {
            return Ok(Bytes::new());
        }
        let mut block = self.block(at / BLOCK)?;
        block.advance((at % BLOCK) as usize);
        Ok(block)
    }
}

/// Reads on from a place in the blocks.
pub(super) struct From {
    blocks: Blocks,
    at: u64,
}

impl Read for From {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.blocks.from(self.at).map_err(io::Error::other)?;
        let length = buffer.len().min(bytes.len());
        bytes.copy_to_slice(&mut buffer[..length]);
        self.at += length as u64;
        Ok(length)
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        match self {
            Self::File(file) => Length::len(file),
            Self::Object(blocks) => blocks.object.size(),
        }
    }
}

impl ChunkReader for Chunks {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(match self {
            Self::File(file) => Box::new(file.get_read(start)?),
            Self::Object(blocks) => Box::new(From { blocks: blocks.clone(), at: start }),
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let blocks = match self {
            Self::File(file) => return file.get_bytes(start, length),
            Self::Object(blocks) => blocks,
        };
        let external = |source: shanty_remote::Error| ParquetError::External(Box::new(source));
        let end = start.saturating_add(length as u64);
        if end > blocks.object.size() {
            return Err(ParquetError::EOF(format!("it ends at {}, before {end}", blocks.object.size())));
        }
        // A large part would push everything else out: it is read at once.
        if length as u64 > BLOCK {
            return blocks.object.range(start..end).map_err(external);
        }
        let mut out = Vec::with_capacity(length);
        while out.len() < length {
            let block = blocks.from(start + out.len() as u64).map_err(external)?;
            out.extend_from_slice(&block[..block.len().min(length - out.len())]);
        }
        Ok(out.into())
    }
}

/// The network's error inside a Parquet reader's, if there is one.
pub(super) fn network_error(error: ParquetError) -> Result<shanty_remote::Error, ParquetError> {
    match error {
        ParquetError::External(inner) => match inner.downcast::<shanty_remote::Error>() {
            Ok(error) => Ok(*error),
            Err(inner) => match inner.downcast::<io::Error>() {
                Ok(inner) => shanty_remote::Error::inside(*inner)
                    .map_err(|inner| ParquetError::External(Box::new(inner))),
                Err(inner) => Err(ParquetError::External(inner)),
            },
        },
        other => Err(other),
    }
}

/// The same inside an Arrow error.
pub(super) fn network_error_of_arrow(error: ArrowError) -> Result<shanty_remote::Error, ArrowError> {
    match error {
        ArrowError::ExternalError(inner) => match inner.downcast::<ParquetError>() {
            Ok(inner) => network_error(*inner).map_err(|inner| ArrowError::ExternalError(Box::new(inner))),
            Err(inner) => match inner.downcast::<shanty_remote::Error>() {
                Ok(inner) => Ok(*inner),
                Err(inner) => Err(ArrowError::ExternalError(inner)),
            },
        },
        other => Err(other),
    }
}
