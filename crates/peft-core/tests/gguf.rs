//! Bases in GGUF files: what candle's writer made of the reference models gives their logits, blocks are widened as candle
//! widens them, and files that do not hold together are refused by code.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use memory::{MemoryBase, Random, assert_close, case, floats, integers, reference, tensors, tolerance};
use shanty_peft_core::{
    Engine, EngineOptions, Error,
    model::{MemoryUse, ModelConfig, Projection, ResidentBase},
    quant::Nf4Options,
};

type Named = Vec<(String, Tensor)>;

/// A file as llama.cpp's converter would write it, but for the order of tensors.
struct Gguf {
    metadata: Vec<(String, Value)>,
    tensors: Named,
}

/// The name in GGUF of a tensor of safetensors.
fn name(from: &str, family: &str) -> String {
    let parts = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_attention_layernorm", if family == "gemma2" { "post_attention_norm" } else { "ffn_norm" }),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(from.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Rows of each head in pairs, as the converter's `permute` lays them.
fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
    let shape = tensor.dims().to_vec();
    let (rows, columns) = (shape[0] / heads, shape.get(1).copied().unwrap_or(1));
    let by_half = tensor.reshape((heads, 2, rows / 2, columns)).unwrap();
    by_half.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape).unwrap()
}

impl Gguf {
    fn of(config: &ModelConfig, stored: Vec<(String, Tensor)>) -> Self {
        let architecture = if config.family == "mistral" { "llama" } else { config.family };
        let key = |key: &str| format!("{architecture}.{key}");
        let whole = |number: usize| Value::U32(number as u32);
        let mut metadata = vec![
            ("general.architecture".to_owned(), Value::String(architecture.to_owned())),
            (key("block_count"), whole(config.layers)),
            (key("context_length"), whole(config.max_positions)),
            (key("embedding_length"), whole(config.hidden_size)),
            (key("feed_forward_length"), whole(config.intermediate_size)),
            (key("attention.head_count"), whole(config.attention_heads)),
            (key("attention.head_count_kv"), whole(config.key_value_heads)),
            (key("attention.key_length"), whole(config.head_dim)),
            (key("attention.value_length"), whole(config.head_dim)),
            (key("attention.layer_norm_rms_epsilon"), Value::F32(config.norm_epsilon as f32)),
            (key("rope.freq_base"), Value::F32(config.rope.theta as f32)),
            (key("rope.dimension_count"), whole(config.head_dim)),
        ];
        let caps = [
            ("attn_logit_softcapping", config.attention_soft_cap),
            ("final_logit_softcapping", config.logits_soft_cap),
        ];
        for (name, cap) in caps {
            metadata.extend(cap.map(|cap| (key(name), Value::F32(cap as f32))));
        }
        metadata.extend(config.windows[0].map(|window| (key("attention.sliding_window"), whole(window))));
        if config.attention_scale != (config.head_dim as f64).powf(-0.5) {
            metadata.push((key("attention.scale"), Value::F32(config.attention_scale as f32)));
        }
        let mut tensors: Named = stored
            .into_iter()
            .map(|(from, tensor)| {
                let mut tensor = tensor.to_dtype(candle_core::DType::F32).unwrap();
                if config.norms_less_one && from.contains("norm") {
                    tensor = (tensor + 1.0).unwrap();
                }
                if architecture == "llama" && from.contains("q_proj") {
                    tensor = interleave(&tensor, config.attention_heads);
                }
                if architecture == "llama" && from.contains("k_proj") {
                    tensor = interleave(&tensor, config.key_value_heads);
                }
                (name(&from, config.family), tensor)
            })
            .collect();
        let scaled = config.rope.inverse_frequencies(config.head_dim, 1);
        let theta = config.rope.theta as f32;
        let plain = |pair: usize| 1.0 / theta.powf(2.0 * pair as f32 / config.head_dim as f32);
        let factors: Vec<f32> =
            scaled.iter().enumerate().map(|(pair, scaled)| plain(pair) / scaled).collect();
        if factors.iter().any(|factor| (factor - 1.0).abs() > 1e-3) {
            let factors = Tensor::from_vec(factors, config.head_dim / 2, &Device::Cpu).unwrap();
            tensors.push(("rope_freqs.weight".to_owned(), factors));
        }
        Self { metadata, tensors }
    }

    /// Matrices stored as `dtype`, vectors as f32.
    fn write(&self, path: &Path, dtype: GgmlDType) -> Vec<(String, QTensor)> {
        let tensors: Vec<(String, QTensor)> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
                (name.clone(), QTensor::quantize(tensor, dtype).unwrap())
            })
            .collect();
        let named: Vec<(&str, &QTensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let metadata: Vec<(&str, &Value)> =
            self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let mut file = fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &named).unwrap();
        tensors
    }
}

