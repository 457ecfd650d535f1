//! What a prepared folder says of itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Format, Split, Summary};

/// Name of the manifest.
pub(crate) const MANIFEST: &str = "manifest.json";
/// Name of the file that holds the manifest's hash.
pub(crate) const SEAL: &str = "manifest.b3";
/// What the manifest's `kind` says.
pub(super) const KIND: &str = "shanty prepared data";
/// Changes when the layout of the files, or what rows are built from the same input, changes.
pub(crate) const VERSION: u32 = 1;

/// What a prepared folder says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(super) kind: String,
    pub(super) version: u32,
    pub(crate) inputs: Inputs,
    pub(super) files: Vec<FileEntry>,
    pub(crate) summary: Summary,
}

impl Manifest {
    pub(crate) fn new(inputs: Inputs, files: Vec<FileEntry>, summary: Summary) -> Self {
        Self { kind: KIND.to_owned(), version: VERSION, inputs, files, summary }
    }
}

/// A file of the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) blake3: String,
}

/// All that the rows follow from: equal inputs give the same folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inputs {
    pub(crate) tokenizer_hash: String,
    pub(crate) format: Format,
    pub(crate) max_length: u32,
    pub(crate) packing: bool,
    #[serde(default)]
    pub(crate) virtual_tokens: u32,
    pub(crate) template_time: Option<i64>,
    pub(crate) train: Vec<InputFile>,
    pub(crate) eval: Vec<InputFile>,
}

impl Inputs {
    pub(crate) fn files(&self, split: Split) -> &[InputFile] {
        match split {
            Split::Train => &self.train,
            Split::Eval => &self.eval,
        }
    }
}

/// A data file, as it was when it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InputFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) blake3: String,
}

/// The hash that stands for the prepared data: of rows, sample lines, options and tokenizer, not of where the files lay.
pub(crate) fn content_hash(inputs: &Inputs, files: &[FileEntry]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut field = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    field(KIND);
    field(&VERSION.to_string());
    field(&inputs.tokenizer_hash);
    field(&inputs.max_length.to_string());
    field(&inputs.packing.to_string());
    if inputs.virtual_tokens > 0 {
        field(&inputs.virtual_tokens.to_string());
    }
    for file in files {
        field(&file.name);
        field(&file.bytes.to_string());
        field(&file.blake3);
    }
    hasher.finalize().to_hex().to_string()
}
