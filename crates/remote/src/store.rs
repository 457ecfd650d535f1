//! From a URL to a store: one home for data, models and checkpoints.

use std::{ffi::OsString, str::FromStr, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    http::HttpBuilder,
    path::Path,
};
use url::Url;

use crate::{
    Error,
    client::{USER_AGENT, install_tls, words},
};

/// One request, with all of its body, may take so long. The largest is 8 MiB: slower than 0.6 Mbit/s is dead.
const REQUEST: &str = "120 seconds";
const CONNECT: &str = "10 seconds";

/// Variables that stores are set up from, by name.
#[derive(Debug, Clone, Default)]
pub struct Environment(Vec<(String, String)>);

impl Environment {
    /// The variables of this process.
    pub fn of_process() -> Self {
        let text =
            |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// These variables and no others.
    pub fn of<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        Self(variables.into_iter().map(owned).collect())
    }

    /// Those that begin so and that a store knows, by the store's own keys.
    fn keys<K: FromStr>(&self, prefix: &str) -> Vec<(K, &str)> {
        self.0
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse::<K>().ok()?, value.as_str())))
            .collect()
    }
}

/// A store, and what in it a URL names.
#[derive(Debug, Clone)]
pub struct Location {
    /// The store: a bucket, a container, a server.
    pub store: Arc<dyn ObjectStore>,
    /// The key in it, or the prefix.
    pub path: Path,
    /// The URL.
    pub url: String,
}

/// Makes a store of a URL, with credentials and endpoints from the environment: `AWS_…` for `s3://`, `GOOGLE_…` for
/// `gs://`, `AZURE_…` for `az://`. Requests are repeated with growing pauses while servers fail, for a minute at most.
///
/// # Errors
/// [`Error::Url`] for what is no such URL, or where the environment makes no sense. Asks nobody yet.
pub fn open_store(url: &str) -> Result<Location, Error> {
    open_store_in(url, &Environment::of_process())
}

/// [`open_store`] with the environment given.
///
/// # Errors
/// As [`open_store`].
pub fn open_store_in(url: &str, environment: &Environment) -> Result<Location, Error> {
    install_tls();
    let refuse = |reason: String| Error::Url { url: url.to_owned(), reason };
    let parsed = Url::parse(url).map_err(|source| refuse(source.to_string()))?;
    let bucket = parsed.host_str().filter(|host| !host.is_empty());
    let bucket = bucket.ok_or_else(|| refuse("it names no bucket, container or host".to_owned()))?;
    let failed = |source: object_store::Error| refuse(words(&source));
    // Keys are taken as they are written; only what a URL must escape is unescaped.
    let key = || Path::from_url_path(parsed.path()).map_err(|source| refuse(source.to_string()));
    let (store, path): (Arc<dyn ObjectStore>, Path) = match parsed.scheme() {
        "s3" => {
            let client = |key| AmazonS3ConfigKey::Client(key);
            let of_environment = environment.keys("AWS_").into_iter();
            let store = of_environment
                .fold(AmazonS3Builder::new(), |builder, (key, value)| builder.with_config(key, value))
                .with_config(client(ClientConfigKey::Timeout), REQUEST)
                .with_config(client(ClientConfigKey::ConnectTimeout), CONNECT)
                .with_config(client(ClientConfigKey::UserAgent), USER_AGENT)
                .with_bucket_name(bucket)
                .with_retry(retry())
                .build();
            (Arc::new(store.map_err(failed)?), key()?)
        }
        "gs" => {
            let client = |key| GoogleConfigKey::Client(key);
            let of_environment = environment.keys("GOOGLE_").into_iter();
            let store = of_environment
                .fold(GoogleCloudStorageBuilder::new(), |builder, (key, value)| {
                    builder.with_config(key, value)
                })
                .with_config(client(ClientConfigKey::Timeout), REQUEST)
                .with_config(client(ClientConfigKey::ConnectTimeout), CONNECT)
                .with_config(client(ClientConfigKey::UserAgent), USER_AGENT)
                .with_bucket_name(bucket)
                .with_retry(retry())
                .build();
            (Arc::new(store.map_err(failed)?), key()?)
        }
        "az" => {
            let client = |key| AzureConfigKey::Client(key);
            let of_environment = environment.keys("AZURE_").into_iter();
            let store = of_environment
                .fold(MicrosoftAzureBuilder::new(), |builder, (key, value)| builder.with_config(key, value))
                .with_config(client(ClientConfigKey::Timeout), REQUEST)
                .with_config(client(ClientConfigKey::ConnectTimeout), CONNECT)
                .with_config(client(ClientConfigKey::UserAgent), USER_AGENT)
                .with_container_name(bucket)
                .with_retry(retry())
                .build();
            (Arc::new(store.map_err(failed)?), key()?)
        }
        "http" | "https" => {
            let options = ClientOptions::new()
                .with_config(ClientConfigKey::Timeout, REQUEST)
                .with_config(ClientConfigKey::ConnectTimeout, CONNECT)
                .with_config(ClientConfigKey::UserAgent, USER_AGENT)
                .with_allow_http(true);
            // The whole address is the store, so that a query (a signature) stays as it is.
            let store =
                HttpBuilder::new().with_url(url).with_client_options(options).with_retry(retry()).build();
            (Arc::new(store.map_err(failed)?), Path::default())
        }
        other => {
            return Err(refuse(format!(
                "`{other}://` is none of `s3://`, `gs://`, `az://`, `http://`, `https://`"
            )));
        }
    };
    Ok(Location { store, path, url: url.to_owned() })
}

fn retry() -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(200),
        max_backoff: Duration::from_secs(10),
        base: 2.0,
    };
    RetryConfig { backoff, max_retries: 6, retry_timeout: Duration::from_secs(60) }
}

/// A store's error in our words.
pub(crate) fn failed(url: &str, source: object_store::Error) -> Error {
    let mut reason = words(&source);
    if let Some((_, query)) = url.split_once('?').filter(|(_, query)| !query.is_empty()) {
        reason = reason.replace(query, "…");
    }
    let url = shown(url);
    match source {
        object_store::Error::NotFound { .. } => Error::NotFound { url, reason: short(&reason) },
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            Error::Denied { url, reason: short(&reason) }
        }
        object_store::Error::Precondition { .. } => Error::Changed { url },
        object_store::Error::NotSupported { .. } if reason.contains("Range request") => {
            Error::NoRanges { url }
        }
        _ => Error::Unreachable { url, reason: short(&reason) },
    }
}

/// A URL without its query, which may hold a signature.
pub(crate) fn shown(url: &str) -> String {
    match url.split_once('?') {
        Some((before, _)) if url.starts_with("http") => format!("{before}?…"),
        _ => url.to_owned(),
    }
}

/// Stores answer in XML and HTML: one line of it is enough.
fn short(reason: &str) -> String {
    const MOST: usize = 240;
    let line = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
