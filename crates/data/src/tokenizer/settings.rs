//! What the files beside `tokenizer.json` say, read leniently: other programs write them in many ways.

use std::{fs, io, path::Path};

use serde_json::{Map, Value};

use crate::Error;

/// Names under which templates know tokens.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files beside `tokenizer.json` say.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) bos_token: Option<String>,
    pub(super) eos_token: Option<String>,
    pub(super) pad_token: Option<String>,
    pub(super) add_bos_token: Option<bool>,
    pub(super) add_eos_token: Option<bool>,
    pub(super) chat_template: Option<String>,
    /// Tokens by the name under which templates know them.
    pub(super) tokens: Vec<(String, String)>,
    /// End tokens of `generation_config.json`, then `config.json`.
    pub(super) eos_ids: Vec<u32>,
}

impl Settings {
    pub(super) fn load(model_dir: &Path) -> Result<Self, Error> {
        let config = object(&model_dir.join("tokenizer_config.json"))?;
        let map = object(&model_dir.join("special_tokens_map.json"))?;
        let mut settings = Self::default();
        for name in TOKENS {
            // A null in the configuration says that there is none; only a missing key asks the older file.
            let value = config.get(name).or_else(|| map.get(name));
            if let Some(token) = value.and_then(token_text) {
                settings.tokens.push((name.to_owned(), token));
            }
        }
        settings.bos_token = settings.token("bos_token");
        settings.eos_token = settings.token("eos_token");
        settings.pad_token = settings.token("pad_token");
        settings.add_bos_token = config.get("add_bos_token").and_then(Value::as_bool);
        settings.add_eos_token = config.get("add_eos_token").and_then(Value::as_bool);
        settings.chat_template = chat_template(model_dir, &config)?;
        for file in ["generation_config.json", "config.json"] {
            let ids = object(&model_dir.join(file))?;
            settings.eos_ids.extend(ids.get("eos_token_id").map(token_ids).unwrap_or_default());
        }
        Ok(settings)
    }

    fn token(&self, name: &str) -> Option<String> {
        self.tokens.iter().find(|(other, _)| other == name).map(|(_, token)| token.clone())
    }
}

/// A token is a string, or an object that describes an added token.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// An id, or a list of ids.
fn token_ids(value: &Value) -> Vec<u32> {
    let many = value.as_array().map(Vec::as_slice).unwrap_or(std::slice::from_ref(value));
    many.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}

fn text(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => {
            Err(Error::Tokenizer { path: path.to_owned(), place: None, reason: source.to_string() })
        }
    }
}

/// The object in a file; an empty one where there is no file.
fn object(path: &Path) -> Result<Map<String, Value>, Error> {
    let Some(text) = text(path)? else { return Ok(Map::new()) };
    serde_json::from_str(&text).map_err(|source| Error::Tokenizer {
        path: path.to_owned(),
        place: None,
        reason: source.to_string(),
    })
}

/// The chat template: a file of its own, or in `tokenizer_config.json` a string or a list of named ones.
fn chat_template(model_dir: &Path, config: &Map<String, Value>) -> Result<Option<String>, Error> {
    if let Some(template) = text(&model_dir.join("chat_template.jinja"))? {
        return Ok(Some(template));
    }
    let elsewhere = object(&model_dir.join("chat_template.json"))?;
    match config.get("chat_template").or_else(|| elsewhere.get("chat_template")) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(named)) => named_template(model_dir, named).map(Some),
        Some(_) => Err(unusable(model_dir, "`chat_template` is neither a string nor a list".to_owned())),
    }
}

fn named_template(model_dir: &Path, named: &[Value]) -> Result<String, Error> {
    let templates: Vec<(&str, &str)> = named
        .iter()
        .filter_map(|entry| Some((entry.get("name")?.as_str()?, entry.get("template")?.as_str()?)))
        .collect();
    let default = templates.iter().find(|(name, _)| *name == "default");
    match (default, &*templates) {
        (Some((_, template)), _) | (None, [(_, template)]) => Ok((*template).to_owned()),
        _ => {
            let names = templates.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
            Err(unusable(model_dir, format!("none of the chat templates ({names}) is named `default`")))
        }
    }
}

fn unusable(model_dir: &Path, reason: String) -> Error {
    Error::Tokenizer { path: model_dir.join("tokenizer_config.json"), place: None, reason }
}
