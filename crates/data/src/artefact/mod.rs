//! The prepared folder: what is in it, and how it is written and read.
//!
//! | file | what |
//! |---|---|
//! | `SPLIT.rows` | rows back to back: token ids (u32), segments (sample id u64, length u32), trained ranges (u32, u32) |
//! | `SPLIT.index` | 32 bytes a row: offset u64, tokens, segments, ranges, trained tokens u32, checksum u64 |
//! | `SPLIT.samples` | 16 bytes a sample: file u32, piece u32, line u64 |
//! | `manifest.json` | sizes and hashes of the above, the input files, the figures |
//! | `manifest.b3` | BLAKE3 of `manifest.json` |
//!
//! All numbers are little-endian. The folder is written under a temporary name and renamed when it is complete.

mod manifest;
mod read;
mod write;

use std::ffi::OsStr;

pub use self::read::Prepared;
pub(crate) use self::{
    manifest::{FileEntry, InputFile, Inputs, MANIFEST, Manifest, Recipe, SEAL, content_hash},
    write::{Folder, SplitWriter},
};

use crate::Split;

/// Bytes of an entry of `SPLIT.index`.
const INDEX_ENTRY: u64 = 32;
/// Bytes of an entry of `SPLIT.samples`.
const SAMPLE_ENTRY: u64 = 16;
const SEGMENT: usize = 12;
const RANGE: usize = 8;
const TOKEN: usize = 4;

/// Kinds of files that a split has.
const PARTS: [&str; 3] = ["rows", "index", "samples"];

fn file_name(split: Split, part: &str) -> String {
    format!("{split}.{part}")
}

/// Whether a file of this name belongs to prepared data.
pub(crate) fn is_ours(name: &OsStr) -> bool {
    let splits = [Split::Train, Split::Eval];
    let mut files = splits.iter().flat_map(|split| PARTS.map(|part| file_name(*split, part)));
    name == MANIFEST || name == SEAL || files.any(|file| name == file.as_str())
}

/// What the index says of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    offset: u64,
    tokens: u32,
    segments: u32,
    ranges: u32,
    trained_tokens: u32,
    checksum: u64,
}

impl Entry {
    fn to_bytes(self) -> [u8; INDEX_ENTRY as usize] {
        let mut bytes = [0; INDEX_ENTRY as usize];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.segments.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.ranges.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.trained_tokens.to_le_bytes());
        bytes[24..].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; INDEX_ENTRY as usize]) -> Self {
        let mut numbers = Numbers(bytes);
        Self {
            offset: numbers.u64(),
            tokens: numbers.u32(),
            segments: numbers.u32(),
            ranges: numbers.u32(),
            trained_tokens: numbers.u32(),
            checksum: numbers.u64(),
        }
    }

    /// Bytes of the row in `SPLIT.rows`.
    fn row_bytes(&self) -> usize {
        self.tokens as usize * TOKEN + self.segments as usize * SEGMENT + self.ranges as usize * RANGE
    }
}

/// Little-endian numbers, one after another. Past the end they are 0; callers check lengths first.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((bytes, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// What a row's bytes are checked by when they are read.
fn checksum(row: &[u8]) -> u64 {
    let hash = blake3::hash(row);
    Numbers(hash.as_bytes()).u64()
}
