//! Tensors of a folder, read from safetensors piece by piece.
//!
//! Files are read by position over their checked headers: no memory map (a file that shrinks under one kills the
//! process), and never more than one piece of one tensor besides what is kept.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::error::{Error, Origin, Result};

/// The file of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The longest header that the format allows, bytes.
const LONGEST_HEADER: u64 = 100_000_000;
/// Elements read at a time; a multiple of every quantisation block.
pub const PIECE: usize = 1 << 20;

/// Sees the bytes of a tensor as they are read.
pub type Witness<'a> = dyn FnMut(&[u8]) + 'a;

/// A safetensors file with a checked header.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    origin: Origin,
    file: File,
    data_start: u64,
    metadata: Metadata,
    names: BTreeSet<String>,
}

impl TensorFile {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// Unreadable, or damaged: cut short, too long, a header that does not hold together.
    pub fn open(path: &Path, origin: Origin) -> Result<Self> {
        let unreadable = |source| Error::Read { origin, file: path.to_owned(), source };
        let damaged = |problem: String| Error::DamagedTensors { origin, file: path.to_owned(), problem };
        let file = File::open(path).map_err(unreadable)?;
        let info = file.metadata().map_err(unreadable)?;
        if info.is_dir() {
            return Err(unreadable(io::ErrorKind::IsADirectory.into()));
        }
        let length = info.len();
        let mut word = [0; 8];
        if length < 8 {
            return Err(damaged(format!("it is {length} bytes long, shorter than any safetensors file")));
        }
        file.read_exact_at(&mut word, 0).map_err(unreadable)?;
        let header_length = u64::from_le_bytes(word);
        if header_length > LONGEST_HEADER || header_length > length - 8 {
            return Err(damaged(format!(
                "its header claims {header_length} bytes, the file has {} behind that number",
                length - 8
            )));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact_at(&mut header, 8).map_err(unreadable)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| damaged(format!("its header is not sound: {error}")))?;
        let data_start = 8 + header_length;
        let (expected, found) = (metadata.data_len() as u64, length - data_start);
        if found != expected {
            return Err(damaged(format!(
                "its header describes {expected} bytes of tensors, the file has {found}"
            )));
        }
        let names = metadata.tensors().into_keys().collect();
        Ok(Self { path: path.to_owned(), origin, file, data_start, metadata, names })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// A text that the header carries besides the tensors.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let info = self.metadata.info(name)?;
        let name = self.names.get(name)?;
        Some(Tensor {
            file: self,
            name,
            dtype: info.dtype,
            shape: &info.shape,
            start: info.data_offsets.0 as u64,
        })
    }
}

