//! A decoder as its `config.json` describes it.
//!
//! [`ModelConfig`] says what the layer loop needs to know and nothing of where it was read; [`crate::model::families`]
//! fill it. Both ways of writing rotary settings are read: `rope_parameters` (transformers 5) and `rope_theta` with
//! `rope_scaling` (transformers 4).

use std::{fmt, fs, path::Path};

use serde_json::Value;

use crate::{
    error::{Error, Origin, Result},
    model::families,
};

mod fields;
mod rope;

pub(crate) use fields::Fields;
pub use rope::{Rope, RopeScaling};

/// The linear layers of a decoder layer, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl Projection {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Name below the layer, for example `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Last part of the name, for example `q_proj`.
    pub fn name(self) -> &'static str {
        let path = self.path();
        path.rsplit('.').next().unwrap_or(path)
    }

    /// Full name of the module in layer `layer`, for example `model.layers.0.self_attn.q_proj`.
    pub fn module(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.path())
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The MLP's nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
    GeluTanh,
}

/// The norms of a decoder layer, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Norm {
    /// Ahead of attention.
    AttentionInput,
    /// Of each head's queries, ahead of rotation.
    Query,
    /// Of each head's keys, ahead of rotation.
    Key,
    /// Of attention's output, ahead of the sum with the residual stream.
    AttentionOutput,
    /// Ahead of the MLP.
    MlpInput,
    /// Of the MLP's output, ahead of the sum with the residual stream.
    MlpOutput,
}

impl Norm {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 6] = [
        Self::AttentionInput,
        Self::Query,
        Self::Key,
        Self::AttentionOutput,
        Self::MlpInput,
        Self::MlpOutput,
    ];

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// A decoder: embedding, equal layers of attention and gated MLP with norms ahead, norm, output head.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The `model_type` it was read from.
    pub family: &'static str,
    /// Tokens.
    pub vocabulary_size: usize,
    /// Width between layers.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub attention_heads: usize,
    /// Key and value heads; a divisor of `attention_heads`.
    pub key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Longest sequence it was made for.
    pub max_positions: usize,
    /// Added to the mean square in the norms.
    pub norm_epsilon: f64,
    /// Positions.
    pub rope: Rope,
    /// The MLP's nonlinearity.
    pub activation: Activation,
    /// Multiplies attention's scores.
    pub attention_scale: f64,
    /// Bounds attention's scaled scores: `cap tanh(score / cap)`.
    pub attention_soft_cap: Option<f64>,
    /// Keys that a query of each layer sees, itself included; none sees all before it.
    pub windows: Vec<Option<usize>>,
    /// Multiplies the embedding.
    pub embedding_scale: Option<f32>,
    /// Bounds the logits: `cap tanh(logit / cap)`.
    pub logits_soft_cap: Option<f64>,
    /// Whether queries and keys pass a norm of their own.
    pub query_key_norms: bool,
    /// Whether the outputs of attention and MLP pass norms of their own.
    pub output_norms: bool,
    /// Whether norms are stored less 1.
    pub norms_less_one: bool,
    /// Whether q, k and v have a bias.
    pub query_key_value_bias: bool,
    /// Whether attention's output has a bias.
    pub output_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Whether the folder holds weights that bitsandbytes quantised to NF4.
    pub stored_nf4: bool,
    /// First token of a sequence.
    pub bos_token: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_tokens: Vec<u32>,
    /// Token that fills.
    pub pad_token: Option<u32>,
}

impl ModelConfig {
    /// Reads `config.json` of a model's folder.
    ///
    /// # Errors
    /// Unreadable, not JSON, an unknown family, an option that is not there, an impossible value.
    pub fn load(folder: &Path) -> Result<Self> {
        let file = folder.join("config.json");
        let text = fs::read(&file).map_err(|source| Error::Read {
            origin: Origin::Base,
            file: file.clone(),
            source,
        })?;
        Self::from_json(&text, &file)
    }

