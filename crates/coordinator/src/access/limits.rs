//! How much one may have at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::error::{Error, Result};

/// How much may be had at once. The defaults serve a crew of a few thousand workers on one token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections, all together.
    pub connections: usize,
    /// Connections that have not yet said who they are.
    pub unidentified: usize,
    /// How long a connection may take to say who it is; then it is dropped.
    pub identify_within: Duration,
    /// How long agreeing on keys may take; then the connection is dropped.
    pub handshake_within: Duration,
    /// Connections of one token or certificate.
    pub connections_per_identity: usize,
    /// Calls and streams that one token or certificate has open.
    pub calls_per_identity: usize,
    /// Calls and streams that one connection has open.
    pub calls_per_connection: u32,
    /// How long a call that is no stream may take.
    pub call_within: Duration,
    /// A connection that answers no ping for this long is dropped.
    pub silent_within: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            unidentified: 2_048,
            identify_within: Duration::from_secs(10),
            handshake_within: Duration::from_secs(5),
            connections_per_identity: 8_192,
            calls_per_identity: 32_768,
            calls_per_connection: 256,
            call_within: Duration::from_secs(120),
            silent_within: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// How often a connection is asked whether it is there.
    pub(crate) fn ping_every(&self) -> Duration {
        self.silent_within * 2 / 5
    }

    /// How long it may take to answer.
    pub(crate) fn answer_within(&self) -> Duration {
        self.silent_within * 3 / 5
    }
}

/// Counts of one thing by identity.
#[derive(Debug, Clone)]
pub(crate) struct Counts {
    what: &'static str,
    most: usize,
    counts: Arc<Mutex<HashMap<Arc<str>, usize>>>,
}

/// Counts as one for as long as it lives.
#[derive(Debug)]
pub(crate) struct Claim {
    identity: Arc<str>,
    counts: Arc<Mutex<HashMap<Arc<str>, usize>>>,
}

impl Counts {
    pub fn new(what: &'static str, most: usize) -> Self {
        Self { what, most, counts: Arc::default() }
    }

    /// One more of an identity's.
    pub fn claim(&self, identity: &Arc<str>) -> Result<Claim> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(Arc::clone(identity)).or_default();
        if *count >= self.most {
            return Err(Error::TooMany { caller: identity.to_string(), count: *count, what: self.what });
        }
        *count += 1;
        Ok(Claim { identity: Arc::clone(identity), counts: Arc::clone(&self.counts) })
    }
}

impl Claim {
    /// Whose it is.
    pub fn identity(&self) -> &Arc<str> {
        &self.identity
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.identity) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_can_be_had_again_and_identities_do_not_share() {
        let counts = Counts::new("calls", 2);
        let (ann, bob): (Arc<str>, Arc<str>) = ("ann".into(), "bob".into());
        let first = counts.claim(&ann).unwrap();
        let _second = counts.claim(&ann).unwrap();
        assert!(matches!(counts.claim(&ann), Err(Error::TooMany { count: 2, .. })));
        assert!(counts.claim(&bob).is_ok());
        drop(first);
        assert!(counts.claim(&ann).is_ok());
        assert_eq!(counts.counts.lock().unwrap().len(), 1, "who has nothing is not remembered");
    }
}
