//! Mistral: Llama with a sliding window in every layer.

use super::{Family, shared};
use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "mistral", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    let defaults = shared::Defaults {
        key_value_heads: Some(8),
        max_positions: 4096 * 32,
        ..shared::Defaults::default()
    };
    let config = shared::decoder(fields, &FAMILY, defaults)?;
    let window = match fields.has("sliding_window") {
        true => fields.optional_size("sliding_window")?,
        // The first release, whose files lack the key, has it.
        false => Some(4096),
    };
    Ok(ModelConfig { windows: vec![window; config.layers], ..config })
}
