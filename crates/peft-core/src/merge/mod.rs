//! A base and an adapter as one model.
//!
//! Tensors go through one at a time, from the base's files into shards: with floats, no more is in memory than one tensor;
//! with NF4, one tensor and the shard that is being filled. What rounding or quantising loses is measured on the way.

mod fold;
mod folded;
mod nf4;
mod report;
mod shard;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use folded::{FoldedModel, FoldedTensor};
use report::Distances;
pub use report::{MergeReport, TensorReport};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use shard::{ShardWriter, Slot, unwritable};

use crate::{
    adapter_files::stored::to_bytes,
    error::{Error, Origin, Result},
    model::weights::{INDEX_FILE, PIECE, SINGLE_FILE},
    quant::Nf4Options,
    use_error::UseError,
};

/// What weights are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As the base's.
    Stored,
    /// 32 bits.
    F32,
    /// 16 bits, more digits.
    F16,
    /// 16 bits, wider range.
    Bf16,
    /// The decoder's linear layers in 4-bit NormalFloat as bitsandbytes stores it, all else as the base's.
    Nf4(Nf4Options),
}

impl Form {
    fn dtype(self, stored: Dtype) -> Dtype {
        match self {
            Self::Stored | Self::Nf4(_) => stored,
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// What becomes of a model.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// The base's folder: settings and tokenizer come from there.
    pub base: PathBuf,
    /// The folder that is written.
    pub out: PathBuf,
    /// What weights are stored as.
    pub form: Form,
    /// A new file is begun before one grows larger, bytes.
    pub shard_bytes: u64,
    /// Take the adapter out of a base that it was folded into, rather than fold it in.
    pub take_out: bool,
}

/// Bytes that a shard may have where nobody says: as transformers has it.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// How far a merge has come: bytes of the base that are done, and all.
pub type MergeProgress<'a> = dyn FnMut(u64, u64) + 'a;

/// Writes the model with its adapter folded in: weights, index, settings, and the files beside them.
///
/// # Errors
/// The folder holds a model already or cannot be written, the base cannot be read, or the adapter cannot be taken out.
pub fn merge(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    progress: &mut MergeProgress<'_>,
) -> Result<MergeReport> {
    let MergeOptions { base, out, .. } = options;
    if base.is_file() {
        let reason =
            "a GGUF file holds no folder's settings; merge into the folder that it was made from".to_owned();
        return Err(UseError::NotMergeable { method: "any kind".to_owned(), reason }.into());
    }
    for taken in [SINGLE_FILE, INDEX_FILE, "config.json"] {
        if out.join(taken).exists() {
            return Err(UseError::OutputTaken { path: out.join(taken) }.into());
        }
    }
    fs::create_dir_all(out).map_err(|source| unwritable(out, source))?;
    let mut tensors = model.tensors()?;
    let split = model.splits_tied_head();
    if let Some(head) = split.then(|| head_of(model, &tensors)).flatten() {
        tensors.push(head);
    }
    let mut report = MergeReport::default();
    let written = match options.form {
        Form::Nf4(nf4) => nf4::write(model, options, nf4, &tensors, &mut report, progress)?,
        _ => write_floats(model, options, &tensors, &mut report, progress)?,
    };
    let names = name_shards(out, written, &mut report)?;
    if let Some(index) = names {
        let path = out.join(INDEX_FILE);
        fs::write(&path, index).map_err(|source| unwritable(&path, source))?;
    }
    write_config(model, options, split)?;
    copy_files(base, out)?;
    Ok(report)
}

/// The head that the embedding was: the base's numbers, changed by what is put on the head.
fn head_of(model: &FoldedModel<'_>, tensors: &[FoldedTensor]) -> Option<FoldedTensor> {
    let embedding = tensors.iter().find(|tensor| tensor.name == "model.embed_tokens.weight")?;
    let changed = model.part(HEAD).is_some();
    Some(FoldedTensor { name: HEAD.to_owned(), changed, ..embedding.clone() })
}

const HEAD: &str = "lm_head.weight";

/// Tensors of one file, and the name that it has meanwhile.
struct Written {
    partial: PathBuf,
    /// Names and bytes.
    tensors: Vec<(String, u64)>,
}

fn partial_name(out: &Path, index: usize) -> PathBuf {
    out.join(format!("model-{:05}.partial", index + 1))
}

/// Gives shards their names; the text of the index where there are several.
fn name_shards(out: &Path, written: Vec<Written>, report: &mut MergeReport) -> Result<Option<String>> {
    let count = written.len();
    let mut weight_map = Map::new();
    let mut total = 0;
    for (index, Written { partial, tensors }) in written.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let path = out.join(&name);
        fs::rename(&partial, &path).map_err(|source| unwritable(&path, source))?;
        report.bytes += fs::metadata(&path).map_err(|source| unwritable(&path, source))?.len();
        for (tensor, bytes) in tensors {
            total += bytes;
            weight_map.insert(tensor, Value::from(name.as_str()));
        }
    }
    report.shards = count;
    weight_map.sort_keys();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    Ok((count > 1).then(|| format!("{index:#}\n")))
}

/// Cuts tensors into shards by their size, and puts wider dtypes first in each.
fn shards(slots: Vec<(usize, Slot)>, limit: u64) -> Vec<Vec<(usize, Slot)>> {
    let mut shards: Vec<Vec<(usize, Slot)>> = Vec::new();
    let mut bytes = 0;
    for slot in slots {
        let size = slot.1.bytes();
        if shards.is_empty() || bytes + size > limit && bytes > 0 {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(shard) = shards.last_mut() {
            shard.push(slot);
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|(_, slot)| std::cmp::Reverse(slot.dtype.bitsize()));
    }
    shards
}

fn write_floats(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    tensors: &[FoldedTensor],
    report: &mut MergeReport,
    progress: &mut MergeProgress<'_>,
) -> Result<Vec<Written>> {
    let slot = |tensor: &FoldedTensor| Slot {
        name: tensor.name.clone(),
        dtype: options.form.dtype(tensor.dtype),
        shape: tensor.shape.clone(),
    };
    let slots = tensors.iter().map(slot).enumerate().collect();
    let total = tensors.iter().map(|tensor| tensor.numbers() as u64).sum();
    let mut done = 0;
    let mut written = Vec::new();
    for (index, shard) in shards(slots, options.shard_bytes).into_iter().enumerate() {
        let slots: Vec<Slot> = shard.iter().map(|(_, slot)| slot.clone()).collect();
        let mut writer = ShardWriter::create(&partial_name(&options.out, index), &slots)?;
        for (tensor, slot) in &shard {
            let tensor = &tensors[*tensor];
            write_tensor(model, options, tensor, slot.dtype, &mut writer, report)?;
            done += tensor.numbers() as u64;
            progress(done, total);
        }
        let tensors = slots.iter().map(|slot| (slot.name.clone(), slot.bytes())).collect();
        written.push(Written { partial: writer.finish()?, tensors });
    }
    Ok(written)
}

/// The base's tensor that `tensor` is made of: itself, but for a head that was the embedding.
fn source(tensor: &FoldedTensor, model: &FoldedModel<'_>) -> FoldedTensor {
    let name = match tensor.name.as_str() {
        HEAD if model.splits_tied_head() => "model.embed_tokens.weight",
        own => own,
    };
    FoldedTensor { name: name.to_owned(), ..tensor.clone() }
}

fn write_tensor(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    tensor: &FoldedTensor,
    dtype: Dtype,
    writer: &mut ShardWriter,
    report: &mut MergeReport,
) -> Result<()> {
    if let Some(raw) = model.raw(&source(tensor, model))? {
        let mut failed = None;
        let mut put = |bytes: &[u8]| {
            if failed.is_none() {
                failed = writer.write(bytes).err();
            }
        };
        if raw.dtype() == dtype && raw.is_plain() {
            raw.pieces(&mut put)?;
        } else {
            raw.pieces_f32(&mut |_| {}, |piece| put(&to_bytes(dtype, piece)))?;
        }
        return failed.map_or(Ok(()), Err);
    }
    let (before, after) = before_and_after(model, options, tensor)?;
    let mut distances = Distances::default();
    for (before, after) in before.chunks(PIECE).zip(after.chunks(PIECE)) {
        let bytes = to_bytes(dtype, after);
        distances.add(before, after, &from_bytes(dtype, &bytes));
        writer.write(&bytes)?;
    }
    if tensor.changed {
        report.tensors.push(distances.report(&tensor.name));
    }
    Ok(())
}

/// The numbers as they are, and as they are to be.
fn before_and_after(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    tensor: &FoldedTensor,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let before = model.base(&source(tensor, model))?;
    if !options.take_out {
        let mut after = before.clone();
        model.fold(tensor, &mut after)?;
        return Ok((before, after));
    }
    match model.unfolded(tensor, &before)? {
        Some(after) => Ok((before, after)),
        None => {
            let reason = format!("`{}` with it does not say what was there without it", tensor.name);
            Err(UseError::NotMergeable { method: "this one".to_owned(), reason }.into())
        }
    }
}

fn from_bytes(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F16 => bytes.as_chunks().0.iter().map(|two| half::f16::from_le_bytes(*two).to_f32()).collect(),
        Dtype::BF16 => {
            bytes.as_chunks().0.iter().map(|two| half::bf16::from_le_bytes(*two).to_f32()).collect()
        }
        _ => bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect(),
    }
}

/// `config.json` of the base, made true of what was written.
fn write_config(model: &FoldedModel<'_>, options: &MergeOptions, split: bool) -> Result<()> {
    let file = options.base.join("config.json");
    let text =
        fs::read(&file).map_err(|source| Error::Read { origin: Origin::Base, file: file.clone(), source })?;
    let parsed: Result<Map<String, Value>, _> = serde_json::from_slice(&text);
    let mut json = parsed.map_err(|source| Error::Json { origin: Origin::Base, file, source })?;
    let dtype = match options.form {
        Form::F32 => Some("float32"),
        Form::F16 => Some("float16"),
        Form::Bf16 => Some("bfloat16"),
        Form::Stored | Form::Nf4(_) => None,
    };
    if let Some(dtype) = dtype {
        let key = if json.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        json.insert(key.to_owned(), Value::from(dtype));
    }
    match options.form {
        Form::Nf4(nf4) => {
            let compute = nf4::compute_dtype(model)?;
            json.insert(
                "quantization_config".to_owned(),
                crate::model::export::nf4_settings(compute, nf4.double),
            );
        }
        _ => drop(json.remove("quantization_config")),
    }
    if split {
        json.insert("tie_word_embeddings".to_owned(), Value::from(false));
    }
    let path = options.out.join("config.json");
    let text = format!("{:#}\n", Value::Object(json));
    fs::write(&path, text).map_err(|source| unwritable(&path, source))
}

/// Copies what lies beside the weights: tokenizer, templates, licence.
fn copy_files(base: &Path, out: &Path) -> Result<()> {
    let unreadable = |source| Error::Read { origin: Origin::Base, file: base.to_owned(), source };
    for entry in fs::read_dir(base).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let is_weights = [".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".onnx"]
            .iter()
            .any(|ending| text.ends_with(ending))
            || text.contains(".safetensors.")
            || text.ends_with(".bin.index.json");
        if is_weights || text == "config.json" || text.starts_with('.') || !entry.path().is_file() {
            continue;
        }
        let target = out.join(&name);
        if target.exists() {
            continue;
        }
        // Read and written, not copied: the base may be read-only, the copy must not be.
        let bytes = fs::read(entry.path()).map_err(|source| Error::Read {
            origin: Origin::Base,
            file: entry.path(),
            source,
        })?;
        fs::write(&target, bytes).map_err(|source| unwritable(&target, source))?;
    }
    Ok(())
}

/// How far a tensor of a merged model is from the base once the adapter is taken out again.
#[derive(Debug, Clone, PartialEq)]
pub struct Unmerged {
    /// The tensor.
    pub name: String,
    /// max |without - base| / max |base|.
    pub error: f64,
    /// The most that rounding to what it is stored as explains.
    pub allowed: f64,
}

/// Takes the adapter out of a merged model and compares with the base, tensor by tensor; `model` is base and adapter.
///
/// Where what the method did cannot be taken out (DoRA), the merged tensor is compared with the base folded again.
///
/// # Errors
/// The merged model cannot be read, is quantised, or [`UseError::NotUnmerged`].
pub fn verify(model: &FoldedModel<'_>, merged: &Path) -> Result<Vec<Unmerged>> {
    let merged = FoldedModel::open(merged, None, 1)?;
    let stored = merged.tensors()?;
    let mut checked = Vec::new();
    for tensor in model.tensors()?.iter().filter(|tensor| tensor.changed) {
        let Some(found) = stored.iter().find(|other| other.name == tensor.name) else {
            let (folder, tensor) = (PathBuf::from("the merged model"), tensor.name.clone());
            return Err(Error::MissingTensor { folder, tensor });
        };
        let step = match (found.quantised, found.dtype) {
            (true, _) => {
                let reason = "4 bits keep too little to see the base in them".to_owned();
                return Err(UseError::NotMergeable { method: "NF4".to_owned(), reason }.into());
            }
            // Half a step of each format, and a few roundings of f32.
            (false, Dtype::BF16) => 2f64.powi(-8),
            (false, Dtype::F16) => 2f64.powi(-11),
            (false, _) => 0.0,
        } + 1e-6;
        let (base, values) = (model.base(tensor)?, merged.base(found)?);
        let largest = |values: &[f32]| values.iter().fold(0f32, |most, value| most.max(value.abs()));
        let (without, expected) = match model.unfolded(tensor, &values)? {
            Some(without) => (without, base),
            None => (values.clone(), model.folded(tensor)?),
        };
        let scale = f64::from(largest(&expected)).max(f64::MIN_POSITIVE);
        let off = without.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        // What was rounded is the merged number: its step is taken by the larger of both.
        let allowed = step * f64::from(largest(&values)).max(scale) / scale;
        let result = Unmerged { name: tensor.name.clone(), error: f64::from(off) / scale, allowed };
        if result.error > result.allowed {
            let Unmerged { name: tensor, error, allowed } = result;
            return Err(UseError::NotUnmerged { tensor, error, allowed }.into());
        }
        checked.push(result);
    }
    Ok(checked)
}
