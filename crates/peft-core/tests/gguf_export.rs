//! Models and adapters as GGUF, read back by candle.
#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor, quantized::gguf_file::Content};
use candle_transformers::models::quantized_llama::ModelWeights;
use common::{copy_folder, reference, relative};
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    Engine, EngineOptions,
    adapter_files::StoredAdapter,
    generate::LoadedAdapter,
    gguf_export::{self, Encoding},
    merge::{FoldedModel, Form, MergeOptions, SHARD_BYTES, merge},
    model::ModelConfig,
};
use tempfile::TempDir;

const IDS: [u32; 8] = [5, 17, 33, 120, 64, 7, 201, 9];
const ADAPTER: &str = "adapters/lora_all_linear/llama/adapter";

/// A base with its tokenizer.
fn base(model: &str) -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("base");
    copy_folder(&reference(model), &folder);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(reference("tokenizer").join(file), folder.join(file)).unwrap();
    }
    (place, folder)
}

fn export(base: &Path, adapter: Option<&LoadedAdapter>, encoding: Encoding, name: &str) -> PathBuf {
    let out = base.parent().unwrap().join(name);
    let model = FoldedModel::open(base, adapter, 1).unwrap();
    gguf_export::model(&model, base, &out, encoding, &mut |_, _| {}).unwrap();
    out
}

/// Logits of the last token by candle's own Llama.
fn by_candle(gguf: &Path) -> Vec<f32> {
    let mut reader = File::open(gguf).unwrap();
    let content = Content::read(&mut reader).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut reader, &Device::Cpu).unwrap();
    let ids = Tensor::from_slice(&IDS, (1, IDS.len()), &Device::Cpu).unwrap();
    model.forward(&ids, 0).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn by_shanty(base: &Path, adapter: Option<&LoadedAdapter>) -> Vec<f32> {
    let options = EngineOptions { threads: 1, ..EngineOptions::new(base, 32) };
    let mut engine = Engine::load(options, &mut |_| {}).unwrap();
    if let Some(adapter) = adapter {
        engine.adapt(adapter.fit().clone());
    }
    let logits = engine.logits(adapter.map(LoadedAdapter::parameters), &[IDS.to_vec()]).unwrap();
    let vocabulary = engine.config().vocabulary_size;
    logits[logits.len() - vocabulary..].to_vec()
}

fn adapter(base: &Path) -> LoadedAdapter {
    LoadedAdapter::open(&reference(ADAPTER), &ModelConfig::load(base).unwrap()).unwrap()
}

/// All tensors of a GGUF file, dequantised.
fn tensors(gguf: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut reader = File::open(gguf).unwrap();
    let content = Content::read(&mut reader).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    names
        .into_iter()
        .map(|name| {
            let tensor = content.tensor(&mut reader, &name, &Device::Cpu).unwrap();
            let tensor = tensor.dequantize(&Device::Cpu).unwrap();
            let values = tensor.flatten_all().unwrap().to_vec1().unwrap();
            (name, (tensor.dims().to_vec(), values))
        })
        .collect()
}

#[test]
fn candles_llama_gives_the_same_logits() {
    for model in ["models/llama", "models/llama_tied"] {
        let (place, base) = base(model);
        let adapter = (model == "models/llama").then(|| adapter(&base));
        let exact = export(&base, adapter.as_ref(), Encoding::F32, "f32.gguf");
        // f32 on both sides: the order of sums differs.
        let error = relative(&by_candle(&exact), &by_shanty(&base, adapter.as_ref()));
        assert!(error < 1e-4, "{model}: {error:e}");

        let half = export(&base, adapter.as_ref(), Encoding::F16, "f16.gguf");
        let rounded = place.path().join("rounded");
        let folded = FoldedModel::open(&base, adapter.as_ref(), 1).unwrap();
        let options = MergeOptions {
            base: base.clone(),
            out: rounded.clone(),
            form: Form::F16,
            shard_bytes: SHARD_BYTES,
            take_out: false,
        };
        merge(&folded, &options, &mut |_, _| {}).unwrap();
        // Norms stay f32 in GGUF and are rounded in the folder: 2^-12 of a factor near 1, through two layers.
        let error = relative(&by_candle(&half), &by_shanty(&rounded, None));
        assert!(error < 2e-3, "{model}: {error:e}");
    }
}

