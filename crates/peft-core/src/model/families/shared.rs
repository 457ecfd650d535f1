//! What nearly all families have in common.

use serde_json::Value;

use super::Family;
use crate::{
    error::Result,
    model::config::{Activation, Fields, ModelConfig},
};

/// The values that transformers takes where a key is absent, where families differ in them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    /// `num_key_value_heads`; none takes as many as query heads.
    pub(super) key_value_heads: Option<usize>,
    /// `head_dim`; none divides the hidden size by the query heads.
    pub(super) head_dim: Option<usize>,
    /// `tie_word_embeddings`.
    pub(super) tied_embeddings: bool,
    /// `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// `rms_norm_eps`.
    pub(super) norm_epsilon: f64,
    /// Taken without looking; none reads `hidden_act`, and takes silu where that is absent.
    pub(super) activation: Option<Activation>,
}

impl Default for Defaults {
    /// Llama's.
    fn default() -> Self {
        Self {
            key_value_heads: None,
            head_dim: None,
            tied_embeddings: false,
            max_positions: 2048,
            norm_epsilon: 1e-6,
            activation: None,
        }
    }
}

/// A decoder without biases and with nothing that only some families have.
pub(super) fn decoder(fields: &Fields<'_>, family: &Family, defaults: Defaults) -> Result<ModelConfig> {
    let hidden_size = fields.size("hidden_size")?;
    let attention_heads = fields.size("num_attention_heads")?;
    let key_value_heads = match defaults.key_value_heads {
        Some(heads) if !fields.has("num_key_value_heads") => heads,
        _ => fields.size_or("num_key_value_heads", attention_heads)?,
    };
    if !attention_heads.is_multiple_of(key_value_heads) {
        return Err(fields.problem(
            "num_key_value_heads",
            format!("is {key_value_heads}, which does not divide num_attention_heads ({attention_heads})"),
        ));
    }
    let head_dim = head_dim(fields, defaults, hidden_size, attention_heads)?;
    let max_positions = fields.size_or("max_position_embeddings", defaults.max_positions)?;
    let layers = fields.layers()?;
    Ok(ModelConfig {
        family: family.name,
        vocabulary_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        layers,
        attention_heads,
        key_value_heads,
        head_dim,
        max_positions,
        norm_epsilon: norm_epsilon(fields, defaults)?,
        rope: fields.rope(max_positions)?,
        activation: match defaults.activation {
            Some(activation) => activation,
            None => activation(fields, "hidden_act", Activation::Silu)?,
        },
        attention_scale: (head_dim as f64).powf(-0.5),
        attention_soft_cap: None,
        windows: vec![None; layers],
        embedding_scale: None,
        logits_soft_cap: None,
        query_key_norms: false,
        output_norms: false,
        norms_less_one: false,
        query_key_value_bias: false,
        output_bias: false,
        mlp_bias: false,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(defaults.tied_embeddings),
        stored_nf4: fields.stored_nf4()?,
        bos_token: fields.tokens("bos_token_id")?.first().copied(),
        eos_tokens: fields.tokens("eos_token_id")?,
        pad_token: fields.tokens("pad_token_id")?.first().copied(),
    })
}

fn head_dim(
    fields: &Fields<'_>,
    defaults: Defaults,
    hidden_size: usize,
    attention_heads: usize,
) -> Result<usize> {
    let head_dim = match fields.optional_size("head_dim")?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(attention_heads) => hidden_size / attention_heads,
        None => {
            return Err(fields.problem(
                "num_attention_heads",
                format!("is {attention_heads}, which does not divide hidden_size ({hidden_size})"),
            ));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(
            fields.problem("head_dim", format!("is {head_dim}; rotary positions need an even number"))
        );
    }
    Ok(head_dim)
}

fn norm_epsilon(fields: &Fields<'_>, defaults: Defaults) -> Result<f64> {
    let norm_epsilon = fields.number("rms_norm_eps")?.unwrap_or(defaults.norm_epsilon);
    if !(norm_epsilon > 0.0 && norm_epsilon < 1.0) {
        return Err(fields.problem("rms_norm_eps", format!("is {norm_epsilon}, not between 0 and 1")));
    }
    Ok(norm_epsilon)
}

/// The nonlinearity under `key`.
pub(super) fn activation(fields: &Fields<'_>, key: &str, default: Activation) -> Result<Activation> {
    match fields.text(key)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        Some(other) => Err(fields.unsupported(key, &Value::from(other))),
    }
}

/// Which layers see `window` keys: what `layer_types` says, or else those that `slides` picks.
pub(super) fn windows(
    fields: &Fields<'_>,
    layers: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let key = "layer_types";
    let Some(types) = fields.list(key)? else {
        return Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect());
    };
    if types.len() != layers {
        return Err(fields.problem(key, format!("has {} items for {layers} layers", types.len())));
    }
    let of = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(fields.problem(key, "asks for windows, but sliding_window is not set"))
        }
        _ => Err(fields.unsupported(key, kind)),
    };
    types.iter().map(of).collect()
}

/// Refuses attention that is not causal.
pub(super) fn causal(fields: &Fields<'_>) -> Result<()> {
    let key = "use_bidirectional_attention";
    match fields.flag(key)? {
        Some(true) => Err(fields.unsupported(key, &Value::from(true))),
        _ => Ok(()),
    }
}

/// A soft cap; absent takes `default`, null is none.
pub(super) fn soft_cap(fields: &Fields<'_>, key: &str, default: f64) -> Result<Option<f64>> {
    if !fields.has(key) {
        return Ok(Some(default));
    }
    match fields.number(key)? {
        Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
            Err(fields.problem(key, format!("is {cap}, not above 0")))
        }
        cap => Ok(cap),
    }
}