    /// Reads the text of a `config.json`; `file` is named in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_json(text: &[u8], file: &Path) -> Result<Self> {
        let json: Value = serde_json::from_slice(text).map_err(|source| Error::Json {
            origin: Origin::Base,
            file: file.to_owned(),
            source,
        })?;
        let fields = Fields::new(&json, file)?;
        let found = fields.text("model_type")?.ok_or_else(|| fields.problem("model_type", "is missing"))?;
        match families::find(found) {
            Some(family) => family.describe(&fields),
            None => Err(Error::UnknownFamily {
                file: file.to_owned(),
                found: found.to_owned(),
                known: families::names(),
            }),
        }
    }

    /// Outputs and inputs of a projection, `[out, in]`.
    pub fn shape(&self, projection: Projection) -> [usize; 2] {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.attention_heads * self.head_dim, self.key_value_heads * self.head_dim);
        match projection {
            Projection::Q => [queries, hidden],
            Projection::K | Projection::V => [keys, hidden],
            Projection::O => [hidden, queries],
            Projection::Gate | Projection::Up => [intermediate, hidden],
            Projection::Down => [hidden, intermediate],
        }
    }

    /// Whether a projection has a bias.
    pub fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Q | Projection::K | Projection::V => self.query_key_value_bias,
            Projection::O => self.output_bias,
            Projection::Gate | Projection::Up | Projection::Down => self.mlp_bias,
        }
    }

    /// The norms of every layer.
    pub fn norms(&self) -> impl Iterator<Item = Norm> {
        let (query_key, output) = (self.query_key_norms, self.output_norms);
        Norm::ALL.into_iter().filter(move |norm| match norm {
            Norm::AttentionInput | Norm::MlpInput => true,
            Norm::Query | Norm::Key => query_key,
            Norm::AttentionOutput | Norm::MlpOutput => output,
        })
    }

    /// Name of a norm below the layer, for example `input_layernorm`.
    pub fn norm_path(&self, norm: Norm) -> &'static str {
        match norm {
            Norm::AttentionInput => "input_layernorm",
            Norm::Query => "self_attn.q_norm",
            Norm::Key => "self_attn.k_norm",
            Norm::AttentionOutput => "post_attention_layernorm",
            // What stands ahead of the MLP is named after what it stands behind, unless something else stands there.
            Norm::MlpInput if self.output_norms => "pre_feedforward_layernorm",
            Norm::MlpInput => "post_attention_layernorm",
            Norm::MlpOutput => "post_feedforward_layernorm",
        }
    }

    /// Full name of a norm in layer `layer`, for example `model.layers.0.input_layernorm`.
    pub fn norm_module(&self, layer: usize, norm: Norm) -> String {
        format!("model.layers.{layer}.{}", self.norm_path(norm))
    }

    /// Features that a norm works on.
    pub fn norm_features(&self, norm: Norm) -> usize {
        match norm {
            Norm::Query | Norm::Key => self.head_dim,
            _ => self.hidden_size,
        }
    }

    /// Number of frozen parameters: a tied head counts once.
    pub fn parameters(&self) -> usize {
        let linear: usize = Projection::ALL
            .iter()
            .map(|projection| {
                let [out, input] = self.shape(*projection);
                out * input + if self.has_bias(*projection) { out } else { 0 }
            })
            .sum();
        let embeddings = if self.tied_embeddings { 1 } else { 2 } * self.vocabulary_size * self.hidden_size;
        let norms: usize = self.norms().map(|norm| self.norm_features(norm)).sum();
        self.layers * (linear + norms) + embeddings + self.hidden_size
    }

    /// The settings that change numbers, in a fixed form: what a base's hash covers besides its tensors.
    pub fn essentials(&self) -> String {
        let Self {
            family,
            vocabulary_size,
            hidden_size,
            intermediate_size,
            layers,
            attention_heads,
            key_value_heads,
            head_dim,
            norm_epsilon,
            rope,
            activation,
            attention_scale,
            attention_soft_cap,
            windows,
            embedding_scale,
            logits_soft_cap,
            query_key_norms,
            output_norms,
            norms_less_one,
            query_key_value_bias,
            output_bias,
            mlp_bias,
            tied_embeddings,
            stored_nf4,
            // How long a sequence may be and which tokens begin and end one changes no logit.
            max_positions: _,
            bos_token: _,
            eos_tokens: _,
            pad_token: _,
        } = self;
        let mut text = format!(
            "{family} v{vocabulary_size} h{hidden_size} i{intermediate_size} l{layers} a{attention_heads} \
             kv{key_value_heads} d{head_dim} eps{norm_epsilon:e} {rope:?} {activation:?} \
             b{query_key_value_bias}/{output_bias}/{mlp_bias} tied{tied_embeddings} nf4{stored_nf4}"
        );
        // What most families lack is written where it is there: hashes of the others stay as they were.
        let mut add = |there: bool, what: String| {
            if there {
                text.push(' ');
                text.push_str(&what);
            }
        };
        let usual_scale = (*head_dim as f64).powf(-0.5);
        add(*attention_scale != usual_scale, format!("scale{attention_scale:e}"));
        add(attention_soft_cap.is_some(), format!("cap{attention_soft_cap:?}"));
        add(windows.iter().any(Option::is_some), format!("windows{windows:?}"));
        add(embedding_scale.is_some(), format!("embedding{embedding_scale:?}"));
        add(logits_soft_cap.is_some(), format!("logits{logits_soft_cap:?}"));
        add(*query_key_norms, "qknorms".to_owned());
        add(*output_norms, "outputnorms".to_owned());
        add(*norms_less_one, "lessone".to_owned());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_counted_once_where_tied() {
        let config = |tied| {
            let json = format!(
                r#"{{"model_type":"llama","vocab_size":10,"hidden_size":4,"intermediate_size":6,"num_hidden_layers":2,
                    "num_attention_heads":2,"num_key_value_heads":1,"tie_word_embeddings":{tied},"attention_bias":true}}"#
            );
            ModelConfig::from_json(json.as_bytes(), Path::new("config.json")).unwrap()
        };
        // A layer: q 16+4, k and v 8+2 each, o 16+4, MLP 3·24, norms 8; behind: norm 4, tables 40 each.
        let layer = 20 + 2 * 10 + 20 + 72 + 8;
        assert_eq!(config(true).parameters(), 2 * layer + 4 + 40);
        assert_eq!(config(false).parameters(), 2 * layer + 4 + 80);
        assert_eq!(config(true).head_dim, 2);
    }
}
