//! A decoder as its `config.json` describes it.
//!
//! [`ModelConfig`] says what the layer loop needs to know and nothing of where it was read; a further family is a
//! further function in [`ModelConfig::from_json`] that fills it. Both ways of writing rotary settings are
//! read: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (transformers 4).

use std::{fmt, fs, path::Path};

use serde_json::Value;

use crate::error::{Error, Origin, Result};

mod fields;

use fields::Fields;

/// Model types that there are.
pub const FAMILIES: &[&str] = &["llama"];

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

/// Rotary position embedding, half-rotation as in transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low ones divided, high ones kept, blended between (Llama 3.1).
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths above `original_positions / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths below `original_positions / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// Context length before scaling.
        original_positions: usize,
    },
}

impl Rope {
    /// Angle per position of each pair of a head's features, `[head_dim / 2]`.
    ///
    /// Rounded to f32 where transformers rounds, so that angles agree at long positions too.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / head_dim as f32;
                let frequency = 1.0 / (self.theta as f32).powf(exponent);
                self.scaling.apply(frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_positions } => {
                let wavelength = std::f32::consts::TAU / frequency;
                let original = original_positions as f64;
                if wavelength > (original / low_frequency_factor) as f32 {
                    return frequency / factor as f32;
                }
                if wavelength < (original / high_frequency_factor) as f32 {
                    return frequency;
                }
                let smooth = (original as f32 / wavelength - low_frequency_factor as f32)
                    / (high_frequency_factor - low_frequency_factor) as f32;
                (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
            }
        }
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
        let family = fields.text("model_type")?.ok_or_else(|| fields.problem("model_type", "is missing"))?;
        match family {
            "llama" => llama(&fields),
            other => Err(Error::UnknownFamily {
                file: file.to_owned(),
                found: other.to_owned(),
                known: FAMILIES.to_vec(),
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

/// Llama 1 to 3.x, and what shares its code in transformers.
fn llama(fields: &Fields<'_>) -> Result<ModelConfig> {
    let hidden_size = fields.size("hidden_size")?;
    let attention_heads = fields.size("num_attention_heads")?;
    let key_value_heads = fields.size_or("num_key_value_heads", attention_heads)?;
    if !attention_heads.is_multiple_of(key_value_heads) {
        return Err(fields.problem(
            "num_key_value_heads",
            format!("is {key_value_heads}, which does not divide num_attention_heads ({attention_heads})"),
        ));
    }
    let head_dim = match fields.optional_size("head_dim")? {
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
    match fields.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(fields.unsupported("hidden_act", &Value::from(other))),
    }
    let norm_epsilon = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
    if !(norm_epsilon > 0.0 && norm_epsilon < 1.0) {
        return Err(fields.problem("rms_norm_eps", format!("is {norm_epsilon}, not between 0 and 1")));
    }
    let max_positions = fields.size_or("max_position_embeddings", 2048)?;
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(ModelConfig {
        family: "llama",
        vocabulary_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        layers: fields.size("num_hidden_layers")?,
        attention_heads,
        key_value_heads,
        head_dim,
        max_positions,
        norm_epsilon,
        rope: fields.rope(max_positions)?,
        activation: Activation::Silu,
        query_key_value_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        stored_nf4: fields.stored_nf4()?,
        bos_token: fields.tokens("bos_token_id")?.first().copied(),
        eos_tokens: fields.tokens("eos_token_id")?,
        pad_token: fields.tokens("pad_token_id")?.first().copied(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_positions: 8192,
    };

    #[test]
    fn rotary_frequencies_are_scaled_as_transformers_scales_them() {
        let of = |scaling| Rope { theta: 500_000.0, scaling }.inverse_frequencies(128);
        let (plain, linear, llama3) =
            (of(RopeScaling::None), of(RopeScaling::Linear { factor: 4.0 }), of(LLAMA3));
        assert_eq!(plain.len(), 64);
        assert_eq!(plain[0], 1.0);
        let (mut kept, mut divided) = (0, 0);
        for pair in 0..64 {
            let exact = 500_000_f64.powf(-2.0 * pair as f64 / 128.0);
            // powf, its argument and the reciprocal round at 6e-8 each; the argument's error grows by ln(theta) = 13.
            assert!((f64::from(plain[pair]) - exact).abs() < 2e-6 * exact);
            assert_eq!(linear[pair], plain[pair] / 4.0);
            kept += usize::from(llama3[pair] == plain[pair]);
            divided += usize::from(llama3[pair] == plain[pair] / 8.0);
            assert!(llama3[pair] <= plain[pair] && llama3[pair] >= plain[pair] / 8.0);
        }
        // Wavelengths below 2048 are kept: 2 pi theta^(i/64) < 2048 for i ≤ 28; those above 8192 divided: i ≥ 35.
        assert_eq!((kept, divided), (29, 29));
        assert!(llama3.is_sorted_by(|earlier, later| earlier > later));
    }

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
