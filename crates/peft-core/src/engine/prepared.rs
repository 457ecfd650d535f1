//! Starts that are computed from the base as it is on disk (PiSSA, OLoRA, LoftQ): once, into a folder that every worker reads.
//!
//! The folder holds one file of safetensors for each adapted layer: A and B under PEFT's names and, where the start changes the
//! base, the changed weights under the base's. `start.json` is written last and makes the start exist; it names the
//! settings and the base by a hash, and every file by its own.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::EngineOptions;
use crate::{
    adapter::{AnyMethod, Fit, ParameterLayout, PreparedModule},
    backend::cpu::Cpu,
    error::{Error, Origin, Result},
    model::{ModelConfig, Module, Place, weights::ModelFiles, weights::TensorFile},
    quant::{Nf4Options, Nf4View, Scales, double, nf4},
};

/// What makes a start exist.
const MANIFEST: &str = "start.json";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    /// PEFT's word for the start.
    start: String,
    /// Hash of the settings and of what the base is.
    key: String,
    /// Hash of each file.
    files: BTreeMap<String, String>,
}

/// A start that lies ready.
#[derive(Debug)]
pub(super) struct Prepared {
    files: Vec<PathBuf>,
}

impl Prepared {
    /// Opens the start of `options`, or computes it where it is not there; none where the method needs none.
    pub(super) fn open(options: &EngineOptions, fit: &Fit, config: &ModelConfig) -> Result<Option<Self>> {
        let Some((method, start)) = fit.method().and_then(|method| Some((method, method.prepared_start()?)))
        else {
            return Ok(None);
        };
        let Some(folder) = &options.start else { return Err(Error::StartMissing { start }) };
        let key = key(options, fit, config)?;
        if !folder.join(MANIFEST).exists() {
            compute(options, &**method, start, fit, config, folder, &key)?;
        }
        Ok(Some(read(folder, &key)?))
    }

    /// Files whose tensors stand for those of the base.
    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// A and B where they lie in the flat parameters; all else is 0.
    pub(super) fn parameters(&self, layout: &ParameterLayout) -> Result<Vec<f32>> {
        let mut parameters = vec![0.0; layout.len()];
        for path in &self.files {
            let file = TensorFile::open(path, Origin::Adapter)?;
            for entry in layout.entries() {
                if let Some(tensor) = file.tensor(&entry.peft_name) {
                    tensor.expect_shape(&entry.shape)?;
                    tensor.read_f32(&mut parameters[entry.range.clone()], &mut |_| {})?;
                }
            }
        }
        Ok(parameters)
    }
}

/// What a start depends on. The base is named by its settings and the names and sizes of its files: what is computed from other
/// numbers of the same form is found out by the base's own hash, which checkpoints compare.
fn key(options: &EngineOptions, fit: &Fit, config: &ModelConfig) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(text.as_bytes());
        hasher.update(&[0]);
    };
    if let Some(method) = fit.method() {
        add(&crate::adapter::config::to_json(&**method, fit.layout(), &[]));
        add(method.prepared_start().unwrap_or_default());
    }
    add(&config.essentials());
    add(&format!("{:?}", options.quantization));
    let wrong = |source| Error::Read { origin: Origin::Base, file: options.base.clone(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(&options.base).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            files.push(format!("{name} {}", entry.metadata().map_err(wrong)?.len()));
        }
    }
    files.sort();
    files.iter().for_each(|file| add(file));
    Ok(hasher.finalize().to_hex().to_string())
}

fn read(folder: &Path, key: &str) -> Result<Prepared> {
    let file = folder.join(MANIFEST);
    let text = fs::read(&file).map_err(|source| Error::Read {
        origin: Origin::Adapter,
        file: file.clone(),
        source,
    })?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|source| Error::Json {
        origin: Origin::Adapter,
        file: file.clone(),
        source,
    })?;
    let another = || Error::StartOfAnother { folder: folder.to_owned() };
    if manifest.key != key {
        return Err(another());
    }
    let mut files = Vec::new();
    for (name, hash) in &manifest.files {
        // A file lies in the folder itself: a manifest may not reach elsewhere.
        if Path::new(name).file_name().is_none_or(|own| own != name.as_str()) {
            return Err(another());
        }
        let path = folder.join(name);
        if hash_of(&path)? != *hash {
            return Err(another());
        }
        files.push(path);
    }
    Ok(Prepared { files })
}

