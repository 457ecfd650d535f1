//! What a file may hold, told by the structs themselves.
//!
//! [`described!`](crate::shape) wraps the declaration of a struct or an enum and keeps, beside the serde type, its keys,
//! types and doc comments as data. The checks of a file, the "did you mean", the typed reading of environment
//! variables and flags, and the reference pages all come from this one declaration.

use std::{collections::BTreeMap, path::PathBuf};

/// What a key may hold.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// A table with keys of its own.
    Table(Table),
    /// A whole number from 0 to `max`.
    Integer {
        /// The highest value that fits.
        max: i64,
    },
    /// A number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// Text.
    Text,
    /// A path; relative ones are resolved.
    Path,
    /// One word of a list.
    Words(Vec<Word>),
    /// One word of a list, or a whole number from 0 to `max`.
    WordsOrInteger {
        /// The words.
        words: Vec<Word>,
        /// The highest value that fits.
        max: i64,
    },
    /// A list of so many numbers.
    Numbers(usize),
    /// Text, or a list of texts.
    TextOrList,
    /// Text, or a list of tables with keys of their own.
    TextOrTables(Table),
    /// A list of whole numbers from 0 to `max`.
    Integers {
        /// The highest value that fits.
        max: i64,
    },
    /// A table of numbers under names of one's own.
    NumbersByName,
}

/// A table: its keys, in the order of the declaration.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// The doc comment of the struct.
    pub doc: &'static str,
    /// The keys.
    pub fields: Vec<Field>,
}

/// A key of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Its name in the file.
    pub key: &'static str,
    /// The doc comment of the field.
    pub doc: &'static str,
    /// What it may hold.
    pub shape: Shape,
    /// Whether it may stay without any value.
    pub optional: bool,
}

/// One word that a key may hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Word {
    /// As it is written in the file.
    pub word: String,
    /// The doc comment of the variant.
    pub doc: &'static str,
}

/// A type that knows what a file may hold for it.
pub trait Describe {
    /// Whether a key of this type may stay without any value.
    const OPTIONAL: bool = false;

    /// What a file may hold for it.
    fn shape() -> Shape;
}

impl Shape {
    /// The keys of a table, or of the tables of a list; none for anything else.
    pub fn fields(&self) -> &[Field] {
        match self {
            Self::Table(table) | Self::TextOrTables(table) => &table.fields,
            _ => &[],
        }
    }

    /// The words that may stand there.
    pub fn words(&self) -> &[Word] {
        match self {
            Self::Words(words) | Self::WordsOrInteger { words, .. } => words,
            _ => &[],
        }
    }

    /// The shape of a dotted key below this one. Indices of lists of tables are passed over.
    pub fn find(&self, key: &str) -> Option<&Shape> {
        key.split('.').try_fold(self, |shape, part| {
            let part = part.split_once('[').map_or(part, |(name, _)| name);
            shape.fields().iter().find(|field| field.key == part).map(|field| &field.shape)
        })
    }

    /// All dotted keys below this one that hold a value, in the order of the declaration.
    pub fn leaves(&self) -> Vec<(String, &Field)> {
        let mut leaves = Vec::new();
        collect_leaves(self, "", &mut leaves);
        leaves
    }

    /// The shape in words, as it stands in messages: `must be …`.
    pub fn expected(&self) -> String {
        match self {
            Self::Table(_) => "a table".to_owned(),
            Self::Integer { .. } => "a whole number".to_owned(),
            Self::Number => "a number".to_owned(),
            Self::Boolean => "`true` or `false`".to_owned(),
            Self::Text => "text in quotes".to_owned(),
            Self::Path => "a path in quotes".to_owned(),
            Self::Words(words) => format!("one of {}", quoted(words.iter().map(|word| word.word.as_str()))),
            Self::WordsOrInteger { words, .. } => {
                format!("one of {}, or a whole number", quoted(words.iter().map(|word| word.word.as_str())))
            }
            Self::Numbers(length) => format!("a list of {length} numbers"),
            Self::TextOrList => "text or a list of texts".to_owned(),
            Self::TextOrTables(_) => "text or a list of tables".to_owned(),
            Self::Integers { .. } => "a list of whole numbers".to_owned(),
            Self::NumbersByName => "a table of names and numbers".to_owned(),
        }
    }
}

