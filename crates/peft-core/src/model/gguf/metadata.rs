//! Metadata of a GGUF file as the keys of a `config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};
use shanty_gguf::Header;

use super::Gguf;
use crate::error::{Error, Result};

/// Keys of the architecture, such as `llama.block_count`.
pub(super) struct Metadata<'a> {
    pub(super) header: &'a Header,
    pub(super) path: &'a Path,
    pub(super) architecture: &'static str,
}

/// What Llama 3.1 to 3.3 divide low frequencies by.
const LLAMA3_FACTORS: [f64; 2] = [8.0, 32.0];

impl Metadata<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn wrong(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::GgufSetting { file: self.path.to_owned(), key: self.name(key), problem: problem.into() }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.header.get(&self.name(key)) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, "is no number")),
        }
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.header.get(&self.name(key)) else { return Ok(None) };
        // Some converters write one number a layer; equal ones are one.
        let number = match value.as_list() {
            None => value.as_u64(),
            Some(list) => {
                let mut numbers = list.iter().map(|item| item.as_u64());
                let first = numbers.next().flatten();
                first.filter(|first| numbers.all(|number| number == Some(*first)))
            }
        };
        let size = number.and_then(|number| usize::try_from(number).ok());
        size.map(Some).ok_or_else(|| self.wrong(key, "is not one whole number for all layers"))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        match self.optional_size(key)? {
            Some(size) if (1..=1 << 24).contains(&size) => Ok(size),
            Some(size) => Err(self.wrong(key, format!("is {size}, not from 1 to 2^24"))),
            None => Err(self.wrong(key, "is missing")),
        }
    }

    pub(super) fn key_value_heads(&self) -> Result<usize> {
        match self.optional_size("attention.head_count_kv")? {
            None => self.size("attention.head_count"),
            Some(_) => self.size("attention.head_count_kv"),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.header.get(&self.name(key)).and_then(|value| value.as_str())
    }
}

/// The whole `config.json`.
pub(super) fn config(gguf: &Gguf) -> Result<Value> {
    let metadata = gguf.metadata();
    let (hidden, heads) = (metadata.size("embedding_length")?, metadata.size("attention.head_count")?);
    if metadata.optional_size("expert_count")?.is_some_and(|experts| experts > 0) {
        return Err(metadata.wrong("expert_count", "asks for experts; there are none here"));
    }
    let head_dim = match metadata.optional_size("attention.key_length")? {
        Some(_) => metadata.size("attention.key_length")?,
        None => hidden / heads,
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if metadata.optional_size(key)?.is_some_and(|size| size != head_dim) {
            return Err(metadata.wrong(key, format!("is not the size of a head, {head_dim}")));
        }
    }
    let tensor = |name: &str| gguf.header.tensor(name);
    let vocabulary = match tensor("token_embd.weight") {
        Some(table) if table.shape.len() == 2 => table.shape[1],
        _ => return Err(metadata.wrong("vocab_size", "cannot be told: there is no matrix token_embd.weight")),
    };
    let positions = metadata.size("context_length")?;
    let mut json = json!({
        "model_type": gguf.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": metadata.size("feed_forward_length")?,
        "num_hidden_layers": metadata.size("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.key_value_heads()?,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon")?,
        "tie_word_embeddings": tensor("output.weight").is_none(),
        "rope_parameters": rope(gguf, &metadata, head_dim, positions)?,
    });
    let Some(keys) = json.as_object_mut() else { return Ok(json) };
    for (key, token) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        let id = gguf.header.get(&format!("tokenizer.ggml.{token}_token_id")).and_then(|id| id.as_u64());
        keys.insert(format!("{key}_token_id"), json!(id));
    }
    family(gguf, &metadata, head_dim, keys)?;
    Ok(json)
}

