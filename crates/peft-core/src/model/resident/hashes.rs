//! The hash of what a base is loaded from.

use std::collections::BTreeMap;

use crate::model::{config::ModelConfig, weights::Tensor};

/// A hash for each tensor that was read.
#[derive(Debug, Default)]
pub(crate) struct Hashes {
    tensors: BTreeMap<String, blake3::Hasher>,
}

impl Hashes {
    /// Takes the next bytes of a tensor, as stored.
    pub(crate) fn see(&mut self, tensor: &Tensor<'_>, bytes: &[u8]) {
        match self.tensors.get_mut(tensor.name()) {
            Some(hasher) => hasher,
            None => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(
                    format!("{} {} {:?}\n", tensor.name(), tensor.stored_as(), tensor.shape()).as_bytes(),
                );
                self.tensors.entry(tensor.name().to_owned()).or_insert(hasher)
            }
        }
        .update(bytes);
    }

    /// Takes what was hashed elsewhere, of other tensors.
    pub(crate) fn join(&mut self, others: Self) {
        self.tensors.extend(others.tensors);
    }

    /// A hash of the tensors' hashes in the order of their names, so that reading may go in any order.
    pub(crate) fn content_hash(&self, config: &ModelConfig) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(config.essentials().as_bytes());
        for tensor in self.tensors.values() {
            hasher.update(tensor.finalize().as_bytes());
        }
        hasher.finalize()
    }
}
