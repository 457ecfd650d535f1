//! Damaged bases: configurations, headers, tensors, indices, pre-quantised weights.

use std::fs;

use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use shanty_diagnostic::Diagnose as _;
use shanty_peft_core::{
    model::{ModelConfig, ResidentBase},
    quant::Nf4Options,
};

use crate::{
    common::reference,
    scene::{
        Damage, MODEL, Tensors, UP, assert_presentable, bytes, change, config, floats, header, index,
        length_word, remove, spoilt, write,
    },
};

fn dense_cases() -> Vec<(&'static str, &'static str, Damage)> {
    let rope = |kind: &str| json!({ "rope_type": kind, "factor": 2.0, "rope_theta": 10000.0 });
    vec![
        ("no config", "SH0301", remove("config.json")),
        ("no weights", "SH0301", remove(MODEL)),
        ("weights are a folder", "SH0301", Box::new(|folder| {
            fs::remove_file(folder.join(MODEL)).unwrap();
            fs::create_dir(folder.join(MODEL)).unwrap();
        })),
        ("config is no JSON", "SH0302", write("config.json", "{\n  \"model_type\": llama")),
        ("config is empty", "SH0302", write("config.json", "")),
        ("config is a list", "SH0303", write("config.json", "[]")),
        ("no model type", "SH0303", config("model_type", Value::Null)),
        ("model type is a number", "SH0303", config("model_type", json!(3))),
        ("unknown family", "SH0304", config("model_type", json!("gpt2"))),
        ("size is a text", "SH0303", config("hidden_size", json!("64"))),
        ("size is zero", "SH0303", config("hidden_size", json!(0))),
        ("size is negative", "SH0303", config("num_hidden_layers", json!(-1))),
        ("size is absurd", "SH0303", config("intermediate_size", json!(1_u64 << 40))),
        ("size is missing", "SH0303", config("vocab_size", Value::Null)),
        ("heads do not divide", "SH0303", config("num_key_value_heads", json!(3))),
        ("head is odd", "SH0303", config("head_dim", json!(15))),
        ("epsilon is zero", "SH0303", config("rms_norm_eps", json!(0.0))),
        ("tie is a text", "SH0303", config("tie_word_embeddings", json!("no"))),
        ("token is a text", "SH0303", config("eos_token_id", json!("</s>"))),
        ("other activation", "SH0305", config("hidden_act", json!("gelu"))),
        ("other rotary scaling", "SH0305", config("rope_parameters", rope("yarn"))),
        ("llama3 scaling without its factors", "SH0303", config("rope_parameters", rope("llama3"))),
        ("linear scaling by zero", "SH0303", config("rope_parameters", json!({"rope_type": "linear", "factor": 0}))),
        ("theta is not above 1", "SH0303", config("rope_parameters", json!({"rope_theta": 0.5}))),
        ("part of a head rotates", "SH0305", config("partial_rotary_factor", json!(0.5))),
        ("other quantisation", "SH0305", config("quantization_config", json!({"quant_method": "gptq"}))),
        ("8-bit quantisation", "SH0305", config("quantization_config", json!({"load_in_8bit": true}))),
        ("weights are empty", "SH0306", write(MODEL, "")),
        ("weights are five bytes", "SH0306", write(MODEL, "hello")),
        ("weights are a pointer", "SH0306", write(MODEL, "version https://git-lfs.github.com/spec/v1\n")),
        ("header longer than any", "SH0306", length_word(MODEL, u64::MAX)),
        ("header longer than the file", "SH0306", length_word(MODEL, 90_000_000)),
        ("header overflows with 8", "SH0306", length_word(MODEL, u64::MAX - 7)),
        ("header is empty", "SH0306", length_word(MODEL, 0)),
        ("header is cut", "SH0306", length_word(MODEL, 100)),
        ("header is no JSON", "SH0306", header(MODEL, b"not JSON at all")),
        ("header is no text", "SH0306", header(MODEL, b"{\"\xff\xfe\":1}")),
        ("header is a deep nest", "SH0306", header(MODEL, &[b'['; 4096])),
        ("tensors overlap", "SH0306", header(MODEL, br#"{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"b":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}"#)),
        ("tensors leave a hole", "SH0306", header(MODEL, br#"{"a":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}"#)),
        ("shape does not fit bytes", "SH0306", header(MODEL, br#"{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,64]}}"#)),
        ("shape overflows", "SH0306", header(MODEL, br#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,64]}}"#)),
        ("unknown dtype", "SH0306", header(MODEL, br#"{"a":{"dtype":"F99","shape":[16],"data_offsets":[0,64]}}"#)),
        ("offsets run backwards", "SH0306", header(MODEL, br#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[64,0]}}"#)),
        ("offset is negative", "SH0306", header(MODEL, br#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[-4,0]}}"#)),
        ("weights are cut by a byte", "SH0306", bytes(MODEL, |bytes| { bytes.pop(); })),
        ("weights are cut in half", "SH0306", bytes(MODEL, |bytes| bytes.truncate(bytes.len() / 2))),
        ("weights go on behind the end", "SH0306", bytes(MODEL, |bytes| bytes.push(0))),
        ("tensor is missing", "SH0307", change(MODEL, |all| drop(all.remove(UP)))),
        ("head is missing", "SH0307", change(MODEL, |all| drop(all.remove("lm_head.weight")))),
        ("more layers than stored", "SH0307", config("num_hidden_layers", json!(3))),
        ("bias is called for", "SH0307", config("attention_bias", json!(true))),
        ("tensor is of another shape", "SH0308", change(MODEL, |all| {
            all.insert(UP.to_owned(), floats(&[64, 96], 0.5));
        })),
        ("tensor lost a dimension", "SH0308", change(MODEL, |all| all.get_mut(UP).unwrap().shape = vec![96 * 64])),
        ("vocabulary is of another size", "SH0308", config("vocab_size", json!(300))),
        ("weights are whole numbers", "SH0309", change(MODEL, |all| all.get_mut(UP).unwrap().dtype = Dtype::I32)),
        ("norm is of whole numbers", "SH0309", change(MODEL, |all| {
            all.get_mut("model.norm.weight").unwrap().dtype = Dtype::U32;
        })),
        ("weight is not a number", "SH0312", change(MODEL, |all| {
            all.get_mut(UP).unwrap().bytes[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
        })),
        ("embedding is infinite", "SH0312", change(MODEL, |all| {
            let bytes = &mut all.get_mut("model.embed_tokens.weight").unwrap().bytes;
            bytes[400..404].copy_from_slice(&f32::INFINITY.to_le_bytes());
        })),
        ("only pickles", "SH0315", Box::new(|folder| {
            fs::rename(folder.join(MODEL), folder.join("pytorch_model.bin")).unwrap();
        })),
        ("shard is missing", "SH0310", index(|json| json["weight_map"][UP] = json!("shard-2.safetensors"))),
        ("shard lacks a tensor", "SH0310", index(|json| json["weight_map"]["more"] = json!("shard-1.safetensors"))),
        ("index leaves the folder", "SH0310", index(|json| json["weight_map"][UP] = json!("../model.safetensors"))),
        ("index names an absolute path", "SH0310", index(|json| json["weight_map"][UP] = json!("/etc/passwd"))),
        ("index names nothing", "SH0310", index(|json| json["weight_map"][UP] = json!(""))),
        ("index lacks a tensor", "SH0307", index(|json| {
            json["weight_map"].as_object_mut().unwrap().remove(UP);
        })),
        ("index has no map", "SH0302", index(|json| *json = json!({ "weights": {} }))),
        ("index is of numbers", "SH0302", index(|json| json["weight_map"][UP] = json!(1))),
    ]
}

/// Part of a pre-quantised weight.
fn part(suffix: &'static str, spoil: impl Fn(&mut Tensors, String) + 'static) -> Damage {
    change(MODEL, move |all| spoil(all, format!("{UP}{suffix}")))
}

fn state(from: &'static str, to: &'static str) -> Damage {
    part(".quant_state.bitsandbytes__nf4", move |all, name| {
        let state = all.get_mut(&name).unwrap();
        let text = String::from_utf8(state.bytes.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        state.bytes = text.replace(from, to).into_bytes();
        state.shape = vec![state.bytes.len()];
    })
}

fn nf4_cases() -> Vec<(&'static str, &'static str, Damage)> {
    vec![
        ("state is no JSON", "SH0311", state("{", "")),
        ("state is of another type", "SH0311", state("\"nf4\"", "\"fp4\"")),
        ("state has an odd block size", "SH0311", state("\"blocksize\": 64", "\"blocksize\": 63")),
        ("state has a block size of 0", "SH0311", state("\"blocksize\": 64", "\"blocksize\": 0")),
        ("state has another shape", "SH0308", state("[176, 64]", "[64, 176]")),
        (
            "state has other nested blocks",
            "SH0311",
            state("\"nested_blocksize\": 256", "\"nested_blocksize\": 128"),
        ),
        ("state has no offset", "SH0311", state("\"nested_offset\"", "\"offset\"")),
        ("state has another nested dtype", "SH0311", state("\"float32\"", "\"float16\"")),
        (
            "state is of type fp4 by name",
            "SH0311",
            part(".quant_state.bitsandbytes__nf4", |all, name| {
                let state = all.remove(&name).unwrap();
                all.insert(name.replace("nf4", "fp4"), state);
            }),
        ),
        (
            "state is gone",
            "SH0308",
            part(".quant_state.bitsandbytes__nf4", |all, name| drop(all.remove(&name))),
        ),
        (
            "other code book",
            "SH0311",
            part(".quant_map", |all, name| all.get_mut(&name).unwrap().bytes[0] ^= 1),
        ),
        (
            "code book is short",
            "SH0308",
            part(".quant_map", |all, name| {
                all.insert(name, floats(&[15], 0.0));
            }),
        ),
        ("no scales", "SH0307", part(".absmax", |all, name| drop(all.remove(&name)))),
        (
            "too few scales",
            "SH0308",
            part(".absmax", |all, name| {
                let scales = all.get_mut(&name).unwrap();
                scales.bytes.pop();
                scales.shape = vec![scales.bytes.len()];
            }),
        ),
        (
            "scales are f32 but doubly quantised",
            "SH0309",
            part(".absmax", |all, name| {
                all.insert(name, floats(&[176], 1.0));
            }),
        ),
        (
            "nested scale is not a number",
            "SH0312",
            part(".nested_absmax", |all, name| {
                all.insert(name, floats(&[1], f32::NAN));
            }),
        ),
        ("no nested map", "SH0307", part(".nested_quant_map", |all, name| drop(all.remove(&name)))),
        (
            "codes are short",
            "SH0311",
            part("", |all, name| {
                let codes = all.get_mut(&name).unwrap();
                codes.bytes.pop();
                codes.shape = vec![codes.bytes.len(), 1];
            }),
        ),
    ]
}

#[test]
fn every_damaged_base_gives_its_code() {
    let dense = dense_cases().into_iter().map(|case| ("models/llama", case));
    let nf4 = nf4_cases().into_iter().map(|case| ("nf4/checkpoint_double/model", case));
    let mut wrong = Vec::new();
    for (source, (case, code, damage)) in dense.chain(nf4) {
        let folder = spoilt(source, &damage);
        for nf4 in [None, Some(Nf4Options::default())] {
            match ResidentBase::load(folder.path(), nf4, &mut |_| {}) {
                Ok(_) => wrong.push(format!("{case}: loaded")),
                Err(error) if error.code() != code => {
                    wrong.push(format!("{case}: {} instead of {code}: {error}", error.code()));
                }
                Err(error) => assert_presentable(case, &error, folder.path()),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_block_size_that_cannot_be_is_told() {
    for block_size in [0, 16, 48, 8192] {
        let options = Some(Nf4Options { block_size, double: true });
        let error = ResidentBase::load(&reference("models/llama"), options, &mut |_| {}).unwrap_err();
        assert_eq!(error.code(), "SH0313");
    }
}

#[test]
fn a_json_mistake_has_line_and_column() {
    let folder = spoilt("models/llama", &write("config.json", "{\n  \"model_type\": llama\n}"));
    let diagnostic = ModelConfig::load(folder.path()).unwrap_err().diagnostic();
    assert_eq!((diagnostic.line, diagnostic.column), (Some(2), Some(17)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever bytes change, the answer is a base or an error.
    #[test]
    fn random_damage_never_panics(
        places in prop::collection::vec((0.0_f64..1.0, any::<u8>()), 1..8), header in any::<bool>(), cut in prop::option::of(0.0_f64..1.0),
    ) {
        let folder = spoilt("nf4/checkpoint_double/model", &bytes(MODEL, move |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
            let end = if header { length } else { bytes.len() };
            for (place, byte) in &places {
                bytes[(place * end as f64) as usize] = *byte;
            }
            if let Some(cut) = cut {
                bytes.truncate((cut * bytes.len() as f64) as usize);
            }
        }));
        if let Err(error) = ResidentBase::load(folder.path(), Some(Nf4Options::default()), &mut |_| {}) {
            assert_presentable("random", &error, folder.path());
        }
    }
}
