//! Bases in one GGUF file: its metadata as a `config.json`, its tensors under the names that safetensors have.
//!
//! Numbers stay as stored until they are read (see [`shanty_gguf::Kind`]). What llama.cpp's converter changed is changed
//! back: in files of Llama's architecture the rows of q and k lie interleaved in each head, for another kind of rotation.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use serde_json::Value;
use shanty_gguf::{Header, HeaderError, Kind, TensorInfo};

use crate::{
    error::{Error, Origin, Result},
    model::weights::{Encoding, Stored, TensorFile},
};

mod metadata;
mod names;

use metadata::Metadata;

/// What is read of a GGUF file: its `general.architecture`, and the `model_type` that it is.
const ARCHITECTURES: [(&str, &str); 6] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma2"),
    ("phi3", "phi3"),
];

/// A GGUF file with a checked header, of an architecture that is known.
struct Gguf {
    path: PathBuf,
    /// None where only the header is there.
    file: Option<File>,
    header: Header,
    architecture: &'static str,
    model_type: &'static str,
}

impl Gguf {
    fn open(path: &Path) -> Result<Self> {
        let unreadable = |source| Error::Read { origin: Origin::Base, file: path.to_owned(), source };
        let file = File::open(path).map_err(unreadable)?;
        let header = Header::read(&file).map_err(|error| match error {
            HeaderError::Read(source) => unreadable(source),
            HeaderError::Damaged(problem) => {
                Error::DamagedGguf { file: path.to_owned(), problem: problem.to_string() }
            }
        })?;
        Self::of_header(path, Some(file), header)
    }

    fn of_header(path: &Path, file: Option<File>, header: Header) -> Result<Self> {
        let found = header.get("general.architecture").and_then(|value| value.as_str()).unwrap_or_default();
        let known = ARCHITECTURES.iter().find(|(architecture, _)| *architecture == found);
        let Some(&(architecture, model_type)) = known else {
            let known = ARCHITECTURES.map(|(architecture, _)| architecture).to_vec();
            return Err(Error::GgufArchitecture { file: path.to_owned(), found: found.to_owned(), known });
        };
        Ok(Self { path: path.to_owned(), file, header, architecture, model_type })
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata { header: &self.header, path: &self.path, architecture: self.architecture }
    }

    /// The numbers of a short vector, such as factors of rotary frequencies.
    fn vector(&self, info: &TensorInfo<'_>) -> Result<Vec<f32>> {
        use std::os::unix::fs::FileExt;

        let wrong = |problem: String| {
            let key = info.name.to_owned();
            Err(Error::GgufSetting { file: self.path.clone(), key, problem })
        };
        if info.kind != Kind::F32 || info.bytes > 1 << 20 {
            return wrong(format!("is of {} bytes of {:?}, no short vector of F32", info.bytes, info.kind));
        }
        let Some(file) = &self.file else { return wrong("is not there to be read".to_owned()) };
        let mut bytes = vec![0; info.bytes as usize];
        file.read_exact_at(&mut bytes, info.start).map_err(|source| Error::Read {
            origin: Origin::Base,
            file: self.path.clone(),
            source,
        })?;
        let mut numbers = vec![0.0; bytes.len() / 4];
        info.kind.write_f32(&bytes, &mut numbers);
        Ok(numbers)
    }
}

/// The `config.json` that transformers would have beside the same weights.
///
/// # Errors
/// Unreadable, damaged, of an unknown architecture, or without a setting that it needs.
pub fn config(path: &Path) -> Result<Value> {
    metadata::config(&Gguf::open(path)?)
}

/// As [`config`], of a header that lies in memory, without vectors beside it.
///
/// # Errors
/// As [`config`].
pub(crate) fn config_of_bytes(file: &[u8]) -> Result<Value> {
    let path = Path::new("memory.gguf");
    let header = Header::of_bytes(file)
        .map_err(|error| Error::DamagedGguf { file: path.to_owned(), problem: error.to_string() })?;
    metadata::config(&Gguf::of_header(path, None, header)?)
}

/// All tensors under the names that they have in safetensors.
///
/// # Errors
/// As [`config`].
pub fn tensors(path: &Path) -> Result<TensorFile> {
    let gguf = Gguf::open(path)?;
    let metadata = gguf.metadata();
    let heads = [metadata.size("attention.head_count")?, metadata.key_value_heads()?];
    let mut tensors = gguf
        .header
        .tensors()
        .map(|info| {
            let name = names::safetensors(info.name, gguf.model_type);
            let heads = interleaved(&name, gguf.architecture, heads);
            let shape: Box<[usize]> = info.shape.iter().rev().map(|size| *size as usize).collect();
            let rows = shape.first().copied().unwrap_or(1);
            if let Some(heads) = heads
                && (rows == 0 || !rows.is_multiple_of(2 * heads))
            {
                return Err(Error::GgufSetting {
                    file: path.to_owned(),
                    key: info.name.to_owned(),
                    problem: format!("has {rows} rows for {heads} heads of an even size"),
                });
            }
            let encoding = match info.kind {
                Kind::F32 => Encoding::Plain(safetensors::Dtype::F32),
                Kind::F16 => Encoding::Plain(safetensors::Dtype::F16),
                Kind::BF16 => Encoding::Plain(safetensors::Dtype::BF16),
                blocks => Encoding::Blocks(blocks),
            };
            Ok(Stored { name: name.into(), shape, encoding, start: info.start, heads })
        })
        .collect::<Result<Vec<Stored>>>()?;
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let file = gguf.file.expect("a file was opened above");
    Ok(TensorFile::of_tensors(path, file, tensors))
}

/// The heads in each of which the rows of a tensor lie interleaved.
fn interleaved(name: &str, architecture: &str, [queries, keys]: [usize; 2]) -> Option<usize> {
    if architecture != "llama" {
        return None;
    }
    if name.contains(".q_proj.") {
        return Some(queries);
    }
    name.contains(".k_proj.").then_some(keys)
}
