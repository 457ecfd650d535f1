//! What a checkpoint says about itself.

use std::{cmp::Ordering, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The newest manifest format that is read and written. 2 knows the loss of the held-out rows.
pub const FORMAT: u32 = 2;

/// What names a checkpoint within a job. The order is that of progress: step, attempt, generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The attempt that wrote it.
    pub attempt: u32,
    /// Updates applied.
    pub step: u64,
    /// The generation that wrote it.
    pub generation: u64,
}

impl Key {
    /// The checkpoint's folder below the store: `checkpoints/00000050-a1-g3`.
    pub fn path(&self) -> String {
        format!("{FOLDER}/{self}")
    }
}

/// Where checkpoints lie below the store.
pub(crate) const FOLDER: &str = "checkpoints";

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.step, self.attempt, self.generation).cmp(&(other.step, other.attempt, other.generation))
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}-a{}-g{}", self.step, self.attempt, self.generation)
    }
}

impl FromStr for Key {
    type Err = ();

    /// Reads a folder's name, or its path below the store.
    fn from_str(text: &str) -> Result<Self, ()> {
        let name = text.strip_prefix(FOLDER).and_then(|rest| rest.strip_prefix('/')).unwrap_or(text);
        let (step, rest) = name.split_once("-a").ok_or(())?;
        let (attempt, generation) = rest.split_once("-g").ok_or(())?;
        let key = Self {
            step: step.parse().map_err(drop)?,
            attempt: attempt.parse().map_err(drop)?,
            generation: generation.parse().map_err(drop)?,
        };
        // One name per key: `+5`, `05-a1-g1` and the like are not ours.
        if key.to_string() == name { Ok(key) } else { Err(()) }
    }
}

/// The file `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`] of the version that wrote it.
    pub format: u32,
    /// The job.
    pub job: String,
    /// The attempt that wrote it.
    pub attempt: u32,
    /// Updates applied.
    pub step: u64,
    /// The generation that wrote it.
    pub generation: u64,
    /// When it was written, milliseconds since the Unix epoch by the writer's clock; for people.
    pub created_unix_ms: u64,
    /// The other files of the folder.
    pub files: Vec<FileEntry>,
    /// What training needs to go on, besides the files.
    pub state: State,
}

/// A file of a checkpoint, as the manifest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name in the checkpoint's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its content, hexadecimal.
    pub blake3: String,
}

/// What training needs to go on, besides adapter and optimizer: where it is, by which plan it computes,
/// and what it was made from. Hashes are opaque here: equal or not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The pass over the data that the next step falls in, from 0.
    pub epoch: u64,
    /// Part of the plan that the bits depend on.
    pub world_size: u32,
    /// Part of the plan that the bits depend on.
    pub threads: u32,
    /// Rows in a micro-batch: part of the plan that the bits depend on.
    pub micro_batch_rows: u32,
    /// Rows in a step.
    pub global_batch_size: u64,
    /// Seed of order, initialisation and dropout.
    pub seed: u64,
    /// The last step that was evaluated in this lineage.
    pub evaluated_step: Option<u64>,
    /// Mean loss of the held-out rows with this very state, where they were evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    /// Hash of the base model.
    pub base_hash: String,
    /// Hash of the tokenizer's files.
    pub tokenizer_hash: String,
    /// Hash of the prepared data.
    pub data_hash: String,
    /// Hash of what defines the adapter: method, rank, targets, …
    pub adapter_hash: String,
    /// The version of shanty that wrote it.
    pub shanty_version: String,
}

/// A loss, kept to the last bit: as text, since a manifest's hash is over its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loss(u64);

impl Loss {
    /// The loss as a number.
    pub fn value(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl From<f64> for Loss {
    fn from(value: f64) -> Self {
        Self(value.to_bits())
    }
}

impl Serialize for Loss {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Rust writes the shortest text that reads back as the same number.
        serializer.serialize_str(&self.value().to_string())
    }
}

impl<'de> Deserialize<'de> for Loss {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse::<f64>().map(Self::from).map_err(serde::de::Error::custom)
    }
}

