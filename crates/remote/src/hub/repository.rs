//! What the hub says of a model: its commit and its files.

use std::{collections::BTreeSet, fs, path::Path};

use reqwest::{StatusCode, header::HeaderMap};
use serde::Deserialize;

use super::{HubOptions, ModelId, cache::is_plain};
use crate::{
    Error,
    client::{http, wait, words},
};

/// Says which file holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Files beside the weights, as far as they are there.
pub(super) const SMALL: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// Tries of a request before it counts as failed.
pub(super) const TRIES: u32 = 5;

/// A model as the hub has it.
#[derive(Debug, Clone)]
pub(super) struct Repository {
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    pub(super) size: u64,
    /// The name of its blob, where the list says it.
    pub(super) etag: Option<String>,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default, rename = "blobId")]
    blob_id: Option<String>,
    #[serde(default)]
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: Option<String>,
    size: Option<u64>,
}

/// Asks the hub for a model.
pub(super) fn ask(options: &HubOptions, model: &ModelId) -> Result<Repository, Error> {
    let (options, model) = (options.clone(), model.clone());
    wait(async move {
        let revision = escaped(&model.revision);
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", options.endpoint, model.id);
        let mut tried = 0;
        let body = loop {
            tried += 1;
            match get(&options, &model, &url).await {
                Ok(body) => break body,
                Err(Error::HubUnreachable { .. }) if tried < 3 => {
                    tokio::time::sleep(pause(tried)).await;
                }
                Err(error) => return Err(error),
            }
        };
        let nonsense = |reason: String| Error::Answer {
            model: model.shown(),
            endpoint: options.endpoint.clone(),
            reason,
        };
        let info: Info = serde_json::from_slice(&body).map_err(|source| nonsense(source.to_string()))?;
        if info.sha.len() != 40 || !info.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(nonsense(format!("its commit is `{}`", info.sha)));
        }
        if let Some(bad) = info.siblings.iter().find(|file| !is_plain(&file.rfilename)) {
            return Err(nonsense(format!("it names a file `{}`", bad.rfilename)));
        }
        let file = |file: Sibling| {
            let large = file.lfs.as_ref();
            let size = large.and_then(|large| large.size).or(file.size).unwrap_or(0);
            let etag = large.and_then(|large| large.sha256.clone()).or(file.blob_id);
            RemoteFile { name: file.rfilename, size, etag: etag.filter(|etag| is_hash(etag)) }
        };
        Ok(Repository { commit: info.sha, files: info.siblings.into_iter().map(file).collect() })
    })
}

async fn get(options: &HubOptions, model: &ModelId, url: &str) -> Result<bytes::Bytes, Error> {
    let unreachable = |reason: String| Error::HubUnreachable {
        model: model.shown(),
        endpoint: options.endpoint.clone(),
        reason,
    };
    let mut request = http()?.get(url);
    if let Some(token) = &options.token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.map_err(|source| unreachable(words(&source)))?;
    if !answer.status().is_success() {
        return Err(refused(options, model, answer.status(), answer.headers()));
    }
    answer.bytes().await.map_err(|source| unreachable(words(&source)))
}

/// What an answer that is no success means.
pub(super) fn refused(
    options: &HubOptions,
    model: &ModelId,
    status: StatusCode,
    headers: &HeaderMap,
) -> Error {
    let header =
        |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (code, message) = (header("x-error-code"), header("x-error-message"));
    let reason = if message.is_empty() { status.to_string() } else { format!("{message} ({status})") };
    let (model, endpoint) = (model.shown(), options.endpoint.clone());
    match status {
        StatusCode::NOT_FOUND => Error::NoModel { model, endpoint, reason },
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let (gated, with_token) = (code == "GatedRepo", options.token.is_some());
            Error::ModelDenied { model, endpoint, reason, gated, with_token }
        }
        _ if status.is_server_error()
            || status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT =>
        {
            Error::HubUnreachable { model, endpoint, reason }
        }
        _ => Error::Answer { model, endpoint, reason },
    }
}

/// The files that training needs; with `shards`, of the weights those alone.
pub(super) fn needed(
    repository: &Repository,
    model: &ModelId,
    shards: Option<&[String]>,
) -> Result<Vec<RemoteFile>, Error> {
    let has = |name: &str| repository.files.iter().any(|file| file.name == name);
    let unusable = |reason: String, hint: &str| {
        Err(Error::Unusable { model: model.shown(), reason, hint: hint.to_owned() })
    };
    let ends = |ending: &str| repository.files.iter().find(|file| file.name.ends_with(ending));
    let is_shard = |name: &str| name.starts_with("model-") && name.ends_with(".safetensors");
    let is_weight = |name: &str| match shards {
        Some(shards) => shards.iter().any(|shard| shard == name) || name == INDEX,
        None if has(INDEX) => is_shard(name) || name == INDEX,
        None if has("model.safetensors") => name == "model.safetensors",
        None => !name.contains('/') && name.ends_with(".safetensors"),
    };
    let wanted = |file: &&RemoteFile| SMALL.contains(&file.name.as_str()) || is_weight(&file.name);
    let files: Vec<RemoteFile> = repository.files.iter().filter(wanted).cloned().collect();
    if let Some(absent) = shards.into_iter().flatten().find(|shard| !has(shard)) {
        return unusable(format!("its index names `{absent}`, which is not there"), "tell its author");
    }
    if !files.iter().any(|file| file.name.ends_with(".safetensors")) {
        return match (ends(".bin").or_else(|| ends(".pth")), ends(".gguf")) {
            (Some(file), _) => unusable(
                format!(
                    "its weights are a Python pickle (`{}`), which can run code when it is opened",
                    file.name
                ),
                "convert it: `AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)` writes safetensors; or look for \
                 another revision or copy of the model",
            ),
            (_, Some(file)) => unusable(
                format!("its weights are GGUF (`{}`)", file.name),
                "download that file and give its path as `base.model`",
            ),
            _ => unusable("it holds no safetensors".to_owned(), "name a model with weights"),
        };
    }
    for name in ["config.json", "tokenizer.json"] {
        if !has(name) {
            let hint = "`AutoTokenizer.from_pretrained(…).save_pretrained(…)` writes a `tokenizer.json`; name the folder then";
            return unusable(format!("it has no `{name}`"), hint);
        }
    }
    Ok(files)
}

/// The shards that an index names.
pub(super) fn shards(index: &Path, model: &ModelId) -> Result<Vec<String>, Error> {
    let text = fs::read_to_string(index).map_err(super::cache::failed(index))?;
    shard_names(&text).ok_or_else(|| Error::Unusable {
        model: model.shown(),
        reason: format!("`{INDEX}` has no `weight_map` of file names"),
        hint: "tell its author".to_owned(),
    })
}

/// The shards that the text of an index names; nothing if it is none.
pub(super) fn shard_names(index: &str) -> Option<Vec<String>> {
    let index: serde_json::Value = serde_json::from_str(index).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    let names: Option<BTreeSet<&str>> =
        map.values().map(|name| name.as_str().filter(|name| is_plain(name))).collect();
    Some(names?.into_iter().map(str::to_owned).collect())
}

/// Whether a text is a SHA-256 or a git SHA-1 in hexadecimal.
pub(super) fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A revision as a part of a path: `refs/pr/1` is one part.
pub(super) fn escaped(revision: &str) -> String {
    let mut out = String::new();
    for byte in revision.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// The pause after so many failed tries.
pub(super) fn pause(tried: u32) -> std::time::Duration {
    std::time::Duration::from_millis(250 << tried.min(5))
}
