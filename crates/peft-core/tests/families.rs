//! What every family must do beyond the logits of short rows: windows, LongRoPE, generation by a cache, and what
//! candle-transformers makes of the same numbers.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{collections::HashMap, ops::ControlFlow, path::Path};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models;
use memory::{
    MemoryBase, Random, Setup, assert_close, case, floats, integers, padded_rows, reference, tensors,
    tolerance,
};
use shanty_peft_core::{
    Engine, EngineOptions,
    batch::Row,
    generate::SamplingOptions,
    model::{ModelConfig, families},
    quant::Nf4Options,
};

/// Rounding through two layers, as in the reference numbers.
const TOLERANCE: f64 = 1e-4;

const FIXTURES: [&str; 7] = [
    "mistral_window",
    "qwen2_window",
    "qwen3_window",
    "gemma2_window",
    "phi3_window",
    "phi3_longrope_short",
    "phi3_longrope_long",
];

fn engine(folder: &Path, max_length: usize) -> Engine {
    let options = EngineOptions { threads: 2, ..EngineOptions::new(folder, max_length) };
    Engine::load(options, &mut |_| {}).unwrap()
}

#[test]
fn windows_and_long_positions_are_transformers_own() {
    for name in FIXTURES {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
        let expected = tensors(&folder.join("expected.safetensors"));
        let ids: Vec<u32> = integers(&expected["ids"]).into_iter().map(|id| id as u32).collect();
        let mut engine = engine(&folder, ids.len());
        let got = engine.logits(None, std::slice::from_ref(&ids)).unwrap();
        assert_close(name, &got, &floats(&expected["logits"]), TOLERANCE);
        let loss = engine.evaluate_base(&[Row::whole(0, ids)]).unwrap().mean() as f32;
        assert_close(name, &[loss], &floats(&expected["loss"]), 1e-5);
    }
}