/// What only some architectures have.
fn family(
    gguf: &Gguf,
    metadata: &Metadata<'_>,
    head_dim: usize,
    keys: &mut Map<String, Value>,
) -> Result<()> {
    let window = metadata.optional_size("attention.sliding_window")?.filter(|window| *window > 0);
    let mut set = |key: &str, value: Value| {
        keys.insert(key.to_owned(), value);
    };
    match gguf.model_type {
        "llama" => {
            set("attention_bias", json!(gguf.header.tensor("blk.0.attn_q.bias").is_some()));
            set("mlp_bias", json!(gguf.header.tensor("blk.0.ffn_up.bias").is_some()));
            if let Some(window) = window {
                // Mistral's files are of Llama's architecture.
                set("model_type", json!("mistral"));
                set("sliding_window", json!(window));
            }
        }
        "gemma2" => {
            set("sliding_window", json!(window));
            set("attn_logit_softcapping", json!(metadata.number("attn_logit_softcapping")?));
            set("final_logit_softcapping", json!(metadata.number("final_logit_softcapping")?));
            // The one of 27B alone scales by another number than the head's size; its file need not say so.
            let (layers, heads) = (metadata.size("block_count")?, metadata.size("attention.head_count")?);
            let known = if layers == 46 { metadata.size("embedding_length")? / heads } else { head_dim };
            let scalar = metadata.number("attention.scale")?.map_or(known as f64, |scale| scale.powi(-2));
            set("query_pre_attn_scalar", json!(scalar));
        }
        "phi3" => set("sliding_window", json!(window)),
        _ => {}
    }
    Ok(())
}

/// Rotary settings; factors that lie beside the weights are read from there.
fn rope(gguf: &Gguf, metadata: &Metadata<'_>, head_dim: usize, positions: usize) -> Result<Value> {
    let theta = metadata.number("rope.freq_base")?.unwrap_or(10_000.0);
    let vector = |name: &str| match gguf.header.tensor(name) {
        Some(info) => gguf.vector(&info).map(Some),
        None => Ok(None),
    };
    if let Some(factors) = vector("rope_freqs.weight")? {
        return Ok(llama3(theta, head_dim, &factors)
            .unwrap_or_else(|| json!({"rope_type": "factors", "rope_theta": theta, "factors": factors})));
    }
    if let (Some(long), Some(short)) =
        (vector("rope_factors_long.weight")?, vector("rope_factors_short.weight")?)
    {
        let original = metadata.optional_size("rope.scaling.original_context_length")?.unwrap_or(positions);
        return Ok(json!({
            "rope_type": "longrope",
            "rope_theta": theta,
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": original,
            "attention_factor": metadata.number("rope.scaling.attn_factor")?,
        }));
    }
    match metadata.text("rope.scaling.type") {
        None | Some("none") => Ok(json!({"rope_type": "default", "rope_theta": theta})),
        Some("linear") => {
            let factor = metadata.number("rope.scaling.factor")?;
            Ok(json!({"rope_type": "linear", "rope_theta": theta, "factor": factor}))
        }
        Some(other) => {
            Err(metadata.wrong("rope.scaling.type", format!("is `{other}`, which is not supported")))
        }
    }
}

/// The settings of Llama 3.x that give these factors, if there are any.
fn llama3(theta: f64, head_dim: usize, factors: &[f32]) -> Option<Value> {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let wanted = |factor: f64, pair: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / head_dim as f64);
        if wavelength < original / high {
            return 1.0;
        }
        if wavelength > original / low {
            return factor;
        }
        let smooth = (original / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    let factor = LLAMA3_FACTORS.into_iter().find(|factor| {
        factors.len() == head_dim / 2
            && factors.iter().enumerate().all(|(pair, found)| {
                let wanted = wanted(*factor, pair);
                // Written as f32, by a program that computed in f32.
                (f64::from(*found) - wanted).abs() <= 1e-4 * wanted
            })
    })?;
    Some(json!({
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as usize,
    }))
}
