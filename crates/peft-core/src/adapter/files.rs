//! The adapter's folder, as PEFT writes and reads it: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! PEFT warns, and goes on with random or unused numbers, where names do not fit. Here that is an error.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use safetensors::tensor::{Dtype, TensorView};

use super::{
    config,
    fit::Fit,
    layout::{PREFIX, ParameterLayout},
    method::{SavedTensor, SharedMethod},
    registry::{METHODS, Registration},
};
use crate::{
    error::{Error, Origin, Result},
    model::{ModelConfig, weights::TensorFile},
};

/// Settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// An adapter's folder, its settings read and its tensors not yet.
#[derive(Debug)]
pub struct AdapterFolder {
    method: SharedMethod,
    dropped: Vec<String>,
    tensors: TensorFile,
}

impl AdapterFolder {
    /// Opens a folder that PEFT or [`write()`] wrote.
    ///
    /// # Errors
    /// A file is missing or damaged, or the settings are not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with(folder, &[])
    }

    /// As [`Self::open`], with methods of other crates besides those that there are here.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(folder: &Path, methods: &[&Registration]) -> Result<Self> {
        let file = folder.join(CONFIG_FILE);
        let text = fs::read(&file).map_err(|source| Error::Read {
            origin: Origin::Adapter,
            file: file.clone(),
            source,
        })?;
        let known: Vec<&Registration> = METHODS.iter().chain(methods).copied().collect();
        let (method, dropped) = config::read(&text, &file, &known)?;
        let tensors = folder.join(TENSORS_FILE);
        if !tensors.exists() && folder.join("adapter_model.bin").exists() {
            return Err(Error::OnlyPickles { origin: Origin::Adapter, folder: folder.to_owned() });
        }
        Ok(Self { method, dropped, tensors: TensorFile::open(&tensors, Origin::Adapter)? })
    }

    /// Its method, with its settings.
    pub fn method(&self) -> &SharedMethod {
        &self.method
    }

    /// Fits it to a model.
    ///
    /// # Errors
    /// Its settings do not fit the model.
    pub fn fit(&self, model: &ModelConfig) -> Result<Fit> {
        Fit::new(self.method.clone(), model)
    }

    /// Keys of its settings that nothing here knows, sorted: worth a warning.
    pub fn dropped_keys(&self) -> &[String] {
        &self.dropped
    }

    /// Reads its tensors into a flat buffer of `layout`; f32, f16 and bf16 are widened.
    ///
    /// # Errors
    /// A tensor is missing, has no place in the layout, or is of the wrong shape or dtype.
    pub fn read_into(&self, layout: &ParameterLayout, parameters: &mut [f32]) -> Result<()> {
        expect_length(parameters, layout)?;
        let file = || self.tensors.path().to_owned();
        let mut stored: BTreeMap<String, &str> = BTreeMap::new();
        let mut unexpected = Vec::new();
        for name in self.tensors.names() {
            if stored.insert(without_adapter_name(name), name).is_some() {
                unexpected.push(name.to_owned());
            }
        }
        let mut missing = Vec::new();
        let mut found = Vec::new();
        for entry in layout.entries() {
            match stored.remove(&entry.peft_name).and_then(|name| self.tensors.tensor(name)) {
                Some(tensor) => found.push((entry, tensor)),
                None => missing.push(entry.peft_name.clone()),
            }
        }
        // PEFT keeps the frozen embedding itself beside an update of it; it is that of the base.
        stored.retain(|name, _| !is_frozen_embedding(name));
        let without_prefix: Vec<String> =
            stored.values().filter(|name| !name.starts_with(PREFIX)).map(|name| (*name).to_owned()).collect();
        if !without_prefix.is_empty() {
            return Err(Error::AdapterPrefix { file: file(), tensors: without_prefix });
        }
        unexpected.extend(stored.into_values().map(str::to_owned));
        if !missing.is_empty() {
            missing.sort();
            return Err(Error::MissingAdapterTensors { file: file(), tensors: missing });
        }
        if !unexpected.is_empty() {
            unexpected.sort();
            return Err(Error::UnexpectedAdapterTensors { file: file(), tensors: unexpected });
        }
        for (entry, tensor) in &found {
            tensor.expect_shape(&entry.shape)?;
            tensor.expect_float()?;
        }
        parameters.fill(0.0);
        for (entry, tensor) in found {
            let values = &mut parameters[entry.range.clone()];
            tensor.read_f32(values, &mut |_| {})?;
            if entry.shift != 0.0 {
                values.iter_mut().for_each(|value| *value += entry.shift);
            }
        }
        Ok(())
    }
}

