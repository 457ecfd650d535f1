//! LoRA: what it adds to a linear layer, what it gets back, and its files.
//!
//! `y += s drop(x) Aᵀ Bᵀ` with A `[r, in]`, B `[out, r]`, s = alpha / r or alpha / sqrt(r), after Hu et al.,
//! arXiv 2106.09685, as PEFT computes it: dropout lies on the branch's input alone.
//!
//! With `p = drop(x) Aᵀ` `[T, r]`, kept from the forward pass:
//! `dB += s dyᵀ p`, `dp = s dy B`, `dA += dpᵀ drop(x)`, `dx += mask (dp A)`.
//! The mask is drawn again in the backward pass; nothing of it is kept.
//!
//! [`dora`] trains the length of each row besides, [`embedding`] adapts the token embedding, [`start`] holds the starts that
//! are computed from the base.

pub mod branch;
pub mod config;
pub mod dora;
pub mod embedding;
pub mod start;

use std::{path::Path, sync::Arc};

use serde_json::{Map, Value};

pub use branch::Lora;
pub use config::{Bias, LoraConfig, LoraStart};
use dora::Dora;
use embedding::{EmbeddingLora, EmbeddingUpdate};

use super::{
    branch::{EmbeddingBranch, LinearBranch},
    config::Keys,
    fit::Fit,
    layout::{ParameterEntry, ParameterLayout},
    method::{Method, MethodOn, ModuleStart, Needs, Rate, Role, SharedMethod, Start, Tensor},
    registry::Registration,
    targets::Matched,
};
use crate::{
    backend::Backend,
    error::{Error, Result},
    model::{ModelConfig, Module, ModuleKind, Place},
};

/// What follows the module in the names of its tensors.
pub(super) const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
const B_BIAS: &str = "lora_B.bias";
const MAGNITUDE: &str = "lora_magnitude_vector";
const EMBEDDING_A: &str = "lora_embedding_A";
const EMBEDDING_B: &str = "lora_embedding_B";
const TOKENS: &str = "token_adapter.trainable_tokens_delta";

impl LoraConfig {
    /// How files know it.
    pub const REGISTRATION: Registration =
        Registration { peft_type: "LORA", read: |keys| Ok(Arc::new(Self::read(keys)?)) };

    /// Shared, as engines take it.
    pub fn shared(self) -> SharedMethod {
        Arc::new(self)
    }

    /// Finds the adapted modules of a model and lays out their tensors.
    ///
    /// # Errors
    /// An impossible setting, or `target_modules` does not fit the model.
    pub fn fit(&self, model: &ModelConfig) -> Result<Fit> {
        Fit::new(self.clone().shared(), model)
    }

    /// Reads the text of an `adapter_config.json`; `file` is named in errors.
    ///
    /// Returns the settings and the keys that were dropped, sorted.
    ///
    /// # Errors
    /// Not JSON, another method, an option that is not there, an impossible value.
    pub fn from_json(text: &[u8], file: &Path) -> Result<(Self, Vec<String>)> {
        let json = super::config::parse(text, file)?;
        let keys = Keys::new(&json, file);
        let config = keys.read(Self::read)?;
        Ok((config, keys.unknown()))
    }

    /// The rate of B, and of both factors on the embedding.
    fn rates(&self) -> (Rate, Rate) {
        match self.loraplus_lr_ratio {
            None => (Rate::Job, Rate::Job),
            Some(ratio) => (Rate::Times(ratio), Rate::Peak(self.loraplus_lr_embedding)),
        }
    }

    fn refuse(&self, key: &str, problem: String) -> Error {
        Error::AdapterSetting { file: None, key: key.to_owned(), problem }
    }
}

