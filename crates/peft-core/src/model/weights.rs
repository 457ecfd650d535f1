//! Tensors of a base, read piece by piece: safetensors of a folder, or a GGUF file.
//!
//! Files are read by position over their checked headers: no memory map (a file that shrinks under one kills the
//! process), and never more than one piece of one tensor besides what is kept.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    error::{Error, Origin, Result},
    model::gguf,
};

mod file;
mod header;
mod tensor;

pub use file::TensorFile;
pub(crate) use file::{Encoding, Stored};
pub use tensor::{PIECE, Tensor, Witness};

/// The file of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The tensors of a base: one file of safetensors, shards under an index, or a GGUF file.
#[derive(Debug)]
pub struct ModelFiles {
    folder: PathBuf,
    files: Vec<TensorFile>,
    /// Which file holds a tensor.
    places: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ModelFiles {
    /// Opens `model.safetensors` of a folder, or else all shards of `model.safetensors.index.json`; of a file, the tensors
    /// of a GGUF under the names that safetensors have.
    ///
    /// # Errors
    /// None of them is there, one is damaged, or the index does not agree with its shards.
    pub fn open(folder: &Path) -> Result<Self> {
        if folder.is_file() {
            return Ok(Self::of_file(folder, gguf::tensors(folder)?));
        }
        let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
        if single.exists() {
            return Ok(Self::of_file(folder, TensorFile::open(&single, Origin::Base)?));
        }
        match fs::read(&index) {
            Ok(text) => Self::sharded(folder, &index, &text),
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Read { origin: Origin::Base, file: index, source })
            }
            Err(_) if has_pickles(folder) => {
                Err(Error::OnlyPickles { origin: Origin::Base, folder: folder.to_owned() })
            }
            Err(source) => Err(Error::Read { origin: Origin::Base, file: single, source }),
        }
    }

    fn of_file(folder: &Path, file: TensorFile) -> Self {
        let places = file.names().map(|name| (name.to_owned(), 0)).collect();
        Self { folder: folder.to_owned(), files: vec![file], places }
    }

    /// As [`ModelFiles::open`], with tensors of the safetensors `over` in the place of the folder's.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub(crate) fn open_over(folder: &Path, over: &[PathBuf]) -> Result<Self> {
        let mut files = Self::open(folder)?;
        for file in over {
            files.put_over(TensorFile::open(file, Origin::Adapter)?);
        }
        Ok(files)
    }

    /// Takes tensors of `file` in the place of those of their names; others of it are left.
    fn put_over(&mut self, file: TensorFile) {
        let index = self.files.len();
        for name in file.names() {
            if let Some(place) = self.places.get_mut(name) {
                *place = index;
            }
        }
        self.files.push(file);
    }

    fn sharded(folder: &Path, index: &Path, text: &[u8]) -> Result<Self> {
        let wrong = |problem: String| Error::Index { file: index.to_owned(), problem };
        let Index { weight_map } = serde_json::from_slice(text).map_err(|source| Error::Json {
            origin: Origin::Base,
            file: index.to_owned(),
            source,
        })?;
        let mut files: Vec<TensorFile> = Vec::new();
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            let place = match opened.get(shard.as_str()) {
                Some(place) => *place,
                None => {
                    // A shard lies in the folder itself: an index may not reach elsewhere.
                    if Path::new(shard).file_name().is_none_or(|name| name != shard.as_str()) {
                        return Err(wrong(format!(
                            "tensor `{tensor}` lies in `{shard}`, which is no file name"
                        )));
                    }
                    let path = folder.join(shard);
                    if !path.exists() {
                        return Err(wrong(format!("shard `{shard}`, which holds `{tensor}`, is missing")));
                    }
                    files.push(TensorFile::open(&path, Origin::Base)?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if files[place].tensor(tensor).is_none() {
                return Err(wrong(format!("shard `{shard}` does not hold `{tensor}`")));
            }
            places.insert(tensor.clone(), place);
        }
        Ok(Self { folder: folder.to_owned(), files, places })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// A tensor, if there is one of that name.
    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        self.files[*self.places.get(name)?].tensor(name)
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find(name)
            .ok_or_else(|| Error::MissingTensor { folder: self.folder.clone(), tensor: name.to_owned() })
    }
}

/// Whether a folder holds weights in PyTorch's own format.
fn has_pickles(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("pytorch_model") && name.ends_with(".bin") || name.ends_with(".pth")
    })
}