/// A tensor that lies in a file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    file: &'a TensorFile,
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    start: u64,
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Its file.
    pub fn file(&self) -> &'a Path {
        self.file.path()
    }

    /// Its dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// How many numbers it holds.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many bytes it takes in the file.
    pub fn bytes(&self) -> usize {
        // The header was checked not to overflow.
        self.elements() * self.dtype.bitsize() / 8
    }

    /// Refuses any other shape.
    ///
    /// # Errors
    /// [`Error::WrongShape`].
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::WrongShape {
            origin: self.file.origin,
            file: self.file.path.clone(),
            tensor: self.name.to_owned(),
            found: self.shape.to_vec(),
            expected: expected.to_vec(),
        })
    }

    /// Refuses any dtype but those of `allowed`; `wanted` names them.
    ///
    /// # Errors
    /// [`Error::WrongDtype`].
    pub fn expect_dtype(&self, allowed: &[Dtype], wanted: &'static str) -> Result<()> {
        if allowed.contains(&self.dtype) {
            return Ok(());
        }
        Err(Error::WrongDtype {
            origin: self.file.origin,
            file: self.file.path.clone(),
            tensor: self.name.to_owned(),
            found: format!("{:?}", self.dtype),
            expected: wanted,
        })
    }

    /// Refuses whole numbers and 8-bit floats.
    ///
    /// # Errors
    /// [`Error::WrongDtype`].
    pub fn expect_float(&self) -> Result<()> {
        self.expect_dtype(&[Dtype::F32, Dtype::F16, Dtype::BF16], "F32, F16 or BF16")
    }

    fn non_finite(&self) -> Error {
        Error::NonFinite {
            origin: self.file.origin,
            file: self.file.path.clone(),
            tensor: self.name.to_owned(),
        }
    }

    /// Reads bytes from `offset` of the tensor on.
    fn read_at(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        let position = self.file.data_start + self.start + offset as u64;
        self.file.file.read_exact_at(out, position).map_err(|source| Error::Read {
            origin: self.file.origin,
            file: self.file.path.clone(),
            source,
        })
    }

    /// Reads all bytes as they are.
    ///
    /// # Errors
    /// Unreadable.
    pub fn read_bytes(&self, out: &mut [u8], witness: &mut Witness<'_>) -> Result<()> {
        debug_assert_eq!(out.len(), self.bytes());
        for (piece, out) in out.chunks_mut(4 * PIECE).enumerate() {
            self.read_at(piece * 4 * PIECE, out)?;
            witness(out);
        }
        Ok(())
    }

    /// Reads the numbers as f32 and hands them on in pieces of [`PIECE`].
    ///
    /// # Errors
    /// Unreadable, another dtype than f32, f16 and bf16, or a number that is infinite or none.
    pub fn pieces_f32(&self, witness: &mut Witness<'_>, mut take: impl FnMut(&[f32])) -> Result<()> {
        self.expect_float()?;
        let width = self.dtype.bitsize() / 8;
        let longest = PIECE.min(self.elements());
        let (mut bytes, mut numbers) = (vec![0; longest * width], vec![0.0; longest]);
        let mut done = 0;
        while done < self.elements() {
            let count = PIECE.min(self.elements() - done);
            let (bytes, numbers) = (&mut bytes[..count * width], &mut numbers[..count]);
            self.read_at(done * width, bytes)?;
            witness(bytes);
            if !to_f32(self.dtype, bytes, numbers) {
                return Err(self.non_finite());
            }
            take(numbers);
            done += count;
        }
        Ok(())
    }

    /// Reads the numbers as f32.
    ///
    /// # Errors
    /// As [`Self::pieces_f32`].
    pub fn read_f32(&self, out: &mut [f32], witness: &mut Witness<'_>) -> Result<()> {
        debug_assert_eq!(out.len(), self.elements());
        let mut done = 0;
        self.pieces_f32(witness, |piece| {
            out[done..done + piece.len()].copy_from_slice(piece);
            done += piece.len();
        })
    }

    /// Reads the numbers of a bf16 tensor as they are.
    ///
    /// # Errors
    /// Unreadable, another dtype, or a number that is infinite or none.
    pub fn read_bf16(&self, out: &mut [bf16], witness: &mut Witness<'_>) -> Result<()> {
        self.expect_dtype(&[Dtype::BF16], "BF16")?;
        self.read_bytes(bytemuck::cast_slice_mut(out), witness)?;
        if cfg!(target_endian = "big") {
            out.iter_mut().for_each(|value| *value = bf16::from_bits(value.to_bits().swap_bytes()));
        }
        // Exponent all ones: infinite or not a number.
        if out.iter().any(|value| value.to_bits() & 0x7f80 == 0x7f80) {
            return Err(self.non_finite());
        }
        Ok(())
    }
}

/// Widens little-endian numbers; false where one is infinite or none.
fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::BF16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        _ => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
    out.iter().fold(true, |finite, value| finite & (value.to_bits() & 0x7f80_0000 != 0x7f80_0000))
}

/// The safetensors of a model's folder: one file, or shards under an index.
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
    /// Opens `model.safetensors`, or else all shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// None of both is there, one is damaged, or the index does not agree with its shards.
    pub fn open(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
        if single.exists() {
            let file = TensorFile::open(&single, Origin::Base)?;
            let places = file.names().map(|name| (name.to_owned(), 0)).collect();
            return Ok(Self { folder: folder.to_owned(), files: vec![file], places });
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
