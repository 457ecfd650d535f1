//! The tokenizer that a GGUF file carries, as the `tokenizer.json` that it was made from.
//!
//! Read are byte-level BPE tokenizers (`tokenizer.ggml.model = "gpt2"`): tokens and merges lie in the file, how text is cut
//! before merging is known by the name under `tokenizer.ggml.pre`.

use std::{fs::File, path::Path};

use serde_json::{Map, Value, json};
use shanty_gguf::{Header, List};

use super::settings::Settings;
use crate::Error;

/// How a text is cut before merging.
struct Pre {
    /// What llama.cpp calls it.
    names: &'static [&'static str],
    split: Split,
    /// Whether a piece that is a token stays whole whatever the merges say.
    ignore_merges: bool,
    /// Whether text is composed first (NFC).
    composed: bool,
    /// Whether a text begins with the begin token where the file does not say.
    begins: bool,
}

enum Split {
    /// GPT-2's expression.
    Gpt2,
    /// GPT-2's expression on what lies between single digits.
    Digits,
    /// An expression of its own.
    Expression(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PRES: [Pre; 4] = [
    Pre { names: &["gpt-2"], split: Split::Gpt2, ignore_merges: false, composed: false, begins: false },
    Pre {
        names: &["smollm", "codeshell", "starcoder", "refact", "command-r", "exaone"],
        split: Split::Digits,
        ignore_merges: false,
        composed: false,
        begins: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "smaug-bpe"],
        split: Split::Expression(LLAMA3),
        ignore_merges: true,
        composed: false,
        begins: true,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen"],
        split: Split::Expression(QWEN2),
        ignore_merges: false,
        composed: true,
        begins: false,
    },
];

/// Kinds of tokens, by number.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The `tokenizer.json` and what else belongs to it.
pub(super) fn load(path: &Path) -> Result<(Vec<u8>, Settings), Error> {
    let fail = |reason: String| Error::Tokenizer { path: path.to_owned(), place: None, reason };
    let file = File::open(path).map_err(|source| fail(source.to_string()))?;
    let header = Header::read(&file).map_err(|source| fail(source.to_string()))?;
    let (json, settings) = convert(&header).map_err(fail)?;
    Ok((json.to_string().into_bytes(), settings))
}

fn convert(header: &Header) -> Result<(Value, Settings), String> {
    let text = |key: &str| header.get(&format!("tokenizer.{key}")).and_then(|value| value.as_str());
    match text("ggml.model") {
        Some("gpt2") => {}
        None => return Err("it carries no tokenizer (tokenizer.ggml.model)".to_owned()),
        Some(other) => {
            return Err(format!(
                "its tokenizer is of the model `{other}`; only byte-level BPE (`gpt2`) is read from GGUF"
            ));
        }
    }
    let found = text("ggml.pre").unwrap_or("gpt-2");
    let pre = PRES.iter().find(|pre| pre.names.contains(&found)).ok_or_else(|| {
        let known: Vec<&str> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
        format!("how its tokenizer cuts text, `{found}`, is not known; known are {}", known.join(", "))
    })?;
    let tokens = texts(header, "tokenizer.ggml.tokens")?;
    let merges = texts(header, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| merge.split_once(' ').ok_or_else(|| format!("its merge `{merge}` is no pair")))
        .collect::<Result<Vec<(&str, &str)>, String>>()?;
    let added = added_tokens(header, &tokens)?;
    let vocabulary: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    if vocabulary.len() != tokens.len() {
        return Err("it holds a token twice".to_owned());
    }
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": pre.composed.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": pre.split.json(),
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    });
    Ok((json, settings(header, &tokens, pre)))
}

impl Split {
    fn json(&self) -> Value {
        let bytes = |expression: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": expression});
        match self {
            Self::Gpt2 => bytes(true),
            Self::Digits => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]})
            }
            Self::Expression(expression) => {
                let pattern = json!({"Regex": expression});
                let split =
                    json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
                json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
            }
        }
    }
}

fn list<'a>(header: &'a Header, key: &str) -> Result<List<'a>, String> {
    header.get(key).and_then(|value| value.as_list()).ok_or_else(|| format!("it has no list `{key}`"))
}

fn texts<'a>(header: &'a Header, key: &str) -> Result<Vec<&'a str>, String> {
    let text = |(at, value): (usize, shanty_gguf::Value<'a>)| {
        value.as_str().ok_or_else(|| format!("item {at} of `{key}` is no text"))
    };
    list(header, key)?.iter().enumerate().map(text).collect()
}

fn added_tokens(header: &Header, tokens: &[&str]) -> Result<Vec<Value>, String> {
    let key = "tokenizer.ggml.token_type";
    let Some(value) = header.get(key) else { return Ok(Vec::new()) };
    let kinds = value.as_list().filter(|kinds| kinds.len() == tokens.len());
    let kinds = kinds.ok_or_else(|| format!("`{key}` is no list of {} items", tokens.len()))?;
    let added = kinds.iter().zip(tokens).enumerate().filter_map(|(id, (kind, token))| {
        let kind = kind.as_i64().filter(|kind| matches!(*kind, CONTROL | USER_DEFINED))?;
        Some(json!({
            "id": id,
            "content": token,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": kind == CONTROL,
        }))
    });
    Ok(added.collect())
}

fn settings(header: &Header, tokens: &[&str], pre: &Pre) -> Settings {
    let id = |name: &str| {
        let value = header.get(&format!("tokenizer.ggml.{name}_token_id"))?;
        value.as_u64().and_then(|id| u32::try_from(id).ok())
    };
    let token = |name: &str| id(name).and_then(|id| tokens.get(id as usize)).map(|token| (*token).to_owned());
    let flag = |name: &str| header.get(&format!("tokenizer.ggml.{name}")).and_then(|value| value.as_bool());
    let named =
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")];
    Settings {
        bos_token: token("bos"),
        eos_token: token("eos"),
        pad_token: token("padding"),
        add_bos_token: Some(flag("add_bos_token").unwrap_or(pre.begins)),
        add_eos_token: Some(flag("add_eos_token").unwrap_or(false)),
        chat_template: header
            .get("tokenizer.chat_template")
            .and_then(|value| value.as_str())
            .map(str::to_owned),
        tokens: named.iter().filter_map(|(name, key)| Some(((*name).to_owned(), token(key)?))).collect(),
        eos_ids: ["eos", "eot", "eom"].into_iter().filter_map(id).collect(),
    }
}