#[test]
fn an_unknown_family_is_told_what_there_is() {
    let error = ModelConfig::from_json(br#"{"model_type": "mamba"}"#, "config.json".as_ref()).unwrap_err();
    let text = error.to_string();
    assert_eq!(families::names(), ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"]);
    assert!(families::names().iter().all(|name| text.contains(name)), "{text}");
}

/// Names of models whose greedy continuation is compared.
const MODELS: [&str; 9] =
    ["llama", "llama_tied", "llama_rope3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"];

/// Token by token over a cache, or all at once: the same logits, and so the same tokens.
#[test]
fn a_cache_continues_as_the_whole_row_would() {
    let windows = FIXTURES[..5]
        .iter()
        .map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name));
    for folder in MODELS.map(|name| reference(&format!("models/{name}"))).into_iter().chain(windows) {
        let mut engine = engine(&folder, 48);
        let mut ids: Vec<u32> = vec![5, 17, 33, 60, 7, 12, 40];
        let options = SamplingOptions { temperature: 0.0, max_tokens: 24, ..SamplingOptions::default() };
        let found = engine.generate(None, &ids, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(found.len(), 24);
        let vocabulary = engine.config().vocabulary_size;
        for token in found {
            let logits = engine.logits(None, std::slice::from_ref(&ids)).unwrap();
            let last = &logits[logits.len() - vocabulary..];
            let best = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // Where two are as likely but for rounding, either may be taken.
            assert!(last[token as usize] >= best - 1e-4 * best.abs(), "{}", folder.display());
            ids.push(token);
        }
    }
}

/// The tensors of a base as candle-transformers reads them.
fn variables(base: &MemoryBase) -> VarBuilder<'static> {
    let config = &base.config;
    let shape = |name: &str, count: usize| -> Vec<usize> {
        if name.ends_with("bias") || name.contains("norm") {
            return vec![count];
        }
        let projection =
            config.projections().iter().find(|item| name.contains(&format!(".{}.", item.name())));
        let columns = projection.map_or(config.hidden_size, |projection| config.shape(*projection)[1]);
        vec![count / columns, columns]
    };
    let tensor = |(name, numbers): (&String, &Vec<f32>)| {
        let shape = shape(name, numbers.len());
        let mut tensor = Tensor::from_slice(numbers, shape, &Device::Cpu).unwrap();
        if config.norms_less_one && name.contains("norm") {
            tensor = (tensor - 1.0).unwrap();
        }
        (name.clone(), tensor)
    };
    let tensors: HashMap<String, Tensor> = base.tensors.iter().map(tensor).collect();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

const COMMON: &str = r#""vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 5000.0, "max_window_layers": 9, "use_sliding_window": false, "tie_word_embeddings": false"#;

/// A family with its keys, and the last token's logits by candle-transformers.
struct Oracle {
    keys: &'static str,
    last: fn(&str, VarBuilder<'_>, &Tensor) -> candle_core::Result<Tensor>,
}

fn parsed<T: serde::de::DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap()
}

fn oracles() -> Vec<Oracle> {
    vec![
        Oracle {
            keys: r#""model_type": "llama""#,
            last: |text, variables, ids| {
                let config = parsed::<models::llama::LlamaConfig>(text).into_config(false);
                let mut cache = models::llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
                models::llama::Llama::load(variables, &config)?.forward(ids, 0, &mut cache)
            },
        },
        Oracle {
            keys: r#""model_type": "mistral", "head_dim": 12, "sliding_window": null, "hidden_act": "silu",
                "use_flash_attn": false"#,
            last: |text, variables, ids| {
                models::mistral::Model::new(&parsed(text), variables)?.forward(ids, 0)
            },
        },
        Oracle {
            keys: r#""model_type": "qwen2", "sliding_window": 64, "hidden_act": "silu""#,
            last: |text, variables, ids| {
                models::qwen2::ModelForCausalLM::new(&parsed(text), variables)?.forward(ids, 0)
            },
        },
        Oracle {
            keys: r#""model_type": "qwen3", "head_dim": 12, "attention_bias": false, "sliding_window": null,
                "hidden_act": "silu""#,
            last: |text, variables, ids| {
                models::qwen3::ModelForCausalLM::new(&parsed(text), variables)?.forward(ids, 0)
            },
        },
        Oracle {
            keys: r#""model_type": "gemma", "head_dim": 12, "attention_bias": false, "hidden_act": "gelu_pytorch_tanh""#,
            last: |text, variables, ids| {
                models::gemma::Model::new(false, &parsed(text), variables)?.forward(ids, 0)
            },
        },
        // It scales by the size of a head whatever query_pre_attn_scalar says.
        Oracle {
            keys: r#""model_type": "gemma2", "head_dim": 12, "attention_bias": false, "sliding_window": null,
                "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12"#,
            last: |text, variables, ids| {
                models::gemma2::Model::new(false, &parsed(text), variables)?.forward(ids, 0)
            },
        },
        Oracle {
            keys: r#""model_type": "phi3", "hidden_act": "silu""#,
            last: |text, variables, ids| models::phi3::Model::new(&parsed(text), variables)?.forward(ids, 0),
        },
    ]
}

#[test]
fn candle_transformers_makes_the_same_logits() {
    for Oracle { keys, last } in oracles() {
        let text = match keys.contains("gemma") {
            // Its head is always the embedding.
            true => COMMON.replace(r#""tie_word_embeddings": false"#, r#""tie_word_embeddings": true"#),
            false => COMMON.to_owned(),
        };
        let text = format!("{{{text}, {keys}}}");
        let config = ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap();
        let base = MemoryBase::random(config, 13);
        let mut random = Random::new(4);
        let ids: Vec<u32> = (0..23).map(|_| random.below(61)).collect();
        let input = Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu).unwrap();
        let wanted = floats(&last(&text, variables(&base), &input).unwrap());
        let mut engine = Setup::new(None).engine(base);
        let got = engine.logits(None, &[ids]).unwrap();
        assert_close(keys, &got[got.len() - 61..], &wanted, TOLERANCE);
    }
}

/// What bitsandbytes quantised keeps its codes, whatever is asked for, and gives the logits of the numbers they stand for.
#[test]
fn pre_quantised_bases_give_the_logits_of_their_numbers() {
    for name in ["nf4/checkpoint_double", "nf4/checkpoint_plain"] {
        let (case, expected) = (case(name), tensors(&reference(name).join("expected.safetensors")));
        let rows = padded_rows(&expected["right.input_ids"], &expected["right.attention_mask"], None);
        for quantization in
            [None, Some(Nf4Options::default()), Some(Nf4Options { block_size: 128, double: false })]
        {
            let options = EngineOptions {
                quantization,
                threads: 2,
                ..EngineOptions::new(reference(name).join("model"), 32)
            };
            let mut engine = Engine::load(options, &mut |_| {}).unwrap();
            let wanted = floats(&expected["right.logits.weights_f32"]);
            for (row, wanted) in rows.iter().zip(wanted.chunks(wanted.len() / rows.len())) {
                let got = engine.logits(None, std::slice::from_ref(&row.token_ids)).unwrap();
                assert_close(name, &got, &wanted[..got.len()], tolerance(&case, "logits"));
            }
        }
    }
}
