//! Writes a prepared folder.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use super::{
    Entry, PARTS, checksum, file_name,
    manifest::{FileEntry, MANIFEST, Manifest, SEAL},
};
use crate::{Error, Row, Split};

fn failed(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |source| Error::Write { path: path.to_owned(), source }
}

/// A folder under a temporary name. It disappears if it is not completed.
pub(crate) struct Folder {
    temporary: PathBuf,
    target: PathBuf,
    is_complete: bool,
}

impl Folder {
    /// Makes a temporary folder beside `target`.
    pub(crate) fn create(target: &Path) -> Result<Self, Error> {
        let temporary = beside(target, "part");
        remove(&temporary)?;
        remove_orphans(target);
        fs::create_dir_all(&temporary).map_err(failed(&temporary))?;
        Ok(Self { temporary, target: target.to_owned(), is_complete: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes the manifest, last, and puts the folder in place of what was there.
    pub(crate) fn complete(mut self, manifest: &Manifest) -> Result<(), Error> {
        let path = self.temporary.join(MANIFEST);
        let text = serde_json::to_vec_pretty(manifest).map_err(|source| failed(&path)(source.into()))?;
        let seal = blake3::hash(&text).to_hex();
        write_synced(&self.temporary.join(SEAL), seal.as_bytes())?;
        write_synced(&path, &text)?;
        sync_folder(&self.temporary)?;

        let old = beside(&self.target, "old");
        remove(&old)?;
        if self.target.exists() {
            fs::rename(&self.target, &old).map_err(failed(&self.target))?;
        }
        if let Err(source) = fs::rename(&self.temporary, &self.target) {
            // Best effort to put back what was there; the error that counts is the first.
            let _ = fs::rename(&old, &self.target);
            return Err(failed(&self.target)(source));
        }
        self.is_complete = true;
        if let Some(parent) = self.target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_folder(parent)?;
        }
        remove(&old)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.is_complete {
            // The error that led here is the one to report.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// A hidden name beside `target`, of this process alone.
fn beside(target: &Path, what: &str) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.{what}-{}", std::process::id()))
}

/// Removes what processes that were killed left beside `target`. Best effort: it is only a matter of space.
fn remove_orphans(target: &Path) {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_alive = |id: &str| !Path::new("/proc/self").exists() || Path::new("/proc").join(id).exists();
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let rest = file_name.to_str().and_then(|file| file.strip_prefix('.')?.strip_prefix(&*name));
        let id = rest.and_then(|rest| rest.strip_prefix(".part-").or_else(|| rest.strip_prefix(".old-")));
        if id.is_some_and(|id| id.parse::<u32>().is_ok() && !is_alive(id)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed(path)(source)),
        _ => Ok(()),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = File::create(path).map_err(failed(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed(path))
}

fn sync_folder(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(failed(path))
}

/// A file that is hashed while it is written.
struct Hashed {
    name: String,
    path: PathBuf,
    output: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Hashed {
    fn create(folder: &Path, name: String) -> Result<Self, Error> {
        let path = folder.join(&name);
        let file = File::create(&path).map_err(failed(&path))?;
        let output = BufWriter::with_capacity(1 << 18, file);
        Ok(Self { name, path, output, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.output.write_all(bytes).map_err(failed(&self.path))
    }

    fn finish(self) -> Result<FileEntry, Error> {
        let file = self.output.into_inner().map_err(|source| failed(&self.path)(source.into_error()))?;
        file.sync_all().map_err(failed(&self.path))?;
        Ok(FileEntry {
            name: self.name,
            bytes: self.bytes,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }
}

/// Writes the rows of a split as they are closed.
pub(crate) struct SplitWriter {
    rows: Hashed,
    index: Hashed,
    samples: Hashed,
    buffer: Vec<u8>,
}

impl SplitWriter {
    pub(crate) fn create(folder: &Path, split: Split) -> Result<Self, Error> {
        let [rows, index, samples] = PARTS.map(|part| Hashed::create(folder, file_name(split, part)));
        Ok(Self { rows: rows?, index: index?, samples: samples?, buffer: Vec::new() })
    }

    /// Notes where the next sample comes from.
    pub(crate) fn sample(&mut self, file: u32, part: u32, line: u64) -> Result<(), Error> {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&file.to_le_bytes());
        bytes[4..8].copy_from_slice(&part.to_le_bytes());
        bytes[8..].copy_from_slice(&line.to_le_bytes());
        self.samples.write(&bytes)
    }

    /// Writes the next row.
    pub(crate) fn row(&mut self, row: &Row) -> Result<(), Error> {
        let buffer = &mut self.buffer;
        buffer.clear();
        for id in &row.token_ids {
            buffer.extend_from_slice(&id.to_le_bytes());
        }
        for segment in &row.segments {
            buffer.extend_from_slice(&segment.sample_id.to_le_bytes());
            buffer.extend_from_slice(&segment.length.to_le_bytes());
        }
        for range in &row.trained {
            buffer.extend_from_slice(&range.start.to_le_bytes());
            buffer.extend_from_slice(&range.end.to_le_bytes());
        }
        let entry = Entry {
            offset: self.rows.bytes,
            tokens: row.token_ids.len() as u32,
            segments: row.segments.len() as u32,
            ranges: row.trained.len() as u32,
            trained_tokens: row.trained_tokens(),
            checksum: checksum(buffer),
        };
        self.index.write(&entry.to_bytes())?;
        self.rows.write(&self.buffer)
    }

    /// Brings all files to disk.
    pub(crate) fn finish(self) -> Result<[FileEntry; 3], Error> {
        Ok([self.rows.finish()?, self.index.finish()?, self.samples.finish()?])
    }
}
