//! Reads who a certificate is of, and which certificates a revocation list takes back.
//!
//! Role and name stand in the certificate as a URI, `shanty://worker/node-7`: signed with the rest, ignored by programs that do
//! not know it. A certificate of the authority without such a URI stands for nobody.

use std::{collections::BTreeSet, path::Path};

use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer,
    pem::{PemObject, SectionKind},
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use crate::{
    error::{Error, Result},
    files,
    role::Role,
};

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The coordinator shows it to those who connect.
    Coordinator,
    /// Somebody shows it to the coordinator, and has this role there.
    Client(Role),
}

impl Purpose {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Client(role) => role.as_str(),
        }
    }

    /// The purpose of a word.
    pub fn parse(word: &str) -> Option<Self> {
        if word == "coordinator" { Some(Self::Coordinator) } else { Role::parse(word).map(Self::Client) }
    }
}

/// Serial number of a certificate, as hexadecimal digits without leading zeros.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(String);

impl Serial {
    fn new(bytes: &[u8]) -> Self {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(digits.trim_start_matches('0').to_owned())
    }

    /// As it is shown.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Who a certificate is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What for; none if it is no certificate of a Shanty authority.
    pub purpose: Option<Purpose>,
    /// Its holder's name; empty without a purpose.
    pub name: String,
    /// Its number.
    pub serial: Serial,
    /// Seconds since the Unix epoch from which on it holds.
    pub not_before: i64,
    /// Seconds since the Unix epoch after which it does not.
    pub not_after: i64,
    /// Host names and addresses that it is for.
    pub hosts: Vec<String>,
    /// Whether it is an authority's.
    pub is_authority: bool,
}

/// Reads a certificate. Says nothing about whose signature it bears.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read(der: &[u8]) -> Result<Facts, String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let mut facts = Facts {
        purpose: None,
        name: String::new(),
        serial: Serial::new(certificate.raw_serial()),
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
        hosts: Vec::new(),
        is_authority: certificate.is_ca(),
    };
    let names = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let mut uris = 0;
    for name in names.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::DNSName(host) => facts.hosts.push((*host).to_owned()),
            GeneralName::IPAddress(bytes) => facts.hosts.extend(address(bytes)),
            GeneralName::URI(uri) => {
                if let Some((purpose, name)) = identity(uri) {
                    (facts.purpose, facts.name) = (Some(purpose), name.to_owned());
                    uris += 1;
                }
            }
            _ => {}
        }
    }
    if uris > 1 {
        return Err("it claims to be of several at once".to_owned());
    }
    Ok(facts)
}

fn identity(uri: &str) -> Option<(Purpose, &str)> {
    let (purpose, name) = uri.strip_prefix("shanty://")?.split_once('/')?;
    is_name(name).then_some(())?;
    Some((Purpose::parse(purpose)?, name))
}

/// The URI that says who a certificate is of.
pub(crate) fn identity_uri(purpose: Purpose, name: &str) -> String {
    format!("shanty://{}/{name}", purpose.as_str())
}

/// Whether a text may be somebody's name: letters, digits, `-`, `_` and `.`, at most 64.
pub fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with(['.', '-'])
}

fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(std::net::IpAddr::from(bytes).to_string());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|bytes| std::net::IpAddr::from(bytes).to_string())
}

/// The certificates of a PEM file, at least one.
///
/// # Errors
/// [`Error::File`], [`Error::Damaged`]
pub fn read_pem(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = files::read_text(path)?;
    let damaged = |what: String| Error::Damaged { path: path.to_owned(), what };
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let certificates = certificates.map_err(|error| damaged(error.to_string()))?;
    if certificates.is_empty() {
        return Err(damaged("it holds no certificate".to_owned()));
    }
    Ok(certificates)
}

/// The revocation lists of a PEM file, and the numbers that they take back.
///
/// # Errors
/// [`Error::File`], [`Error::Damaged`]
pub fn read_revoked(path: &Path) -> Result<(Vec<CertificateRevocationListDer<'static>>, BTreeSet<Serial>)> {
    let text = files::read_text(path)?;
    let damaged = |what: String| Error::Damaged { path: path.to_owned(), what };
    let mut lists = Vec::new();
    let sections = <(SectionKind, Vec<u8>)>::pem_slice_iter(text.as_bytes());
    for section in sections {
        let (kind, der) = section.map_err(|error| damaged(error.to_string()))?;
        if kind == SectionKind::Crl {
            lists.push(CertificateRevocationListDer::from(der));
        }
    }
    if lists.is_empty() {
        return Err(damaged("it holds no revocation list".to_owned()));
    }
    let mut revoked = BTreeSet::new();
    for list in &lists {
        let (_, list) =
            CertificateRevocationList::from_der(list).map_err(|error| damaged(error.to_string()))?;
        revoked.extend(list.iter_revoked_certificates().map(|entry| Serial::new(entry.raw_serial())));
    }
    Ok((lists, revoked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_words() {
        for good in ["node-7", "a", "ci.runner_2"] {
            assert!(is_name(good), "{good}");
            assert_eq!(
                identity(&identity_uri(Purpose::Client(Role::Worker), good)),
                Some((Purpose::Client(Role::Worker), good))
            );
        }
        for bad in ["", "a/b", "a b", "../x", "-rf", &"a".repeat(65), "ä"] {
            assert!(!is_name(bad), "{bad}");
            assert_eq!(identity(&format!("shanty://admin/{bad}")), None);
        }
        assert_eq!(identity("shanty://captain/x"), None);
        assert_eq!(identity("https://admin/x"), None);
    }
}
