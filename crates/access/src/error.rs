//! What can go wrong with tokens and certificates before a coordinator is asked.

use std::{io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be used.
    #[error("failed to {action} `{}`: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others may read a secret.
    #[error("`{}` holds a secret, and others than its owner may read or write it (mode {mode:04o})", path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// What was given as a token is none.
    #[error("{place} holds no token")]
    NoToken {
        /// Where it was looked for.
        place: String,
    },
    /// The token would cross a network in clear.
    #[error("the token is not sent to {address}: everybody on the way could read it")]
    InClear {
        /// The address.
        address: String,
    },
    /// A certificate without its key, or the other way round.
    #[error("a client certificate takes a certificate and its key; only the {which} is given")]
    HalfIdentity {
        /// `certificate` or `key`.
        which: &'static str,
    },
    /// TLS cannot be set up with what was given.
    #[error("failed to set up TLS: {what}")]
    Tls {
        /// What is wrong.
        what: String,
    },
    /// There is an authority already.
    #[error("`{}` holds an authority already", folder.display())]
    AuthorityExists {
        /// The folder.
        folder: PathBuf,
    },
    /// There is no authority.
    #[error("`{}` holds no authority", folder.display())]
    NoAuthority {
        /// The folder.
        folder: PathBuf,
    },
    /// A certificate cannot be made so.
    #[error("no certificate can be made: {what}")]
    BadRequest {
        /// Why.
        what: String,
    },
    /// The authority never issued it.
    #[error("no certificate here is called `{name}`")]
    NoCertificate {
        /// What was asked for.
        name: String,
    },
    /// The authority's files are damaged.
    #[error("`{}` cannot be understood: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// The system has no random bits.
    #[error("the system gave no random bits")]
    Random,
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let new = |code: &str| Diagnostic::new(code, self);
        match self {
            Self::File { path, source, .. } => {
                let kind = match source.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::Interrupted => Kind::Transient,
                    _ => Kind::User,
                };
                new("SH0933").in_file(path).kind(kind)
            }
            Self::TooOpen { path, .. } => {
                new("SH0746").in_file(path).hint(format!("chmod 600 {}", path.display()))
            }
            Self::NoToken { .. } => new("SH0746")
                .hint("a token reads shanty-NUMBER-SECRET; `shanty token create` makes one"),
            Self::InClear { .. } => new("SH0746")
                .hint("reach the coordinator as https://…; a coordinator that runs with --insecure asks for no token"),
            Self::HalfIdentity { .. } => new("SH0746").hint("give both --cert and --key"),
            Self::Tls { .. } => new("SH0745").hint("`shanty certs show` tells what a certificate is of"),
            Self::AuthorityExists { folder } => new("SH0930")
                .in_file(folder)
                .hint("a second one would not know the certificates of the first; choose another --dir"),
            Self::NoAuthority { folder } => {
                new("SH0930").in_file(folder).hint("`shanty certs init` makes one; --dir names its folder")
            }
            Self::BadRequest { .. } => new("SH0931"),
            Self::NoCertificate { .. } => new("SH0932").hint("`shanty certs show` lists them"),
            Self::Damaged { path, .. } => new("SH0933").in_file(path),
            Self::Random => new("SH0933").kind(Kind::Internal),
        }
    }
}
