//! The layers of a file: default < file < environment < flags.
//!
//! Each layer is read and checked on its own, so that an error can say where its value came from. The `config` crate
//! lays them on top of each other and makes the typed value.

use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Map, Source, Value};
use serde::de::DeserializeOwned;

use crate::{
    check::{Checker, unknown_key_hint},
    document::{Document, Item, Node, position_in},
    error::{Error, Errors},
    loaded::Sources,
    place::Place,
    read,
    shape::{Describe, Shape},
};

/// Where the layers of one file come from.
pub(crate) struct Layers<'a> {
    /// The file; without one the other layers must say everything.
    pub(crate) file: Option<&'a Path>,
    /// What the names of its environment variables begin with: `SHANTY_JOB__`.
    pub(crate) prefix: &'static str,
    /// All environment variables.
    pub(crate) environment: Vec<(String, String)>,
    /// Dotted keys and values, in the order of the command line.
    pub(crate) flags: &'a [(String, String)],
    /// How such a key and value are typed.
    pub(crate) flag: fn(&str, &str) -> String,
    /// Keys that must be given, each with a value as an example.
    pub(crate) required: &'static [(&'static str, &'static str)],
}

impl Layers<'_> {
    /// Reads and merges all layers.
    pub(crate) fn load<T: Describe + DeserializeOwned>(self) -> Result<(T, Sources), Errors> {
        let shape = T::shape();
        let mut errors = Vec::new();
        let mut builder = Config::builder();
        let mut sources = Sources::default();

        if let Some(path) = self.file {
            let document = parse(path, read::text(path)?)?;
            let place = |span: &std::ops::Range<usize>| Place::File {
                path: path.to_owned(),
                at: Some(document.position(span)),
            };
            let mut checker = Checker { root: &shape, place: &place, errors: &mut errors };
            if let Some(value) = checker.value("", &document.root, &shape) {
                builder = builder.add_source(Layer(value.into_table().unwrap_or_default()));
            }
            sources.path = path.to_owned();
            sources.document = Some(document);
        }
        for (variable, text) in self.environment {
            let Some(key) = variable.strip_prefix(self.prefix) else { continue };
            let key = key.to_lowercase().replace("__", ".");
            let place = Place::Environment { variable };
            if let Some(value) = typed(&shape, &key, &text, &place, self.prefix, &mut errors) {
                builder = builder.add_source(Layer(Map::from([(key.clone(), value)])));
                sources.environment.push((key, place));
            }
        }
        for (key, text) in self.flags {
            let place = Place::Flag { text: (self.flag)(key, text) };
            if let Some(value) = typed(&shape, key, text, &place, self.prefix, &mut errors) {
                builder = builder.add_source(Layer(Map::from([(key.clone(), value)])));
                sources.flags.push((key.clone(), place));
            }
        }
        // A key that was refused is not missing: only what no layer names is.
        for (key, example) in self.required {
            if !sources.names(key) && !errors.iter().any(|error| names_parent(error, key)) {
                errors.push(missing(key, example, &sources));
            }
        }
        Errors::check(errors)?;

        let merged = builder.build().map_err(|error| fallback(error, &sources))?;
        let value = merged.try_deserialize().map_err(|error| fallback(error, &sources))?;
        Ok((value, sources))
    }
}

/// Reads `KEY=VALUE` as it stands behind `--set`.
///
/// # Errors
/// [`Error::Override`] where there is no `=`, or nothing before it.
pub fn parse_override(text: &str) -> Result<(String, String), Errors> {
    let refuse = |reason: &str| Error::Override { text: text.to_owned(), reason: reason.to_owned() };
    let (key, value) = text.split_once('=').ok_or_else(|| refuse("it has no `=`"))?;
    let key = key.trim();
    if key.is_empty() {
        return Err(refuse("it names no key before the `=`").into());
    }
    Ok((key.to_owned(), value.trim().to_owned()))
}

pub(crate) fn parse(path: &Path, text: String) -> Result<Document, Errors> {
    // Kept for the position of an error: the parser takes the text.
    let shown = text.clone();
    Document::parse(text).map_err(|error| {
        let place = Place::File { path: path.to_owned(), at: Some(position_in(&shown, &error.span)) };
        let reason = error.message.replace('\n', ", ");
        Error::Syntax { hint: syntax_hint(&reason), reason, place }.into()
    })
}

