//! Qwen2 and 2.5: Llama with biases on q, k and v, and on request a sliding window in the upper layers.

use super::{Family, shared};
use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "qwen2", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    let config = shared::decoder(fields, &FAMILY, defaults())?;
    let windows = windows(fields, config.layers)?;
    Ok(ModelConfig { query_key_value_bias: true, windows, ..config })
}

pub(super) fn defaults() -> shared::Defaults {
    shared::Defaults { key_value_heads: Some(32), max_positions: 32_768, ..shared::Defaults::default() }
}

/// Layers from `max_window_layers` on have a window, where `use_sliding_window` asks for any.
pub(super) fn windows(fields: &Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let wanted = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = match fields.has("sliding_window") {
        true => fields.optional_size("sliding_window")?,
        false => Some(4096),
    };
    let full = fields.optional_count("max_window_layers")?.unwrap_or(28);
    shared::windows(fields, layers, window.filter(|_| wanted), |layer| layer >= full)
}
