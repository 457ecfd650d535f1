//! A header out of bytes, each length checked against what is there.

use std::ops::Range;

use crate::{
    MAGIC,
    header::{Entry, TensorEntry},
    kind::Kind,
    value::Item,
};

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {what}")]
pub struct Problem {
    /// Where in the file.
    pub at: u64,
    /// What is there.
    pub what: String,
}

/// Why a header could not be read.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The bytes end before the header does.
    Short,
    /// It does not hold together.
    Wrong(Problem),
}

/// A header as it was read: places in its bytes.
pub(crate) struct Parsed {
    pub(crate) entries: Vec<Entry>,
    pub(crate) tensors: Vec<TensorEntry>,
    /// Bytes that it takes.
    pub(crate) length: usize,
}

/// The fewest bytes that an entry of the metadata, and a tensor's, take.
const LEAST_ENTRY: u64 = 13;
const LEAST_TENSOR: u64 = 24;
/// ggml knows no more dimensions.
const MOST_DIMENSIONS: u32 = 4;
/// As ggml has it.
const LONGEST_NAME: u64 = 1 << 16;

/// Reads a header at the front of `bytes`, of a file of `file_length` bytes.
pub(crate) fn parse(bytes: &[u8], file_length: u64) -> Result<Parsed, Stop> {
    let mut cursor = Cursor { bytes, at: 0, file_length };
    if cursor.take(4)? != MAGIC {
        return Err(cursor.wrong(0, "it does not begin with `GGUF`"));
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        let what = match version.swap_bytes() {
            2 | 3 => "its numbers are big-endian".to_owned(),
            _ => format!("it is of version {version}; 2 and 3 are read"),
        };
        return Err(cursor.wrong(4, what));
    }
    let (tensors, entries) = (cursor.u64()?, cursor.u64()?);
    cursor.plausible(tensors, LEAST_TENSOR, "tensors")?;
    cursor.plausible(entries, LEAST_ENTRY, "entries of metadata")?;
    // Both counts were just bounded by the length of the file; a file that is not read whole yet is short of them.
    let mut parsed = Parsed { entries: cursor.room(entries, LEAST_ENTRY)?, tensors: Vec::new(), length: 0 };
    for _ in 0..entries {
        parsed.entries.push(cursor.entry()?);
    }
    parsed.tensors = cursor.room(tensors, LEAST_TENSOR)?;
    for _ in 0..tensors {
        parsed.tensors.push(cursor.tensor()?);
    }
    parsed.length = cursor.at;
    Ok(parsed)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_length: u64,
}

impl<'a> Cursor<'a> {
    fn wrong(&self, at: usize, what: impl Into<String>) -> Stop {
        Stop::Wrong(Problem { at: at as u64, what: what.into() })
    }

    /// Refuses a count of things of at least `least` bytes that the rest of the file cannot hold.
    fn plausible(&self, count: u64, least: u64, what: &str) -> Result<(), Stop> {
        let rest = self.file_length - self.at as u64;
        match count.checked_mul(least) {
            Some(bytes) if bytes <= rest => Ok(()),
            _ => Err(self.wrong(self.at, format!("{count} {what} are claimed, {rest} bytes follow"))),
        }
    }

    /// Room for so many things, each of which takes at least `least` of the bytes that are there.
    fn room<T>(&self, count: u64, least: u64) -> Result<Vec<T>, Stop> {
        if count * least > (self.bytes.len() - self.at) as u64 {
            return Err(Stop::Short);
        }
        Ok(Vec::with_capacity(count as usize))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let taken = self.bytes[self.at..].get(..length).ok_or(Stop::Short)?;
        self.at += length;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        let mut word = [0; 8];
        word.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(word))
    }

    /// A length in bytes, which the file must hold.
    fn length(&mut self, what: &str) -> Result<usize, Stop> {
        let at = self.at;
        let length = self.u64()?;
        let rest = self.file_length - self.at as u64;
        if length > rest {
            return Err(self.wrong(at, format!("{what} of {length} bytes is claimed, {rest} bytes follow")));
        }
        usize::try_from(length).map_err(|_| Stop::Short)
    }

    /// A name: where it lies.
    fn name(&mut self, what: &str) -> Result<Range<usize>, Stop> {
        let at = self.at;
        let length = self.length(what)?;
        if length as u64 > LONGEST_NAME {
            return Err(self.wrong(at, format!("{what} of {length} bytes; {LONGEST_NAME} at most are right")));
        }
        let start = self.at;
        if std::str::from_utf8(self.take(length)?).is_err() {
            return Err(self.wrong(start, format!("{what} is no UTF-8")));
        }
        Ok(start..self.at)
    }

    fn entry(&mut self) -> Result<Entry, Stop> {
        let key = self.name("a key")?;
        let at = self.at;
        let number = self.u32()?;
        let (item, count) = if number == Item::LIST {
            let at = self.at;
            let number = self.u32()?;
            let Some(item) = Item::of(number) else {
                return Err(self.wrong(at, format!("a list of type {number}, which is none that is read")));
            };
            let count = self.u64()?;
            self.plausible(count, item.width() as u64, "items of a list")?;
            (item, Some(count as usize))
        } else {
            match Item::of(number) {
                Some(item) => (item, None),
                None => return Err(self.wrong(at, format!("a value of type {number}, which there is not"))),
            }
        };
        let start = self.at;
        self.skip(item, count.unwrap_or(1))?;
        Ok(Entry { key, item, count, value: start..self.at })
    }

    fn skip(&mut self, item: Item, count: usize) -> Result<(), Stop> {
        if item != Item::Text {
            let bytes = item.width().checked_mul(count).ok_or(Stop::Short)?;
            return self.take(bytes).map(|_| ());
        }
        for _ in 0..count {
            let length = self.length("a text")?;
            self.take(length)?;
        }
        Ok(())
    }

    fn tensor(&mut self) -> Result<TensorEntry, Stop> {
        let start = self.at;
        let name = self.name("a tensor's name")?;
        let at = self.at;
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return Err(self.wrong(at, format!("a tensor of {dimensions} dimensions; there are at most 4")));
        }
        let mut shape = [1_u64; MOST_DIMENSIONS as usize];
        for size in &mut shape[..dimensions as usize] {
            let at = self.at;
            *size = self.u64()?;
            if *size == 0 {
                return Err(self.wrong(at, "a tensor without numbers"));
            }
        }
        let at = self.at;
        let number = self.u32()?;
        let Some(kind) = Kind::of(number) else {
            let known = Kind::ALL.map(|kind| format!("{kind:?}")).join(", ");
            return Err(self.wrong(at, format!("a tensor stored as type {number}; read are {known}")));
        };
        let offset = self.u64()?;
        let numbers = shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size));
        let whole = shape[0].is_multiple_of(kind.block_numbers() as u64);
        let Some(bytes) = numbers.filter(|_| whole).and_then(|numbers| kind.bytes(numbers)) else {
            let shape = &shape[..dimensions as usize];
            return Err(
                self.wrong(start, format!("a tensor of {shape:?} numbers, which {kind:?} cannot store"))
            );
        };
        if bytes > self.file_length || offset > self.file_length {
            return Err(self.wrong(
                start,
                format!("a tensor of {bytes} bytes at {offset} in a file of {}", self.file_length),
            ));
        }
        Ok(TensorEntry { name, dimensions: dimensions as u8, shape, kind, offset, bytes })
    }
}
