//! An adapter in memory, ready to be laid on a base that is there already.

use std::path::Path;

use super::Adapted;
use crate::{
    adapter::{AdapterFolder, LoraConfig, ParameterLayout},
    error::Result,
    model::ModelConfig,
};

/// An adapter in memory. Any number of them share one base: each takes its own numbers and nothing else.
#[derive(Debug, Clone)]
pub struct LoadedAdapter {
    config: LoraConfig,
    layout: ParameterLayout,
    parameters: Vec<f32>,
    dropped_keys: Vec<String>,
}

impl LoadedAdapter {
    /// Reads a folder that PEFT or Shanty wrote, for a base of this shape.
    ///
    /// # Errors
    /// The folder is damaged, of a method or with options that are not supported, or does not fit the base.
    pub fn open(folder: &Path, base: &ModelConfig) -> Result<Self> {
        let folder = AdapterFolder::open(folder)?;
        let (layout, _) = folder.config().layout(base)?;
        let mut parameters = vec![0.0; layout.len()];
        folder.read_into(&layout, &mut parameters)?;
        let dropped_keys = folder.dropped_keys().to_vec();
        Ok(Self { config: folder.config().clone(), layout, parameters, dropped_keys })
    }

    /// What a pass over the base takes.
    pub fn adapted(&self) -> Adapted<'_> {
        Adapted { layout: &self.layout, parameters: &self.parameters }
    }

    /// Its settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Keys of its settings that nothing here knows: worth a warning.
    pub fn dropped_keys(&self) -> &[String] {
        &self.dropped_keys
    }

    /// Bytes that its numbers take.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(self.parameters.as_slice())
    }
}
