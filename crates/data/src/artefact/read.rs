//! Reads a prepared folder.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    Entry, INDEX_ENTRY, Numbers, PARTS, SAMPLE_ENTRY, checksum, file_name,
    manifest::{KIND, MANIFEST, Manifest, SEAL, VERSION},
};
use crate::{Error, Row, SampleSource, Segment, Split, SplitSummary, Summary, order::row_of};

/// A prepared folder, opened for reading. All reads are positioned and none moves a cursor: share it as you like.
#[derive(Debug)]
pub struct Prepared {
    dir: PathBuf,
    manifest: Manifest,
    train: SplitFiles,
    eval: Option<SplitFiles>,
}

#[derive(Debug)]
struct SplitFiles {
    rows: File,
    index: File,
    samples: File,
}

impl Prepared {
    /// Opens a folder that [`prepare`](crate::prepare()) wrote: checks its manifest and the sizes of its files.
    ///
    /// # Errors
    /// [`Error::NotPrepared`] without a manifest, or with one of another version; [`Error::Damaged`] if manifest, seal and
    /// files do not fit together.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let manifest = read_manifest(dir)?;
        for file in &manifest.files {
            let path = dir.join(&file.name);
            let bytes = fs::metadata(&path).map_err(|source| damaged(&path, &source))?.len();
            if bytes != file.bytes {
                return Err(damaged(&path, &format!("it has {bytes} bytes instead of {}", file.bytes)));
            }
        }
        let train = SplitFiles::open(dir, Split::Train)?;
        let eval = match manifest.summary.eval {
            Some(_) => Some(SplitFiles::open(dir, Split::Eval)?),
            None => None,
        };
        Ok(Self { dir: dir.to_owned(), manifest, train, eval })
    }

    /// Reads every byte and compares the hashes with the manifest.
    ///
    /// # Errors
    /// [`Error::Damaged`] with the first file that differs.
    pub fn verify(&self) -> Result<(), Error> {
        for file in &self.manifest.files {
            let path = self.dir.join(&file.name);
            let mut hasher = blake3::Hasher::new();
            let mut input = File::open(&path).map_err(|source| damaged(&path, &source))?;
            io::copy(&mut input, &mut hasher).map_err(|source| damaged(&path, &source))?;
            if hasher.finalize().to_hex().as_str() != file.blake3 {
                return Err(damaged(&path, &"its bytes are not those that were written"));
            }
        }
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its figures.
    pub fn summary(&self) -> &Summary {
        &self.manifest.summary
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How many rows a split has; 0 for a split that there is not.
    pub fn rows(&self, split: Split) -> u64 {
        self.summary().split(split).map_or(0, |summary| summary.rows)
    }

    /// Reads a row and checks its checksum. Ids are those of [`order`](crate::order): a mix gives a row that comes a second
    /// time in an epoch an id of its own, which leads to the same tokens.
    ///
    /// # Errors
    /// [`Error::NoSuchRow`]; [`Error::Damaged`] if the bytes are not those that were written.
    pub fn row(&self, split: Split, id: u64) -> Result<Row, Error> {
        let (files, entry) = self.entry(split, id)?;
        let path = self.dir.join(file_name(split, "rows"));
        let mut bytes = vec![0; entry.row_bytes()];
        files.rows.read_exact_at(&mut bytes, entry.offset).map_err(|source| damaged(&path, &source))?;
        if checksum(&bytes) != entry.checksum {
            return Err(damaged(&path, &format!("row {id} is not what was written")));
        }
        let mut numbers = Numbers(&bytes);
        let token_ids = (0..entry.tokens).map(|_| numbers.u32()).collect();
        let segments = (0..entry.segments)
            .map(|_| Segment { sample_id: numbers.u64(), length: numbers.u32() })
            .collect();
        let trained = (0..entry.ranges).map(|_| numbers.u32()..numbers.u32()).collect();
        Ok(Row { id, token_ids, segments, trained })
    }

    /// How many tokens of a row are targets, from the index alone.
    ///
    /// # Errors
    /// [`Error::NoSuchRow`]; [`Error::Damaged`] if the index cannot be read.
    pub fn trained_tokens(&self, split: Split, id: u64) -> Result<u32, Error> {
        Ok(self.entry(split, id)?.1.trained_tokens)
    }

    /// Which records a row is made of, in the order of its segments.
    ///
    /// # Errors
    /// As [`Prepared::row`].
    pub fn samples_of_row(&self, split: Split, id: u64) -> Result<Vec<SampleSource>, Error> {
        let row = self.row(split, id)?;
        row.segments.iter().map(|segment| self.sample(split, segment.sample_id)).collect()
    }

    fn sample(&self, split: Split, sample_id: u64) -> Result<SampleSource, Error> {
        let path = self.dir.join(file_name(split, "samples"));
        let mut bytes = [0; SAMPLE_ENTRY as usize];
        let files = self.files(split).ok_or(Error::NoSuchRow { split, id: 0, rows: 0 })?;
        files
            .samples
            .read_exact_at(&mut bytes, sample_id * SAMPLE_ENTRY)
            .map_err(|source| damaged(&path, &source))?;
        let mut numbers = Numbers(&bytes);
        let (file, part, line) = (numbers.u32(), numbers.u32(), numbers.u64());
        let input = self.manifest.inputs.files(split).get(file as usize);
        let input =
            input.ok_or_else(|| damaged(&path, &format!("sample {sample_id} is of no input file")))?;
        Ok(SampleSource { sample_id, file: input.path.clone(), line, part })
    }

    /// How often a row of a split may come in an epoch.
    fn copies(&self, split: Split) -> u64 {
        let mix = self.summary().split(split).map(SplitSummary::mix).unwrap_or_default();
        mix.iter().map(|part| part.rows_per_epoch.div_ceil(part.rows.max(1)) + 1).max().unwrap_or(1)
    }

    fn files(&self, split: Split) -> Option<&SplitFiles> {
        match split {
            Split::Train => Some(&self.train),
            Split::Eval => self.eval.as_ref(),
        }
    }

    fn entry(&self, split: Split, id: u64) -> Result<(&SplitFiles, Entry), Error> {
        let rows = self.rows(split);
        let ids = rows.saturating_mul(self.copies(split));
        let Some(files) = self.files(split).filter(|_| id < ids) else {
            return Err(Error::NoSuchRow { split, id, rows });
        };
        let id = row_of(id, rows);
        let mut bytes = [0; INDEX_ENTRY as usize];
        let failed = |reason: &dyn ToString| damaged(&self.dir.join(file_name(split, "index")), reason);
        files.index.read_exact_at(&mut bytes, id * INDEX_ENTRY).map_err(|source| failed(&source))?;
        let entry = Entry::from_bytes(&bytes);
        // A damaged index must not make us ask for memory without end.
        let longest = self.summary().max_length;
        if entry.tokens > longest || entry.segments > entry.tokens || entry.ranges > entry.tokens {
            return Err(failed(&format!("entry {id} is not what was written")));
        }
        Ok((files, entry))
    }
}

impl SplitFiles {
    fn open(dir: &Path, split: Split) -> Result<Self, Error> {
        let [rows, index, samples] = PARTS.map(|part| {
            let path = dir.join(file_name(split, part));
            File::open(&path).map_err(|source| damaged(&path, &source))
        });
        Ok(Self { rows: rows?, index: index?, samples: samples? })
    }
}

fn damaged(path: &Path, reason: &dyn ToString) -> Error {
    Error::Damaged { path: path.to_owned(), reason: reason.to_string() }
}

fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    let path = dir.join(MANIFEST);
    let not_prepared = |reason: String| Error::NotPrepared { path: dir.to_owned(), reason };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(not_prepared(format!("there is no `{MANIFEST}`")));
        }
        Err(source) => return Err(Error::Read { path, source }),
    };
    let seal_path = dir.join(SEAL);
    let seal = fs::read_to_string(&seal_path).map_err(|source| damaged(&seal_path, &source))?;
    if blake3::hash(&text).to_hex().as_str() != seal.trim() {
        return Err(damaged(&path, &format!("it does not fit `{SEAL}`")));
    }
    // The version is looked at alone first: another one may have other fields.
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|source| not_prepared(source.to_string()))?;
    if value["kind"] != KIND {
        return Err(not_prepared(format!("its manifest is not of {KIND}")));
    }
    if value["version"] != VERSION {
        return Err(not_prepared(format!("its version is {}, not {VERSION}", value["version"])));
    }
    serde_json::from_value(value).map_err(|source| not_prepared(source.to_string()))
}
