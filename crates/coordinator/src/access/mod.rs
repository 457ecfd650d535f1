//! Who asks, and whether they may.
//!
//! `rights` is the one table from call to least role; what has no row there is refused. `guard` stands before every service
//! and lets nobody through whom `Access::admit` has not let in. A call that was let in ends when the rights that it was let
//! in by do: a token that expires or is taken back, a certificate that is revoked, a job that is over.

pub(crate) mod guard;
mod limits;
mod record;
mod rights;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::HeaderMap;
use shanty_access::{
    NewToken, Role, Secret, TokenId,
    token::{self, TokenHash},
};
use shanty_proto::JobId;
use tokio_util::sync::CancellationToken;

pub(crate) use self::limits::{Claim, Counts};
pub use self::{limits::Limits, record::TokenRecord, rights::RIGHTS};
use crate::{
    error::{Error, Result},
    listen::Peer,
    machine::Change,
    store::Store,
};

/// How long the workers of a job that has ended may still say their last words on a token that was for it alone.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// How often is looked whether somebody's rights are over.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Longest name of a token.
const LONGEST_NAME: usize = 64;

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// For limits and logs: `token 0123…`, `certificate of node-7`, …
    pub identity: Arc<str>,
    pub role: Role,
    /// The one job that the caller may work for.
    pub job: Option<JobId>,
    /// Cancelled when the rights are over.
    pub ended: CancellationToken,
}

/// A call that was let in.
#[derive(Debug)]
pub(crate) struct Pass {
    pub caller: Caller,
    /// Counts as one of the caller's calls for as long as it lives.
    _call: Claim,
}

#[derive(Debug)]
struct Entry {
    record: TokenRecord,
    hash: TokenHash,
    ended: CancellationToken,
}

/// A token of this process's own making: the key that the coordinator's user finds, see [`shanty_access::local_key`].
#[derive(Debug)]
struct Key {
    id: TokenId,
    hash: TokenHash,
    name: Arc<str>,
    role: Role,
}

/// Tokens, and who may do what.
#[derive(Debug)]
pub(crate) struct Access {
    /// Nobody is asked.
    open: bool,
    keys: Vec<Key>,
    tokens: Mutex<BTreeMap<TokenId, Entry>>,
    calls: Counts,
    connections: Counts,
    never: CancellationToken,
}

impl Access {
    /// Nobody is let in but by the keys. With `open`, everybody.
    pub fn new(open: bool, limits: &Limits) -> Self {
        Self {
            open,
            keys: Vec::new(),
            tokens: Mutex::default(),
            calls: Counts::new("calls", limits.calls_per_identity),
            connections: Counts::new("connections", limits.connections_per_identity),
            never: CancellationToken::new(),
        }
    }

    /// Takes a token that is not stored.
    pub fn add_key(&mut self, secret: &Secret, name: &str, role: Role) {
        if let Some((id, hash)) = token::read(secret.expose()) {
            self.keys.push(Key { id, hash, name: name.into(), role });
        }
    }

    /// Takes stored tokens over. Those of jobs that have ended are gone; gives their numbers.
    pub fn restore(&self, stored: Vec<TokenRecord>, is_over: impl Fn(&JobId) -> bool) -> Vec<TokenId> {
        let mut gone = Vec::new();
        for record in stored {
            let over = record.job.as_ref().is_some_and(&is_over) || record.is_expired(now());
            match TokenHash::from_hex(&record.hash).filter(|_| !over) {
                Some(hash) => self.insert(record, hash),
                None => gone.push(record.id),
            }
        }
        gone
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TokenId, Entry>> {
        // A map of whole entries is whole after any panic.
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, record: TokenRecord, hash: TokenHash) {
        let entry = Entry { hash, ended: CancellationToken::new(), record };
        self.lock().insert(entry.record.id.clone(), entry);
    }

    /// Makes a token; it holds once this returns, and outlives the process.
    pub async fn create(&self, store: &Store, wanted: Wanted) -> Result<(TokenRecord, Secret)> {
        let plain = |name: &str| name.len() <= LONGEST_NAME && !name.chars().any(char::is_control);
        if !plain(&wanted.name) {
            return Err(Error::bad(format!("a token's name is at most {LONGEST_NAME} bytes of plain text")));
        }
        if wanted.job.is_some() && wanted.role != Role::Worker {
            return Err(Error::bad("only a worker's token can be for one job alone"));
        }
        let NewToken { id, secret, hash } = NewToken::draw()?;
        let created_unix_ms = now();
        let expires_unix_ms = wanted.lifetime.map(|lifetime| {
            created_unix_ms.saturating_add(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX))
        });
        let record = TokenRecord {
            id,
            hash: hash.to_hex(),
            role: wanted.role,
            name: wanted.name,
            job: wanted.job,
            created_unix_ms,
            expires_unix_ms,
        };
        store.persist(vec![Change::Token(record.clone())]).await?;
        self.insert(record.clone(), hash);
        tracing::info!(token = %record.id, role = %record.role, name = record.name, "token made");
        Ok((record, secret))
    }

    /// All tokens, without secrets.
    pub fn list(&self) -> Vec<TokenRecord> {
        let mut records: Vec<_> = self.lock().values().map(|entry| entry.record.clone()).collect();
        records.sort_by(|one, other| (one.created_unix_ms, &one.id).cmp(&(other.created_unix_ms, &other.id)));
        records
    }

