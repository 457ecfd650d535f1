//! What a base is, as a hash that several readers can make together.
//!
//! Each tensor is cut into chunks; a chunk is hashed with its tensor's name and where it begins, and the hashes are added up,
//! wrapping. So tensors and parts of tensors may be read in any order and by different members; their sums make the hash of the whole.
//! A sum tells bases apart that were mixed up; it does not withstand somebody who makes one base pass for another.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::model::{config::ModelConfig, weights::Tensor};

/// Words of a sum.
pub const WORDS: usize = 8;

/// A sum of the hashes of chunks.
pub type ContentSum = [u64; WORDS];

/// Bytes of a chunk, but for scales: no part of a cut layer begins inside of one.
const CHUNK: usize = 4096;

/// Bytes of a tensor's chunk: those of scales are what a smallest unit of a cut layer has of them.
pub(crate) fn chunk(name: &str, bytes_a_number: usize) -> usize {
    if name.ends_with(".nested_absmax") {
        4
    } else if name.ends_with(".absmax") {
        256 * bytes_a_number.max(1)
    } else {
        CHUNK
    }
}

/// Adds two sums.
pub fn add(sum: &mut ContentSum, other: &ContentSum) {
    for (word, other) in sum.iter_mut().zip(other) {
        *word = word.wrapping_add(*other);
    }
}

/// Takes in what is read.
#[derive(Debug, Default)]
pub(crate) struct Hashes {
    sum: ContentSum,
    /// What is said of each tensor besides its numbers.
    headers: BTreeMap<String, String>,
    /// Of each tensor that is read from front to back: bytes taken in, and those of a chunk that is not full.
    reading: BTreeMap<String, (usize, Vec<u8>)>,
}

impl Hashes {
    /// The next bytes of a tensor that is read from front to back.
    pub(crate) fn see(&mut self, tensor: &Tensor<'_>, mut bytes: &[u8]) {
        let chunk = chunk_of(tensor);
        if !self.reading.contains_key(tensor.name()) {
            self.headers.insert(tensor.name().to_owned(), header(tensor));
            self.reading.insert(tensor.name().to_owned(), (0, Vec::new()));
        }
        let Some((position, rest)) = self.reading.get_mut(tensor.name()) else { return };
        if !rest.is_empty() {
            let (fill, after) = bytes.split_at(bytes.len().min(chunk - rest.len()));
            rest.extend_from_slice(fill);
            bytes = after;
            if rest.len() == chunk {
                add(&mut self.sum, &hashes(tensor.name(), *position, chunk, rest));
                *position += chunk;
                rest.clear();
            }
        }
        let (whole, after) = bytes.split_at(bytes.len() / chunk * chunk);
        add(&mut self.sum, &hashes(tensor.name(), *position, chunk, whole));
        *position += whole.len();
        rest.extend_from_slice(after);
    }

    /// Bytes from the inside of a tensor: from a chunk's first to a chunk's last, or the tensor's.
    pub(crate) fn see_at(&mut self, tensor: &Tensor<'_>, from: usize, bytes: &[u8]) {
        let chunk = chunk_of(tensor);
        debug_assert!(from.is_multiple_of(chunk), "parts begin at chunks");
        add(&mut self.sum, &hashes(tensor.name(), from, chunk, bytes));
    }

    /// Takes what was hashed elsewhere, of other tensors.
    pub(crate) fn join(&mut self, others: Self) {
        add(&mut self.sum, &others.sum);
        self.headers.extend(others.headers);
        self.reading.extend(others.reading);
    }

    /// The hash of a base all of whose tensors were taken in.
    pub(crate) fn content_hash(&self, config: &ModelConfig) -> blake3::Hash {
        finish(&frame_of(config, self.headers.values().cloned().collect()), &self.sum())
    }

    /// The sum of all that was taken in.
    pub(crate) fn sum(&self) -> ContentSum {
        let mut sum = self.sum;
        for (name, (position, rest)) in &self.reading {
            if !rest.is_empty() {
                add(&mut sum, &one(name, *position as u64, rest));
            }
        }
        sum
    }
}

fn chunk_of(tensor: &Tensor<'_>) -> usize {
    chunk(tensor.name(), tensor.bytes() / tensor.elements().max(1))
}

/// The sum of the hashes of the chunks that `bytes` are, the first of which begins at `from`.
fn hashes(name: &str, from: usize, chunk: usize, bytes: &[u8]) -> ContentSum {
    let each = bytes.par_chunks(chunk).enumerate();
    each.map(|(index, bytes)| one(name, (from + index * chunk) as u64, bytes)).reduce(
        ContentSum::default,
        |mut sum, other| {
            add(&mut sum, &other);
            sum
        },
    )
}

fn one(name: &str, from: u64, bytes: &[u8]) -> ContentSum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(name.as_bytes());
    hasher.update(&[0]);
    hasher.update(&from.to_le_bytes());
    hasher.update(bytes);
    let mut out = [0; 8 * WORDS];
    hasher.finalize_xof().fill(&mut out);
    let mut words = ContentSum::default();
    for (word, bytes) in words.iter_mut().zip(out.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// What of a base's hash is known without its numbers: the settings that change numbers, and each tensor's name, dtype and shape in the
/// order of names.
pub(crate) fn frame(config: &ModelConfig, tensors: &[Tensor<'_>]) -> blake3::Hash {
    frame_of(config, tensors.iter().map(header).collect())
}

fn header(tensor: &Tensor<'_>) -> String {
    format!("{} {} {:?}\n", tensor.name(), tensor.stored_as(), tensor.shape())
}

fn frame_of(config: &ModelConfig, mut headers: Vec<String>) -> blake3::Hash {
    headers.sort_unstable();
    headers.dedup();
    let mut hasher = blake3::Hasher::new();
    hasher.update(config.essentials().as_bytes());
    for header in &headers {
        hasher.update(header.as_bytes());
    }
    hasher.finalize()
}

/// A frame and a sum make a hash.
pub(crate) fn finish(frame: &blake3::Hash, sum: &ContentSum) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(frame.as_bytes());
    for word in sum {
        hasher.update(&word.to_le_bytes());
    }
    hasher.finalize()
}
