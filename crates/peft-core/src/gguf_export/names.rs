//! Families, tensors and settings under llama.cpp's names.
//!
//! Source: `gguf-py/gguf/tensor_mapping.py`, `constants.py` and `convert_hf_to_gguf.py` of ggml-org/llama.cpp.

use serde_json::Value;

use super::writer::Meta;
use crate::{
    error::{Error, Result},
    model::{ModelConfig, RopeScaling},
    use_error::UseError,
};

/// What is done to a tensor's numbers besides renaming it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// Rows of each head interleaved: first and second half of the rotated features side by side.
    Permute {
        /// Heads.
        heads: usize,
    },
    /// 1 is added: the family stores norms less 1, llama.cpp does not.
    AddOne,
}

/// A family as llama.cpp knows it.
pub(super) struct Architecture<'a> {
    pub(super) name: &'static str,
    config: &'a ModelConfig,
    permutes: bool,
    norms_less_one: bool,
}

impl<'a> Architecture<'a> {
    pub(super) fn of(config: &'a ModelConfig) -> Result<Self> {
        let (name, permutes, norms_less_one) = match config.family {
            "llama" => ("llama", true, false),
            "mistral" => ("llama", true, false),
            "qwen2" => ("qwen2", false, false),
            "qwen3" => ("qwen3", false, false),
            "gemma" => ("gemma", false, true),
            "gemma2" => ("gemma2", false, true),
            "phi3" => ("phi3", false, false),
            other => {
                let reason = format!("the family {other} has no name in llama.cpp here");
                return Err(UseError::NotExportable { reason }.into());
            }
        };
        Ok(Self { name, config, permutes, norms_less_one })
    }

    /// The name of a tensor, and what is done to its numbers. Norms and biases have one dimension.
    pub(super) fn tensor(&self, name: &str) -> Result<(String, Change)> {
        let unknown = || -> Error {
            let reason = format!("tensor `{name}` has no name in llama.cpp's {}", self.name);
            UseError::NotExportable { reason }.into()
        };
        let (module, kind) = name.rsplit_once('.').ok_or_else(unknown)?;
        let new = self.module(module).ok_or_else(unknown)?;
        let is_norm = module.ends_with("norm");
        let change = match module.rsplit('.').next() {
            Some("q_proj") if self.permutes => Change::Permute { heads: self.config.attention_heads },
            Some("k_proj") if self.permutes => Change::Permute { heads: self.config.key_value_heads },
            _ if is_norm && self.norms_less_one => Change::AddOne,
            _ => Change::None,
        };
        Ok((format!("{new}.{kind}"), change))
    }

    /// The name of a module, without `.weight`.
    pub(super) fn module(&self, module: &str) -> Option<String> {
        match module {
            "model.embed_tokens" => return Some("token_embd".to_owned()),
            "model.norm" => return Some("output_norm".to_owned()),
            "lm_head" => return Some("output".to_owned()),
            _ => {}
        }
        let (layer, inner) = module.strip_prefix("model.layers.")?.split_once('.')?;
        layer.parse::<usize>().ok()?;
        let four_norms = self.name == "gemma2";
        let inner = match inner {
            "self_attn.q_proj" => "attn_q",
            "self_attn.k_proj" => "attn_k",
            "self_attn.v_proj" => "attn_v",
            "self_attn.o_proj" => "attn_output",
            "self_attn.qkv_proj" => "attn_qkv",
            "self_attn.q_norm" => "attn_q_norm",
            "self_attn.k_norm" => "attn_k_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            "input_layernorm" => "attn_norm",
            "post_attention_layernorm" if four_norms => "post_attention_norm",
            "post_attention_layernorm" => "ffn_norm",
            "pre_feedforward_layernorm" => "ffn_norm",
            "post_feedforward_layernorm" => "post_ffw_norm",
            _ => return None,
        };
        Some(format!("blk.{layer}.{inner}"))
    }

    /// The settings of the model. `json` is its `config.json`.
    pub(super) fn metadata(&self, json: &Value) -> Vec<(String, Meta)> {
        let config = self.config;
        let count = |value: usize| Meta::U32(u32::try_from(value).unwrap_or(u32::MAX));
        let mut meta = Vec::new();
        let mut put = |name: &str, value: Meta| meta.push((format!("{}.{name}", self.name), value));
        put("vocab_size", count(config.vocabulary_size));
        put("context_length", count(config.max_positions));
        put("embedding_length", count(config.hidden_size));
        put("block_count", count(config.layers));
        put("feed_forward_length", count(config.intermediate_size));
        put("attention.head_count", count(config.attention_heads));
        put("attention.head_count_kv", count(config.key_value_heads));
        put("attention.key_length", count(config.head_dim));
        put("attention.value_length", count(config.head_dim));
        put("attention.layer_norm_rms_epsilon", Meta::F32(config.norm_epsilon as f32));
        put("rope.dimension_count", count(config.head_dim));
        put("rope.freq_base", Meta::F32(config.rope.theta as f32));
        if let RopeScaling::Linear { factor } = config.rope.scaling {
            put("rope.scaling.type", Meta::Text("linear".to_owned()));
            put("rope.scaling.factor", Meta::F32(factor as f32));
        }
        for (name, key) in [
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ] {
            if let Some(value) = json[key].as_f64() {
                put(name, Meta::F32(value as f32));
            }
        }
        // llama.cpp's llama has no window: what Mistral sees beyond it, it sees there.
        if let Some(window) = json["sliding_window"].as_u64().filter(|_| self.name != "llama")
            && json["use_sliding_window"] != false
        {
            put("attention.sliding_window", count(window as usize));
        }
        meta
    }

    /// Factors that divide rotary frequencies (Llama 3.1), which llama.cpp wants as a tensor.
    pub(super) fn rope_factors(&self) -> Option<Vec<f32>> {
        let RopeScaling::Llama3 { .. } = self.config.rope.scaling else { return None };
        let plain = crate::model::Rope { scaling: RopeScaling::None, ..self.config.rope.clone() };
        let plain = plain.inverse_frequencies(self.config.head_dim);
        let scaled = self.config.rope.inverse_frequencies(self.config.head_dim);
        Some(plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())
    }
}

/// Rows of each head interleaved, as llama.cpp's rotation wants them: row `2 i + h` of a head is its row `h · half + i`.
pub(super) fn permute(values: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let (head_rows, half) = (rows / heads, rows / heads / 2);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for row in 0..head_rows {
            let from = head * head_rows + (row % 2) * half + row / 2;
            out.extend_from_slice(&values[from * columns..][..columns]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::permute;

    #[test]
    fn rows_of_a_head_are_interleaved() {
        // Two heads of four rows of one number.
        let rows = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0];
        assert_eq!(permute(&rows, 2, 1), [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0]);
        assert_eq!(permute(&[1.0, 2.0, 3.0, 4.0], 1, 2), [1.0, 2.0, 3.0, 4.0], "two rows stay");
    }
}
