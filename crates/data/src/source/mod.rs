//! Data files: where they are, and their records in batches.

mod input;
mod jsonl;
mod parquet;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub(crate) use self::{
    input::{Identity, identify, size},
    jsonl::name,
};
use crate::{Error, Place};

/// What a data file is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    JsonLines,
    Parquet,
}

/// One record, as it was read.
#[derive(Debug)]
pub(crate) enum Raw {
    /// A line of JSON Lines, not parsed yet.
    Line(Vec<u8>),
    /// A row of Parquet.
    Object(Map<String, Value>),
}

/// Some records of one file, in order.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Number of the file in the source.
    pub(crate) file: u32,
    /// Line (or row) from 1, and record.
    pub(crate) records: Vec<(u64, Raw)>,
}

/// The records of several files, read in batches, so that memory stays bounded whatever their size.
pub(crate) struct Source {
    files: Vec<PathBuf>,
    current: usize,
    reader: Option<Reader>,
    records_in_file: u64,
    bytes_before: u64,
    /// Columns that are read from Parquet files; empty: all.
    wanted: Vec<&'static str>,
}

enum Reader {
    JsonLines(jsonl::Reader),
    Parquet(parquet::Reader),
}

impl Source {
    pub(crate) fn new(files: Vec<PathBuf>, wanted: &[&'static str]) -> Self {
        Self { files, current: 0, reader: None, records_in_file: 0, bytes_before: 0, wanted: wanted.to_vec() }
    }

    /// Bytes of the files that are behind the reader.
    pub(crate) fn bytes_done(&self) -> u64 {
        let in_file = match &self.reader {
            Some(Reader::JsonLines(reader)) => reader.bytes_done(),
            Some(Reader::Parquet(reader)) => reader.bytes_done(),
            None => 0,
        };
        self.bytes_before + in_file
    }

    /// The next records; nothing at the end of the last file.
    pub(crate) fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        loop {
            let Some(path) = self.files.get(self.current) else { return Ok(None) };
            let reader = match &mut self.reader {
                Some(reader) => reader,
                closed => closed.insert(match kind(path)? {
                    Kind::JsonLines => Reader::JsonLines(jsonl::Reader::open(path)?),
                    Kind::Parquet => Reader::Parquet(parquet::Reader::open(path, &self.wanted)?),
                }),
            };
            let records = match reader {
                Reader::JsonLines(reader) => reader.next_records()?,
                Reader::Parquet(reader) => reader.next_records()?,
            };
            if !records.is_empty() {
                self.records_in_file += records.len() as u64;
                return Ok(Some(Batch { file: self.current as u32, records }));
            }
            if self.records_in_file == 0 {
                return Err(Error::EmptyFile { path: path.clone() });
            }
            self.bytes_before = self.bytes_done();
            self.reader = None;
            self.records_in_file = 0;
            self.current += 1;
        }
    }
}

/// The columns of a file's first record, and where that is.
pub(crate) fn first_columns(path: &Path) -> Result<(Place, Vec<String>), Error> {
    if kind(path)? == Kind::Parquet {
        let columns = parquet::columns(path)?;
        return Ok((Place { file: path.to_owned(), line: 1 }, columns));
    }
    let first = jsonl::Reader::open(path)?.next_records()?.into_iter().next();
    let Some((line, raw)) = first else { return Err(Error::EmptyFile { path: path.to_owned() }) };
    let place = Place { file: path.to_owned(), line };
    let columns = object(raw, || place.clone())?.keys().cloned().collect();
    Ok((place, columns))
}

/// The object that a record is.
pub(crate) fn object(raw: Raw, place: impl Fn() -> Place) -> Result<Map<String, Value>, Error> {
    match raw {
        Raw::Line(bytes) => jsonl::parse(&bytes, place),
        Raw::Object(map) => Ok(map),
    }
}

/// The files that a path or glob leads to, sorted.
pub(crate) fn expand(pattern: &str) -> Result<Vec<PathBuf>, Error> {
    let fail = |reason: String| Error::NoInput { pattern: pattern.to_owned(), reason };
    if shanty_remote::is_url(pattern) {
        return Ok(shanty_remote::expand(pattern)?.into_iter().map(PathBuf::from).collect());
    }
    let path = Path::new(pattern);
    if path.is_dir() {
        return Err(fail("it is a folder; name its files, for example with `*.jsonl`".to_owned()));
    }
    // A name that exists is taken as it is, also with brackets in it.
    if path.exists() {
        return Ok(vec![path.to_owned()]);
    }
    if !pattern.contains(['*', '?', '[']) {
        return Err(fail("no such file".to_owned()));
    }
    let paths = glob::glob(pattern).map_err(|source| fail(source.to_string()))?;
    let mut files = Vec::new();
    for path in paths {
        let path =
            path.map_err(|source| Error::Read { path: source.path().to_owned(), source: source.into() })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(fail("no file matches".to_owned()));
    }
    files.sort_unstable();
    Ok(files)
}

/// What a file is, by its ending (before `.gz` and `.zst`); by its first bytes where the ending says nothing.
fn kind(path: &Path) -> Result<Kind, Error> {
    let name = input::name(path);
    let plain = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
    match plain.rsplit_once('.').map(|(_, ending)| ending) {
        Some("jsonl" | "json" | "ndjson") => return Ok(Kind::JsonLines),
        Some("parquet") if plain.len() == name.len() => return Ok(Kind::Parquet),
        _ => {}
    }
    let reason = match &*input::first_bytes(path)? {
        b"PAR1" => return Ok(Kind::Parquet),
        [b'{', ..] => return Ok(Kind::JsonLines),
        [0x1f, 0x8b, ..] => ": it is compressed by gzip; name it `.jsonl.gz` if it holds JSON Lines",
        [0x28, 0xb5, 0x2f, 0xfd] => ": it is compressed by zstd; name it `.jsonl.zst` if it holds JSON Lines",
        _ => "",
    };
    Err(Error::FileType { path: path.to_owned(), reason: reason.to_owned() })
}
