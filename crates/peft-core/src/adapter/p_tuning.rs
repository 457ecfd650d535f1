//! P-tuning: rows before the token embeddings that a small network makes (Liu et al., arXiv 2103.10385).
//!
//! Trained through [`PromptNetwork`], an MLP or a bidirectional LSTM as PEFT 0.21 has them; saved as the network's result,
//! `prompt_embeddings` `[T, hidden]`, which is then used as in [`super::prompt_tuning`].

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    config::{Keys, shortest},
    layout::ParameterLayout,
    method::{Method, MethodOn, Reparameterisation, SharedMethod, Start, Tensor},
    networks::PromptNetwork,
    registry::Registration,
    targets::Matched,
    virtual_tokens::{Shape, TENSOR, VirtualTokenConfig, wrong},
};
use crate::{
    backend::Backend,
    batch::VirtualTokens,
    error::Result,
    model::{ModelConfig, Module},
};

/// Most layers of an LSTM that are taken; far above any use.
const MOST_LAYERS: usize = 64;

/// The network: PEFT's `encoder_reparameterization_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PromptEncoder {
    /// Linear, ReLU, linear, ReLU, linear.
    #[default]
    Mlp,
    /// A bidirectional LSTM, then linear, ReLU, linear.
    Lstm,
}

/// Settings of p-tuning, under PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct PTuningConfig {
    /// What all methods with virtual tokens have.
    pub common: VirtualTokenConfig,
    /// The network.
    pub encoder_reparameterization_type: PromptEncoder,
    /// Its width; the model's own when none.
    pub encoder_hidden_size: Option<usize>,
    /// Layers of the LSTM.
    pub encoder_num_layers: usize,
    /// Share of numbers set to 0 between the LSTM's layers while training.
    pub encoder_dropout: f32,
    /// Read from a file, which holds the network's result only: the rows themselves are what there is.
    pub finished: bool,
}

impl Default for PTuningConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            common: VirtualTokenConfig::default(),
            encoder_reparameterization_type: PromptEncoder::Mlp,
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
            finished: false,
        }
    }
}

impl PTuningConfig {
    /// How files know it.
    pub const REGISTRATION: Registration =
        Registration { peft_type: "P_TUNING", read: |keys| Ok(Arc::new(Self::read(keys)?)) };

    /// Shared, as engines take it.
    pub fn shared(self) -> SharedMethod {
        Arc::new(self)
    }

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let encoder_reparameterization_type = match keys.text("encoder_reparameterization_type")? {
            None | Some("MLP") => PromptEncoder::Mlp,
            Some("LSTM") => PromptEncoder::Lstm,
            Some(other) => {
                let problem = format!("is \"{other}\", not MLP or LSTM");
                return Err(keys.wrong("encoder_reparameterization_type", problem));
            }
        };
        let config = Self {
            common: VirtualTokenConfig::read(keys)?,
            encoder_reparameterization_type,
            encoder_hidden_size: keys.whole("encoder_hidden_size")?,
            encoder_num_layers: keys.whole("encoder_num_layers")?.unwrap_or(2),
            encoder_dropout: keys.number("encoder_dropout")?.unwrap_or(0.0) as f32,
            finished: true,
        };
        config.check()?;
        Ok(config)
    }

    fn hidden(&self, model: &ModelConfig) -> usize {
        self.encoder_hidden_size.unwrap_or(model.hidden_size)
    }
}

impl Method for PTuningConfig {
    fn peft_type(&self) -> &'static str {
        Self::REGISTRATION.peft_type
    }

    fn base_model(&self) -> Option<&str> {
        self.common.base_model_name_or_path.as_deref()
    }

    fn check(&self) -> Result<()> {
        if self.encoder_hidden_size == Some(0) {
            return Err(wrong("encoder_hidden_size", "is 0".to_owned()));
        }
        if !(1..=MOST_LAYERS).contains(&self.encoder_num_layers) {
            let problem = format!("is {}, not from 1 to {MOST_LAYERS}", self.encoder_num_layers);
            return Err(wrong("encoder_num_layers", problem));
        }
        if !(0.0..1.0).contains(&self.encoder_dropout) {
            let problem = format!("is {}, not from 0 to below 1", self.encoder_dropout);
            return Err(wrong("encoder_dropout", problem));
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
        let shape = [self.common.num_virtual_tokens, model.hidden_size];
        Ok(vec![Tensor::new(TENSOR, shape).start(Start::Normal { deviation: 1.0 })])
    }

    fn virtual_tokens(&self) -> VirtualTokens {
        VirtualTokens::Rows(self.common.num_virtual_tokens)
    }

    fn reparameterisation(&self, model: &ModelConfig) -> Result<Option<Box<dyn Reparameterisation>>> {
        if self.finished {
            return Ok(None);
        }
        let (count, features, hidden) =
            (self.common.num_virtual_tokens, model.hidden_size, self.hidden(model));
        let network = match self.encoder_reparameterization_type {
            PromptEncoder::Mlp => PromptNetwork::mlp(count, features, hidden),
            PromptEncoder::Lstm => {
                let (layers, dropout) = (self.encoder_num_layers, self.encoder_dropout);
                PromptNetwork::lstm(count, features, hidden, layers, dropout)
            }
        };
        Ok(Some(Box::new(network)))
    }

    fn settings_on(
        &self,
        model: &ModelConfig,
        _layout: &ParameterLayout,
        _state: &[f32],
    ) -> Map<String, Value> {
        let mut map = self.common.settings(model, &Shape::rows(model));
        let encoder = match self.encoder_reparameterization_type {
            PromptEncoder::Mlp => "MLP",
            PromptEncoder::Lstm => "LSTM",
        };
        for (key, value) in [
            ("encoder_dropout", shortest(self.encoder_dropout)),
            ("encoder_hidden_size", json!(self.hidden(model))),
            ("encoder_num_layers", json!(self.encoder_num_layers)),
            ("encoder_reparameterization_type", json!(encoder)),
        ] {
            map.insert(key.to_owned(), value);
        }
        map
    }
}

impl<B: Backend> MethodOn<B> for PTuningConfig {}