#[test]
fn every_family_comes_back_from_its_gguf() {
    let models = fs::read_dir(reference("models")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut written = Vec::new();
    for model in models {
        let model = model.to_str().unwrap().to_owned();
        let (_place, base) = base(&format!("models/{model}"));
        let Ok(folded) = FoldedModel::open(&base, None, 1) else { continue };
        let out = base.with_extension("gguf");
        if let Err(error) = gguf_export::model(&folded, &base, &out, Encoding::F32, &mut |_, _| {}) {
            assert_eq!(error.diagnostic().code, "SH0451", "{model}: {error}");
            continue;
        }
        // llama.cpp has no window in its Llama, which Mistral is to it: inside the window nothing differs.
        let error = relative(&by_shanty(&out, None), &by_shanty(&base, None));
        assert!(error < 1e-5, "{model}: {error:e}");
        written.push(model);
    }
    for family in ["llama", "llama_rope3", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2"] {
        assert!(written.iter().any(|model| model == family), "{family} is not among {written:?}");
    }
}

#[test]
fn fewer_bits_lose_what_they_must() {
    let (_place, base) = base("models/llama");
    let adapter = adapter(&base);
    let exact = tensors(&export(&base, Some(&adapter), Encoding::F32, "f32.gguf"));
    let logits = by_shanty(&base, Some(&adapter));
    // A step is 1/127 or 1/8 of a block's largest number, about three deviations of normal numbers; half of it is lost.
    for (encoding, name, most, far) in
        [(Encoding::Q8_0, "q8.gguf", 0.01, 0.1), (Encoding::Q4_0, "q4.gguf", 0.15, 1.0)]
    {
        let file = export(&base, Some(&adapter), encoding, name);
        let found = tensors(&file);
        assert_eq!(found.keys().collect::<Vec<_>>(), exact.keys().collect::<Vec<_>>());
        for (tensor, (shape, values)) in &found {
            let (expected_shape, expected) = &exact[tensor];
            assert_eq!(shape, expected_shape);
            let (lost, size) = values.iter().zip(expected).fold((0.0, 0.0), |(lost, size), (a, b)| {
                (lost + f64::from(a - b).powi(2), size + f64::from(*b).powi(2))
            });
            let loss = (lost / size).sqrt();
            match shape.len() {
                1 => assert_eq!(loss, 0.0, "{tensor} is f32"),
                _ if tensor == "output.weight" => assert!(loss < 0.01, "{tensor}: {loss}"),
                _ => assert!(loss > 1e-4 && loss < most, "{tensor}: {loss}"),
            }
        }
        let error = relative(&by_candle(&file), &logits);
        assert!(error < far, "{name}: {error}");
    }
}

#[test]
fn an_adapter_alone_has_the_merged_models_change() {
    let (place, base) = base("models/llama");
    let config = ModelConfig::load(&base).unwrap();
    for name in [ADAPTER, "adapters/rslora/llama/adapter", "adapters/lora_patterns/llama/adapter"] {
        let Ok(loaded) = LoadedAdapter::open(&reference(name), &config) else {
            assert_ne!(name, ADAPTER, "plain LoRA is there");
            continue;
        };
        let stored = StoredAdapter::open(&reference(name)).unwrap();
        let out = place.path().join("lora.gguf");
        let _ = fs::remove_file(&out);
        gguf_export::adapter(&stored, &config, &out, Encoding::F32).unwrap();
        let bare = tensors(&export(&base, None, Encoding::F32, &format!("{}.bare", name.replace('/', "-"))));
        let merged = tensors(&export(
            &base,
            Some(&loaded),
            Encoding::F32,
            &format!("{}.merged", name.replace('/', "-")),
        ));
        let mut reader = File::open(&out).unwrap();
        let content = Content::read(&mut reader).unwrap();
        let text = |key: &str| content.metadata[key].to_string().unwrap().clone();
        assert_eq!((text("general.type"), text("adapter.type")), ("adapter".to_owned(), "lora".to_owned()));
        assert_eq!(text("general.architecture"), "llama");
        let alpha = content.metadata["adapter.lora.alpha"].to_f32().unwrap();
        let factors = tensors(&out);
        let mut compared = 0;
        for (weight, (shape, values)) in &bare {
            let Some((a_shape, a)) = factors.get(&format!("{weight}.lora_a")) else { continue };
            let (_, b) = &factors[&format!("{weight}.lora_b")];
            let (rank, columns) = (a_shape[0], a_shape[1]);
            // As llama.cpp lays it on: W + alpha / rank · B A.
            let scale = alpha / rank as f32;
            let laid: Vec<f32> = (0..shape[0] * columns)
                .map(|at| {
                    let sum: f32 =
                        (0..rank).map(|k| b[at / columns * rank + k] * a[k * columns + at % columns]).sum();
                    values[at] + scale * sum
                })
                .collect();
            let error = relative(&laid, &merged[weight].1);
            assert!(error < 1e-6, "{name}: {weight} {error:e}");
            compared += 1;
        }
        assert_eq!(2 * compared, factors.len(), "{name}");
    }
}

#[test]
fn the_tokenizer_comes_along() {
    let (_place, base) = base("models/llama");
    let file = export(&base, None, Encoding::F16, "f16.gguf");
    let content = Content::read(&mut File::open(&file).unwrap()).unwrap();
    let text = |key: &str| content.metadata[key].to_string().unwrap().as_str();
    assert_eq!((text("tokenizer.ggml.model"), text("tokenizer.ggml.pre")), ("gpt2", "llama-bpe"));
    let tokens = content.metadata["tokenizer.ggml.tokens"].to_vec().unwrap();
    let kinds = content.metadata["tokenizer.ggml.token_type"].to_vec().unwrap();
    assert_eq!((tokens.len(), kinds.len()), (288, 288));
    assert_eq!(tokens[1].to_string().unwrap(), "<s>");
    assert_eq!(kinds[1].to_i32().unwrap(), 3, "a control token");
    assert_eq!(content.metadata["tokenizer.ggml.merges"].to_vec().unwrap().len(), 21);
    assert_eq!(content.metadata["tokenizer.ggml.bos_token_id"].to_u32().unwrap(), 1);
    assert!(content.metadata["tokenizer.ggml.add_bos_token"].to_bool().unwrap());
}

#[test]
fn what_llama_cpp_cannot_hold_is_refused() {
    let (place, base) = base("models/llama");
    let config = ModelConfig::load(&base).unwrap();
    let out = place.path().join("out.gguf");
    for name in [
        "adapters/dora/llama/adapter",
        "adapters/ia3/llama/adapter",
        "adapters/lora_modules_to_save/llama/adapter",
    ] {
        let stored = StoredAdapter::open(&reference(name)).unwrap();
        let error = gguf_export::adapter(&stored, &config, &out, Encoding::F32).unwrap_err();
        assert_eq!(error.diagnostic().code, "SH0451", "{name}: {error}");
    }
    fs::write(base.join("tokenizer.json"), r#"{"model": {"type": "Unigram"}}"#).unwrap();
    let model = FoldedModel::open(&base, None, 1).unwrap();
    let error = gguf_export::model(&model, &base, &out, Encoding::F16, &mut |_, _| {}).unwrap_err();
    assert_eq!(error.diagnostic().code, "SH0451", "{error}");
    assert!(!out.exists());
}
