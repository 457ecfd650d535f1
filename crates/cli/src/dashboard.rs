//! The address of the dashboard, as a person is told it.

use std::io::{IsTerminal, stderr};

use shanty_access::Secret;

use crate::ui::Ui;

/// The address, with the token as its fragment: browsers do not send that, and the page removes it from the address bar at once.
fn link(address: &str, token: &Secret) -> String {
    format!("{address}/#token={}", token.expose())
}

/// Whether an address is one of this machine alone.
fn is_loopback(address: &str) -> bool {
    let host = url::Url::parse(address).ok().and_then(|url| url.host().map(|host| host.to_owned()));
    match host {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// Tells where the dashboard is. The token is shown on a terminal alone, never to a file or a journal that others may read, and
/// only for an address that nobody else's browser reaches.
pub(crate) fn tell(ui: &Ui, address: &str, token: Option<&Secret>) {
    if !stderr().is_terminal() {
        return;
    }
    match token.filter(|_| is_loopback(address)) {
        Some(token) => ui.note(format!("dashboard {}", link(address, token))),
        None => ui.note(format!("dashboard {address}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_in_the_fragment() {
        let token = shanty_access::NewToken::draw().unwrap().secret;
        let link = link("http://127.0.0.1:7461", &token);
        let parsed = url::Url::parse(&link).unwrap();
        assert_eq!(parsed.fragment(), Some(format!("token={}", token.expose()).as_str()), "{link}");
        assert_eq!((parsed.path(), parsed.query()), ("/", None));
    }

    #[test]
    fn only_this_machine_counts_as_loopback() {
        for here in ["http://127.0.0.1:1", "https://127.0.0.2:1", "http://[::1]:1", "http://localhost:1"] {
            assert!(is_loopback(here), "{here}");
        }
        for there in
            ["http://0.0.0.0:1", "http://10.0.0.1:1", "https://head:1", "nonsense", "http://127.0.0.1.a.org"]
        {
            assert!(!is_loopback(there), "{there}");
        }
    }
}
