//! Phi-3: Llama with queries, keys and values in one matrix, gate and up in another, and LongRoPE.
//!
//! transformers takes LongRoPE's long factors for every batch that reaches behind the first context, and the short ones
//! else. Here the longest row that there is room for decides, so that a loss does not depend on what shares its batch:
//! `data.max_length` in training, prompt and continuation when generating.

use serde_json::Value;

use super::{Family, shared};
use crate::{
    error::Result,
    model::config::{Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "phi3", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    // Dropout inside of the base would be on while training.
    for key in ["resid_pdrop", "embd_pdrop", "attention_dropout"] {
        if let Some(p) = fields.number(key)?
            && p != 0.0
        {
            return Err(fields.unsupported(key, &Value::from(p)));
        }
    }
    let defaults =
        shared::Defaults { max_positions: 4096, norm_epsilon: 1e-5, ..shared::Defaults::default() };
    let config = shared::decoder(fields, &FAMILY, defaults)?;
    let window = fields.optional_size("sliding_window")?;
    Ok(ModelConfig { fused: true, windows: vec![window; config.layers], ..config })
}
