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
        self.layers * (linear + 2 * self.hidden_size) + embeddings + self.hidden_size
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
        format!(
            "{family} v{vocabulary_size} h{hidden_size} i{intermediate_size} l{layers} a{attention_heads} \
             kv{key_value_heads} d{head_dim} eps{norm_epsilon:e} {rope:?} {activation:?} \
             b{query_key_value_bias}/{output_bias}/{mlp_bias} tied{tied_embeddings} nf4{stored_nf4}"
        )
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
