//! Connections to a coordinator that say who asks.

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tonic::{
    Request, Status,
    metadata::{AsciiMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};
use url::{Host, Url};

use crate::{
    error::{Error, Result},
    files, local_key,
    secret::Secret,
    token,
};

/// A connection that shows a token, if there is one, with every request.
pub type Channel = InterceptedService<tonic::transport::Channel, Bearer>;

/// How long the other side may take to agree on keys.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// How often a token's file is looked at again: it may be exchanged while we run.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What is shown to a coordinator, and by what it is known.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// Certificates of the authorities that are trusted; those of the system when absent.
    pub ca: Option<PathBuf>,
    /// The client's certificate.
    pub certificate: Option<PathBuf>,
    /// The client's key.
    pub key: Option<PathBuf>,
    /// The file of a token.
    pub token_file: Option<PathBuf>,
    /// A token itself; counts where no file is named.
    pub token: Option<Secret>,
}

impl Credentials {
    /// Prepares a connection to `address`: TLS where it begins with `https`, a token where there is one.
    ///
    /// # Errors
    /// [`Error::TooOpen`], [`Error::NoToken`], [`Error::InClear`], [`Error::HalfIdentity`], [`Error::Tls`], [`Error::File`]
    pub fn prepare(&self, address: &Url, endpoint: Endpoint) -> Result<(Endpoint, Bearer)> {
        let bearer = self.bearer(address)?;
        if address.scheme() != "https" {
            return Ok((endpoint, bearer));
        }
        let endpoint = endpoint
            .tls_config(self.tls(address)?)
            .map_err(|error| Error::Tls { what: innermost(&error) })?;
        Ok((endpoint, bearer))
    }

    fn tls(&self, address: &Url) -> Result<ClientTlsConfig> {
        let mut tls = ClientTlsConfig::new().timeout(HANDSHAKE_WITHIN);
        tls = match &self.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(files::read_text(ca)?)),
            None => tls.with_native_roots(),
        };
        // Without the brackets of an IPv6 address.
        tls = match address.host() {
            Some(Host::Ipv6(host)) => tls.domain_name(host.to_string()),
            Some(host) => tls.domain_name(host.to_string()),
            None => tls,
        };
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => {
                files::require_private(key)?;
                let (certificate, key) = (files::read_text(certificate)?, files::read_text(key)?);
                Ok(tls.identity(Identity::from_pem(certificate, key)))
            }
            (None, None) => Ok(tls),
            (Some(_), None) => Err(Error::HalfIdentity { which: "certificate" }),
            (None, Some(_)) => Err(Error::HalfIdentity { which: "key" }),
        }
    }

    fn bearer(&self, address: &Url) -> Result<Bearer> {
        let here = is_loopback(address);
        let named = match (&self.token_file, &self.token) {
            (Some(path), _) => Some(Source::File(path.clone())),
            (None, Some(token)) => Some(Source::Fixed(token.clone())),
            (None, None) => None,
        };
        // The key that a coordinator left for its own user is shown to this machine alone.
        let left_here = || address.port_or_known_default().filter(|_| here).and_then(local_key::find);
        let source = named.or_else(|| left_here().map(Source::File));
        let Some(source) = source else { return Ok(Bearer::default()) };
        if address.scheme() != "https" && !here {
            return Err(Error::InClear { address: address.to_string() });
        }
        let value = source.read()?;
        Ok(Bearer { state: Some(Arc::new(Mutex::new(State { source, value, read: Instant::now() }))) })
    }
}

/// Whether an address is of this machine, whatever any name server says.
pub fn is_loopback(address: &Url) -> bool {
    match address.host() {
        Some(Host::Ipv4(host)) => host.is_loopback(),
        Some(Host::Ipv6(host)) => host.is_loopback(),
        Some(Host::Domain(host)) => {
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|host| host.is_loopback())
        }
        None => false,
    }
}

#[derive(Debug)]
enum Source {
    File(PathBuf),
    Fixed(Secret),
}

impl Source {
    fn read(&self) -> Result<AsciiMetadataValue> {
        let (secret, place) = match self {
            Self::File(path) => (Secret::read(path)?, format!("`{}`", path.display())),
            Self::Fixed(secret) => (secret.clone(), "what was given as a token".to_owned()),
        };
        let no_token = || Error::NoToken { place };
        token::read(secret.expose()).ok_or_else(no_token)?;
        let text = format!("Bearer {}", secret.expose());
        let mut value: AsciiMetadataValue =
            MetadataValue::try_from(text).expect("a token is of letters, digits and dashes");
        // Kept out of the header compression's table, and of its Debug.
        value.set_sensitive(true);
        Ok(value)
    }
}

#[derive(Debug)]
struct State {
    source: Source,
    value: AsciiMetadataValue,
    read: Instant,
}

/// Puts a token on every request.
#[derive(Debug, Clone, Default)]
pub struct Bearer {
    state: Option<Arc<Mutex<State>>>,
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(state) = &self.state {
            // A value is whole after any panic.
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(state.source, Source::File(_)) && state.read.elapsed() > READ_AGAIN_AFTER {
                state.read = Instant::now();
                // A file that is just being exchanged, or gone: what was read before is as good as anything.
                if let Ok(value) = state.source.read() {
                    state.value = value;
                }
            }
            request.metadata_mut().insert("authorization", state.value.clone());
        }
        Ok(request)
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::NewToken;

    fn bearer(credentials: &Credentials, address: &str) -> Result<Option<String>> {
        let mut bearer = credentials.bearer(&Url::parse(address).unwrap())?;
        let request = bearer.call(Request::new(())).unwrap();
        let value = request.metadata().get("authorization");
        Ok(value.map(|value| value.to_str().unwrap().to_owned()))
    }

    #[test]
    fn a_token_never_crosses_a_network_in_clear() {
        let token = NewToken::draw().unwrap().secret;
        let credentials = Credentials { token: Some(token.clone()), ..Credentials::default() };
        let shown = Some(format!("Bearer {}", token.expose()));
        for address in ["https://head:7461", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"] {
            assert_eq!(bearer(&credentials, address).unwrap(), shown, "{address}");
        }
        for address in ["http://head:7461", "http://10.0.0.1:1", "http://localhost.example:1"] {
            assert!(matches!(bearer(&credentials, address), Err(Error::InClear { .. })), "{address}");
        }
        assert_eq!(bearer(&Credentials::default(), "http://head:7461").unwrap(), None);
        assert!(!format!("{credentials:?}").contains(token.expose()));
    }

    #[test]
    fn what_is_no_token_is_not_sent() {
        let credentials = Credentials { token: Some(Secret::new("hunter2")), ..Credentials::default() };
        assert!(matches!(bearer(&credentials, "https://head:1"), Err(Error::NoToken { .. })));
    }

    #[test]
    fn a_certificate_goes_with_its_key() {
        let credentials = Credentials { certificate: Some("a.pem".into()), ..Credentials::default() };
        let address = Url::parse("https://head:1").unwrap();
        assert!(matches!(credentials.tls(&address), Err(Error::HalfIdentity { which: "certificate" })));
    }
}