/// `….lora_A.default.weight`, which other programs write, is `….lora_A.weight`.
fn without_adapter_name(name: &str) -> String {
    match name.strip_suffix(".default") {
        Some(rest) => rest.to_owned(),
        None => name.replacen(".default.", ".", 1),
    }
}

fn is_frozen_embedding(name: &str) -> bool {
    ["embed_tokens.base_layer.weight", "lm_head.base_layer.weight"].iter().any(|end| name.ends_with(end))
}

fn expect_length(parameters: &[f32], layout: &ParameterLayout) -> Result<()> {
    if parameters.len() == layout.len() {
        return Ok(());
    }
    Err(Error::Length { what: "the flat parameter buffer", found: parameters.len(), expected: layout.len() })
}

/// Writes a folder that PEFT opens without a warning. Both files appear whole or not at all, the settings last.
///
/// # Errors
/// The disk is full, the folder cannot be written, or `parameters` is not of `layout`.
pub fn write(folder: &Path, fit: &Fit, parameters: &[f32], state: &[f32]) -> Result<()> {
    let files = contents(fit, parameters, state)?;
    fs::create_dir_all(folder).map_err(|source| unwritable(folder, source))?;
    files.iter().try_for_each(|(name, content)| write_whole(&folder.join(name), content))
}

/// The files of such a folder, name and content, in the order in which they are to be written. `parameters` is of
/// [`Fit::trained`], `state` of [`super::Method::state`]; the bare base has no files.
///
/// # Errors
/// An impossible setting, or `parameters` is not of the fitted method.
pub fn contents(fit: &Fit, parameters: &[f32], state: &[f32]) -> Result<Vec<(String, Vec<u8>)>> {
    let Some(method) = fit.method() else { return Ok(Vec::new()) };
    method.check()?;
    expect_length(parameters, fit.trained())?;
    let mut made = Vec::new();
    let effective = match fit.network() {
        Some(network) => {
            made.resize(fit.layout().len(), 0.0);
            network.network.forward(parameters, None, &mut made)?;
            &made[..]
        }
        None => parameters,
    };
    let saved = method.saved(fit.layout(), effective, state)?;
    let tensors =
        serialise(&saved).map_err(|error| unwritable(Path::new(TENSORS_FILE), io::Error::other(error)))?;
    let settings = match fit.model() {
        Some(model) => config::to_json_on(&**method, model, fit.layout(), state),
        None => config::to_json(&**method, fit.layout(), state),
    }
    .into_bytes();
    Ok(vec![(TENSORS_FILE.to_owned(), tensors), (CONFIG_FILE.to_owned(), settings)])
}

fn serialise(saved: &[SavedTensor]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes: Vec<Cow<'_, [u8]>> = saved
        .iter()
        .map(|tensor| match cfg!(target_endian = "little") {
            true => Cow::Borrowed(bytemuck::cast_slice(&tensor.values)),
            false => Cow::Owned(tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        })
        .collect();
    let views = saved
        .iter()
        .zip(&bytes)
        .map(|(tensor, bytes)| {
            Ok((tensor.name.as_str(), TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize(views, Some(HashMap::from([("format".to_owned(), "pt".to_owned())])))
}

fn unwritable(file: &Path, source: io::Error) -> Error {
    Error::Write { origin: Origin::Adapter, file: file.to_owned(), source }
}

/// Writes under a temporary name in the same folder, brings it to the disk, then renames.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let result = write_synced(&temporary, bytes).and_then(|()| fs::rename(&temporary, path)).and_then(|()| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    });
    result.map_err(|source| {
        // What went wrong is told; a temporary that cannot be removed adds nothing to it.
        let _ = fs::remove_file(&temporary);
        unwritable(path, source)
    })
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
