//! How files are spoilt, and what every error must look like.

use std::{fs, path::Path};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use shanty_diagnostic::Diagnose as _;
use shanty_peft_core::Error;

use crate::common::{self, copy_folder, reference, tensors};

/// What spoils a folder.
pub type Damage = Box<dyn Fn(&Path)>;

/// Changes `config.json` or `adapter_config.json`.
pub fn json_file(file: &'static str, change: impl Fn(&mut Value) + 'static) -> Damage {
    Box::new(move |folder| {
        let path = folder.join(file);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    })
}

/// Sets one key of `config.json`.
pub fn config(key: &'static str, value: Value) -> Damage {
    json_file("config.json", move |json| json[key] = value.clone())
}

/// Sets one key of `adapter_config.json`.
pub fn setting(key: &'static str, value: Value) -> Damage {
    json_file("adapter_config.json", move |json| json[key] = value.clone())
}

pub fn write(file: &'static str, bytes: impl AsRef<[u8]> + 'static) -> Damage {
    Box::new(move |folder| fs::write(folder.join(file), bytes.as_ref()).unwrap())
}

pub fn remove(file: &'static str) -> Damage {
    Box::new(move |folder| fs::remove_file(folder.join(file)).unwrap())
}

/// Changes the bytes of a file.
pub fn bytes(file: &'static str, change: impl Fn(&mut Vec<u8>) + 'static) -> Damage {
    Box::new(move |folder| {
        let path = folder.join(file);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    })
}

/// Rewrites a safetensors file with a header of its own.
pub fn header(file: &'static str, text: &'static [u8]) -> Damage {
    bytes(file, move |bytes| {
        *bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text);
        bytes.extend([0; 64]);
    })
}

pub type Tensors = std::collections::BTreeMap<String, common::Stored>;

/// Changes the tensors of a file, which stays sound.
pub fn change(file: &'static str, change: impl Fn(&mut Tensors) + 'static) -> Damage {
    Box::new(move |folder| {
        let path = folder.join(file);
        let mut all = tensors(&path);
        change(&mut all);
        save(&path, &all);
    })
}

pub fn save(path: &Path, all: &Tensors) {
    let views = all.iter().map(|(name, tensor)| {
        (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

pub fn floats(shape: &[usize], value: f32) -> common::Stored {
    let count = shape.iter().product::<usize>();
    let bytes = (0..count).flat_map(|_| value.to_le_bytes()).collect();
    common::Stored { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
}

/// Makes a shard and an index from the single file; `change` may spoil the index.
pub fn index(change: impl Fn(&mut Value) + 'static) -> Damage {
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

pub const MODEL: &str = "model.safetensors";
pub const ADAPTER: &str = "adapter_model.safetensors";
pub const UP: &str = "model.layers.0.mlp.up_proj.weight";
pub const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

/// Spoils the header's length word.
pub fn length_word(file: &'static str, length: u64) -> Damage {
    bytes(file, move |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()))
}

/// The error is fit to be shown: its code has a page, its message is one line without a full stop.
pub fn assert_presentable(case: &str, error: &Error, folder: &Path) {
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

pub fn spoilt(source: &str, damage: &Damage) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&reference(source), folder.path());
    damage(folder.path());
    folder
}
