//! An adapter in memory, ready to be laid on a base that is there already.

use std::path::Path;

use crate::{
    adapter::{AdapterFolder, Fit},
    error::Result,
    model::ModelConfig,
    use_error::UseError,
};

/// An adapter in memory. Any number of them share one base: each takes its own numbers and nothing else.
#[derive(Debug, Clone)]
pub struct LoadedAdapter {
    fit: Fit,
    parameters: Vec<f32>,
    base_hash: Option<String>,
    dropped_keys: Vec<String>,
}

impl LoadedAdapter {
    /// Reads a folder that PEFT or Shanty wrote, for a base of this shape.
    ///
    /// # Errors
    /// The folder is damaged, of a method or with options that are not supported, or does not fit the base.
    pub fn open(folder: &Path, base: &ModelConfig) -> Result<Self> {
        let folder = AdapterFolder::open(folder)?;
        // Files hold what a network made, not the network.
        let fit = folder.fit(base)?.without_network();
        let mut parameters = vec![0.0; fit.layout().len()];
        folder.read_into(fit.layout(), &mut parameters)?;
        let base_hash = folder.base_hash();
        Ok(Self { fit, parameters, base_hash, dropped_keys: folder.dropped_keys().to_vec() })
    }

    /// Its method, fitted to the base: for [`crate::Engine::adapt`].
    pub fn fit(&self) -> &Fit {
        &self.fit
    }

    /// Its numbers.
    pub fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    /// Hash of the base that it was trained on, where its file says it.
    pub fn base_hash(&self) -> Option<&str> {
        self.base_hash.as_deref()
    }

    /// Refuses a base that it was not trained on; `folder` is the adapter's, for the message. Where the file does not say,
    /// there is nothing to refuse.
    ///
    /// # Errors
    /// [`UseError::WrongBase`].
    pub fn check_base(&self, folder: &Path, base: blake3::Hash) -> Result<()> {
        let found = base.to_hex();
        match self.base_hash() {
            Some(expected) if expected != found.as_str() => Err(UseError::WrongBase {
                adapter: folder.to_owned(),
                expected: expected.chars().take(16).collect(),
                found: found.chars().take(16).collect(),
            }
            .into()),
            _ => Ok(()),
        }
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
