//! TLS: the coordinator's certificate, the authority whose client certificates are known, and what was revoked. All of it is
//! read again when its files change, so that nobody restarts a coordinator to revoke or to renew.

use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use shanty_access::{
    Error,
    certificate::{self, Purpose, Serial},
    files,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

use super::connection::{ClientCertificate, Peer, State};

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Time, length and number of each file; none of a file that is not there.
type Stamps = Vec<Option<(SystemTime, u64, u64)>>;

/// The files that TLS takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The coordinator's certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority whose certificates clients may show; none are asked for without.
    pub client_ca: Option<PathBuf>,
    /// What that authority has taken back.
    pub revoked: Option<PathBuf>,
}

impl TlsFiles {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref(), self.revoked.as_ref()]
            .into_iter()
            .flatten()
    }

    /// Changes when a file does.
    fn stamp(&self) -> Stamps {
        use std::os::unix::fs::MetadataExt;
        let stamp = |path: &PathBuf| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
        };
        self.all().map(stamp).collect()
    }
}

#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    revoked: BTreeSet<Serial>,
}

/// TLS as it stands.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    loaded: RwLock<Loaded>,
    /// Connections with a client certificate.
    peers: Mutex<Vec<Weak<State>>>,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, Error> {
        let loaded = RwLock::new(load(&files)?);
        Ok(Self { files, loaded, peers: Mutex::default() })
    }

    /// Agrees on keys with whoever connected; gives the certificate that was shown, if any.
    pub async fn handshake(
        &self,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Option<ClientCertificate>)> {
        let config = Arc::clone(&self.loaded.read().unwrap_or_else(PoisonError::into_inner).config);
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        // The signature was verified in the handshake; a certificate without role and name is nobody's.
        let certificate = shown.and_then(|der| match certificate::read(der) {
            Ok(facts) => match facts.purpose {
                Some(Purpose::Client(role)) => Some(ClientCertificate {
                    name: facts.name.into(),
                    role,
                    serial: facts.serial,
                    not_after: facts.not_after,
                }),
                _ => None,
            },
            Err(_) => None,
        });
        Ok((stream, certificate))
    }

    /// Remembers a connection, to end it once its certificate is no longer good.
    pub fn remember(&self, peer: &Peer) {
        if peer.certificate().is_some() {
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            if peers.len() == peers.capacity() {
                peers.retain(|peer| peer.strong_count() > 0);
            }
            peers.push(peer.downgrade());
        }
    }

    /// Reads files again that changed, and ends connections whose certificates are no longer good, until `stop`.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut stamp = self.files.stamp();
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                () = stop.cancelled() => return,
            }
            let (this, before) = (Arc::clone(&self), stamp.clone());
            // A few small files, but perhaps on a network's disk.
            let looked = tokio::task::spawn_blocking(move || this.look(&before)).await;
            stamp = looked.unwrap_or(stamp);
            self.cut();
        }
    }

    fn look(&self, before: &Stamps) -> Stamps {
        let now = self.files.stamp();
        if now == *before {
            return now;
        }
        match load(&self.files) {
            Ok(loaded) => {
                *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
                tracing::info!("certificates were read again");
            }
            // Half of an exchange, which the other half will follow, or a damaged file: what was good goes on.
            Err(error) => {
                tracing::error!(%error, "changed certificates cannot be used; those before stay in force");
            }
        }
        now
    }

    fn cut(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|weak| {
            let Some(peer) = Peer::upgrade(weak) else { return false };
            let Some(certificate) = peer.certificate() else { return false };
            let good = certificate.not_after >= now && !loaded.revoked.contains(&certificate.serial);
            if !good {
                tracing::info!(
                    name = &*certificate.name,
                    "a connection ends: its certificate is expired or revoked"
                );
                peer.cut().cancel();
            }
            good
        });
    }
}

fn load(files: &TlsFiles) -> Result<Loaded, Error> {
    let bad = |error: &dyn std::fmt::Display| Error::Tls { what: error.to_string() };
    let provider = Arc::new(ring::default_provider());
    let chain = certificate::read_pem(&files.certificate)?;
    files::require_private(&files.key)?;
    let key = files::read_text(&files.key)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|error| Error::Damaged { path: files.key.clone(), what: error.to_string() })?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(&error))?;
    let mut revoked = BTreeSet::new();
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificate::read_pem(ca)? {
                roots.add(certificate).map_err(|error| bad(&error))?;
            }
            let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            if let Some(path) = &files.revoked {
                let (lists, serials) = certificate::read_revoked(path)?;
                revoked = serials;
                verifier = verifier.with_crls(lists).only_check_end_entity_revocation();
            }
            // A browser has no certificate; it signs in with a token.
            let verifier = verifier.allow_unauthenticated().build().map_err(|error| bad(&error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| bad(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is taken up again would pass by the list of what is revoked.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Loaded { config: Arc::new(config), revoked })
}
