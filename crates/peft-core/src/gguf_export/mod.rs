//! Models and adapters as GGUF, for llama.cpp and what is built on it.
//!
//! A model is written with its adapter folded in, or the adapter is written alone, as llama.cpp's LoRA: factors under the
//! names of the weights that they are laid on. Rows of q and k are interleaved where llama.cpp wants them so.

mod names;
mod tokenizer;
mod writer;

use std::{fs, path::Path};

use names::{Architecture, Change};
use serde_json::Value;
pub use writer::{Encoding, GgufFile, Meta, TensorInfo};

use crate::{
    adapter_files::StoredAdapter,
    error::{Error, Origin, Result},
    merge::{FoldedModel, FoldedTensor},
    model::{ModelConfig, weights::PIECE},
    use_error::UseError,
};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportReport {
    /// Size of the file, bytes.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// Tensors that are wider than asked for, as their rows are no multiple of a block; names as in GGUF.
    pub widened: Vec<String>,
}

fn text(key: &str, value: &str) -> (String, Meta) {
    (key.to_owned(), Meta::Text(value.to_owned()))
}

fn config_json(base: &Path) -> Result<Value> {
    let file = base.join("config.json");
    let text =
        fs::read(&file).map_err(|source| Error::Read { origin: Origin::Base, file: file.clone(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { origin: Origin::Base, file, source })
}

/// Writes a model with its adapter folded in. Matrices are encoded as asked, norms and biases as f32. With
/// [`Encoding::Q4_0`] the output head, or the embedding that is the head too, gets 8 bits.
///
/// # Errors
/// Family or tokenizer have no name in llama.cpp, the base cannot be read, or the file not written.
pub fn model(
    model: &FoldedModel<'_>,
    base: &Path,
    out: &Path,
    encoding: Encoding,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ExportReport> {
    let config = model.config();
    let architecture = Architecture::of(config)?;
    let tensors = model.tensors()?;
    if model.splits_tied_head() {
        let reason = "the adapter changes the embedding but not the head, which is the same tensor; \
                      `shanty merge` first, which makes two of it"
            .to_owned();
        return Err(UseError::NotExportable { reason }.into());
    }
    let head = if config.tied_embeddings { "token_embd.weight" } else { "output.weight" };
    let mut infos = Vec::new();
    let mut sources: Vec<(&FoldedTensor, Change)> = Vec::new();
    let mut widened = Vec::new();
    for tensor in &tensors {
        // A tied head that is stored all the same.
        if config.tied_embeddings && tensor.name == "lm_head.weight" {
            continue;
        }
        let (name, change) = architecture.tensor(&tensor.name)?;
        let wanted = match (tensor.shape.len(), encoding) {
            (1, _) => Encoding::F32,
            (_, Encoding::Q4_0) if name == head => Encoding::Q8_0,
            (_, encoding) => encoding,
        };
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let encoding = if columns.is_multiple_of(wanted.block()) {
            wanted
        } else {
            widened.push(name.clone());
            Encoding::F16
        };
        infos.push(TensorInfo { name, shape: tensor.shape.clone(), encoding });
        sources.push((tensor, change));
    }
    let factors = architecture.rope_factors();
    if let Some(factors) = &factors {
        let (name, shape) = ("rope_freqs.weight".to_owned(), vec![factors.len()]);
        infos.push(TensorInfo { name, shape, encoding: Encoding::F32 });
    }
    let count = infos.len();
    let mut meta = vec![
        text("general.architecture", architecture.name),
        text("general.type", "model"),
        text("general.name", &name_of(base)),
        ("general.quantization_version".to_owned(), Meta::U32(2)),
        ("general.file_type".to_owned(), Meta::U32(file_type(encoding))),
    ];
    meta.extend(architecture.metadata(&config_json(base)?));
    meta.extend(tokenizer::metadata(base, config.vocabulary_size)?);
    let mut file = GgufFile::create(out, &meta, infos)?;
    let total = sources.iter().map(|(tensor, _)| tensor.numbers() as u64).sum();
    let mut done = 0;
    for (tensor, change) in sources {
        write_tensor(model, tensor, change, &mut file)?;
        done += tensor.numbers() as u64;
        progress(done, total);
    }
    if let Some(factors) = factors {
        file.write(&factors)?;
    }
    Ok(ExportReport { bytes: file.finish()?, tensors: count, widened })
}

fn write_tensor(
    model: &FoldedModel<'_>,
    tensor: &FoldedTensor,
    change: Change,
    file: &mut GgufFile,
) -> Result<()> {
    let mut values = model.folded(tensor)?;
    match change {
        Change::None => {}
        Change::AddOne => values.iter_mut().for_each(|value| *value += 1.0),
        Change::Times(factor) => values.iter_mut().for_each(|value| *value *= factor),
        Change::Permute { heads } => {
            let columns = if tensor.shape.len() > 1 { tensor.shape[1] } else { 1 };
            values = names::permute(&values, heads, columns);
        }
    }
    values.chunks(PIECE).try_for_each(|piece| file.write(piece))
}

/// What most tensors are, as llama.cpp counts it.
fn file_type(encoding: Encoding) -> u32 {
    match encoding {
        Encoding::F32 => 0,
        Encoding::F16 => 1,
        Encoding::Q4_0 => 2,
        Encoding::Q8_0 => 7,
    }
}

fn name_of(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    folder.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Writes a LoRA adapter alone, as llama.cpp lays it on a model: `--lora FILE`.
///
/// llama.cpp knows one alpha: where modules have scales or ranks of their own, what differs is multiplied into B.
///
/// # Errors
/// Another method than plain LoRA on linear layers, a module without a name in llama.cpp, or the file cannot be written.
pub fn adapter(
    adapter: &StoredAdapter,
    config: &ModelConfig,
    out: &Path,
    encoding: Encoding,
) -> Result<ExportReport> {
    let no = |reason: String| -> Error { UseError::NotExportable { reason }.into() };
    if adapter.method() != "LORA" || adapter.config.get("use_dora") == Some(&Value::from(true)) {
        let method = if adapter.method() == "LORA" { "DoRA" } else { adapter.method() };
        return Err(no(format!("llama.cpp lays LoRA on a model, not {method}; export the merged model")));
    }
    let plain = ["lora_A.weight", "lora_B.weight"];
    if let Some(key) = adapter.tensors.keys().find(|key| !plain.contains(&key.suffix.as_str())) {
        return Err(no(format!(
            "`{}` has no place in llama.cpp's LoRA; export the merged model",
            key.peft()
        )));
    }
    if !matches!(encoding, Encoding::F32 | Encoding::F16) {
        return Err(no("an adapter is written as f32 or f16".to_owned()));
    }
    let architecture = Architecture::of(config)?;
    let modules = adapter.modules_with("lora_A.weight");
    let Some(first) = modules.first() else { return Err(no("the adapter holds no tensor".to_owned())) };
    let (rank, scale) = adapter.lora_scale(first)?;
    let alpha = scale * rank as f64;
    let mut infos = Vec::new();
    let mut tensors = Vec::new();
    for module in modules {
        let (name, change) = architecture.tensor(&format!("{module}.weight"))?;
        let (Some(a), Some(b)) =
            (adapter.tensor(module, "lora_A.weight"), adapter.tensor(module, "lora_B.weight"))
        else {
            return Err(no(format!("`{module}` has one factor only")));
        };
        let (rank, scale) = adapter.lora_scale(module)?;
        if a.shape.len() != 2 || b.shape.len() != 2 || a.shape[0] != rank || b.shape[1] != rank {
            return Err(no(format!("the factors of `{module}` are not of rank {rank}")));
        }
        let own = (scale * rank as f64 / alpha) as f32;
        let mut up = b.values.clone();
        match change {
            Change::Permute { heads } => up = names::permute(&up, heads, rank),
            Change::Times(factor) => up.iter_mut().for_each(|value| *value *= factor),
            Change::None | Change::AddOne => {}
        }
        if own != 1.0 {
            up.iter_mut().for_each(|value| *value *= own);
        }
        for (kind, shape) in [("lora_a", &a.shape), ("lora_b", &b.shape)] {
            infos.push(TensorInfo { name: format!("{name}.{kind}"), shape: shape.clone(), encoding });
        }
        tensors.push((a.values.clone(), up));
    }
    let count = infos.len();
    let meta = vec![
        text("general.architecture", architecture.name),
        text("general.type", "adapter"),
        text("general.name", &name_of(&adapter.folder)),
        ("general.file_type".to_owned(), Meta::U32(file_type(encoding))),
        text("adapter.type", "lora"),
        ("adapter.lora.alpha".to_owned(), Meta::F32(alpha as f32)),
    ];
    let mut file = GgufFile::create(out, &meta, infos)?;
    for (a, b) in tensors {
        file.write(&a)?;
        file.write(&b)?;
    }
    Ok(ExportReport { bytes: file.finish()?, tensors: count, widened: Vec::new() })
}
