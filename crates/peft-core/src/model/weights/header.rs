//! The header of a safetensors file (<https://huggingface.co/docs/safetensors>), read without believing it.
//!
//! What it costs in memory is bounded by its own length: names are kept, shapes of more than [`MOST_DIMENSIONS`] are refused,
//! the free text under `__metadata__` is passed over.

use std::fmt;

use safetensors::tensor::Dtype;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::file::{Encoding, Stored};

/// No tensor of a model has more.
const MOST_DIMENSIONS: usize = 8;
/// The fewest bytes that describe a tensor: `"":{"dtype":"U8","shape":[],"data_offsets":[0,0]}`.
const LEAST_ENTRY: usize = 48;
/// Free text besides the tensors.
const METADATA: &str = "__metadata__";

/// The tensors that a header describes, sorted by name, of a file of `file_length` bytes.
pub(super) fn parse(header: &[u8], file_length: u64) -> Result<Vec<Stored>, String> {
    let data_start = 8 + header.len() as u64;
    let unsound = |error| format!("its header is not sound: {error}");
    let most = header.len() / LEAST_ENTRY;
    let mut found = read(header, Tensors { most, data_start }).map_err(unsound)?;
    found.sort_unstable_by_key(|(tensor, end)| (tensor.start, *end));
    let mut end = data_start;
    for (tensor, tensor_end) in &found {
        let name = &tensor.name;
        if tensor.start != end || *tensor_end < tensor.start {
            let (start, end) = (tensor.start, end - data_start);
            return Err(format!(
                "its header is not sound: tensor `{name}` begins at {}, the one before it ends at {end}",
                start.wrapping_sub(data_start)
            ));
        }
        end = *tensor_end;
        if bytes_of(tensor) != Some(end - tensor.start) {
            return Err(format!(
                "its header is not sound: tensor `{name}` of shape {:?} takes other than {} bytes",
                tensor.shape,
                end - tensor.start
            ));
        }
    }
    if end != file_length {
        return Err(format!(
            "its header describes {} bytes of tensors, the file has {}",
            end - data_start,
            file_length - data_start
        ));
    }
    let mut tensors: Vec<Stored> = found.into_iter().map(|(tensor, _)| tensor).collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    match tensors.windows(2).find(|two| two[0].name == two[1].name) {
        Some(two) => Err(format!("its header is not sound: tensor `{}` is there twice", two[0].name)),
        None => Ok(tensors),
    }
}

/// A text under `__metadata__`.
pub(super) fn metadata(header: &[u8], key: &str) -> Option<String> {
    read(header, Lookup { path: &[METADATA, key] }).ok().flatten()
}

fn read<'a, S: DeserializeSeed<'a>>(header: &'a [u8], seed: S) -> Result<S::Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(header);
    let value = seed.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// Bytes that a tensor takes by its shape; none where they overflow or are no whole number.
fn bytes_of(tensor: &Stored) -> Option<u64> {
    let Encoding::Plain(dtype) = tensor.encoding else { return None };
    let numbers = tensor.shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size as u64))?;
    let bits = numbers.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Reads the whole header: each tensor with where it ends.
struct Tensors {
    /// What the header has room for.
    most: usize,
    data_start: u64,
}

impl<'de> DeserializeSeed<'de> for Tensors {
    type Value = Vec<(Stored, u64)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tensors {
    type Value = Vec<(Stored, u64)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = Vec::with_capacity(self.most);
        while let Some(name) = map.next_key::<Box<str>>()? {
            if &*name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let Described { dtype, shape, data_offsets: (start, end) } = map.next_value()?;
            let place = |offset: u64| {
                self.data_start.checked_add(offset).ok_or_else(|| A::Error::custom("an offset overflows"))
            };
            if tensors.len() == self.most {
                return Err(A::Error::custom("more tensors than its length has room for"));
            }
            let shape = shape.sizes[..shape.count].into();
            let encoding = Encoding::Plain(dtype);
            tensors.push((Stored { name, shape, encoding, start: place(start)?, heads: None }, place(end)?));
        }
        Ok(tensors)
    }
}

/// What the header says of a tensor.
#[derive(serde::Deserialize)]
struct Described {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// Sizes without memory of their own.
struct Shape {
    sizes: [usize; MOST_DIMENSIONS],
    count: usize,
}

impl<'de> serde::Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;

        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MOST_DIMENSIONS} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Shape, A::Error> {
                let mut shape = Shape { sizes: [0; MOST_DIMENSIONS], count: 0 };
                while let Some(size) = sequence.next_element()? {
                    let place = shape.sizes.get_mut(shape.count);
                    *place.ok_or_else(|| A::Error::invalid_length(shape.count + 1, &self))? = size;
                    shape.count += 1;
                }
                Ok(shape)
            }
        }

        deserializer.deserialize_seq(Sizes)
    }
}

/// Finds the text at the end of a path of keys, passing over all else.
struct Lookup<'a> {
    path: &'a [&'a str],
}

impl<'de> DeserializeSeed<'de> for Lookup<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.path.is_empty() {
            return serde::Deserialize::deserialize(deserializer).map(Some);
        }
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Lookup<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(name) = map.next_key::<Box<str>>()? {
            match self.path.split_first() {
                Some((first, path)) if **first == *name => found = map.next_value_seed(Lookup { path })?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}
