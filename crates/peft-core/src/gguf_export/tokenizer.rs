//! A byte-level BPE tokenizer as llama.cpp wants it in the metadata.
//!
//! Words: token texts as the vocabulary has them (bytes as letters), the kind of each, merges, the ids of special tokens, the chat
//! template, and the name of the rule that cuts a text into words before merging: llama.cpp knows rules by name, so a
//! tokenizer with a rule of its own cannot be written, and is refused rather than cut wrongly.

use std::{fs, io, path::Path};

use serde_json::Value;

use super::writer::Meta;
use crate::{
    error::{Error, Origin, Result},
    use_error::UseError,
};

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

const CONTRACTIONS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const REST: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The metadata of the tokenizer of a model's folder, for `vocabulary` rows of the embedding.
///
/// # Errors
/// Unreadable, another kind of tokenizer than byte-level BPE, a rule that llama.cpp does not know, or ids beyond the embedding.
pub fn metadata(folder: &Path, vocabulary: usize) -> Result<Vec<(String, Meta)>> {
    let Some(json) = read(&folder.join("tokenizer.json"))? else {
        let file = folder.join("tokenizer.json");
        let source = io::ErrorKind::NotFound.into();
        return Err(Error::Read { origin: Origin::Base, file, source });
    };
    let settings = read(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let model = &json["model"];
    if model["type"] != "BPE" || model["byte_fallback"] == true || !is_byte_level(&json["decoder"]) {
        return Err(no(format!(
            "the tokenizer is no byte-level BPE (its type is {}); only that is written",
            model["type"]
        )));
    }
    let (mut tokens, mut kinds) = (vec![None; vocabulary], vec![UNUSED; vocabulary]);
    let mut place = |id: Option<u64>, text: &str, kind: i32| {
        let slot = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocabulary);
        let Some(id) = slot else {
            return Err(no(format!("token {text:?} has no row in the embedding of {vocabulary}")));
        };
        tokens[id] = Some(text.to_owned());
        kinds[id] = kind;
        Ok(())
    };
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        place(id.as_u64(), text, NORMAL)?;
    }
    let added: Vec<&Value> = json["added_tokens"].as_array().into_iter().flatten().collect();
    for token in &added {
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        place(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind)?;
    }
    let tokens: Vec<String> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| format!("[PAD{id}]")))
        .collect();
    let merges: Vec<String> = model["merges"].as_array().into_iter().flatten().filter_map(merge).collect();
    let named = |key: &str| -> Option<u32> {
        let value = settings.get(key)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        tokens.iter().position(|token| token == text).map(|id| id as u32)
    };
    let (bos, eos) = (named("bos_token"), named("eos_token"));
    let adds_bos = settings
        .get("add_bos_token")
        .and_then(Value::as_bool)
        .unwrap_or_else(|| begins_with_special(&json["post_processor"]));

    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut meta = vec![
        (key("model"), Meta::Text("gpt2".to_owned())),
        (key("pre"), Meta::Text(rule(&json["pre_tokenizer"])?.to_owned())),
        (key("tokens"), Meta::Texts(tokens)),
        (key("token_type"), Meta::I32s(kinds)),
        (key("merges"), Meta::Texts(merges)),
        (key("add_bos_token"), Meta::Bool(adds_bos)),
    ];
    let eos = eos.or_else(|| first_id(folder, "eos_token_id"));
    for (name, id) in [
        ("bos_token_id", bos.or_else(|| first_id(folder, "bos_token_id"))),
        ("eos_token_id", eos),
        ("padding_token_id", named("pad_token")),
        ("unknown_token_id", named("unk_token")),
    ] {
        meta.extend(id.map(|id| (key(name), Meta::U32(id))));
    }
    if let Some(template) = template(folder, &settings)? {
        meta.push(("tokenizer.chat_template".to_owned(), Meta::Text(template)));
    }
    Ok(meta)
}

fn no(reason: String) -> Error {
    UseError::NotExportable { reason }.into()
}