/// `` `a`, `b`, `c` ``
pub(crate) fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// `a.b` from `a` and `b`, `b` from nothing and `b`.
pub(crate) fn join_key(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

fn collect_leaves<'a>(shape: &'a Shape, parent: &str, leaves: &mut Vec<(String, &'a Field)>) {
    for field in shape.fields() {
        let key = join_key(parent, field.key);
        match field.shape {
            Shape::Table(_) => collect_leaves(&field.shape, &key, leaves),
            _ => leaves.push((key, field)),
        }
    }
}

impl<T: Describe> Describe for Option<T> {
    const OPTIONAL: bool = true;

    fn shape() -> Shape {
        T::shape()
    }
}

macro_rules! describe_as {
    ($($type:ty => $shape:expr;)*) => {
        $(impl Describe for $type {
            fn shape() -> Shape {
                $shape
            }
        })*
    };
}

describe_as! {
    u32 => Shape::Integer { max: i64::from(u32::MAX) };
    u64 => Shape::Integer { max: i64::MAX };
    usize => Shape::Integer { max: i64::MAX };
    f32 => Shape::Number;
    f64 => Shape::Number;
    bool => Shape::Boolean;
    String => Shape::Text;
    PathBuf => Shape::Path;
    [f64; 2] => Shape::Numbers(2);
    Vec<u32> => Shape::Integers { max: i64::from(u32::MAX) };
    BTreeMap<String, f64> => Shape::NumbersByName;
}

/// The word that a variant is written as.
pub(crate) fn word_of<T: serde::Serialize>(variant: &T) -> String {
    match serde_json::to_value(variant) {
        Ok(serde_json::Value::String(word)) => word,
        other => unreachable!("a variant without fields is written as a word, not as {other:?}"),
    }
}

/// Declares structs and enums that know what a file may hold for them ([`Describe`]).
macro_rules! described {
    () => {};
    (
        $(#[$($attribute:tt)*])*
        pub struct $name:ident {
            $($(#[$($field_attribute:tt)*])* pub $field:ident: $type:ty,)*
        }
        $($rest:tt)*
    ) => {
        $(#[$($attribute)*])*
        pub struct $name {
            $($(#[$($field_attribute)*])* pub $field: $type,)*
        }

        impl $crate::shape::Describe for $name {
            fn shape() -> $crate::shape::Shape {
                $crate::shape::Shape::Table($crate::shape::Table {
                    doc: $crate::shape::doc_text!($([$($attribute)*])*),
                    fields: vec![$($crate::shape::Field {
                        key: stringify!($field),
                        doc: $crate::shape::doc_text!($([$($field_attribute)*])*),
                        shape: <$type as $crate::shape::Describe>::shape(),
                        optional: <$type as $crate::shape::Describe>::OPTIONAL,
                    },)*],
                })
            }
        }

        $crate::shape::described! { $($rest)* }
    };
    (
        $(#[$($attribute:tt)*])*
        pub enum $name:ident {
            $($(#[$($variant_attribute:tt)*])* $variant:ident,)*
        }
        $($rest:tt)*
    ) => {
        $(#[$($attribute)*])*
        pub enum $name {
            $($(#[$($variant_attribute)*])* $variant,)*
        }

        impl $crate::shape::Describe for $name {
            fn shape() -> $crate::shape::Shape {
                $crate::shape::Shape::Words(vec![$($crate::shape::Word {
                    word: $crate::shape::word_of(&Self::$variant),
                    doc: $crate::shape::doc_text!($([$($variant_attribute)*])*),
                },)*])
            }
        }

        $crate::shape::described! { $($rest)* }
    };
}

/// The doc comment among attributes, line by line.
macro_rules! doc_text {
    () => { "" };
    ([doc = $line:literal] $($rest:tt)*) => {
        concat!($line, "\n", $crate::shape::doc_text!($($rest)*))
    };
    ([$($other:tt)*] $($rest:tt)*) => { $crate::shape::doc_text!($($rest)*) };
}

pub(crate) use {described, doc_text};
