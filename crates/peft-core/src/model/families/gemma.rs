//! Gemma: norms stored less 1, GeGLU, an embedding that is scaled by the root of its width.

use super::{Family, shared};
use crate::{
    error::Result,
    model::config::{Activation, Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "gemma", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    let config = common(fields, &FAMILY, 16)?;
    // The first files say `gelu` and mean its approximation; what `hidden_activation` says goes first.
    let activation = match (fields.text("hidden_activation")?, fields.text("hidden_act")?) {
        (None, Some("gelu")) => Activation::GeluTanh,
        (None, _) => shared::activation(fields, "hidden_act", Activation::GeluTanh)?,
        (Some(_), _) => shared::activation(fields, "hidden_activation", Activation::GeluTanh)?,
    };
    Ok(ModelConfig { activation, ..config })
}

/// What Gemma and its second generation share; `key_value_heads` where the file does not say.
pub(super) fn common(fields: &Fields<'_>, family: &Family, key_value_heads: usize) -> Result<ModelConfig> {
    shared::causal(fields)?;
    let defaults = shared::Defaults {
        key_value_heads: Some(key_value_heads),
        head_dim: Some(256),
        tied_embeddings: true,
        max_positions: 8192,
        // Read by each generation under its own key.
        activation: Some(Activation::GeluTanh),
        ..shared::Defaults::default()
    };
    let config = shared::decoder(fields, family, defaults)?;
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    // transformers rounds the factor to the dtype that it computes the embedding in, here f32.
    let embedding_scale = (config.hidden_size as f64).sqrt() as f32;
    Ok(ModelConfig {
        query_key_value_bias: attention_bias,
        output_bias: attention_bias,
        embedding_scale: Some(embedding_scale),
        norms_less_one: true,
        ..config
    })
}