fn read(file: &Path) -> Result<Option<Value>> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { origin: Origin::Base, file: file.to_owned(), source }),
    };
    let parsed = serde_json::from_slice(&text);
    parsed.map(Some).map_err(|source| Error::Json { origin: Origin::Base, file: file.to_owned(), source })
}

/// `["a", "b"]` or `"a b"`.
fn merge(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(pair) => match &**pair {
            [Value::String(left), Value::String(right)] => Some(format!("{left} {right}")),
            _ => None,
        },
        _ => None,
    }
}

fn parts(step: &Value) -> Vec<&Value> {
    match step["pretokenizers"].as_array().or_else(|| step["decoders"].as_array()) {
        Some(parts) => parts.iter().collect(),
        None => vec![step],
    }
}

fn is_byte_level(decoder: &Value) -> bool {
    parts(decoder).iter().any(|part| part["type"] == "ByteLevel")
}

/// llama.cpp's name of the rule that cuts a text into words.
fn rule(step: &Value) -> Result<&'static str> {
    let steps = parts(step);
    let Some((last, before)) = steps.split_last() else { return Err(no("the tokenizer cuts no words".to_owned())) };
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return Err(no(format!("llama.cpp has no name for the rule that cuts words: {step}")));
    }
    let by_itself = last["use_regex"] != false;
    let known = match (before, by_itself) {
        ([], true) => Some("gpt-2"),
        ([digits], true) if digits["type"] == "Digits" && digits["individual_digits"] == true => Some("smollm"),
        ([split], false) if split["type"] == "Split" => {
            let pattern = split["pattern"]["Regex"].as_str().unwrap_or_default();
            let digits = pattern.strip_prefix(CONTRACTIONS).and_then(|rest| rest.strip_suffix(REST));
            match digits {
                Some(r"\p{N}{1,3}") => Some("llama-bpe"),
                Some(r"\p{N}") => Some("qwen2"),
                _ => None,
            }
        }
        _ => None,
    };
    known.ok_or_else(|| no(format!("llama.cpp has no name for the rule that cuts words: {step}")))
}

/// Whether a template of the post-processor puts a token ahead of every text.
fn begins_with_special(processor: &Value) -> bool {
    let inner = processor["processors"].as_array();
    let mut templates = inner.into_iter().flatten().chain(std::iter::once(processor));
    templates.any(|processor| processor["single"][0].get("SpecialToken").is_some())
}

fn first_id(folder: &Path, key: &str) -> Option<u32> {
    let of = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    ["generation_config.json", "config.json"].iter().find_map(|file| {
        let json = read(&folder.join(file)).ok()??;
        of(&json[key]).or_else(|| of(&json[key][0]))
    })
}

fn template(folder: &Path, settings: &Value) -> Result<Option<String>> {
    let file = folder.join("chat_template.jinja");
    match fs::read_to_string(&file) {
        Ok(text) => return Ok(Some(text)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Read { origin: Origin::Base, file, source }),
    }
    let template = &settings["chat_template"];
    let named = template.as_array().into_iter().flatten();
    let default = named.into_iter().find(|entry| entry["name"] == "default").map(|entry| &entry["template"]);
    Ok(default.unwrap_or(template).as_str().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_that_cut_words_have_llama_cpps_names() {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
        let split = |digits: &str| {
            let pattern = json!({"Regex": format!("{CONTRACTIONS}{digits}{REST}")});
            json!({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": pattern}, bytes(false)]})
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        assert_eq!(rule(&bytes(true)).unwrap(), "gpt-2");
        let smollm = json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
        assert_eq!(rule(&smollm).unwrap(), "smollm");
        assert_eq!(rule(&split(r"\p{N}{1,3}")).unwrap(), "llama-bpe");
        assert_eq!(rule(&split(r"\p{N}")).unwrap(), "qwen2");
        for unknown in [
            split(r"\p{N}{1,2}"),
            bytes(false),
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            json!({"type": "Metaspace"}),
            Value::Null,
        ] {
            assert!(rule(&unknown).is_err(), "{unknown}");
        }
    }
}
