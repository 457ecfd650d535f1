//! The folder's two files, read whole and written whole.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value};

use super::keys::Key;
use crate::{
    adapter::files::{BASE_HASH, CONFIG_FILE, TENSORS_FILE},
    error::{Error, Origin, Result},
    model::weights::TensorFile,
    use_error::UseError,
};

/// A tensor, widened to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// What it is stored as: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub values: Vec<f32>,
}

impl StoredTensor {
    /// A tensor that will be stored as f32.
    pub fn f32(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        Self { dtype: Dtype::F32, shape: shape.into(), values }
    }

    /// Its bytes as they are stored; numbers are rounded to nearest.
    pub fn bytes(&self) -> Vec<u8> {
        to_bytes(self.dtype, &self.values)
    }
}

/// Little-endian bytes of numbers in a dtype, rounded to nearest.
pub(crate) fn to_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// An adapter's folder in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredAdapter {
    /// Where it was read.
    pub folder: PathBuf,
    /// `adapter_config.json`.
    pub config: Map<String, Value>,
    /// Tensors under PEFT's names, whatever the file's style.
    pub tensors: BTreeMap<Key, StoredTensor>,
    /// Names as the file has them, where they are not PEFT's.
    pub foreign_names: Vec<String>,
    /// Hash of the base that it was trained on, where the file says it.
    pub base_hash: Option<String>,
}

impl StoredAdapter {
    /// Reads a folder.
    ///
    /// # Errors
    /// A file is missing or damaged, the settings are no JSON object, or two names mean the same tensor.
    pub fn open(folder: &Path) -> Result<Self> {
        let file = folder.join(CONFIG_FILE);
        let text = fs::read(&file).map_err(|source| Error::Read {
            origin: Origin::Adapter,
            file: file.clone(),
            source,
        })?;
        let config = serde_json::from_slice(&text).map_err(|source| Error::Json {
            origin: Origin::Adapter,
            file: file.clone(),
            source,
        })?;
        let path = folder.join(TENSORS_FILE);
        if !path.exists() && folder.join("adapter_model.bin").exists() {
            return Err(Error::OnlyPickles { origin: Origin::Adapter, folder: folder.to_owned() });
        }
        let stored = TensorFile::open(&path, Origin::Adapter)?;
        let mut tensors = BTreeMap::new();
        let mut foreign_names = Vec::new();
        for name in stored.names() {
            let Some(tensor) = stored.tensor(name) else { continue };
            let mut values = vec![0.0; tensor.elements()];
            tensor.read_f32(&mut values, &mut |_| {})?;
            let key = Key::parse(name);
            if key.peft() != name {
                foreign_names.push(name.to_owned());
            }
            let read = StoredTensor { dtype: tensor.dtype(), shape: tensor.shape().to_vec(), values };
            if tensors.insert(key.clone(), read).is_some() {
                let problem = format!("is there twice: another name means `{}` too", key.peft());
                return Err(UseError::TensorName { file: path, tensor: name.to_owned(), problem }.into());
            }
        }
        let base_hash = stored.metadata(BASE_HASH);
        Ok(Self { folder: folder.to_owned(), config, tensors, foreign_names, base_hash })
    }

    /// Writes it as PEFT would.
    ///
    /// # Errors
    /// There is an adapter already, or the folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.write_named(folder, Key::peft)
    }

    /// Writes it under other names.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_named(&self, folder: &Path, name: impl Fn(&Key) -> String) -> Result<()> {
        for file in [CONFIG_FILE, TENSORS_FILE] {
            if folder.join(file).exists() {
                return Err(UseError::OutputTaken { path: folder.join(file) }.into());
            }
        }
        let unwritable =
            |file: &Path, source| Error::Write { origin: Origin::Adapter, file: file.to_owned(), source };
        let path = folder.join(TENSORS_FILE);
        let laid_out = |error: safetensors::SafeTensorError| unwritable(&path, std::io::Error::other(error));
        let bytes: Vec<(String, &StoredTensor, Vec<u8>)> =
            self.tensors.iter().map(|(key, tensor)| (name(key), tensor, tensor.bytes())).collect();
        let views = bytes
            .iter()
            .map(|(name, tensor, bytes)| {
                Ok((name.as_str(), TensorView::new(tensor.dtype, tensor.shape.clone(), bytes)?))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(laid_out)?;
        let mut metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        metadata.extend(self.base_hash.iter().map(|hash| (BASE_HASH.to_owned(), hash.clone())));
        let file = safetensors::serialize(views, Some(metadata)).map_err(laid_out)?;
        fs::create_dir_all(folder).map_err(|source| unwritable(folder, source))?;
        fs::write(&path, file).map_err(|source| unwritable(&path, source))?;
        let mut config = self.config.clone();
        config.sort_keys();
        let path = folder.join(CONFIG_FILE);
        fs::write(&path, format!("{:#}", Value::Object(config))).map_err(|source| unwritable(&path, source))
    }

    /// PEFT's name of its method; empty where the settings do not say.
    pub fn method(&self) -> &str {
        self.config.get("peft_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// Numbers in all tensors.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(|tensor| tensor.values.len()).sum()
    }

    /// A tensor of a module.
    pub fn tensor(&self, module: &str, suffix: &str) -> Option<&StoredTensor> {
        self.tensors.get(&Key { module: module.to_owned(), suffix: suffix.to_owned() })
    }

    /// Modules that have a tensor of this name, sorted.
    pub fn modules_with(&self, suffix: &str) -> Vec<&str> {
        let own = self.tensors.keys().filter(|key| key.suffix == suffix);
        own.map(|key| key.module.as_str()).collect()
    }

    /// An error about a setting.
    pub(crate) fn wrong(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::AdapterSetting {
            file: Some(self.folder.join(CONFIG_FILE)),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|value| value.is_finite())
                .ok_or_else(|| self.wrong(key, format!("is {value}, not a number"))),
        }
    }

    /// Rank and scale of LoRA on a module: `rank_pattern`, `alpha_pattern` and `use_rslora` included.
    ///
    /// # Errors
    /// A setting is not what it should be.
    pub fn lora_scale(&self, module: &str) -> Result<(usize, f64)> {
        let pattern = |key: &str| -> Result<Option<f64>> {
            let Some(patterns) = self.config.get(key).and_then(Value::as_object) else { return Ok(None) };
            for (pattern, value) in patterns {
                // PEFT's rule: the last parts of the name, as a regular expression.
                let regex = fancy_regex::Regex::new(&format!(r"\A(?:.*\.)?(?:{pattern})\z"))
                    .map_err(|error| self.wrong(key, format!("holds {pattern:?}: {error}")))?;
                let matches = regex
                    .is_match(module)
                    .map_err(|error| self.wrong(key, format!("holds {pattern:?}: {error}")))?;
                if matches {
                    return value.as_f64().map(Some).ok_or_else(|| self.wrong(key, format!("holds {value}")));
                }
            }
            Ok(None)
        };
        let r = pattern("rank_pattern")?.map_or_else(|| self.number("r", 8.0), Ok)?;
        let alpha = pattern("alpha_pattern")?.map_or_else(|| self.number("lora_alpha", 8.0), Ok)?;
        if !(1.0..=1e6).contains(&r) {
            return Err(self.wrong("r", format!("is {r}")));
        }
        let stabilised = self.config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Ok((r as usize, alpha / if stabilised { r.sqrt() } else { r }))
    }
}