fn syntax_hint(reason: &str) -> Option<String> {
    reason
        .contains("duplicate key")
        .then(|| "each key and each table may stand once; remove or merge one of them".to_owned())
}

/// The value of a variable or flag, read as the type that its key has.
fn typed(
    root: &Shape,
    key: &str,
    text: &str,
    place: &Place,
    prefix: &str,
    errors: &mut Vec<Error>,
) -> Option<Value> {
    let Some(shape) = root.find(key) else {
        let (parent, name) = key.rsplit_once('.').unwrap_or(("", key));
        let hint = match crate::suggest::closest_key(root, parent, name) {
            Some(meant) if matches!(place, Place::Environment { .. }) => {
                Some(format!("did you mean `{prefix}{}`?", meant.to_uppercase().replace('.', "__")))
            }
            Some(meant) => Some(format!("did you mean `{meant}`?")),
            None => unknown_key_hint(root, parent, name),
        };
        errors.push(Error::UnknownKey { key: key.to_owned(), hint, place: place.clone() });
        return None;
    };
    let item = read_as(text, shape);
    Checker { root, place: &|_| place.clone(), errors }.value(key, &item, shape)
}

/// Shells lose quotes, so a value outside a file is read as what its key may hold.
fn read_as(text: &str, shape: &Shape) -> Item {
    let item = |node| Item { span: 0..0, node };
    let as_toml = || Document::parse(format!("value = {text}")).ok()?.item("value").cloned();
    let as_text = || item(Node::Text(text.to_owned()));
    match shape {
        Shape::Text | Shape::Path | Shape::Words(_) if !text.starts_with('"') => as_text(),
        Shape::WordsOrInteger { .. } if text.parse::<i64>().is_err() && !text.starts_with('"') => as_text(),
        Shape::TextOrList | Shape::TextOrTables(_) if !text.starts_with(['"', '[']) => as_text(),
        Shape::Number => text.parse().map_or_else(|_| as_text(), |value| item(Node::Float(value))),
        _ => as_toml().unwrap_or_else(as_text),
    }
}

fn missing(key: &str, example: &str, sources: &Sources) -> Error {
    let (parent, name) = key.rsplit_once('.').unwrap_or(("", key));
    let hint = if parent.is_empty() {
        format!("add `{name} = {example}` at the top of the file")
    } else if sources.document.as_ref().is_some_and(|document| document.item(parent).is_some()) {
        format!("add `{name} = {example}` to `[{parent}]`")
    } else {
        format!("add `[{parent}]` with `{name} = {example}`")
    };
    Error::Missing { key: key.to_owned(), hint, place: sources.locate(key) }
}

/// Whether an error is about a table that would hold the key (so that its absence says nothing new).
fn names_parent(error: &Error, key: &str) -> bool {
    match error {
        Error::WrongType { key: at, .. } => key.starts_with(&format!("{at}.")),
        _ => false,
    }
}

/// What the checks let through and the `config` crate refuses.
fn fallback(error: ConfigError, sources: &Sources) -> Errors {
    let (key, expected, found) = match &error {
        ConfigError::Type { key: Some(key), unexpected, expected, .. } => {
            (key.clone(), (*expected).to_owned(), unexpected.to_string())
        }
        ConfigError::At { key: Some(key), error, .. } => {
            (key.clone(), "readable".to_owned(), error.to_string())
        }
        _ => {
            let place = Place::File { path: sources.path.clone(), at: None };
            return Error::Syntax { reason: error.to_string(), hint: None, place }.into();
        }
    };
    let place = sources.locate(&key);
    Error::WrongType { key, expected, found, hint: None, place }.into()
}

/// A checked layer, as a source of the `config` crate.
#[derive(Debug, Clone)]
struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

/// The process's environment; what is not UTF-8 cannot name one of our keys.
pub(crate) fn process_environment() -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    variables.sort();
    variables
}

/// The folder that relative paths of a value are resolved against.
pub(crate) fn folder_of(place: &Place, file: &Path) -> PathBuf {
    match place {
        Place::File { .. } => file.parent().map(Path::to_owned).unwrap_or_default(),
        _ => PathBuf::new(),
    }
}
