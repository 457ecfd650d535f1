//! A small certificate authority in a folder: `ca.pem`, `ca.key`, what it issued, and what it took back.
//!
//! Keys are written for their owner alone. `revoked.pem` is a revocation list as X.509 has it, signed by the authority; a running
//! coordinator reads it again whenever it changes.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};

use crate::{
    certificate::{self, Facts, Purpose, is_name},
    error::{Error, Result},
    files,
};

/// The authority's certificate: what everybody trusts.
pub const CERTIFICATE: &str = "ca.pem";
/// The authority's key: whoever has it can issue any certificate.
pub const KEY: &str = "ca.key";
/// What was taken back.
pub const REVOKED: &str = "revoked.pem";
/// What was issued.
const LEDGER: &str = "issued.json";
/// Clocks of machines differ; a certificate holds from a little before it was made.
const SLACK: Duration = Duration::hours(1);
/// A revocation list names when the next is due. Ours is read from the disk whenever it changes, so that date says nothing.
const NEXT_LIST: Duration = Duration::days(3650);

/// What is to be issued.
#[derive(Debug, Clone)]
pub struct Request {
    /// Whose it is; names its files.
    pub name: String,
    /// What for.
    pub purpose: Purpose,
    /// Host names and addresses of a coordinator.
    pub hosts: Vec<String>,
    /// How long it holds.
    pub days: u32,
}

/// A certificate of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// Whose.
    pub name: String,
    /// What for: `coordinator`, or a role.
    pub purpose: String,
    /// Its number.
    pub serial: String,
    /// Host names and addresses.
    pub hosts: Vec<String>,
    /// When it was made, seconds since the Unix epoch.
    pub issued_unix: i64,
    /// When it ends, seconds since the Unix epoch.
    pub expires_unix: i64,
    /// When it was taken back.
    pub revoked_unix: Option<i64>,
}

/// Files of an issued certificate.
#[derive(Debug, Clone)]
pub struct IssuedFiles {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// What the ledger says of it.
    pub entry: Issued,
}

/// An authority's folder.
#[derive(Debug, Clone)]
pub struct Authority {
    folder: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Ledger {
    issued: Vec<Issued>,
    /// Grows with each revocation list.
    list_number: u64,
}

impl Authority {
    /// Makes an authority in a folder that holds none.
    ///
    /// # Errors
    /// [`Error::AuthorityExists`], [`Error::BadRequest`], [`Error::File`]
    pub fn init(folder: &Path, name: &str, days: u32) -> Result<Self> {
        if folder.join(CERTIFICATE).exists() || folder.join(KEY).exists() {
            return Err(Error::AuthorityExists { folder: folder.to_owned() });
        }
        require_name(name)?;
        files::make_private_folder(folder)?;
        let key = key_pair()?;
        let mut params = params(name, days)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(bad)?;
        let this = Self { folder: folder.to_owned() };
        files::write_private(&this.folder.join(KEY), &key.serialize_pem())?;
        files::write_public(&this.folder.join(CERTIFICATE), &certificate.pem())?;
        this.save(&mut Ledger::default())?;
        Ok(this)
    }