fn engine(base: &Path) -> Engine {
    let options = EngineOptions { threads: 2, ..EngineOptions::new(base, 32) };
    Engine::load(options, &mut |_| {}).unwrap()
}

fn place(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("base.gguf")
}

#[test]
fn reference_models_give_their_logits_from_gguf() {
    for family in
        ["llama", "llama_tied", "llama_rope3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"]
    {
        let model = format!("models/{family}");
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig::load(&reference(&model)).unwrap();
        let stored = tensors(&reference(&model).join("model.safetensors")).into_iter().collect();
        Gguf::of(&config, stored).write(&place(&folder), GgmlDType::F32);
        let mut engine = engine(&place(&folder));
        let expected = tensors(&reference(&model).join("expected.safetensors"));
        let ids: Vec<u32> =
            integers(&expected["right.input_ids"]).into_iter().take(16).map(|id| id as u32).collect();
        let known = integers(&expected["right.attention_mask"]).iter().take(16).sum::<i64>() as usize;
        let got = engine.logits(None, &[ids[..known].to_vec()]).unwrap();
        let wanted = &floats(&expected["right.logits"])[..got.len()];
        assert_close(&model, &got, wanted, tolerance(&case(&model), "logits"));
    }
}

fn config() -> ModelConfig {
    let text = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128}"#;
    ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap()
}

/// Random tensors of a configuration.
fn random(config: &ModelConfig) -> Vec<(String, Tensor)> {
    let base = MemoryBase::random(config.clone(), 3);
    let shape_of = |name: &str, count: usize| {
        let columns = match name {
            _ if name.contains("norm") => return vec![count],
            _ if name.contains("down_proj") => config.intermediate_size,
            _ if name.contains("o_proj") => config.attention_heads * config.head_dim,
            _ => config.hidden_size,
        };
        vec![count / columns, columns]
    };
    let tensor = |(name, numbers): (&String, &Vec<f32>)| {
        let shape = shape_of(name, numbers.len());
        (name.clone(), Tensor::from_slice(numbers, shape, &Device::Cpu).unwrap())
    };
    base.tensors.iter().map(tensor).collect()
}

#[test]
fn blocks_are_widened_as_candle_widens_them_and_rows_put_back() {
    let kinds = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    let config = config();
    for kind in kinds {
        let folder = tempfile::tempdir().unwrap();
        let written = Gguf::of(&config, random(&config)).write(&place(&folder), kind);
        let base = ResidentBase::load(&place(&folder), None, &mut |_| {}).unwrap();
        assert!(base.unused_tensors().is_empty(), "{:?}", base.unused_tensors());
        let planned = MemoryUse::plan(&place(&folder), None).unwrap();
        assert_eq!(planned, base.memory());
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let wanted_name = name(&format!("{}.weight", projection.module(layer)), "llama");
                let (_, tensor) = written.iter().find(|(name, _)| *name == wanted_name).unwrap();
                let tensor = tensor.dequantize(&Device::Cpu).unwrap();
                let heads = match projection {
                    Projection::Q => Some(config.attention_heads),
                    Projection::K => Some(config.key_value_heads),
                    _ => None,
                };
                let wanted = match heads {
                    None => tensor,
                    Some(heads) => {
                        let (rows, columns) = tensor.dims2().unwrap();
                        let pairs = tensor.reshape((heads, rows / heads / 2, 2, columns)).unwrap();
                        pairs.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, columns)).unwrap()
                    }
                };
                let found = base.weights(layer).linear(projection).weight.as_f32().unwrap();
                let same = found.iter().zip(floats(&wanted)).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{kind:?} {wanted_name}");
            }
        }
    }
}

/// A q of more numbers than are read at once, its rows put back piece by piece.
#[test]
fn nf4_of_a_gguf_base_is_nf4_of_the_same_numbers_in_a_folder() {
    let text = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 512, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128}"#;
    let config = ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap();
    let stored = random(&config);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), text).unwrap();
    let all = stored.iter().cloned().collect();
    candle_core::safetensors::save(&all, folder.path().join("model.safetensors")).unwrap();
    Gguf::of(&config, stored).write(&place(&folder), GgmlDType::F32);
    let options = Some(Nf4Options::default());
    let wanted = ResidentBase::load(folder.path(), options, &mut |_| {}).unwrap();
    let found = ResidentBase::load(&place(&folder), options, &mut |_| {}).unwrap();
    assert!(wanted.packed(0).bytes() == found.packed(0).bytes(), "codes and scales differ");
}

