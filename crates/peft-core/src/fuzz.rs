//! What a fuzzer calls: any bytes go in, errors are fine; panics, endless loops and memory beyond what a header's own
//! length allows are not. `crates/fuzz` runs these.

use std::path::Path;

use shanty_gguf::Header;

use crate::{
    adapter::{Fit, config, registry::METHODS},
    model::{ModelConfig, gguf, weights::TensorFile},
};

/// A small decoder that adapters are fitted to.
const MODEL: &[u8] = br#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}"#;

/// Reads bytes as a safetensors file's header.
pub fn safetensors_header(bytes: &[u8]) {
    if let Ok(tensors) = TensorFile::check_bytes(bytes) {
        // What is sound lies inside the file.
        assert!(tensors.iter().all(|end| *end <= bytes.len() as u64));
    }
}

/// Reads bytes as a GGUF file's header, all its metadata, and the configuration that it stands for.
pub fn gguf(bytes: &[u8]) {
    let Ok(header) = Header::of_bytes(bytes) else { return };
    for key in header.keys() {
        if let Some(list) = header.get(key).and_then(|value| value.as_list()) {
            assert_eq!(list.iter().count(), list.len(), "a list holds what it says");
        }
    }
    for tensor in header.tensors() {
        assert!(tensor.start + tensor.bytes <= bytes.len() as u64, "a tensor lies inside the file");
    }
    drop(header);
    if let Ok(json) = gguf::config_of_bytes(bytes) {
        drop(ModelConfig::from_json(json.to_string().as_bytes(), Path::new("fuzz.gguf")));
    }
}

/// Reads bytes as an `adapter_config.json`, and fits the adapter to a small decoder.
pub fn adapter_config(bytes: &[u8]) {
    let Ok((method, _)) = config::read(bytes, Path::new("adapter_config.json"), METHODS) else { return };
    let model = ModelConfig::from_json(MODEL, Path::new("config.json")).expect("the model above is sound");
    drop(Fit::new(method, &model));
}