    /// The authority of a folder.
    ///
    /// # Errors
    /// [`Error::NoAuthority`]
    pub fn open(folder: &Path) -> Result<Self> {
        if folder.join(CERTIFICATE).exists() {
            Ok(Self { folder: folder.to_owned() })
        } else {
            Err(Error::NoAuthority { folder: folder.to_owned() })
        }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What its own certificate says.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Damaged`]
    pub fn facts(&self) -> Result<Facts> {
        let path = self.folder.join(CERTIFICATE);
        let certificates = certificate::read_pem(&path)?;
        certificate::read(&certificates[0]).map_err(|what| Error::Damaged { path, what })
    }

    /// Makes a key and a certificate for it.
    ///
    /// # Errors
    /// [`Error::BadRequest`], also if one of that name is there and neither revoked nor over; [`Error::File`],
    /// [`Error::TooOpen`]
    pub fn issue(&self, request: &Request) -> Result<IssuedFiles> {
        require_name(&request.name)?;
        let mut ledger = self.ledger()?;
        let now = OffsetDateTime::now_utc();
        let holds = |issued: &Issued| {
            issued.name == request.name
                && issued.revoked_unix.is_none()
                && issued.expires_unix > now.unix_timestamp()
        };
        if ledger.issued.iter().any(holds) {
            let what = format!(
                "`{}` has one that holds; `shanty certs revoke {0}` first, or choose another name",
                request.name
            );
            return Err(Error::BadRequest { what });
        }
        if request.name == "ca" || request.name == "revoked" {
            return Err(Error::BadRequest {
                what: format!("`{}` names the authority's own file", request.name),
            });
        }
        let is_coordinator = request.purpose == Purpose::Coordinator;
        if is_coordinator == request.hosts.is_empty() {
            let what = if is_coordinator {
                "a coordinator's certificate names its hosts: --host head.example --host 10.0.0.10"
            } else {
                "hosts belong into a coordinator's certificate alone"
            };
            return Err(Error::BadRequest { what: what.to_owned() });
        }
        let ends = self.facts()?.not_after;
        let mut params = params(&request.name, request.days)?;
        if params.not_after.unix_timestamp() > ends {
            params.not_after = OffsetDateTime::from_unix_timestamp(ends).map_err(bad)?;
        }
        for host in &request.hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host.as_str().try_into().map_err(bad)?),
            });
        }
        let uri = certificate::identity_uri(request.purpose, &request.name);
        params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().map_err(bad)?));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A worker's certificate must not do for a coordinator's, nor the other way round.
        params.extended_key_usages = vec![if is_coordinator {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        params.use_authority_key_identifier_extension = true;
        let expires_unix = params.not_after.unix_timestamp();
        let key = key_pair()?;
        let made = params.signed_by(&key, &self.issuer()?).map_err(bad)?;
        let facts = certificate::read(made.der()).map_err(|what| Error::BadRequest { what })?;
        let entry = Issued {
            name: request.name.clone(),
            purpose: request.purpose.as_str().to_owned(),
            serial: facts.serial.as_str().to_owned(),
            hosts: request.hosts.clone(),
            issued_unix: now.unix_timestamp(),
            expires_unix,
            revoked_unix: None,
        };
        // What is not in the ledger could not be taken back: it comes first.
        ledger.issued.push(entry.clone());
        self.save(&mut ledger)?;
        let place = |ending: &str| self.folder.join(format!("{}.{ending}", request.name));
        let files = IssuedFiles { certificate: place("pem"), key: place("key"), entry };
        files::write_private(&files.key, &key.serialize_pem())?;
        files::write_public(&files.certificate, &made.pem())?;
        Ok(files)
    }

    /// Takes back the certificates of a name, or one by its number. Gives those that held until now.
    ///
    /// # Errors
    /// [`Error::NoCertificate`], [`Error::File`]
    pub fn revoke(&self, name_or_serial: &str) -> Result<Vec<Issued>> {
        let mut ledger = self.ledger()?;
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let meant = |issued: &&mut Issued| issued.name == name_or_serial || issued.serial == name_or_serial;
        let mut known = false;
        let mut revoked = Vec::new();
        for issued in ledger.issued.iter_mut().filter(meant) {
            known = true;
            if issued.revoked_unix.is_none() {
                issued.revoked_unix = Some(now);
                revoked.push(issued.clone());
            }
        }
        if !known {
            return Err(Error::NoCertificate { name: name_or_serial.to_owned() });
        }
        self.save(&mut ledger)?;
        Ok(revoked)
    }

    /// All certificates that were issued, oldest first.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Damaged`]
    pub fn issued(&self) -> Result<Vec<Issued>> {
        self.ledger().map(|ledger| ledger.issued)
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>> {
        let path = self.folder.join(KEY);
        files::require_private(&path)?;
        let damaged = |error: rcgen::Error| Error::Damaged { path: path.clone(), what: error.to_string() };
        let key = KeyPair::from_pem(&files::read_text(&path)?).map_err(damaged)?;
        let certificate = files::read_text(&self.folder.join(CERTIFICATE))?;
        Issuer::from_ca_cert_pem(&certificate, key).map_err(damaged)
    }

    fn ledger(&self) -> Result<Ledger> {
        let path = self.folder.join(LEDGER);
        let text = files::read_text(&path)?;
        serde_json::from_str(&text).map_err(|error| Error::Damaged { path, what: error.to_string() })
    }

    /// Writes the ledger, and the revocation list that follows from it.
    fn save(&self, ledger: &mut Ledger) -> Result<()> {
        ledger.list_number += 1;
        let now = OffsetDateTime::now_utc();
        let mut revoked = BTreeMap::new();
        for issued in &ledger.issued {
            if let Some(at) = issued.revoked_unix {
                revoked.insert(
                    serial_bytes(&issued.serial),
                    OffsetDateTime::from_unix_timestamp(at).map_err(bad)?,
                );
            }
        }
        let entry = |(serial, revocation_time): (Vec<u8>, OffsetDateTime)| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial),
            revocation_time,
            reason_code: Some(RevocationReason::Unspecified),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + NEXT_LIST,
            crl_number: SerialNumber::from_slice(&ledger.list_number.to_be_bytes()),
            issuing_distribution_point: None,
            revoked_certs: revoked.into_iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer()?).and_then(|list| list.pem()).map_err(bad)?;
        let json = serde_json::to_string_pretty(ledger).expect("plain values under text keys");
        files::write_public(&self.folder.join(LEDGER), &json)?;
        files::write_public(&self.folder.join(REVOKED), &list)
    }
}

