//! Prompt tuning: trained rows before the token embeddings (Lester et al., arXiv 2104.08691).
//!
//! `prompt_embeddings` `[T, hidden]`, as PEFT 0.21 keeps it. The rows pass through the model as tokens do, at positions
//! `0 .. T`; the last of them predicts the sample's first token. Every sample of a packed row gets its own.
//!
//! Rows that begin as embeddings of the vocabulary train far better than random ones, which lie some fifty times further
//! out (34.3 against 23.4 % in PEFT's own comparison, `method_comparison/MetaMathQA`, Llama-3.2-3B).

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    config::Keys,
    layout::ParameterLayout,
    method::{Method, MethodOn, SharedMethod, Start, Tensor},
    registry::Registration,
    targets::Matched,
    virtual_tokens::{Shape, TENSOR, VirtualTokenConfig, repeated, wrong},
};
use crate::{
    backend::Backend,
    batch::VirtualTokens,
    error::Result,
    model::{ModelConfig, Module},
    random,
};

/// How a prompt begins: PEFT's `prompt_tuning_init`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PromptStart {
    /// `RANDOM`: drawn from N(0, 1).
    #[default]
    Random,
    /// `SAMPLE_VOCAB`: embeddings of tokens drawn from the whole vocabulary.
    SampleVocab,
    /// `TEXT`: embeddings of a text's tokens, cut or repeated to the length of the prompt.
    Text {
        /// The text.
        text: String,
        /// Its tokens by the base's tokenizer, special ones included.
        token_ids: Vec<u32>,
        /// The tokenizer's folder, as PEFT writes it down.
        tokenizer: Option<String>,
    },
}

/// Settings of prompt tuning, under PEFT's names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PromptTuningConfig {
    /// What all methods with virtual tokens have.
    pub common: VirtualTokenConfig,
    /// How it begins.
    pub start: PromptStart,
    /// Read from a file: it holds no tokens to begin with.
    pub finished: bool,
}

impl PromptTuningConfig {
    /// How files know it.
    pub const REGISTRATION: Registration =
        Registration { peft_type: "PROMPT_TUNING", read: |keys| Ok(Arc::new(Self::read(keys)?)) };

    /// Shared, as engines take it.
    pub fn shared(self) -> SharedMethod {
        Arc::new(self)
    }

    fn read(keys: &Keys<'_>) -> Result<Self> {
        keys.ignore(&["tokenizer_kwargs"]);
        let (text, tokenizer) = (keys.text("prompt_tuning_init_text")?, keys.text("tokenizer_name_or_path")?);
        let start = match keys.text("prompt_tuning_init")? {
            None | Some("RANDOM") => PromptStart::Random,
            Some("SAMPLE_VOCAB") => PromptStart::SampleVocab,
            Some("TEXT") => PromptStart::Text {
                text: text.unwrap_or_default().to_owned(),
                token_ids: Vec::new(),
                tokenizer: tokenizer.map(str::to_owned),
            },
            Some(other) => {
                let problem = format!("is \"{other}\", not RANDOM, SAMPLE_VOCAB or TEXT");
                return Err(keys.wrong("prompt_tuning_init", problem));
            }
        };
        let config = Self { common: VirtualTokenConfig::read(keys)?, start, finished: true };
        config.check()?;
        Ok(config)
    }
}

impl Method for PromptTuningConfig {
    fn peft_type(&self) -> &'static str {
        Self::REGISTRATION.peft_type
    }

    fn base_model(&self) -> Option<&str> {
        self.common.base_model_name_or_path.as_deref()
    }

    fn check(&self) -> Result<()> {
        match &self.start {
            PromptStart::Text { token_ids, .. } if token_ids.is_empty() && !self.finished => {
                return Err(wrong("prompt_tuning_init_text", "has no token".to_owned()));
            }
            _ => {}
        }
        self.common.check()
    }

    fn targets(&self, model: &ModelConfig) -> Result<Matched> {
        self.common.fit(model, &Shape::rows(model))
    }

    fn tensors(&self, _module: &Module) -> Vec<Tensor> {
        Vec::new()
    }

    fn input_tensors(&self, model: &ModelConfig) -> Result<Vec<Tensor>> {
        let start = match self.start {
            PromptStart::Random => Start::Normal { deviation: 1.0 },
            PromptStart::SampleVocab | PromptStart::Text { .. } => Start::Computed,
        };
        Ok(vec![Tensor::new(TENSOR, [self.common.num_virtual_tokens, model.hidden_size]).start(start)])
    }

    fn virtual_tokens(&self) -> VirtualTokens {
        VirtualTokens::Rows(self.common.num_virtual_tokens)
    }

    fn start_tokens(&self, model: &ModelConfig, seed: u64) -> Option<Vec<u32>> {
        let count = self.common.num_virtual_tokens;
        match &self.start {
            PromptStart::Random => None,
            PromptStart::SampleVocab => {
                let mut units = vec![0.0; count];
                random::fill_uniform(seed, "prompt_tuning_init", 0.5, &mut units);
                let vocabulary = model.vocabulary_size as f64;
                let drawn = units.iter().map(|unit| ((f64::from(*unit) + 0.5) * vocabulary) as u32);
                Some(drawn.map(|id| id.min(model.vocabulary_size as u32 - 1)).collect())
            }
            PromptStart::Text { token_ids, .. } => Some(repeated(token_ids, count)),
        }
    }

    fn settings_on(
        &self,
        model: &ModelConfig,
        _layout: &ParameterLayout,
        _state: &[f32],
    ) -> Map<String, Value> {
        let mut map = self.common.settings(model, &Shape::rows(model));
        let (name, text, tokenizer) = match &self.start {
            PromptStart::Random => ("RANDOM", None, None),
            PromptStart::SampleVocab => ("SAMPLE_VOCAB", None, None),
            // PEFT refuses TEXT without a tokenizer's name.
            PromptStart::Text { text, tokenizer, .. } => {
                ("TEXT", Some(text.as_str()), tokenizer.as_deref().or(self.base_model()).or(Some("")))
            }
        };
        for (key, value) in [
            ("prompt_tuning_init", json!(name)),
            ("prompt_tuning_init_text", json!(text)),
            ("tokenizer_kwargs", Value::Null),
            ("tokenizer_name_or_path", json!(tokenizer)),
        ] {
            map.insert(key.to_owned(), value);
        }
        map
    }
}

impl<B: Backend> MethodOn<B> for PromptTuningConfig {}
