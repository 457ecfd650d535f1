//! Gemma 2: Gemma with norms behind attention and MLP, soft caps, and a window in every other layer.

use super::{Family, gemma, shared};
use crate::{
    error::Result,
    model::config::{Activation, Fields, ModelConfig},
};

pub(super) const FAMILY: Family = Family { name: "gemma2", describe };

fn describe(fields: &Fields<'_>) -> Result<ModelConfig> {
    let config = gemma::common(fields, &FAMILY, 4)?;
    let scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    if !(scalar > 0.0 && scalar.is_finite()) {
        return Err(fields.problem("query_pre_attn_scalar", format!("is {scalar}, not above 0")));
    }
    let window = match fields.has("sliding_window") {
        true => fields.optional_size("sliding_window")?,
        false => Some(4096),
    };
    Ok(ModelConfig {
        activation: shared::activation(fields, "hidden_activation", Activation::GeluTanh)?,
        attention_scale: scalar.powf(-0.5),
        attention_soft_cap: shared::soft_cap(fields, "attn_logit_softcapping", 50.0)?,
        logits_soft_cap: shared::soft_cap(fields, "final_logit_softcapping", 30.0)?,
        output_norms: true,
        windows: shared::windows(fields, config.layers, window, |layer| layer % 2 == 0)?,
        ..config
    })
}
