//! The header of a file: metadata, and where each tensor lies.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::{
    kind::Kind,
    parse::{Parsed, Problem, Stop, parse},
    value::{Item, List, Value},
};

/// Read at first; enough for most headers but for their vocabulary.
const FIRST: u64 = 1 << 20;
/// No tokenizer comes near.
const LONGEST: u64 = 1 << 30;
/// Where tensors begin at multiples of, unless the file says otherwise.
const ALIGNMENT: u64 = 32;

/// Why a header could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It is not sound.
    #[error(transparent)]
    Damaged(#[from] Problem),
}

/// An entry of the metadata: places in the header's bytes.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: Range<usize>,
    pub(crate) item: Item,
    /// How many, of a list.
    pub(crate) count: Option<usize>,
    pub(crate) value: Range<usize>,
}

/// A tensor as the header describes it.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: Range<usize>,
    pub(crate) dimensions: u8,
    pub(crate) shape: [u64; 4],
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// A tensor's place and form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Sizes, the innermost (of numbers that lie beside each other) first.
    pub shape: &'a [u64],
    /// How its numbers are stored.
    pub kind: Kind,
    /// Where it begins, counted from the front of the file.
    pub start: u64,
    /// Bytes that it takes.
    pub bytes: u64,
}

/// A checked header.
#[derive(Debug)]
pub struct Header {
    bytes: Vec<u8>,
    /// Sorted by key.
    entries: Vec<Entry>,
    /// Sorted by name.
    tensors: Vec<TensorEntry>,
    data_start: u64,
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// The file cannot be read, or is not sound: see [`Problem`].
    pub fn read(file: &File) -> Result<Self, HeaderError> {
        let length = file.metadata()?.len();
        Self::read_with(length, |bytes, at| file.read_exact_at(bytes, at))
    }

    /// As [`Header::read`], of a file that lies in memory.
    ///
    /// # Errors
    /// It is not sound.
    pub fn of_bytes(file: &[u8]) -> Result<Self, HeaderError> {
        Self::read_with(file.len() as u64, |bytes, at| {
            let start = usize::try_from(at).unwrap_or(usize::MAX);
            let from = file.get(start..).and_then(|rest| rest.get(..bytes.len()));
            bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn read_with(length: u64, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> Result<Self, HeaderError> {
        let mut bytes = Vec::new();
        let mut wanted = FIRST.min(length);
        loop {
            let known = bytes.len();
            bytes.reserve_exact(wanted as usize - known);
            bytes.resize(wanted as usize, 0);
            read(&mut bytes[known..], known as u64)?;
            match parse(&bytes, length) {
                Ok(parsed) => return Ok(Self::checked(bytes, parsed, length)?),
                Err(Stop::Wrong(problem)) => return Err(problem.into()),
                Err(Stop::Short) if wanted == length => {
                    let what = "the file ends inside its header".to_owned();
                    return Err(Problem { at: length, what }.into());
                }
                Err(Stop::Short) if wanted >= LONGEST => {
                    let what = format!("its header is longer than {LONGEST} bytes");
                    return Err(Problem { at: wanted, what }.into());
                }
                Err(Stop::Short) => wanted = (4 * wanted).min(length).min(LONGEST),
            }
        }
    }

    fn checked(mut bytes: Vec<u8>, parsed: Parsed, length: u64) -> Result<Self, Problem> {
        let Parsed { mut entries, mut tensors, length: header } = parsed;
        bytes.truncate(header);
        entries.sort_unstable_by(|a, b| bytes[a.key.clone()].cmp(&bytes[b.key.clone()]));
        tensors.sort_unstable_by_key(|tensor| tensor.offset);
        let mut this = Self { bytes, entries, tensors, data_start: 0 };
        if let Some(twice) =
            this.entries.windows(2).find(|two| this.text(&two[0].key) == this.text(&two[1].key))
        {
            let what = format!("the key `{}` is there twice", this.text(&twice[1].key));
            return Err(Problem { at: twice[1].key.start as u64, what });
        }
        let alignment = match this.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 16 => alignment,
                _ => {
                    let what = format!("general.alignment is {value:?}, no power of 2 up to 65536");
                    return Err(Problem { at: 0, what });
                }
            },
        };
        this.data_start = (this.bytes.len() as u64).next_multiple_of(alignment);
        this.check_places(alignment, length)?;
        this.tensors.sort_unstable_by(|a, b| this.bytes[a.name.clone()].cmp(&this.bytes[b.name.clone()]));
        let twice = this.tensors.windows(2).find(|two| this.text(&two[0].name) == this.text(&two[1].name));
        if let Some(twice) = twice {
            let what = format!("the tensor `{}` is there twice", this.text(&twice[1].name));
            return Err(Problem { at: twice[1].name.start as u64, what });
        }
        Ok(this)
    }

    /// Tensors, sorted by offset, lie inside the file, at aligned places, one behind the other.
    fn check_places(&self, alignment: u64, length: u64) -> Result<(), Problem> {
        let room = length.saturating_sub(self.data_start);
        let mut end = 0;
        for tensor in &self.tensors {
            let wrong = |what: String| {
                let what = format!("the tensor `{}` {what}", self.text(&tensor.name));
                Err(Problem { at: tensor.name.start as u64, what })
            };
            let TensorEntry { offset, bytes, .. } = *tensor;
            if !offset.is_multiple_of(alignment) {
                return wrong(format!("begins at {offset}, no multiple of {alignment}"));
            }
            // Neither is above the file's length: the sum cannot overflow.
            if offset + bytes > room {
                return wrong(format!("takes {bytes} bytes at {offset} of {room}"));
            }
            if offset < end && bytes > 0 {
                return wrong(format!("begins at {offset}, inside another that ends at {end}"));
            }
            end = end.max(offset + bytes);
        }
        Ok(())
    }

    fn text(&self, place: &Range<usize>) -> &str {
        // Every name was checked to be UTF-8.
        std::str::from_utf8(&self.bytes[place.clone()]).unwrap_or_default()
    }

    /// Names of all entries of the metadata, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| self.text(&entry.key))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let place = self.entries.binary_search_by(|entry| self.text(&entry.key).cmp(key)).ok()?;
        let entry = &self.entries[place];
        let bytes = &self.bytes[entry.value.clone()];
        match entry.count {
            Some(count) => Some(Value::List(List { item: entry.item, count, bytes })),
            None => entry.item.take(bytes).map(|(value, _)| value),
        }
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|tensor| self.info(tensor))
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<TensorInfo<'_>> {
        let place = self.tensors.binary_search_by(|tensor| self.text(&tensor.name).cmp(name)).ok()?;
        Some(self.info(&self.tensors[place]))
    }

    fn info<'a>(&'a self, tensor: &'a TensorEntry) -> TensorInfo<'a> {
        TensorInfo {
            name: self.text(&tensor.name),
            shape: &tensor.shape[..usize::from(tensor.dimensions)],
            kind: tensor.kind,
            start: self.data_start + tensor.offset,
            bytes: tensor.bytes,
        }
    }
}
