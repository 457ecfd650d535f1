//! Reads single keys of a `config.json`; a wrong one is an error that names it.

use std::{fmt::Display, path::Path};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    model::config::{Rope, RopeScaling},
};

/// No dimension of a language model comes near; products of three stay far below 2^64.
const LARGEST_SIZE: u64 = 1 << 24;

/// Far above any model that there is; lists of one item a layer stay small.
const MOST_LAYERS: usize = 4096;

/// The keys of a `config.json`.
pub(crate) struct Fields<'a> {
    json: &'a Map<String, Value>,
    file: &'a Path,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(json: &'a Value, file: &'a Path) -> Result<Self> {
        match json {
            Value::Object(json) => Ok(Self { json, file }),
            _ => Err(Error::ModelConfig {
                file: file.to_owned(),
                key: "{".to_owned(),
                problem: "is missing: the file holds no JSON object".to_owned(),
            }),
        }
    }

    pub(crate) fn problem(&self, key: &str, problem: impl Display) -> Error {
        Error::ModelConfig { file: self.file.to_owned(), key: key.to_owned(), problem: problem.to_string() }
    }

    pub(crate) fn unsupported(&self, key: &str, value: &Value) -> Error {
        Error::UnsupportedModelOption {
            file: self.file.to_owned(),
            key: key.to_owned(),
            value: value.to_string(),
        }
    }

    /// The value of a key; `null` counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Whether a key is there, be it `null`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.json.contains_key(key)
    }

    fn read<T>(
        &self,
        key: &str,
        wanted: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.problem(key, format!("is {value}, not {wanted}"))),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a text", Value::as_str)
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number from 1 to 2^24", |value| {
            let size = value.as_u64().filter(|size| (1..=LARGEST_SIZE).contains(size))?;
            usize::try_from(size).ok()
        })
    }

    /// A whole number that may be 0.
    pub(crate) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number from 0 to 2^24", |value| {
            let count = value.as_u64().filter(|count| *count <= LARGEST_SIZE)?;
            usize::try_from(count).ok()
        })
    }

    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.problem(key, "is missing"))
    }

    /// The list under a key.
    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        self.read(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// The number of decoder layers.
    pub(crate) fn layers(&self) -> Result<usize> {
        let key = "num_hidden_layers";
        let layers = self.size(key)?;
        if layers > MOST_LAYERS {
            return Err(self.problem(key, format!("is {layers}; {MOST_LAYERS} at most can be right")));
        }
        Ok(layers)
    }

    /// One token id, a list of them, or none.
    pub(crate) fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let token = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let tokens = self.read(key, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(token).collect::<Option<Vec<u32>>>(),
            // Some old files write -1 where there is none.
            Value::Number(number) if number.as_i64() == Some(-1) => Some(Vec::new()),
            single => token(single).map(|id| vec![id]),
        })?;
        Ok(tokens.unwrap_or_default())
    }

    /// The object under a key, its keys named `key.inner` in errors.
    fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.read(key, "an object", Value::as_object)
    }

    /// Rotary settings, in transformers' new form or in its old one.
    pub(crate) fn rope(&self, max_positions: usize) -> Result<Rope> {
        let (key, object) = match self.object("rope_parameters")? {
            Some(object) => ("rope_parameters", Some(object)),
            None => ("rope_scaling", self.object("rope_scaling")?),
        };
        if let Some(share) = self.number("partial_rotary_factor")?
            && share != 1.0
        {
            return Err(self.unsupported("partial_rotary_factor", &Value::from(share)));
        }
        let outer_theta = self.number("rope_theta")?;
        let Some(object) = object else {
            return Ok(Rope { theta: self.theta(outer_theta)?, scaling: RopeScaling::None });
        };
        let inner = Fields { json: object, file: self.file };
        let nested = |error| match error {
            Error::ModelConfig { file, key: inner, problem } => {
                Error::ModelConfig { file, key: format!("{key}.{inner}"), problem }
            }
            Error::UnsupportedModelOption { file, key: inner, value } => {
                Error::UnsupportedModelOption { file, key: format!("{key}.{inner}"), value }
            }
            other => other,
        };
        inner.rope_settings(outer_theta, max_positions).map_err(nested)
    }

    fn theta(&self, theta: Option<f64>) -> Result<f64> {
        let theta = theta.unwrap_or(10_000.0);
        if theta > 1.0 && theta.is_finite() {
            return Ok(theta);
        }
        Err(self.problem("rope_theta", format!("is {theta}, not above 1")))
    }

    /// The inside of `rope_parameters` or `rope_scaling`.
    fn rope_settings(&self, outer_theta: Option<f64>, max_positions: usize) -> Result<Rope> {
        let theta = self.theta(self.number("rope_theta")?.or(outer_theta))?;
        if let Some(share) = self.number("partial_rotary_factor")?
            && share != 1.0
        {
            return Err(self.unsupported("partial_rotary_factor", &Value::from(share)));
        }
        let (key, kind) = match self.text("rope_type")? {
            Some(kind) => ("rope_type", kind),
            None => ("type", self.text("type")?.unwrap_or("default")),
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: self.factor("factor")? },
            "llama3" => {
                let low_frequency_factor = self.factor("low_freq_factor")?;
                let high_frequency_factor = self.factor("high_freq_factor")?;
                if high_frequency_factor <= low_frequency_factor {
                    return Err(self.problem("high_freq_factor", "is not above low_freq_factor"));
                }
                RopeScaling::Llama3 {
                    factor: self.factor("factor")?,
                    low_frequency_factor,
                    high_frequency_factor,
                    original_positions: self.size_or("original_max_position_embeddings", max_positions)?,
                }
            }
            other => return Err(self.unsupported(key, &Value::from(other))),
        };
        Ok(Rope { theta, scaling })
    }

    fn factor(&self, key: &str) -> Result<f64> {
        let factor = self.number(key)?.ok_or_else(|| self.problem(key, "is missing"))?;
        if factor > 0.0 && factor.is_finite() {
            return Ok(factor);
        }
        Err(self.problem(key, format!("is {factor}, not above 0")))
    }

    /// Whether `quantization_config` says NF4 by bitsandbytes; any other quantisation is refused.
    pub(crate) fn stored_nf4(&self) -> Result<bool> {
        let Some(object) = self.object("quantization_config")? else { return Ok(false) };
        let inner = Fields { json: object, file: self.file };
        let method = inner.text("quant_method")?.unwrap_or("bitsandbytes");
        if method != "bitsandbytes" {
            return Err(self.unsupported("quantization_config.quant_method", &Value::from(method)));
        }
        if !inner.flag("load_in_4bit")?.unwrap_or(false) {
            return Err(self.unsupported("quantization_config.load_in_4bit", &Value::from(false)));
        }
        match inner.text("bnb_4bit_quant_type")?.unwrap_or("fp4") {
            "nf4" => Ok(true),
            other => Err(self.unsupported("quantization_config.bnb_4bit_quant_type", &Value::from(other))),
        }
    }
}
