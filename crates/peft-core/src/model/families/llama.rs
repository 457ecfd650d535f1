//! Llama 1 to 3.x, and what shares its code in transformers.

use super::{Family, shared};
use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "llama", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    let config = shared::decoder(fields, &FAMILY, shared::Defaults::default())?;
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(ModelConfig {
        query_key_value_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
        ..config
    })
}
