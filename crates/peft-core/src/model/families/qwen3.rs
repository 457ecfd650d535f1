//! Qwen3: Llama with a norm on each head's queries and keys.

use super::{Family, qwen2, shared};
use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "qwen3", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    let defaults = shared::Defaults { head_dim: Some(128), ..qwen2::defaults() };
    let config = shared::decoder(fields, &FAMILY, defaults)?;
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(ModelConfig {
        query_key_value_bias: attention_bias,
        output_bias: attention_bias,
        query_key_norms: true,
        windows: qwen2::windows(fields, config.layers)?,
        ..config
    })
}
