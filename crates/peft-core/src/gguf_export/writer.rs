//! The GGUF container, version 3, written front to back: header, metadata, tensor table, numbers.
//!
//! Sizes are known before the first number, so that one tensor at a time is in memory, whatever the file's size. Source:
//! `docs/gguf.md` of ggml-org/ggml.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use half::f16;

use crate::{
    error::{Error, Origin, Result},
    use_error::UseError,
};

/// Every tensor begins at a multiple of it, bytes.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Meta {
    /// A count.
    U32(u32),
    /// A number.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Whole numbers.
    I32s(Vec<i32>),
}

/// How a tensor's numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// 4 bytes a number.
    F32,
    /// 2 bytes a number.
    F16,
    /// Blocks of 32: a scale and 8 bits each, 8.5 bits a number.
    Q8_0,
    /// Blocks of 32: a scale and 4 bits each, 4.5 bits a number.
    Q4_0,
}

impl Encoding {
    /// The number that stands for it in a file.
    fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// Numbers that share a scale; a row must be a multiple.
    pub fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Q8_0 | Self::Q4_0 => 32,
        }
    }

    /// Bytes that `numbers` take.
    pub fn bytes(self, numbers: usize) -> usize {
        match self {
            Self::F32 => 4 * numbers,
            Self::F16 => 2 * numbers,
            Self::Q8_0 => numbers / 32 * 34,
            Self::Q4_0 => numbers / 32 * 18,
        }
    }

    /// The bytes of some numbers, whole blocks of them.
    fn encode(self, numbers: &[f32]) -> Result<Vec<u8>> {
        let kind = match self {
            Self::F32 => return Ok(numbers.iter().flat_map(|value| value.to_le_bytes()).collect()),
            Self::F16 => {
                return Ok(numbers.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect());
            }
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
        };
        let quantised = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu)
            .and_then(|tensor| QTensor::quantize(&tensor, kind))
            .and_then(|quantised| Ok(quantised.data()?.into_owned()));
        quantised.map_err(|error| UseError::NotExportable { reason: error.to_string() }.into())
    }
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its shape, slowest first, as safetensors has it.
    pub shape: Vec<usize>,
    /// How it is written.
    pub encoding: Encoding,
}

impl TensorInfo {
    /// Numbers that it holds.
    pub fn numbers(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A file that is being written, under a name beside its own until it is whole.
pub struct GgufFile {
    path: PathBuf,
    partial: PathBuf,
    out: BufWriter<File>,
    tensors: Vec<TensorInfo>,
    /// Tensors that are done, and numbers of the next that are.
    done: (usize, usize),
    finished: bool,
}

impl GgufFile {
    /// Writes header and tables. Then [`Self::write`] takes the numbers, tensor after tensor.
    ///
    /// # Errors
    /// Something has the file's name already, or it cannot be written.
    pub fn create(path: &Path, meta: &[(String, Meta)], tensors: Vec<TensorInfo>) -> Result<Self> {
        if path.exists() {
            return Err(UseError::OutputTaken { path: path.to_owned() }.into());
        }
        let mut head = Vec::new();
        head.extend_from_slice(b"GGUF");
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(meta.len() as u64).to_le_bytes());
        for (key, value) in meta {
            text(&mut head, key);
            value.write(&mut head);
        }
        let mut offset = 0u64;
        for tensor in &tensors {
            text(&mut head, &tensor.name);
            head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
            for length in tensor.shape.iter().rev() {
                head.extend_from_slice(&(*length as u64).to_le_bytes());
            }
            head.extend_from_slice(&tensor.encoding.id().to_le_bytes());
            head.extend_from_slice(&offset.to_le_bytes());
            offset += (tensor.encoding.bytes(tensor.numbers()) as u64).next_multiple_of(ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);

        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial).map_err(|source| unwritable(&partial, source))?;
        let mut file = Self {
            path: path.to_owned(),
            partial,
            out: BufWriter::with_capacity(1 << 20, file),
            tensors,
            done: (0, 0),
            finished: false,
        };
        file.put(&head)?;
        Ok(file)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|source| unwritable(&self.partial, source))
    }

    /// Writes the next numbers of the tensor whose turn it is: whole blocks of them.
    ///
    /// # Errors
    /// The disk is full, or there are more numbers than the table says.
    pub fn write(&mut self, numbers: &[f32]) -> Result<()> {
        let (index, before) = self.done;
        let Some(tensor) = self.tensors.get(index) else {
            return Err(Error::Length { what: "the GGUF file", found: index + 1, expected: index });
        };
        let (encoding, wanted) = (tensor.encoding, tensor.numbers());
        let found = before + numbers.len();
        if found > wanted || !numbers.len().is_multiple_of(encoding.block()) {
            return Err(Error::Length { what: "a tensor of the GGUF file", found, expected: wanted });
        }
        let bytes = encoding.encode(numbers)?;
        self.put(&bytes)?;
        self.done = (index, found);
        if found == wanted {
            let length = encoding.bytes(wanted) as u64;
            let gap = length.next_multiple_of(ALIGNMENT) - length;
            self.put(&[0; ALIGNMENT as usize][..gap as usize])?;
            self.done = (index + 1, 0);
        }
        Ok(())
    }

