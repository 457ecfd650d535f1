//! Qwen2 and 2.5: Llama with biases on q, k and v.

use serde_json::Value;

use super::{Family, shared};
use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "qwen2", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    if fields.flag("use_sliding_window")? == Some(true) {
        return Err(fields.unsupported("use_sliding_window", &Value::from(true)));
    }
    let defaults = shared::Defaults { key_value_heads: Some(32), ..shared::Defaults::default() };
    let config = shared::decoder(fields, &FAMILY, defaults)?;
    Ok(ModelConfig { query_key_value_bias: true, ..config })
}
