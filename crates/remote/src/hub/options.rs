//! What the environment says about the hub, by the names that Python's `huggingface_hub` reads.

use std::{env, fmt, fs, path::PathBuf};

/// Where the hub is, where its cache lies, and who asks.
#[derive(Clone)]
pub struct HubOptions {
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// The folder of the cache.
    pub cache: PathBuf,
    /// Sent to the hub itself, and to nobody that it redirects to. Never shown.
    pub token: Option<String>,
    /// Whether the network must not be asked.
    pub offline: bool,
}

impl HubOptions {
    /// `HF_ENDPOINT`; `HF_HUB_CACHE`, else `HF_HOME`, else `XDG_CACHE_HOME`, else `~/.cache`; `HF_TOKEN`, else the file that
    /// `HF_TOKEN_PATH` names, else `$HF_HOME/token`, which `hf auth login` writes; `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`.
    pub fn from_env() -> Self {
        let named = |name: &str| env::var(name).ok().filter(|value| !value.trim().is_empty());
        let folder = |name: &str| named(name).map(PathBuf::from);
        let home = folder("HOME").unwrap_or_default();
        let hf_home = folder("HF_HOME").unwrap_or_else(|| {
            folder("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("huggingface")
        });
        let cache = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
        let token_file = folder("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let token = named("HF_TOKEN")
            .or_else(|| named("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(token_file).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let is_set = |name: &str| named(name).is_some_and(|value| is_yes(&value));
        Self {
            endpoint: named("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim_end_matches('/')
                .to_owned(),
            cache: cache.unwrap_or_else(|| hf_home.join("hub")),
            token,
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
        }
    }
}

/// What Python's `huggingface_hub` takes for yes.
fn is_yes(value: &str) -> bool {
    matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_never_shown() {
        let token = Some("hf_secret".to_owned());
        let options = HubOptions { endpoint: "e".to_owned(), cache: "c".into(), token, offline: false };
        assert!(!format!("{options:?}").contains("secret"));
    }

    #[test]
    fn yes_has_many_names() {
        assert!(["1", "true", "Yes", "ON"].into_iter().all(is_yes));
        assert!(!["0", "false", "no", ""].into_iter().any(is_yes));
    }
}