/// What a checkpoint must have been made from to be of use. `None` is not checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expectations {
    /// Of the base model.
    pub base_hash: Option<String>,
    /// Of the tokenizer's files.
    pub tokenizer_hash: Option<String>,
    /// Of the prepared data.
    pub data_hash: Option<String>,
    /// Of what defines the adapter.
    pub adapter_hash: Option<String>,
    /// Seed of order, initialisation and dropout.
    pub seed: Option<u64>,
    /// Rows in a step.
    pub global_batch_size: Option<u64>,
}

/// The manifest's file in a checkpoint's folder.
pub(crate) const MANIFEST: &str = "manifest.json";

/// A manifest as it is stored: with a hash over itself, so that a flipped digit is noticed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    manifest: Manifest,
    /// BLAKE3 of `manifest` as compact JSON.
    blake3: String,
}

/// What can be read of a manifest of any format.
#[derive(Deserialize)]
struct AnyFormat {
    manifest: AnyManifest,
}

#[derive(Deserialize)]
struct AnyManifest {
    format: u32,
}

impl Manifest {
    /// What names it.
    pub fn key(&self) -> Key {
        Key { attempt: self.attempt, step: self.step, generation: self.generation }
    }

    /// The checkpoint's folder below the store.
    pub fn path(&self) -> String {
        self.key().path()
    }

    /// Size of the files, without the manifest.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Checks that it was made from what is expected.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with the first thing that differs.
    pub fn check(&self, expect: &Expectations) -> Result<()> {
        let state = &self.state;
        let number = |value: u64| value.to_string();
        let pairs = [
            ("base model", expect.base_hash.clone(), state.base_hash.clone()),
            ("tokenizer", expect.tokenizer_hash.clone(), state.tokenizer_hash.clone()),
            ("training data", expect.data_hash.clone(), state.data_hash.clone()),
            ("adapter configuration", expect.adapter_hash.clone(), state.adapter_hash.clone()),
            ("seed", expect.seed.map(number), number(state.seed)),
            ("global batch size", expect.global_batch_size.map(number), number(state.global_batch_size)),
        ];
        for (what, expected, found) in pairs {
            let Some(expected) = expected else { continue };
            if expected != found {
                return Err(Error::Mismatch { path: self.path(), what, expected, found });
            }
        }
        Ok(())
    }

    /// The oldest format that can say what it says, so that older versions read what they can.
    pub(crate) fn format_of(state: &State) -> u32 {
        if state.loss.is_some() { FORMAT } else { 1 }
    }

    /// The content of its file.
    pub(crate) fn seal(&self) -> Vec<u8> {
        let sealed = Sealed { blake3: self.hash(), manifest: self.clone() };
        let mut text = serde_json::to_vec_pretty(&sealed).expect("strings and numbers always serialize");
        text.push(b'\n');
        text
    }

    /// Reads the file of checkpoint `key`.
    pub(crate) fn unseal(key: Key, text: &[u8]) -> Result<Self> {
        let path = key.path();
        let damaged = |reason: String| Error::Damaged { path: path.clone(), reason };
        let broken = |error: serde_json::Error| damaged(format!("{MANIFEST} cannot be read: {error}"));

        let format = serde_json::from_slice::<AnyFormat>(text).map_err(broken)?.manifest.format;
        if format > FORMAT {
            return Err(Error::FutureFormat { path, found: format, supported: FORMAT });
        }
        let sealed: Sealed = serde_json::from_slice(text).map_err(broken)?;
        let manifest = sealed.manifest;
        if manifest.hash() != sealed.blake3 {
            return Err(damaged(format!("{MANIFEST} does not match its own hash")));
        }
        if manifest.key() != key {
            return Err(damaged(format!("{MANIFEST} is that of {}", manifest.path())));
        }
        Ok(manifest)
    }

    fn hash(&self) -> String {
        let text = serde_json::to_vec(self).expect("strings and numbers always serialize");
        blake3::hash(&text).to_hex().to_string()
    }
}
