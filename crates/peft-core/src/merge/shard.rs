//! A safetensors file that is written front to back: header first, then the bytes of one tensor after the other.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use crate::error::{Error, Origin, Result};

/// A tensor of a shard.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slot {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Slot {
    pub(super) fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// A file under a name of its own until it is whole.
pub(super) struct ShardWriter {
    partial: PathBuf,
    out: BufWriter<File>,
    left: u64,
    finished: bool,
}

pub(super) fn unwritable(file: &Path, source: io::Error) -> Error {
    Error::Write { origin: Origin::Base, file: file.to_owned(), source }
}

impl ShardWriter {
    /// Writes the header. `slots` must come with wider dtypes first, so that every tensor begins where its dtype may.
    pub(super) fn create(partial: &Path, slots: &[Slot]) -> Result<Self> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut offset = 0;
        for slot in slots {
            let end = offset + slot.bytes();
            let entry = json!({
                "dtype": format!("{:?}", slot.dtype), "shape": slot.shape, "data_offsets": [offset, end],
            });
            header.insert(slot.name.clone(), entry);
            offset = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let file = File::create(partial).map_err(|source| unwritable(partial, source))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Self { partial: partial.to_owned(), out, left: offset, finished: false };
        let length = (header.len() as u64).to_le_bytes();
        writer
            .out
            .write_all(&length)
            .and_then(|()| writer.out.write_all(&header))
            .map_err(|source| unwritable(partial, source))?;
        Ok(writer)
    }

    /// The next bytes, in the order of the slots.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            let (found, expected) = (bytes.len(), self.left as usize);
            return Err(Error::Length { what: "a shard", found, expected });
        };
        self.left = left;
        self.out.write_all(bytes).map_err(|source| unwritable(&self.partial, source))
    }

    /// Brings it to the disk; it keeps its partial name.
    pub(super) fn finish(mut self) -> Result<PathBuf> {
        if self.left > 0 {
            return Err(Error::Length { what: "a shard", found: 0, expected: self.left as usize });
        }
        let synced = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        synced.map_err(|source| unwritable(&self.partial, source))?;
        self.finished = true;
        Ok(self.partial.clone())
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            // What is left of it must not be taken for weights; if it stays, its name tells.
            let _ = fs::remove_file(&self.partial);
        }
    }
}
