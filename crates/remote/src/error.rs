//! What can go wrong with stores and the hub.

use std::{io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// What went wrong in this crate. Codes `SH0223` to `SH0229` for stores, `SH0340` to `SH0347` for the hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A URL that leads to no store.
    #[error("failed to read URL `{url}`: {reason}")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such object.
    #[error("failed to find `{url}`: {reason}")]
    NotFound {
        /// The object.
        url: String,
        /// What the store says.
        reason: String,
    },
    /// The store does not let us.
    #[error("not allowed to read `{url}`: {reason}")]
    Denied {
        /// The object.
        url: String,
        /// What the store says.
        reason: String,
    },
    /// The store cannot be reached, or fails.
    #[error("failed to read `{url}`: {reason}")]
    Unreachable {
        /// The object.
        url: String,
        /// What happened, at the last try.
        reason: String,
    },
    /// An object is not what it was when it was opened.
    #[error("`{url}` changed while it was read")]
    Changed {
        /// The object.
        url: String,
    },
    /// A server that gives whole files alone.
    #[error("the server of `{url}` does not serve parts of a file")]
    NoRanges {
        /// The object.
        url: String,
    },
    /// The HTTP client cannot be made.
    #[error("failed to set up the HTTP client: {reason}")]
    Client {
        /// Why.
        reason: String,
    },
    /// The hub has no such model, or not in this revision.
    #[error("failed to find model `{model}` on {endpoint}: {reason}")]
    NoModel {
        /// `org/name`, with the revision.
        model: String,
        /// The hub.
        endpoint: String,
        /// What it says.
        reason: String,
    },
    /// The hub does not let us have a model.
    #[error("not allowed to download model `{model}` from {endpoint}: {reason}")]
    ModelDenied {
        /// `org/name`, with the revision.
        model: String,
        /// The hub.
        endpoint: String,
        /// What it says.
        reason: String,
        /// Whether the model's licence must be accepted first.
        gated: bool,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The hub cannot be reached, or fails.
    #[error("failed to download model `{model}` from {endpoint}: {reason}")]
    HubUnreachable {
        /// `org/name`, with the revision.
        model: String,
        /// The hub.
        endpoint: String,
        /// What happened, at the last try.
        reason: String,
    },
    /// The network must not be asked, and the cache lacks the model.
    #[error("model `{model}` is not in the cache `{}`, and {why}", cache.display())]
    NotCached {
        /// `org/name`, with the revision.
        model: String,
        /// The folder of the cache.
        cache: PathBuf,
        /// Why it is not downloaded.
        why: String,
    },
    /// What was downloaded is not what the hub announced.
    #[error("file `{file}` of model `{model}` arrived damaged: {reason}")]
    Damaged {
        /// `org/name`, with the revision.
        model: String,
        /// The file.
        file: String,
        /// What differs.
        reason: String,
    },
    /// A model that is there and holds nothing that can be trained on.
    #[error("model `{model}` cannot be used: {reason}")]
    Unusable {
        /// `org/name`, with the revision.
        model: String,
        /// What it lacks.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The cache cannot be written.
    #[error("failed to write the model cache `{}`: {source}", path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The hub's answer cannot be understood.
    #[error("the answer of {endpoint} about model `{model}` makes no sense: {reason}")]
    Answer {
        /// `org/name`, with the revision.
        model: String,
        /// The hub.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// The error in what a [`Reader`](crate::Reader) failed with; the other way round, what failed it was not the network.
    ///
    /// # Errors
    /// The error as it was, where none of ours is in it.
    pub fn inside(error: io::Error) -> Result<Self, io::Error> {
        error.downcast::<Self>()
    }

    fn code(&self) -> &'static str {
        match self {
            Self::Url { .. } => "SH0223",
            Self::NotFound { .. } => "SH0224",
            Self::Denied { .. } => "SH0225",
            Self::Unreachable { .. } => "SH0226",
            Self::Changed { .. } => "SH0227",
            Self::NoRanges { .. } => "SH0228",
            Self::Client { .. } => "SH0229",
            Self::NoModel { .. } => "SH0340",
            Self::ModelDenied { .. } => "SH0341",
            Self::HubUnreachable { .. } => "SH0342",
            Self::NotCached { .. } => "SH0343",
            Self::Damaged { .. } => "SH0344",
            Self::Unusable { .. } => "SH0345",
            Self::Cache { .. } => "SH0346",
            Self::Answer { .. } => "SH0347",
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Unreachable { .. }
            | Self::Changed { .. }
            | Self::HubUnreachable { .. }
            | Self::Damaged { .. }
            | Self::Cache { .. } => Kind::Transient,
            Self::Client { .. } | Self::Answer { .. } => Kind::Internal,
            _ => Kind::User,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Url { .. } => {
                "URLs are `s3://bucket/key`, `gs://bucket/key`, `az://container/key`, `https://host/path`"
            }
            Self::NotFound { url, .. } if url.starts_with("http") => "check the address in a browser",
            Self::NotFound { .. } => "check bucket and key; a glob such as `*.jsonl` lists what there is",
            Self::Denied { url, .. } | Self::Unreachable { url, .. } => return Some(credentials(url)),
            Self::Changed { .. } => "start again once nobody writes to it",
            Self::NoRanges { .. } => "download the file and name it by its path",
            Self::NoModel { .. } => {
                "write it as on the hub, `org/name` or `org/name@revision`; a folder must be there, or begin with `./`"
            }
            Self::ModelDenied { model, endpoint, gated: true, with_token, .. } => {
                let id = model.split('@').next().unwrap_or(model);
                let token = if *with_token { "" } else { ", and set HF_TOKEN to a token of that account" };
                return Some(format!("accept the licence at {endpoint}/{id} with your account{token}"));
            }
            Self::ModelDenied { with_token: false, .. } => {
                "if it is private, set HF_TOKEN (or run `hf auth login`); otherwise check the name"
            }
            Self::ModelDenied { .. } => {
                "the token that was sent may not read it: check HF_TOKEN and the name"
            }
            Self::HubUnreachable { .. } => {
                "what has arrived is kept, and a repeat goes on from there; HF_ENDPOINT names a mirror"
            }
            Self::NotCached { .. } => {
                "download it where there is a network, or unset HF_HUB_OFFLINE; HF_HOME says where the cache lies"
            }
            Self::Damaged { .. } => "try again; a proxy in between may have changed the file",
            Self::Unusable { hint, .. } => hint,
            Self::Cache { .. } => "HF_HOME or HF_HUB_CACHE names a folder that may be written to",
            Self::Client { .. } | Self::Answer { .. } => return None,
        };
        Some(hint.to_owned())
    }
}

/// Where the credentials of a store come from.
fn credentials(url: &str) -> String {
    let text = match url.split("://").next() {
        Some("s3") => {
            "credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), the region from \
             AWS_REGION, another server from AWS_ENDPOINT (AWS_ALLOW_HTTP=true without TLS), public data needs \
             AWS_SKIP_SIGNATURE=true; profiles of ~/.aws are not read: `aws configure export-credentials --format env`"
        }
        Some("gs") => {
            "credentials come from GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT (paths of JSON keys), \
             public data needs GOOGLE_SKIP_SIGNATURE=true"
        }
        Some("az") => {
            "credentials come from AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, \
             public data needs AZURE_SKIP_SIGNATURE=true"
        }
        _ => "check the address and the network; signed URLs expire",
    };
    text.to_owned()
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let mut diagnostic = Diagnostic::new(self.code(), self).kind(self.kind());
        diagnostic.hint = self.hint();
        diagnostic
    }
}
