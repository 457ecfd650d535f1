//! An adapter in memory, ready to be laid on a base that is there already.

use std::path::Path;

use crate::{
    adapter::{AdapterFolder, Fit},
    error::Result,
    model::ModelConfig,
};

/// An adapter in memory. Any number of them share one base: each takes its own numbers and nothing else.
#[derive(Debug, Clone)]
pub struct LoadedAdapter {
    fit: Fit,
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
        // Files hold what a network made, not the network.
        let fit = folder.fit(base)?.without_network();
        let mut parameters = vec![0.0; fit.layout().len()];
        folder.read_into(fit.layout(), &mut parameters)?;
        Ok(Self { fit, parameters, dropped_keys: folder.dropped_keys().to_vec() })
    }

    /// Its method, fitted to the base: for [`crate::Engine::adapt`].
    pub fn fit(&self) -> &Fit {
        &self.fit
    }

    /// Its numbers.
    pub fn parameters(&self) -> &[f32] {
        &self.parameters
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