#[test]
fn wrong_files_are_refused_by_code() {
    type Spoil = Box<dyn Fn(&mut Gguf)>;
    let set = |key: &'static str, value: Value| -> Spoil {
        Box::new(move |gguf| {
            gguf.metadata.retain(|(other, _)| other != key);
            gguf.metadata.push((key.to_owned(), value.clone()));
        })
    };
    let drop_key = |key: &'static str| -> Spoil {
        Box::new(move |gguf| gguf.metadata.retain(|(other, _)| other != key))
    };
    let drop_tensor = |name: &'static str| -> Spoil {
        Box::new(move |gguf| gguf.tensors.retain(|(other, _)| other != name))
    };
    let reshape = |name: &'static str, shape: [usize; 2]| -> Spoil {
        Box::new(move |gguf| {
            let (_, tensor) = gguf.tensors.iter_mut().find(|(other, _)| other == name).unwrap();
            *tensor = Tensor::zeros(&shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        })
    };
    let layers = Value::Array(vec![Value::U32(4), Value::U32(2)]);
    let cases: Vec<(&str, &str, Spoil)> = vec![
        ("another architecture", "SH0321", set("general.architecture", Value::String("mamba".into()))),
        ("no architecture", "SH0321", drop_key("general.architecture")),
        ("architecture is a number", "SH0321", set("general.architecture", Value::U32(7))),
        ("no layers", "SH0322", drop_key("llama.block_count")),
        ("layers are a text", "SH0322", set("llama.block_count", Value::String("2".into()))),
        ("layers are negative", "SH0322", set("llama.block_count", Value::I32(-2))),
        ("too many layers", "SH0303", set("llama.block_count", Value::U32(1 << 20))),
        ("no heads", "SH0322", set("llama.attention.head_count", Value::U32(0))),
        ("heads differ by layer", "SH0322", set("llama.attention.head_count_kv", layers)),
        ("heads do not divide", "SH0303", set("llama.attention.head_count_kv", Value::U32(3))),
        ("absurd width", "SH0322", set("llama.embedding_length", Value::U64(1 << 50))),
        ("experts", "SH0322", set("llama.expert_count", Value::U32(8))),
        ("values of another size", "SH0322", set("llama.attention.value_length", Value::U32(32))),
        ("part of a head rotates", "SH0322", set("llama.rope.dimension_count", Value::U32(32))),
        ("another scaling", "SH0322", set("llama.rope.scaling.type", Value::String("yarn".into()))),
        (
            "linear scaling without a factor",
            "SH0303",
            set("llama.rope.scaling.type", Value::String("linear".into())),
        ),
        ("epsilon is no number", "SH0322", set("llama.attention.layer_norm_rms_epsilon", Value::Bool(true))),
        ("epsilon is too large", "SH0303", set("llama.attention.layer_norm_rms_epsilon", Value::F32(2.0))),
        ("no embedding", "SH0322", drop_tensor("token_embd.weight")),
        ("no matrix", "SH0307", drop_tensor("blk.1.ffn_up.weight")),
        ("no norm", "SH0307", drop_tensor("output_norm.weight")),
        ("a matrix of another shape", "SH0308", reshape("blk.0.ffn_down.weight", [512, 256])),
        ("odd rows in a head", "SH0322", reshape("blk.0.attn_q.weight", [252, 256])),
        ("no rows at all", "SH0320", reshape("blk.0.attn_q.weight", [0, 256])),
    ];
    for (case, code, spoil) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut gguf = Gguf::of(&config(), random(&config()));
        spoil(&mut gguf);
        gguf.write(&place(&folder), GgmlDType::F32);
        let error = ResidentBase::load(&place(&folder), None, &mut |_| {}).expect_err(case);
        assert_eq!(error.code(), code, "{case}: {error}");
    }
}

#[test]
fn damage_is_told_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    Gguf::of(&config(), random(&config())).write(&place(&folder), GgmlDType::Q4_0);
    let sound = fs::read(place(&folder)).unwrap();
    let load = |bytes: &[u8]| -> Result<(), Error> {
        fs::write(place(&folder), bytes).unwrap();
        ResidentBase::load(&place(&folder), None, &mut |_| {}).map(|_| ())
    };
    for length in [0, 3, 4, 20, 100, 1000, sound.len() / 2] {
        assert_eq!(load(&sound[..length]).unwrap_err().code(), "SH0320", "{length} bytes");
    }
    // A scale that is no number, in every place where one may lie.
    let mut spoilt = sound.clone();
    let data = spoilt.len() / 2;
    spoilt[data..].fill(0xff);
    assert_eq!(load(&spoilt).unwrap_err().code(), "SH0312");
    // Header bytes changed at random: a base or an error, and never a panic.
    let mut random = Random::new(11);
    for _ in 0..200 {
        let mut spoilt = sound.clone();
        for _ in 0..1 + random.below(4) {
            let at = random.below(3000) as usize;
            spoilt[at] = random.below(256) as u8;
        }
        if let Err(error) = load(&spoilt) {
            assert!(error.code().starts_with("SH03"), "{error}");
        }
    }
}