    /// Takes back the token of a number, or those of a name. What runs on them ends.
    pub async fn revoke(&self, store: &Store, which: &str) -> Result<Vec<TokenRecord>> {
        let meant = |entry: &&Entry| entry.record.id.as_str() == which || entry.record.name == which;
        let ids: Vec<TokenId> =
            self.lock().values().filter(meant).map(|entry| entry.record.id.clone()).collect();
        if ids.is_empty() || which.is_empty() {
            return Err(Error::NoSuchToken { token: which.to_owned() });
        }
        store.persist(ids.iter().cloned().map(Change::TokenGone).collect()).await?;
        Ok(self.forget(&ids, "revoked"))
    }

    fn forget(&self, ids: &[TokenId], why: &'static str) -> Vec<TokenRecord> {
        let gone: Vec<Entry> = {
            let mut tokens = self.lock();
            ids.iter().filter_map(|id| tokens.remove(id)).collect()
        };
        for entry in &gone {
            tracing::info!(token = %entry.record.id, name = entry.record.name, "token {why}");
            entry.ended.cancel();
        }
        gone.into_iter().map(|entry| entry.record).collect()
    }

    /// A job is over: tokens for it alone hold a little longer, for last words.
    pub fn job_ended(&self, job: &JobId) {
        let last = now().saturating_add(LAST_WORDS.as_millis() as u64);
        for entry in self.lock().values_mut().filter(|entry| entry.record.job.as_ref() == Some(job)) {
            let ends = entry.record.expires_unix_ms.unwrap_or(u64::MAX);
            entry.record.expires_unix_ms = Some(ends.min(last));
        }
    }

    /// Ends what has expired, until `stop`.
    pub async fn watch(&self, store: &Store, stop: &CancellationToken) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                () = stop.cancelled() => return,
            }
            let now = now();
            let expired: Vec<TokenId> = self
                .lock()
                .values()
                .filter(|entry| entry.record.is_expired(now))
                .map(|entry| entry.record.id.clone())
                .collect();
            if !expired.is_empty() {
                self.forget(&expired, "expired");
                // A store that fails stops the coordinator; an expired token that stays in it is dropped at the next start.
                let _ = store.record(expired.into_iter().map(Change::TokenGone).collect()).await;
            }
        }
    }

    /// Lets a call in, or not.
    pub fn admit(&self, call: &str, headers: &HeaderMap, peer: Option<&Peer>) -> Result<Pass> {
        let caller = if self.open { self.anyone() } else { self.entitled(call, headers, peer)? };
        if let Some(peer) = peer {
            peer.identified(&caller.identity, &self.connections)?;
        }
        let call = self.calls.claim(&caller.identity)?;
        Ok(Pass { caller, _call: call })
    }

    fn entitled(&self, call: &str, headers: &HeaderMap, peer: Option<&Peer>) -> Result<Caller> {
        let caller = self.authenticate(headers, peer)?;
        let Some(least) = rights::least(call) else {
            // Closed by default: what the table does not know, nobody may.
            return Err(not_allowed(&caller, call, "a row in the table of rights, which there is none of"));
        };
        if caller.role.may(least) { Ok(caller) } else { Err(not_allowed(&caller, call, least.as_str())) }
    }

    fn anyone(&self) -> Caller {
        Caller { identity: "anyone".into(), role: Role::Admin, job: None, ended: self.never.clone() }
    }

    /// Who asks. A token counts before a certificate; one that is wrong is not made good by a certificate.
    fn authenticate(&self, headers: &HeaderMap, peer: Option<&Peer>) -> Result<Caller> {
        if let Some(value) = headers.get(http::header::AUTHORIZATION) {
            let shown =
                value.to_str().ok().and_then(|text| text.strip_prefix("Bearer ")).and_then(token::read);
            let Some((id, hash)) = shown else {
                return Err(Error::Unauthenticated { what: "what was shown is no token" });
            };
            return self
                .holder(&id, &hash)
                .ok_or(Error::Unauthenticated { what: "the token is unknown, expired or revoked" });
        }
        let certificate = peer.and_then(Peer::certificate);
        let Some(certificate) = certificate else {
            return Err(Error::Unauthenticated { what: "neither a token nor a certificate was shown" });
        };
        let ended = peer.map_or_else(|| self.never.clone(), Peer::cut);
        let identity = format!("certificate of {}", certificate.name);
        Ok(Caller { identity: identity.into(), role: certificate.role, job: None, ended })
    }

    fn holder(&self, id: &TokenId, hash: &TokenHash) -> Option<Caller> {
        if let Some(key) = self.keys.iter().find(|key| key.id == *id && key.hash == *hash) {
            let (identity, ended) = (Arc::clone(&key.name), self.never.clone());
            return Some(Caller { identity, role: key.role, job: None, ended });
        }
        let tokens = self.lock();
        let entry = tokens.get(id).filter(|entry| entry.hash == *hash && !entry.record.is_expired(now()))?;
        Some(Caller {
            identity: format!("token {id}").into(),
            role: entry.record.role,
            job: entry.record.job.clone(),
            ended: entry.ended.clone(),
        })
    }
}

fn not_allowed(caller: &Caller, call: &str, least: &'static str) -> Error {
    Error::NotAllowed { caller: caller.identity.to_string(), role: caller.role, call: call.to_owned(), least }
}

/// What a token is to be.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub role: Role,
    pub name: String,
    pub job: Option<JobId>,
    pub lifetime: Option<Duration>,
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