    /// Brings the file to the disk under its name; gives its size, bytes.
    ///
    /// # Errors
    /// Numbers are missing, or the disk is full.
    pub fn finish(mut self) -> Result<u64> {
        if self.done != (self.tensors.len(), 0) {
            let (found, expected) = (self.done.0, self.tensors.len());
            return Err(Error::Length { what: "the GGUF file", found, expected });
        }
        let settle = |file: &mut Self| -> io::Result<u64> {
            file.out.flush()?;
            file.out.get_ref().sync_all()?;
            fs::rename(&file.partial, &file.path)?;
            Ok(fs::metadata(&file.path)?.len())
        };
        let size = settle(&mut self).map_err(|source| unwritable(&self.path, source))?;
        self.finished = true;
        Ok(size)
    }
}

impl Drop for GgufFile {
    fn drop(&mut self) {
        if !self.finished {
            // What is left of it must not be taken for a model; if it stays, its name tells.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

fn unwritable(file: &Path, source: io::Error) -> Error {
    Error::Write { origin: Origin::Base, file: file.to_owned(), source }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, id: u32| out.extend_from_slice(&id.to_le_bytes());
        let list = |out: &mut Vec<u8>, id: u32, length: usize| {
            out.extend_from_slice(&9u32.to_le_bytes());
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&(length as u64).to_le_bytes());
        };
        match self {
            Self::U32(value) => {
                kind(out, 4);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Self::F32(value) => {
                kind(out, 6);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Self::Bool(value) => {
                kind(out, 7);
                out.push(u8::from(*value));
            }
            Self::Text(value) => {
                kind(out, 8);
                text(out, value);
            }
            Self::Texts(values) => {
                list(out, 8, values.len());
                values.iter().for_each(|value| text(out, value));
            }
            Self::I32s(values) => {
                list(out, 5, values.len());
                values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::{Content, Value};

    use super::*;

    #[test]
    fn candle_reads_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        let numbers: Vec<f32> = (0..3 * 64).map(|index| ((index * 37 % 101) as f32 - 50.0) / 16.0).collect();
        let tensor = |name: &str, shape: &[usize], encoding| TensorInfo {
            name: name.to_owned(),
            shape: shape.to_vec(),
            encoding,
        };
        let tensors = vec![
            tensor("odd", &[5], Encoding::F32),
            tensor("half", &[3, 64], Encoding::F16),
            tensor("eight", &[3, 64], Encoding::Q8_0),
            tensor("four", &[3, 64], Encoding::Q4_0),
        ];
        let meta = vec![
            ("general.architecture".to_owned(), Meta::Text("llama".to_owned())),
            ("x.count".to_owned(), Meta::U32(7)),
            ("x.share".to_owned(), Meta::F32(0.25)),
            ("x.flag".to_owned(), Meta::Bool(true)),
            ("x.words".to_owned(), Meta::Texts(vec!["Ġa".to_owned(), String::new()])),
            ("x.kinds".to_owned(), Meta::I32s(vec![1, -3])),
        ];
        let mut file = GgufFile::create(&path, &meta, tensors).unwrap();
        file.write(&numbers[..5]).unwrap();
        // In pieces, as large tensors come.
        file.write(&numbers[..64]).unwrap();
        file.write(&numbers[64..]).unwrap();
        file.write(&numbers[..32]).unwrap();
        file.write(&numbers[32..]).unwrap();
        file.write(&numbers).unwrap();
        let size = file.finish().unwrap();
        assert_eq!(size, fs::metadata(&path).unwrap().len());

        let mut reader = File::open(&path).unwrap();
        let content = Content::read(&mut reader).unwrap();
        assert_eq!(content.metadata["x.count"].to_u32().unwrap(), 7);
        assert_eq!(content.metadata["x.share"].to_f32().unwrap(), 0.25);
        assert!(content.metadata["x.flag"].to_bool().unwrap());
        let Value::Array(words) = &content.metadata["x.words"] else { panic!("no list") };
        assert_eq!(words[0].to_string().unwrap(), "Ġa");
        let Value::Array(kinds) = &content.metadata["x.kinds"] else { panic!("no list") };
        assert_eq!(kinds[1].to_i32().unwrap(), -3);
        let mut read = |name: &str| -> Vec<f32> {
            let tensor = content.tensor(&mut reader, name, &Device::Cpu).unwrap();
            tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(read("odd"), numbers[..5]);
        assert_eq!(read("half"), numbers, "sixteenths are exact in f16");
        for (name, steps) in [("eight", 127.0), ("four", 7.0)] {
            for (got, block) in read(name).chunks(32).zip(numbers.chunks(32)) {
                let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                for (got, expected) in got.iter().zip(block) {
                    // Half a step, or one at the end of Q4_0's lopsided range; the scale is rounded to f16.
                    assert!((got - expected).abs() <= 1.01 * largest / steps, "{name}: {got} {expected}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        let tensor = TensorInfo { name: "a".to_owned(), shape: vec![2], encoding: Encoding::F32 };
        let mut file = GgufFile::create(&path, &[], vec![tensor]).unwrap();
        assert!(file.write(&[1.0, 2.0, 3.0]).is_err(), "more than its shape");
        file.write(&[1.0]).unwrap();
        assert!(file.finish().is_err(), "one number is missing");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        fs::write(&path, "mine").unwrap();
        assert!(GgufFile::create(&path, &[], Vec::new()).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
