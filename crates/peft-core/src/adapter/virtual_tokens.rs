//! What prefix tuning, prompt tuning and p-tuning have in common: virtual tokens in front of every sample.
//!
//! PEFT keeps all three as one tensor, `prompt_embeddings`, with a row for each virtual token, and writes down the model's
//! shape as it saw it. What was trained through a network is saved as the network's result.

use serde_json::{Map, Value, json};

use super::{config::Keys, targets::Matched};
use crate::{
    error::{Error, Result},
    model::ModelConfig,
};

/// The tensor in PEFT's files.
pub const TENSOR: &str = "prompt_embeddings";

/// Most virtual tokens that are taken; far above any use.
const MOST: usize = 1 << 16;

/// Settings that the three methods share, under PEFT's names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VirtualTokenConfig {
    /// The base that it was trained on: a folder or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// Virtual tokens in front of every sample.
    pub num_virtual_tokens: usize,
    /// The shape of the model as a file states it; another model is refused.
    pub stated: Stated,
}

/// The shape of a model as an adapter's file states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stated {
    /// Features of a virtual token: in a layer's keys for prefix tuning, else of an embedding.
    pub token_dim: Option<usize>,
    /// Layers.
    pub num_layers: Option<usize>,
    /// Heads: of keys for prefix tuning, else of queries.
    pub num_attention_heads: Option<usize>,
}

impl VirtualTokenConfig {
    /// `count` virtual tokens on any model.
    pub fn new(base: Option<String>, count: usize) -> Self {
        Self { base_model_name_or_path: base, num_virtual_tokens: count, stated: Stated::default() }
    }

    pub(super) fn read(keys: &Keys<'_>) -> Result<Self> {
        keys.refuse(&["modules_to_save"])?;
        if let Some(count) = keys.value("num_transformer_submodules").filter(|count| **count != json!(1)) {
            return Err(keys.unsupported("num_transformer_submodules", count));
        }
        let missing = || keys.wrong("num_virtual_tokens", "is missing".to_owned());
        Ok(Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_owned),
            num_virtual_tokens: keys.whole("num_virtual_tokens")?.ok_or_else(missing)?,
            stated: Stated {
                token_dim: keys.whole("token_dim")?,
                num_layers: keys.whole("num_layers")?,
                num_attention_heads: keys.whole("num_attention_heads")?,
            },
        })
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.num_virtual_tokens {
            1..=MOST => Ok(()),
            count => Err(wrong("num_virtual_tokens", format!("is {count}, not from 1 to {MOST}"))),
        }
    }

    /// Refuses a model of another shape than stated, or without room for the virtual tokens. No module is adapted.
    pub(super) fn fit(&self, model: &ModelConfig, shape: &Shape) -> Result<Matched> {
        let Stated { token_dim, num_layers, num_attention_heads } = self.stated;
        for (key, stated, own) in [
            ("token_dim", token_dim, shape.token_dim),
            ("num_layers", num_layers, model.layers),
            ("num_attention_heads", num_attention_heads, shape.heads),
        ] {
            if let Some(stated) = stated.filter(|stated| *stated != own) {
                return Err(wrong(
                    key,
                    format!("is {stated}, but {own} of the base: it belongs to another one"),
                ));
            }
        }
        let (count, positions) = (self.num_virtual_tokens, model.max_positions);
        if count >= positions {
            return Err(wrong(
                "num_virtual_tokens",
                format!("is {count}, which leaves none of the base's {positions} positions to the text"),
            ));
        }
        Ok(Matched::default())
    }

    /// The keys that PEFT writes for all three.
    pub(super) fn settings(&self, model: &ModelConfig, shape: &Shape) -> Map<String, Value> {
        let keys = [
            ("modules_to_save", Value::Null),
            ("num_attention_heads", json!(shape.heads)),
            ("num_layers", json!(model.layers)),
            ("num_transformer_submodules", json!(1)),
            ("num_virtual_tokens", json!(self.num_virtual_tokens)),
            ("token_dim", json!(shape.token_dim)),
        ];
        keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// What PEFT calls a model's heads and a token's features; it depends on the method.
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) token_dim: usize,
}

impl Shape {
    /// Keys and values in every layer.
    pub(super) fn keys(model: &ModelConfig) -> Self {
        Self { heads: model.key_value_heads, token_dim: model.key_value_heads * model.head_dim }
    }

    /// Rows before the token embeddings.
    pub(super) fn rows(model: &ModelConfig) -> Self {
        Self { heads: model.attention_heads, token_dim: model.hidden_size }
    }
}

pub(super) fn wrong(key: &str, problem: String) -> Error {
    Error::AdapterSetting { file: None, key: key.to_owned(), problem }
}

/// As many of `ids` as there are virtual tokens: the first, or all of them over and over, as PEFT does.
pub(super) fn repeated(ids: &[u32], count: usize) -> Vec<u32> {
    ids.iter().copied().cycle().take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `text_init` of the reference case `adapters/prompt_text`.
    #[test]
    fn a_text_is_cut_or_repeated() {
        let ids = [1, 53, 81, 84];
        assert_eq!(repeated(&ids, 2), [1, 53]);
        assert_eq!(repeated(&ids, 6), [1, 53, 81, 84, 1, 53]);
    }

    #[test]
    fn no_virtual_token_and_too_many_are_refused() {
        assert!(VirtualTokenConfig::new(None, 0).check().is_err());
        assert!(VirtualTokenConfig::new(None, MOST + 1).check().is_err());
        assert!(VirtualTokenConfig::new(None, MOST).check().is_ok());
    }
}
