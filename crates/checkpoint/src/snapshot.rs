//! What a checkpoint holds, in memory.

use bytes::Bytes;

use crate::manifest::{Key, State};

/// A resumable point of training.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The job.
    pub job: String,
    /// Attempt, step (updates applied), generation.
    pub key: Key,
    /// The adapter's files as PEFT knows them (`adapter_config.json`, `adapter_model.safetensors`), by
    /// name. Names are plain: no folders.
    pub files: Vec<(String, Bytes)>,
    /// Master parameters and moments.
    pub optimizer: Optimizer,
    /// Everything else.
    pub state: State,
}

impl Snapshot {
    /// The content of a file by its name.
    pub fn file(&self, name: &str) -> Option<&Bytes> {
        self.files.iter().find(|(other, _)| other == name).map(|(_, content)| content)
    }
}

/// AdamW's state, flat.
///
/// # Shapes
/// All three: `[trainable parameters]`, in the same order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Optimizer {
    /// The f32 master parameters.
    pub parameters: Vec<f32>,
    /// First moments.
    pub exp_avg: Vec<f32>,
    /// Second moments.
    pub exp_avg_sq: Vec<f32>,
}
