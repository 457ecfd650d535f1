//! How many workers share one copy of the base.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Visitor},
};

use crate::shape::{Describe, Shape, Word};

/// How many workers share one copy of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shard {
    /// Each has its own where it fits, else as few as can share one: decided where the job is planned or begun.
    #[default]
    Auto,
    /// Each has its own.
    Replicate,
    /// So many share one.
    Parts(u32),
}

const AUTO: &str = "auto";
const REPLICATE: &str = "replicate";

impl Shard {
    /// How many workers share one copy; 1 where each has its own, and where nothing was decided.
    pub fn parts(self) -> u32 {
        match self {
            Self::Parts(parts) => parts.max(1),
            Self::Auto | Self::Replicate => 1,
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str(AUTO),
            Self::Replicate => f.write_str(REPLICATE),
            Self::Parts(parts) => parts.fmt(f),
        }
    }
}

impl Serialize for Shard {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str(AUTO),
            Self::Replicate => serializer.serialize_str(REPLICATE),
            Self::Parts(parts) => serializer.serialize_u32(*parts),
        }
    }
}

impl<'de> Deserialize<'de> for Shard {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordOrNumber;

        impl Visitor<'_> for WordOrNumber {
            type Value = Shard;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "`{AUTO}`, `{REPLICATE}` or a number of workers")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Shard, E> {
                match word {
                    AUTO => Ok(Shard::Auto),
                    REPLICATE => Ok(Shard::Replicate),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_u64<E: de::Error>(self, parts: u64) -> Result<Shard, E> {
                let parts = u32::try_from(parts);
                parts.map(Shard::Parts).map_err(|_| E::custom("more workers than can be"))
            }

            fn visit_i64<E: de::Error>(self, parts: i64) -> Result<Shard, E> {
                let parts = u32::try_from(parts);
                parts.map(Shard::Parts).map_err(|_| E::custom("no number of workers"))
            }
        }

        deserializer.deserialize_any(WordOrNumber)
    }
}

impl Describe for Shard {
    fn shape() -> Shape {
        let word = |word: &str, doc| Word { word: word.to_owned(), doc };
        let words = vec![
            word(
                AUTO,
                "Replicate where it fits; else share among as few as can hold it. `shanty plan` says which, and why.",
            ),
            word(REPLICATE, "Every worker holds all of it."),
        ];
        Shape::WordsOrInteger { words, max: i64::from(u32::MAX) }
    }
}
