//! Configurations and tensors that only some families have, spoilt.

use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use shanty_peft_core::{model::ResidentBase, quant::Nf4Options};

use crate::scene::{Damage, MODEL, assert_presentable, change, config, floats, json_file, spoilt};

/// A family, what is wrong, the code, the damage.
type Case = (&'static str, &'static str, &'static str, Damage);

fn longrope(change: impl Fn(&mut Value) + 'static) -> Damage {
    json_file("config.json", move |json| {
        let factors = vec![1.5; 8];
        let mut rope = json!({
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 64
        });
        change(&mut rope);
        json["rope_parameters"] = rope;
    })
}

fn drop_tensor(name: &'static str) -> Damage {
    change(MODEL, move |all| drop(all.remove(name).unwrap()))
}

fn reshape(name: &'static str, shape: &'static [usize]) -> Damage {
    change(MODEL, move |all| drop(all.insert(name.to_owned(), floats(shape, 0.5))))
}

fn whole_numbers(name: &'static str, dtype: Dtype) -> Damage {
    change(MODEL, move |all| {
        let tensor = all.get_mut(name).unwrap();
        let numbers = tensor.shape.iter().product::<usize>();
        tensor.bytes = vec![0; numbers * dtype.bitsize() / 8];
        tensor.dtype = dtype;
    })
}

fn cases() -> Vec<Case> {
    vec![
        ("mistral", "window is negative", "SH0303", config("sliding_window", json!(-1))),
        ("mistral", "window is 0", "SH0303", config("sliding_window", json!(0))),
        ("mistral", "window is a text", "SH0303", config("sliding_window", json!("4096"))),
        ("mistral", "no heads", "SH0303", config("num_attention_heads", json!(0))),
        ("mistral", "absurdly many layers", "SH0303", config("num_hidden_layers", json!(1 << 20))),
        ("qwen2", "no bias", "SH0307", drop_tensor("model.layers.1.self_attn.k_proj.bias")),
        ("qwen2", "bias of another size", "SH0308", reshape("model.layers.0.self_attn.q_proj.bias", &[63])),
        (
            "qwen2",
            "bias of bytes",
            "SH0309",
            whole_numbers("model.layers.0.self_attn.v_proj.bias", Dtype::U8),
        ),
        ("qwen2", "layer types are too few", "SH0303", config("layer_types", json!(["full_attention"]))),
        (
            "qwen2",
            "a layer type is unknown",
            "SH0305",
            config("layer_types", json!(["full_attention", "linear_attention"])),
        ),
        ("qwen2", "layer types are no list", "SH0303", config("layer_types", json!("full_attention"))),
        (
            "qwen2",
            "windows without a size",
            "SH0303",
            config("layer_types", json!(["full_attention", "sliding_attention"])),
        ),
        ("qwen2", "first layer with a window is negative", "SH0303", config("max_window_layers", json!(-1))),
        ("qwen3", "no norm of queries", "SH0307", drop_tensor("model.layers.0.self_attn.q_norm.weight")),
        ("qwen3", "norm of another size", "SH0308", reshape("model.layers.1.self_attn.k_norm.weight", &[32])),
        ("qwen3", "heads of another size", "SH0308", config("head_dim", json!(32))),
        ("gemma", "another activation", "SH0305", config("hidden_act", json!("relu"))),
        ("gemma", "another activation by its new name", "SH0305", config("hidden_activation", json!("gelu"))),
        ("gemma", "attention to both sides", "SH0305", config("use_bidirectional_attention", json!(true))),
        ("gemma2", "cap on scores is 0", "SH0303", config("attn_logit_softcapping", json!(0.0))),
        ("gemma2", "cap on scores is negative", "SH0303", config("attn_logit_softcapping", json!(-5.0))),
        ("gemma2", "cap on logits is a text", "SH0303", config("final_logit_softcapping", json!("30"))),
        ("gemma2", "scalar of the scores is 0", "SH0303", config("query_pre_attn_scalar", json!(0))),
        (
            "gemma2",
            "no norm behind the MLP",
            "SH0307",
            drop_tensor("model.layers.0.post_feedforward_layernorm.weight"),
        ),
        ("gemma2", "window is absurd", "SH0303", config("sliding_window", json!(1_u64 << 40))),
        ("phi3", "no stacked projections", "SH0307", drop_tensor("model.layers.0.self_attn.qkv_proj.weight")),
        (
            "phi3",
            "gate and up of another size",
            "SH0308",
            reshape("model.layers.0.mlp.gate_up_proj.weight", &[96, 64]),
        ),
        ("phi3", "dropout in the base", "SH0305", config("resid_pdrop", json!(0.1))),
        (
            "phi3",
            "part of a head rotates",
            "SH0305",
            longrope(|rope| rope["partial_rotary_factor"] = json!(0.75)),
        ),
        ("phi3", "no short factors", "SH0303", longrope(|rope| rope["short_factor"] = Value::Null)),
        ("phi3", "too few long factors", "SH0303", longrope(|rope| rope["long_factor"] = json!([1.0, 2.0]))),
        ("phi3", "a factor is 0", "SH0303", longrope(|rope| rope["long_factor"][3] = json!(0.0))),
        ("phi3", "a factor is a text", "SH0303", longrope(|rope| rope["short_factor"][0] = json!("1"))),
        ("phi3", "factors are no list", "SH0303", longrope(|rope| rope["short_factor"] = json!(1.0))),
        (
            "phi3",
            "attention factor is negative",
            "SH0303",
            longrope(|rope| rope["attention_factor"] = json!(-1.0)),
        ),
        ("phi3", "factor is 0", "SH0303", longrope(|rope| rope["factor"] = json!(0))),
        ("phi3", "another scaling", "SH0305", longrope(|rope| rope["rope_type"] = json!("dynamic"))),
    ]
}

#[test]
fn what_only_some_families_have_is_checked_too() {
    let mut wrong = Vec::new();
    for (family, case, code, damage) in cases() {
        let folder = spoilt(&format!("models/{family}"), &damage);
        for nf4 in [None, Some(Nf4Options::default())] {
            match ResidentBase::load(folder.path(), nf4, &mut |_| {}) {
                Ok(_) => wrong.push(format!("{family}, {case}: loaded")),
                Err(error) if error.code() != code => {
                    wrong.push(format!("{family}, {case}: {} instead of {code}: {error}", error.code()));
                }
                Err(error) => assert_presentable(case, &error, folder.path()),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
