//! What the values of `[train]` mean that are words.

use serde::{Deserialize, Serialize};

use crate::shape::described;

described! {
    /// What becomes of a bad step.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum BadStep {
        /// The job fails.
        #[default]
        Stop,
        /// Its rows are passed over.
        Skip,
    }
}

described! {
    /// How the learning rate falls after the warm-up, as transformers defines them.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Schedule {
        /// It stays where it is.
        Constant,
        /// It falls to 0 in a straight line.
        Linear,
        /// It falls to 0 along half a cosine.
        #[default]
        Cosine,
    }

    /// What becomes of activations between forward and backward.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Recompute {
        /// Decided by the memory that is there.
        #[default]
        Auto,
        /// Everything is kept: fastest.
        Never,
        /// Layer inputs are kept, the rest is computed again: least memory.
        Layers,
    }
}

/// The bytes of `8GiB`, `512 MiB`, `7.5GB`.
pub(crate) fn bytes_of(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "GiB" => 1_u64 << 30,
        "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "MB" => 1_000_000,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    let bytes = number * factor as f64;
    (bytes.is_finite() && bytes >= 1.0).then_some(bytes as u64)
}
