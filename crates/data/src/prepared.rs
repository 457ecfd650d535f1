//! Reads a prepared folder.

use std::path::Path;

use crate::{Error, Row, SampleSource, Split, Summary};

/// A prepared folder, opened for reading. Cheap to share; all reads are positioned, none moves a cursor.
#[derive(Debug)]
pub struct Prepared {
    summary: Summary,
}

impl Prepared {
    /// Opens a folder that [`prepare`](crate::prepare) wrote: checks its manifest and the sizes of its files.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Err(Error::NotPrepared { path: dir.to_owned(), reason: "not built yet".to_owned() })
    }

    /// Reads every byte and compares the hashes with the manifest.
    pub fn verify(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Its figures.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// How many rows a split has; 0 for a split that there is not.
    pub fn rows(&self, split: Split) -> u64 {
        self.summary.split(split).map_or(0, |summary| summary.rows)
    }

    /// Reads a row and checks its checksum.
    pub fn row(&self, split: Split, id: u64) -> Result<Row, Error> {
        Err(Error::NoSuchRow { split, id, rows: 0 })
    }

    /// How many tokens of a row are targets, from the index alone.
    pub fn trained_tokens(&self, split: Split, id: u64) -> Result<u32, Error> {
        Err(Error::NoSuchRow { split, id, rows: 0 })
    }

    /// Which records a row is made of, in the order of its segments.
    pub fn samples_of_row(&self, split: Split, id: u64) -> Result<Vec<SampleSource>, Error> {
        Err(Error::NoSuchRow { split, id, rows: 0 })
    }
}