fn bad(error: impl std::fmt::Display) -> Error {
    Error::BadRequest { what: error.to_string() }
}

fn require_name(name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    let what = format!("`{name}` is no name: letters, digits, `-`, `_` and `.`, at most 64");
    Err(Error::BadRequest { what })
}

fn key_pair() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(bad)
}

fn params(name: &str, days: u32) -> Result<CertificateParams> {
    if days == 0 || days > 36_500 {
        return Err(Error::BadRequest { what: format!("{days} days: from 1 to 36,500 can be had") });
    }
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SLACK;
    params.not_after = now + Duration::days(days.into());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // 127 random bits, and positive.
    let mut serial = [0; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_| Error::Random)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn serial_bytes(serial: &str) -> Vec<u8> {
    let digits = if serial.len() % 2 == 1 { format!("0{serial}") } else { serial.to_owned() };
    let byte = |at: usize| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    (0..digits.len()).step_by(2).filter_map(byte).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::role::Role;

    fn request(name: &str, purpose: Purpose, hosts: &[&str]) -> Request {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        Request { name: name.to_owned(), purpose, hosts, days: 30 }
    }

    #[test]
    fn certificates_carry_role_name_and_hosts_and_keys_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::init(&folder.path().join("certs"), "crew", 3650).unwrap();
        assert!(authority.facts().unwrap().is_authority);
        let head =
            authority.issue(&request("head", Purpose::Coordinator, &["localhost", "10.0.0.1"])).unwrap();
        let worker = authority.issue(&request("node-7", Purpose::Client(Role::Worker), &[])).unwrap();
        let facts = |path: &Path| certificate::read(&certificate::read_pem(path).unwrap()[0]).unwrap();
        let head = facts(&head.certificate);
        assert_eq!(head.purpose, Some(Purpose::Coordinator));
        assert_eq!(head.hosts, ["localhost", "10.0.0.1"]);
        let of_worker = facts(&worker.certificate);
        assert_eq!(
            (of_worker.purpose, of_worker.name.as_str()),
            (Some(Purpose::Client(Role::Worker)), "node-7")
        );
        assert_eq!(of_worker.serial.as_str(), worker.entry.serial);
        assert!(!of_worker.is_authority && of_worker.not_after == worker.entry.expires_unix);
        for key in [worker.key, authority.folder().join(KEY)] {
            assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn what_is_revoked_stands_in_the_list_and_its_name_is_free_again() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::init(folder.path(), "crew", 3650).unwrap();
        let (_, revoked) = certificate::read_revoked(&folder.path().join(REVOKED)).unwrap();
        assert!(revoked.is_empty());
        let ann = request("ann", Purpose::Client(Role::Submit), &[]);
        let first = authority.issue(&ann).unwrap();
        assert!(matches!(authority.issue(&ann), Err(Error::BadRequest { .. })), "the name is taken");
        assert_eq!(authority.revoke("ann").unwrap().len(), 1);
        assert!(authority.revoke("ann").unwrap().is_empty(), "once is enough");
        assert!(matches!(authority.revoke("bob"), Err(Error::NoCertificate { .. })));
        let second = authority.issue(&ann).unwrap();
        let (_, revoked) = certificate::read_revoked(&folder.path().join(REVOKED)).unwrap();
        let revoked: Vec<&str> = revoked.iter().map(certificate::Serial::as_str).collect();
        assert_eq!(revoked, [first.entry.serial.as_str()]);
        assert_ne!(second.entry.serial, first.entry.serial);
        assert_eq!(authority.issued().unwrap().len(), 2);
    }

    #[test]
    fn what_makes_no_sense_is_not_issued() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Authority::open(folder.path()), Err(Error::NoAuthority { .. })));
        let authority = Authority::init(folder.path(), "crew", 10).unwrap();
        assert!(matches!(Authority::init(folder.path(), "crew", 10), Err(Error::AuthorityExists { .. })));
        let worker = Purpose::Client(Role::Worker);
        for wrong in [
            request("../x", worker, &[]),
            request("ca", worker, &[]),
            request("head", Purpose::Coordinator, &[]),
            request("node", worker, &["10.0.0.1"]),
            Request { days: 0, ..request("node", worker, &[]) },
        ] {
            assert!(matches!(authority.issue(&wrong), Err(Error::BadRequest { .. })), "{wrong:?}");
        }
        assert!(authority.issued().unwrap().is_empty());
        // A certificate does not outlive its authority.
        let node = authority.issue(&request("node", worker, &[])).unwrap();
        assert!(node.entry.expires_unix <= authority.facts().unwrap().not_after);
    }
}
