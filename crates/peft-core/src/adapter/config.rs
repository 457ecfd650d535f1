//! PEFT's `adapter_config.json`, as far as all methods share it.
//!
//! Reading follows PEFT's loader: only `peft_type` is needed, absent keys take PEFT's defaults, unknown keys are dropped
//! (and told). Known keys that would change the numbers in a way that there is not here are errors, never ignored.
//! Writing puts down every key that PEFT 0.21.2 writes, so that it has nothing to warn about.

use std::{cell::RefCell, collections::BTreeSet, path::Path};

use serde_json::{Map, Value, json};

use super::{
    layout::ParameterLayout,
    method::{Method, SharedMethod},
    registry::Registration,
    targets::TargetModules,
};
use crate::{
    error::{Error, Origin, Result},
    model::ModelConfig,
};

/// The PEFT version whose keys are written.
pub const PEFT_VERSION: &str = "0.21.2";

/// Keys that every method has and that change nothing of a trained adapter.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "runtime_config",
];

/// Reads the text of an `adapter_config.json`; `file` is named in errors.
///
/// Returns the method and the keys that were dropped, sorted.
///
/// # Errors
/// Not JSON, a method that is not among `known`, an option that is not there, an impossible value.
pub fn read(text: &[u8], file: &Path, known: &[&Registration]) -> Result<(SharedMethod, Vec<String>)> {
    let json = parse(text, file)?;
    let keys = Keys::new(&json, file);
    let found = keys.text("peft_type")?.ok_or_else(|| keys.wrong("peft_type", "is missing".to_owned()))?;
    let Some(registration) = known.iter().find(|registration| registration.peft_type == found) else {
        return Err(Error::UnsupportedMethod {
            file: Some(file.to_owned()),
            found: found.to_owned(),
            known: known.iter().map(|registration| registration.peft_type).collect(),
        });
    };
    let method = keys.read(registration.read)?;
    Ok((method, keys.unknown()))
}

/// The JSON of a file.
///
/// # Errors
/// It is none.
pub(super) fn parse(text: &[u8], file: &Path) -> Result<Value> {
    serde_json::from_slice(text).map_err(|source| Error::Json {
        origin: Origin::Adapter,
        file: file.to_owned(),
        source,
    })
}

/// The text of an `adapter_config.json` as PEFT 0.21.2 writes it.
pub fn to_json(method: &dyn Method, layout: &ParameterLayout, state: &[f32]) -> String {
    written(method, method.settings(layout, state))
}

/// As [`to_json`], for a method that is fitted to `model`.
pub fn to_json_on(
    method: &dyn Method,
    model: &ModelConfig,
    layout: &ParameterLayout,
    state: &[f32],
) -> String {
    written(method, method.settings_on(model, layout, state))
}

fn written(method: &dyn Method, mut map: Map<String, Value>) -> String {
    for (key, value) in [
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(method.base_model())),
        ("inference_mode", json!(true)),
        ("peft_type", json!(method.peft_type())),
        ("peft_version", json!(PEFT_VERSION)),
        ("revision", Value::Null),
        ("task_type", json!("CAUSAL_LM")),
    ] {
        map.insert(key.to_owned(), value);
    }
    map.sort_keys();
    // `{:#}` of a JSON value: two spaces of indent, as Python's `indent=2`.
    format!("{:#}", Value::Object(map))
}

/// `target_modules` as PEFT writes it for a layout: the full names of the adapted modules, sorted.
pub fn adapted_modules(layout: &ParameterLayout) -> Value {
    let adapted = layout.modules().iter().filter(|adapted| adapted.branch);
    let mut modules: Vec<&str> = adapted.map(|adapted| adapted.module.path.as_str()).collect();
    modules.sort_unstable();
    json!(modules)
}

