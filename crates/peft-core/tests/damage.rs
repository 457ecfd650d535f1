//! Damaged and impossible folders: each gives its code, names its file, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{fs, path::Path};

use common::{copy_folder, reference, tensors};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use shanty_diagnostic::Diagnose as _;
use shanty_peft_core::{
    Error,
    adapter::AdapterFolder,
    model::{ModelConfig, ResidentBase},
    quant::Nf4Options,
};

type Damage = Box<dyn Fn(&Path)>;

/// Changes `config.json` or `adapter_config.json`.
fn json_file(file: &'static str, change: impl Fn(&mut Value) + 'static) -> Damage {
    Box::new(move |folder| {
        let path = folder.join(file);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    })
}

/// Sets one key of `config.json`.
fn config(key: &'static str, value: Value) -> Damage {
    json_file("config.json", move |json| json[key] = value.clone())
}

/// Sets one key of `adapter_config.json`.
fn setting(key: &'static str, value: Value) -> Damage {
    json_file("adapter_config.json", move |json| json[key] = value.clone())
}

fn write(file: &'static str, bytes: impl AsRef<[u8]> + 'static) -> Damage {
    Box::new(move |folder| fs::write(folder.join(file), bytes.as_ref()).unwrap())
}

fn remove(file: &'static str) -> Damage {
    Box::new(move |folder| fs::remove_file(folder.join(file)).unwrap())
}

/// Changes the bytes of a file.
fn bytes(file: &'static str, change: impl Fn(&mut Vec<u8>) + 'static) -> Damage {
    Box::new(move |folder| {
        let path = folder.join(file);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    })
}

/// Rewrites a safetensors file with a header of its own.
fn header(file: &'static str, text: &'static [u8]) -> Damage {
    bytes(file, move |bytes| {
        *bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text);
        bytes.extend([0; 64]);
    })
}

type Tensors = std::collections::BTreeMap<String, common::Stored>;

/// Changes the tensors of a file, which stays sound.
fn change(file: &'static str, change: impl Fn(&mut Tensors) + 'static) -> Damage {
    Box::new(move |folder| {
        let path = folder.join(file);
        let mut all = tensors(&path);
        change(&mut all);
        save(&path, &all);
    })
}

