//! What tensors are called in GGUF files and in safetensors.

/// The name in safetensors of what is `name` in GGUF; what has none keeps its own.
pub(super) fn safetensors(name: &str, model_type: &str) -> String {
    let (stem, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
    let renamed = match stem {
        "token_embd" => Some("model.embed_tokens".to_owned()),
        "output_norm" => Some("model.norm".to_owned()),
        "output" => Some("lm_head".to_owned()),
        _ => in_layer(stem, model_type),
    };
    renamed.map_or_else(|| name.to_owned(), |renamed| format!("{renamed}.{suffix}"))
}

fn in_layer(stem: &str, model_type: &str) -> Option<String> {
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "post_attention_norm" => "post_attention_layernorm",
        "ffn_norm" if model_type == "gemma2" => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" if model_type == "phi3" => "mlp.gate_up_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}"))
}

#[cfg(test)]
mod tests {
    use super::safetensors;

    #[test]
    fn names_by_family() {
        assert_eq!(safetensors("token_embd.weight", "llama"), "model.embed_tokens.weight");
        assert_eq!(safetensors("blk.7.attn_q.bias", "qwen2"), "model.layers.7.self_attn.q_proj.bias");
        assert_eq!(
            safetensors("blk.0.ffn_norm.weight", "llama"),
            "model.layers.0.post_attention_layernorm.weight"
        );
        assert_eq!(
            safetensors("blk.0.ffn_norm.weight", "gemma2"),
            "model.layers.0.pre_feedforward_layernorm.weight"
        );
        assert_eq!(safetensors("blk.0.ffn_up.weight", "phi3"), "model.layers.0.mlp.gate_up_proj.weight");
        for kept in ["rope_freqs.weight", "blk.x.attn_q.weight", "blk.0.strange.weight", "blk.0", ""] {
            assert_eq!(safetensors(kept, "llama"), kept);
        }
    }
}
