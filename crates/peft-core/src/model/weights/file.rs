//! A file of tensors with a checked header.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use safetensors::tensor::Dtype;
use shanty_gguf::Kind;

use super::{header, tensor::Tensor};
use crate::error::{Error, Origin, Result};

/// The longest header that the format allows, bytes.
const LONGEST_HEADER: u64 = 100_000_000;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// One by one.
    Plain(Dtype),
    /// In ggml's blocks.
    Blocks(Kind),
}

impl Encoding {
    /// Bytes of so many numbers; headers were checked so that it neither overflows nor cuts a block.
    pub(super) fn bytes(self, numbers: usize) -> usize {
        match self {
            Self::Plain(dtype) => numbers * dtype.bitsize() / 8,
            Self::Blocks(kind) => numbers / kind.block_numbers() * kind.block_bytes(),
        }
    }
}

/// A tensor as a header describes it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) name: Box<str>,
    pub(crate) shape: Box<[usize]>,
    pub(crate) encoding: Encoding,
    /// From the front of the file.
    pub(crate) start: u64,
    /// Heads in each of which rows lie interleaved.
    pub(crate) heads: Option<usize>,
}

/// A file of tensors with a checked header.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    origin: Origin,
    file: File,
    /// Sorted by name.
    tensors: Vec<Stored>,
}

impl TensorFile {
    /// Opens a safetensors file and checks its header against its length.
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
        let read = |bytes: &mut [u8], at| file.read_exact_at(bytes, at);
        let text = read_header(info.len(), read).map_err(unreadable)?.map_err(damaged)?;
        let tensors = header::parse(&text, info.len()).map_err(damaged)?;
        Ok(Self { path: path.to_owned(), origin, file, tensors })
    }

    /// Checks a file that lies in memory as [`TensorFile::open`] does: where each of its tensors ends, or what is wrong.
    pub(crate) fn check_bytes(file: &[u8]) -> Result<Vec<u64>, String> {
        let read = |bytes: &mut [u8], at: u64| {
            let from = file.get(at as usize..).and_then(|rest| rest.get(..bytes.len()));
            bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        let text = read_header(file.len() as u64, read).map_err(|error| error.to_string())??;
        let tensors = header::parse(&text, file.len() as u64)?;
        let end =
            |tensor: &Stored| tensor.start + tensor.encoding.bytes(tensor.shape.iter().product()) as u64;
        Ok(tensors.iter().map(end).collect())
    }

    /// A file whose tensors are known, sorted by name.
    pub(crate) fn of_tensors(path: &Path, file: File, tensors: Vec<Stored>) -> Self {
        Self { path: path.to_owned(), origin: Origin::Base, file, tensors }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|tensor| &*tensor.name)
    }

    /// A text that the header carries besides the tensors.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let length = self.file.metadata().ok()?.len();
        let read = |bytes: &mut [u8], at| self.file.read_exact_at(bytes, at);
        header::metadata(&read_header(length, read).ok()?.ok()?, key)
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let place = self.tensors.binary_search_by(|tensor| (*tensor.name).cmp(name)).ok()?;
        Some(Tensor { file: self, stored: &self.tensors[place] })
    }

    /// Reads bytes from `position` on.
    pub(super) fn read_at(&self, position: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, position).map_err(|source| Error::Read {
            origin: self.origin,
            file: self.path.clone(),
            source,
        })
    }
}

/// The header's text, or what is wrong with the file's length.
fn read_header(
    length: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Result<Vec<u8>, String>> {
    if length < 8 {
        return Ok(Err(format!("it is {length} bytes long, shorter than any safetensors file")));
    }
    let mut word = [0; 8];
    read(&mut word, 0)?;
    let header_length = u64::from_le_bytes(word);
    if header_length > LONGEST_HEADER || header_length > length - 8 {
        return Ok(Err(format!(
            "its header claims {header_length} bytes, the file has {} behind that number",
            length - 8
        )));
    }
    let mut header = vec![0; header_length as usize];
    read(&mut header, 8)?;
    Ok(Ok(header))
}