fn save(path: &Path, all: &Tensors) {
    let views = all.iter().map(|(name, tensor)| {
        (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn floats(shape: &[usize], value: f32) -> common::Stored {
    let count = shape.iter().product::<usize>();
    let bytes = (0..count).flat_map(|_| value.to_le_bytes()).collect();
    common::Stored { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
}

/// Makes a shard and an index from the single file; `change` may spoil the index.
fn index(change: impl Fn(&mut Value) + 'static) -> Damage {
    Box::new(move |folder| {
        let single = folder.join("model.safetensors");
        let names =
            tensors(&single).into_keys().map(|name| (name, Value::from("shard-1.safetensors"))).collect();
        fs::rename(single, folder.join("shard-1.safetensors")).unwrap();
        let mut json = json!({ "weight_map": Value::Object(names) });
        change(&mut json);
        fs::write(folder.join("model.safetensors.index.json"), json.to_string()).unwrap();
    })
}

const MODEL: &str = "model.safetensors";
const ADAPTER: &str = "adapter_model.safetensors";
const UP: &str = "model.layers.0.mlp.up_proj.weight";
const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

/// Spoils the header's length word.
fn length_word(file: &'static str, length: u64) -> Damage {
    bytes(file, move |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()))
}

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

fn adapter_cases() -> Vec<(&'static str, &'static str, Damage)> {
    let unsupported = |key, value| ("option", "SH0405", setting(key, value));
    let mut cases = vec![
        ("no configuration", "SH0401", remove("adapter_config.json")),
        ("no tensors", "SH0401", remove(ADAPTER)),
        (
            "only a pickle",
            "SH0417",
            Box::new(|folder: &Path| {
                fs::rename(folder.join(ADAPTER), folder.join("adapter_model.bin")).unwrap();
            }) as Damage,
        ),
        ("configuration is no JSON", "SH0402", write("adapter_config.json", "{'peft_type': 'LORA'}")),
        ("configuration is cut", "SH0402", bytes("adapter_config.json", |bytes| bytes.truncate(40))),
        ("configuration is a list", "SH0403", write("adapter_config.json", "[]")),
        ("no method", "SH0403", setting("peft_type", Value::Null)),
        ("other method", "SH0404", setting("peft_type", json!("VERA"))),
        ("the tensors of another method", "SH0413", setting("peft_type", json!("IA3"))),
        ("rank is zero", "SH0403", setting("r", json!(0))),
        ("rank is negative", "SH0403", setting("r", json!(-4))),
        ("rank is a text", "SH0403", setting("r", json!("4"))),
        ("rank is a fraction", "SH0403", setting("r", json!(4.5))),
        ("rank is absurd", "SH0403", setting("r", json!(u64::MAX))),
        ("alpha is zero", "SH0403", setting("lora_alpha", json!(0))),
        ("alpha is a text", "SH0403", setting("lora_alpha", json!("8"))),
        ("everything is dropped", "SH0403", setting("lora_dropout", json!(1.0))),
        ("dropout is negative", "SH0403", setting("lora_dropout", json!(-0.1))),
        ("rank-stabilised is a number", "SH0403", setting("use_rslora", json!(1))),
        ("targets are a number", "SH0403", setting("target_modules", json!(3))),
        ("targets are numbers", "SH0403", setting("target_modules", json!([3]))),
        ("targets match nothing", "SH0406", setting("target_modules", json!(["c_attn"]))),
        ("no targets", "SH0406", setting("target_modules", json!([]))),
        (
            "targets match the head, the tensors do not",
            "SH0413",
            setting("target_modules", json!(["q_proj", "lm_head"])),
        ),
        ("targets match a norm", "SH0407", setting("target_modules", json!(["q_proj", "input_layernorm"]))),
        ("magnitudes are missing", "SH0413", setting("use_dora", json!(true))),
        ("a trained module is missing", "SH0413", setting("modules_to_save", json!(["lm_head"]))),
        ("a trained module is none", "SH0422", setting("modules_to_save", json!(["lm_heads"]))),
        ("a trained module has no weights", "SH0407", setting("modules_to_save", json!(["self_attn"]))),
        ("another rank in a pattern", "SH0411", setting("rank_pattern", json!({ "q_proj": 8 }))),
        ("rank zero in a pattern", "SH0403", setting("rank_pattern", json!({ "q_proj": 0 }))),
        ("a pattern of ranks is a list", "SH0403", setting("rank_pattern", json!([8]))),
        ("a pattern's name is no expression", "SH0408", setting("rank_pattern", json!({ "a)(b": 8 }))),
        ("a pattern of alphas holds texts", "SH0403", setting("alpha_pattern", json!({ "q_proj": "8" }))),
        (
            "everything is excluded",
            "SH0420",
            setting("exclude_modules", json!(["self_attn.q_proj", "v_proj"])),
        ),
        ("some is excluded, the tensors are there", "SH0414", setting("exclude_modules", json!(["v_proj"]))),
        ("fewer layers than tensors", "SH0414", setting("layers_to_transform", json!([0]))),
        ("one layer as a number", "SH0414", setting("layers_to_transform", json!(0))),
        ("no such layer", "SH0420", setting("layers_to_transform", json!([7]))),
        ("layers are texts", "SH0403", setting("layers_to_transform", json!(["0"]))),
        ("a name for layers without layers", "SH0403", setting("layers_pattern", json!("layers"))),
        ("B's bias is missing", "SH0413", setting("lora_bias", json!(true))),
        ("trained tokens are missing", "SH0413", setting("trainable_token_indices", json!([1]))),
        (
            "a trained token is beyond the vocabulary",
            "SH0403",
            setting("trainable_token_indices", json!([288])),
        ),
        (
            "trained tokens of another module",
            "SH0403",
            setting("trainable_token_indices", json!({ "lm_head": [1] })),
        ),
        ("bias is another word", "SH0403", setting("bias", json!("some"))),
        ("targets match all", "SH0407", setting("target_modules", json!(".*"))),
        ("targets are no expression", "SH0408", setting("target_modules", json!("(q_proj"))),
        ("targets take forever", "SH0408", setting("target_modules", json!(r"(?:(.*)(?:\1|.)*)*z"))),
        ("tensors are empty", "SH0410", write(ADAPTER, "")),
        ("tensors are cut", "SH0410", bytes(ADAPTER, |bytes| bytes.truncate(bytes.len() - 1))),
        ("header is hostile", "SH0410", length_word(ADAPTER, u64::MAX / 2)),
        ("rank was changed", "SH0411", setting("r", json!(5))),
        ("tensor is transposed", "SH0411", change(ADAPTER, |all| all.get_mut(A).unwrap().shape.reverse())),
        (
            "tensor is of whole numbers",
            "SH0412",
            change(ADAPTER, |all| all.get_mut(A).unwrap().dtype = Dtype::I32),
        ),
        ("tensor is missing", "SH0413", change(ADAPTER, |all| drop(all.remove(A)))),
        (
            "another module is wanted",
            "SH0413",
            setting("target_modules", json!(["q_proj", "v_proj", "k_proj"])),
        ),
        (
            "tensor has no place",
            "SH0414",
            change(ADAPTER, |all| {
                all.insert(A.replace("layers.0", "layers.9"), floats(&[4, 64], 0.0));
            }),
        ),
        (
            "tensor is there twice",
            "SH0414",
            change(ADAPTER, |all| {
                let copy = all[A].clone();
                all.insert(A.replace(".weight", ".default.weight"), copy);
            }),
        ),
        (
            "magnitude of DoRA",
            "SH0414",
            change(ADAPTER, |all| {
                all.insert(A.replace("lora_A.weight", "lora_magnitude_vector"), floats(&[64], 1.0));
            }),
        ),
        (
            "names are in lower case",
            "SH0413",
            change(ADAPTER, |all| {
                let tensor = all.remove(A).unwrap();
                all.insert(A.to_lowercase(), tensor);
            }),
        ),
        (
            "names have no prefix",
            "SH0415",
            change(ADAPTER, |all| {
                *all = std::mem::take(all)
                    .into_iter()
                    .map(|(name, tensor)| (name.replace("base_model.model.", ""), tensor))
                    .collect();
            }),
        ),
        (
            "number is none",
            "SH0416",
            change(ADAPTER, |all| {
                all.get_mut(A).unwrap().bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }),
        ),
    ];
    cases.extend([
        unsupported("init_lora_weights", json!("pissa")),
        unsupported("task_type", json!("SEQ_CLS")),
        unsupported("fan_in_fan_out", json!(true)),
        unsupported("ensure_weight_tying", json!(true)),
        unsupported("target_parameters", json!(["experts"])),
    ]);
    cases
}

/// The error is fit to be shown: its code has a page, its message is one line without a full stop.
fn assert_presentable(case: &str, error: &Error, folder: &Path) {
    let diagnostic = error.diagnostic();
    let page =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../docs/errors/{}.md", diagnostic.code));
    assert!(page.exists(), "{case}: {} has no page", diagnostic.code);
    assert!(!diagnostic.message.ends_with('.'), "{case}: {}", diagnostic.message);
    assert!(!diagnostic.message.starts_with(char::is_uppercase), "{case}: {}", diagnostic.message);
    if let Some(file) = diagnostic.file {
        assert!(file.starts_with(folder), "{case}: {}", file.display());
    }
}

fn spoilt(source: &str, damage: &Damage) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&reference(source), folder.path());
    damage(folder.path());
    folder
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
fn every_damaged_adapter_gives_its_code() {
    let model = ModelConfig::load(&reference("models/llama")).unwrap();
    let mut wrong = Vec::new();
    for (case, code, damage) in adapter_cases() {
        let folder = spoilt("adapters/lora_qv/llama/adapter", &damage);
        let read = || {
            let adapter = AdapterFolder::open(folder.path())?;
            let fit = adapter.fit(&model)?;
            let mut parameters = vec![0.0; fit.layout().len()];
            adapter.read_into(fit.layout(), &mut parameters)
        };
        match read() {
            Ok(()) => wrong.push(format!("{case}: read")),
            Err(error) if error.code() != code => {
                wrong.push(format!("{case}: {} instead of {code}: {error}", error.code()));
            }
            Err(error) => assert_presentable(case, &error, folder.path()),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_undamaged_copies_are_fine() {
    let nothing: Damage = Box::new(|_| {});
    for source in ["models/llama", "nf4/checkpoint_double/model"] {
        ResidentBase::load(spoilt(source, &nothing).path(), None, &mut |_| {}).unwrap();
    }
    AdapterFolder::open(spoilt("adapters/lora_qv/llama/adapter", &nothing).path()).unwrap();
    // An index that is right.
    let folder = spoilt("models/llama", &index(|_| {}));
    ResidentBase::load(folder.path(), None, &mut |_| {}).unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_told() {
    let nowhere = Path::new("/nowhere/at/all");
    let error = ResidentBase::load(nowhere, None, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), "SH0301");
    assert!(error.diagnostic().hint.unwrap().contains("config.json"));
    assert_eq!(AdapterFolder::open(nowhere).unwrap_err().code(), "SH0401");
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

#[test]
fn a_failed_write_leaves_nothing_behind() {
    let source = AdapterFolder::open(&reference("adapters/lora_qv/llama/adapter")).unwrap();
    let model = ModelConfig::load(&reference("models/llama")).unwrap();
    let fit = source.fit(&model).unwrap();
    let parameters = vec![0.0; fit.layout().len()];
    let folder = tempfile::tempdir().unwrap();
    // A folder stands where the file should go: the rename fails.
    fs::create_dir(folder.path().join(ADAPTER)).unwrap();
    let write = || shanty_peft_core::adapter::files::write(folder.path(), &fit, &parameters, &[]);
    let error = write().unwrap_err();
    assert_eq!(error.code(), "SH0409");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [ADAPTER]);
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
