//! Damaged adapters: settings, targets, headers, tensors.

use std::{fs, path::Path};

use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use shanty_peft_core::{adapter::AdapterFolder, model::ModelConfig};

use crate::{
    common::reference,
    scene::{
        A, ADAPTER, Damage, assert_presentable, bytes, change, floats, length_word, remove, setting, spoilt,
        write,
    },
};

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