impl Method for LoraConfig {
    fn peft_type(&self) -> &'static str {
        Self::REGISTRATION.peft_type
    }

    fn base_model(&self) -> Option<&str> {
        self.base_model_name_or_path.as_deref()
    }

    fn check(&self) -> Result<()> {
        self.check_settings()
    }

    fn targets(&self, model: &ModelConfig) -> Result<Matched> {
        let kinds = [ModuleKind::Linear, ModuleKind::Embedding, ModuleKind::Head];
        let matched = self.selection().find(model, &kinds)?;
        for module in &matched.targets {
            let special = module.kind != ModuleKind::Linear;
            let path = &module.path;
            if self.use_dora && special {
                return Err(self.refuse("use_dora", format!("is not there for `{path}`")));
            }
            if self.lora_dropout > 0.0 && module.kind == ModuleKind::Head {
                return Err(self.refuse("lora_dropout", format!("is not there for `{path}`: set it to 0")));
            }
            if self.init_lora_weights.is_computed() && special {
                let problem = format!("computes a start from the base, which is not there for `{path}`");
                return Err(self.refuse("init_lora_weights", problem));
            }
        }
        Ok(matched)
    }

    /// A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B zero: the start that PEFT takes. On the embedding A is zero
    /// and B normal.
    fn tensors(&self, module: &Module) -> Vec<Tensor> {
        let [out, input] = module.shape;
        let (r, _) = self.of_module(&module.path);
        let (b_rate, embedding_rate) = self.rates();
        let uniform = |width: usize| Start::Uniform { bound: 1.0 / (width as f32).sqrt() };
        let start = self.init_lora_weights;
        if module.kind == ModuleKind::Embedding {
            // [vocabulary, hidden]
            let normal = Start::Normal { deviation: 1.0 };
            let a = if start == LoraStart::Random { normal } else { Start::Constant(0.0) };
            return vec![
                Tensor::new(EMBEDDING_A, [r, out]).start(a).rate(embedding_rate),
                Tensor::new(EMBEDDING_B, [input, r]).start(normal).rate(embedding_rate),
            ];
        }
        let a = match start {
            LoraStart::Gaussian => Start::Normal { deviation: 1.0 / r as f32 },
            start if start.is_computed() => Start::Computed,
            _ => uniform(input),
        };
        let b = match start {
            LoraStart::Random => uniform(r),
            start if start.is_computed() => Start::Computed,
            _ => Start::Constant(0.0),
        };
        let mut tensors =
            vec![Tensor::new(A, [r, input]).start(a), Tensor::new(B, [out, r]).start(b).rate(b_rate)];
        if self.lora_bias {
            tensors.push(Tensor::new(B_BIAS, [out]).rate(b_rate));
        }
        if self.use_dora {
            tensors.push(Tensor::new(MAGNITUDE, [out]).start(Start::Computed));
        }
        tensors
    }

    fn other_tensors(&self, model: &ModelConfig) -> Result<Vec<(Module, Vec<Tensor>)>> {
        let mut others = self.selection().saved(model)?;
        if self.bias != Bias::None {
            let targets = self.targets(model)?.targets;
            for module in model.modules().into_iter().filter(|module| module.bias) {
                let adapted = targets.contains(&module);
                let saved = others.iter().any(|(other, _)| *other == module);
                if saved || (self.bias == Bias::LoraOnly && !adapted) {
                    continue;
                }
                let suffix = if adapted { "base_layer.bias" } else { "bias" };
                let bias = Tensor::new(suffix, [module.shape[0]]).start(Start::Base).role(Role::Bias);
                others.push((module, vec![bias]));
            }
        }
        if !self.trainable_token_indices.is_empty() {
            if let Some(token) =
                self.trainable_token_indices.iter().find(|token| **token as usize >= model.vocabulary_size)
            {
                let problem = format!("names token {token}, the base has {}", model.vocabulary_size);
                return Err(self.refuse("trainable_token_indices", problem));
            }
            let embedding = model.modules().into_iter().find(|module| module.kind == ModuleKind::Embedding);
            if let Some(module) = embedding {
                let shape = [self.trainable_token_indices.len(), module.shape[1]];
                let rows = Tensor::new(TOKENS, shape).start(Start::Base);
                let rows = rows.role(Role::Rows);
                others.push((module, vec![rows]));
            }
        }
        Ok(others)
    }

    fn trained_tokens(&self) -> &[u32] {
        &self.trainable_token_indices
    }

    fn start(&self, start: &mut ModuleStart<'_>) -> Result<()> {
        start::fill(self, start)
    }

    fn needs(&self, module: &Module) -> Needs {
        let [out, input] = module.shape;
        let (r, _) = self.of_module(&module.path);
        let wide = if self.lora_dropout > 0.0 { input } else { 0 };
        if module.kind == ModuleKind::Embedding {
            return Needs { narrow: r, ..Needs::default() };
        }
        if self.use_dora {
            let fixed = [out * r, (r * r).max(out), out, out];
            return Needs { kept: out, wide, narrow: r, output: out, fixed };
        }
        let fixed = [if self.lora_bias { out } else { 0 }, 0, 0, 0];
        Needs { kept: r, wide, narrow: r, fixed, ..Needs::default() }
    }

    fn dropout(&self) -> f32 {
        self.lora_dropout
    }

    fn settings(&self, layout: &ParameterLayout, _state: &[f32]) -> Map<String, Value> {
        self.write(layout)
    }
}

impl<Back: Backend> MethodOn<Back> for LoraConfig {
    fn linear(&self, module: &Module, tensors: &[ParameterEntry]) -> Option<Box<dyn LinearBranch<Back>>> {
        let of = |suffix: &str| tensors.iter().find(|entry| entry.suffix == suffix);
        let (a, b) = (of(A)?, of(B)?);
        let lora = Lora {
            a: a.range.start,
            b: b.range.start,
            rank: a.rows(),
            input: a.columns(),
            output: b.rows(),
            scale: self.of_module(&module.path).1,
            bias: of(B_BIAS).map(|bias| bias.range.start),
            module: module.number(),
        };
        match of(MAGNITUDE) {
            Some(magnitude) => Some(Box::new(Dora { lora, magnitude: magnitude.range.start })),
            None => Some(Box::new(lora)),
        }
    }

    fn embedding(
        &self,
        module: &Module,
        tensors: &[ParameterEntry],
    ) -> Option<Box<dyn EmbeddingBranch<Back>>> {
        debug_assert!(module.place == Place::Input);
        let of = |suffix: &str| tensors.iter().find(|entry| entry.suffix == suffix);
        let update = of(EMBEDDING_A).zip(of(EMBEDDING_B)).map(|(a, b)| EmbeddingUpdate {
            a: a.range.start,
            b: b.range.start,
            rank: a.rows(),
            vocabulary: a.columns(),
            scale: self.of_module(&module.path).1,
        });
        let rows = of(TOKENS).map_or(0, |rows| rows.range.start);
        let tokens = (self.trainable_token_indices.clone(), rows);
        Some(Box::new(EmbeddingLora { update, tokens, hidden: module.shape[1] }))
    }
}