fn hash_of(path: &Path) -> Result<String> {
    let wrong = |source| Error::Read { origin: Origin::Adapter, file: path.to_owned(), source };
    let mut hasher = blake3::Hasher::new();
    let file = fs::File::open(path).map_err(wrong)?;
    hasher.update_reader(file).map_err(wrong)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Computes a start layer by layer into a folder beside, which then takes its name. Who is second finds it there.
fn compute(
    options: &EngineOptions,
    method: &dyn AnyMethod,
    start: &'static str,
    fit: &Fit,
    config: &ModelConfig,
    folder: &Path,
    key: &str,
) -> Result<()> {
    if config.stored_nf4 || options.base.is_file() {
        return Err(Error::StartNeedsWeights { start });
    }
    let cpu = Cpu::new(options.threads)?;
    let base = ModelFiles::open(&options.base)?;
    let wrong = |file: &Path| {
        let file = file.to_owned();
        move |source| Error::Write { origin: Origin::Adapter, file, source }
    };
    let mut name = folder.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    fs::create_dir_all(&temporary).map_err(wrong(&temporary))?;
    let mut files = BTreeMap::new();
    for layer in 0..config.layers {
        let modules = fit.layout().modules().iter().filter(|adapted| adapted.branch);
        let modules: Vec<&Module> = modules
            .map(|adapted| &adapted.module)
            .filter(|module| module.place == Place::Layer(layer))
            .collect();
        if modules.is_empty() {
            continue;
        }
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for module in modules {
            let stored = base.tensor(&format!("{}.weight", module.path))?;
            stored.expect_shape(&module.shape)?;
            let mut weight = vec![0.0; stored.elements()];
            stored.read_f32(&mut weight, &mut |_| {})?;
            let lost = options.quantization.map_or_else(Vec::new, |nf4| lost(&weight, module, nf4));
            let PreparedModule { tensors: own, residual } = method.prepare(&cpu, module, &weight, &lost)?;
            for (suffix, shape, values) in own {
                let name = format!("{}{}.{suffix}", crate::adapter::layout::PREFIX, module.path);
                tensors.push((name, Dtype::F32, shape, bytes(&values)));
            }
            if let Some(residual) = residual {
                // In the base's own numbers: what is trained on is what is kept.
                let (dtype, bytes) = match stored.dtype() {
                    Dtype::F32 => (Dtype::F32, bytes(&residual)),
                    _ => {
                        let halves = residual.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes());
                        (Dtype::BF16, halves.collect())
                    }
                };
                tensors.push((stored.name().to_owned(), dtype, module.shape.to_vec(), bytes));
            }
        }
        let name = format!("layer-{layer:05}.safetensors");
        let path = temporary.join(&name);
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)))
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
        let content = views.and_then(|views| safetensors::serialize(views, None));
        let content = content.map_err(|error| wrong(&path)(std::io::Error::other(error)))?;
        write(&path, &content).map_err(wrong(&path))?;
        files.insert(name, blake3::hash(&content).to_hex().to_string());
    }
    let manifest = Manifest { start: start.to_owned(), key: key.to_owned(), files };
    let path = temporary.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|error| wrong(&path)(error.into()))?;
    write(&path, &text).map_err(wrong(&path))?;
    if let Err(source) = fs::rename(&temporary, folder) {
        // Another process was first: its numbers are the same.
        let _ = fs::remove_dir_all(&temporary);
        if !folder.join(MANIFEST).exists() {
            return Err(wrong(folder)(source));
        }
    }
    Ok(())
}

fn write(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// What 4 bits lose of a weight: W less what it becomes.
fn lost(weight: &[f32], module: &Module, options: Nf4Options) -> Vec<f32> {
    let size = options.block_size;
    let mut codes = vec![0; nf4::code_bytes(weight.len())];
    let mut scales = vec![0.0; nf4::blocks(weight.len(), size)];
    // Weights that are no numbers are refused when the base is loaded, right after this.
    let _ = nf4::quantise(weight, size, &mut codes, &mut scales);
    let twice = options.double.then(|| double::quantise(&scales));
    let scales = match &twice {
        Some(double::DoubleScales { codes, nested, offset }) => {
            Scales::Double { codes, nested, offset: *offset, map: &double::DYNAMIC_MAP }
        }
        None => Scales::Plain(&scales),
    };
    let [rows, columns] = module.shape;
    let mut kept = vec![0.0; weight.len()];
    Nf4View::new(rows, columns, size, &codes, scales).write_f32(0, &mut kept);
    weight.iter().zip(kept).map(|(weight, kept)| weight - kept).collect()
}