/// What PEFT writes for an option that is not used: nothing that [`Keys::refuse`] minds.
pub(super) fn is_unused(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// `8`, not `8.0`, as PEFT's users write it.
pub fn whole_or_not(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

/// 0.05 for the f32 nearest to it, not 0.05000000074505806.
pub fn shortest(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

/// The keys of an `adapter_config.json`. A key that is never asked for is unknown.
#[derive(Debug)]
pub struct Keys<'a> {
    json: Option<&'a Map<String, Value>>,
    file: &'a Path,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    /// The keys of `json`, which was read from `file`.
    pub fn new(json: &'a Value, file: &'a Path) -> Self {
        let asked = WITHOUT_EFFECT.iter().map(|key| (*key).to_owned()).collect();
        Self { json: json.as_object(), file, asked: RefCell::new(asked) }
    }

    /// An error about a key.
    pub fn wrong(&self, key: &str, problem: String) -> Error {
        Error::AdapterSetting { file: Some(self.file.to_owned()), key: key.to_owned(), problem }
    }

    /// An error about an option that there is not.
    pub fn unsupported(&self, key: &str, value: &Value) -> Error {
        Error::UnsupportedOption {
            file: Some(self.file.to_owned()),
            key: key.to_owned(),
            value: value.to_string(),
        }
    }

    /// A key's value; none where it is absent or null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.json?.get(key).filter(|value| !value.is_null())
    }

    /// A key's value in another form; `wanted` says which, for people.
    ///
    /// # Errors
    /// It is of another form.
    pub fn get<T>(
        &self,
        key: &str,
        wanted: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, format!("is {value}, not {wanted}")))
    }

    /// A text.
    ///
    /// # Errors
    /// It is none.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "a text", Value::as_str)
    }

    /// A whole number, not below 0.
    ///
    /// # Errors
    /// It is none.
    pub fn whole(&self, key: &str) -> Result<Option<usize>> {
        let value = self.get(key, "a whole number", Value::as_u64)?;
        Ok(value.map(|value| usize::try_from(value).unwrap_or(usize::MAX)))
    }

    /// A number.
    ///
    /// # Errors
    /// It is none.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    /// Yes or no.
    ///
    /// # Errors
    /// It is neither.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// A list of texts.
    ///
    /// # Errors
    /// It is none.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.get(key, "a list of texts", texts)
    }

    /// Names of modules, or a pattern of them.
    ///
    /// # Errors
    /// It is neither.
    pub fn modules(&self, key: &str) -> Result<Option<TargetModules>> {
        self.get(key, "a text or a list of texts", |value| match value {
            Value::String(pattern) => Some(TargetModules::Pattern(pattern.clone())),
            other => texts(other).map(TargetModules::Names),
        })
    }

    /// Refuses options that are used and not there.
    ///
    /// # Errors
    /// The first of `keys` that is neither absent, null, false nor empty.
    pub fn refuse(&self, keys: &[&str]) -> Result<()> {
        for key in keys {
            if let Some(value) = self.value(key).filter(|value| !is_unused(value)) {
                return Err(self.unsupported(key, value));
            }
        }
        Ok(())
    }

    /// Says that `keys` are known and have no effect on a trained adapter.
    pub fn ignore(&self, keys: &[&str]) {
        self.asked.borrow_mut().extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// Reads a method; errors of its own check name this file.
    pub(super) fn read<T>(&self, read: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        if let Some(task) = self.value("task_type").filter(|task| *task != "CAUSAL_LM") {
            return Err(self.unsupported("task_type", task));
        }
        read(self).map_err(|error| match error {
            Error::AdapterSetting { file: None, key, problem } => {
                Error::AdapterSetting { file: Some(self.file.to_owned()), key, problem }
            }
            other => other,
        })
    }

    /// Keys that nobody asked for, sorted.
    pub(super) fn unknown(&self) -> Vec<String> {
        let asked = self.asked.borrow();
        let keys = self.json.into_iter().flat_map(Map::keys);
        let mut unknown: Vec<String> =
            keys.filter(|key| !asked.contains(*key) && *key != "peft_type").cloned().collect();
        unknown.sort();
        unknown
    }
}

pub(super) fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}
