//! Families of decoders: what each `model_type` means.
//!
//! A family is one file that turns the keys of a `config.json` into a [`ModelConfig`], registered by one line in
//! `FAMILIES`. `shared` reads what nearly all have in common and lets a family change the rest. The layer loop knows no
//! families: what sets one apart from another is a field of [`ModelConfig`].

mod gemma;
mod gemma2;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;
mod shared;

use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

/// A family of decoders.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Its `model_type`.
    name: &'static str,
    /// Reads its keys.
    describe: fn(&Fields<'_>) -> Result<ModelConfig>,
}

/// All families.
static FAMILIES: &[Family] = &[
    llama::FAMILY,
    mistral::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    gemma::FAMILY,
    gemma2::FAMILY,
    phi3::FAMILY,
];

/// The family of a `model_type`.
pub(crate) fn find(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == model_type)
}

/// The `model_type` of every family.
pub fn names() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.name).collect()
}

impl Family {
    /// What a `config.json` of this family says.
    ///
    /// # Errors
    /// A key is missing, wrong, or asks for what is not supported.
    pub(crate) fn describe(&self, fields: &Fields<'_>) -> Result<ModelConfig> {
        (self.describe)(fields)
    }
}
