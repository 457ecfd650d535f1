//! Tokens: 256 random bits with a public number, kept as hashes.
//!
//! A token reads `shanty-NUMBER-SECRET`. The number names it in lists and logs; whoever has the rest has the rights.
//! What is stored is a BLAKE3 hash of the secret: with 256 random bits there is nothing to guess, so that a slow hash
//! would only slow down the coordinator.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    secret::Secret,
};

const PREFIX: &str = "shanty-";
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;
/// Keeps this hash apart from every other use of the function.
const CONTEXT: &str = "shanty 2026-11-24 access token";

/// The public number of a token.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenId(String);

impl TokenId {
    /// Takes what [`fmt::Display`] shows.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.len() == 2 * ID_BYTES && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        hex.then(|| Self(text.to_ascii_lowercase()))
    }

    /// As it is shown.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Hash of a token's secret. Equality takes the same time whatever differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenHash(blake3::Hash);

impl TokenHash {
    /// Takes what [`TokenHash::to_hex`] gave.
    pub fn from_hex(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(Self)
    }

    /// As it is stored.
    pub fn to_hex(&self) -> String {
        self.0.to_hex().to_string()
    }
}

/// A token that was just made. Its secret is shown once.
#[derive(Debug)]
pub struct NewToken {
    /// Its number.
    pub id: TokenId,
    /// All of it.
    pub secret: Secret,
    /// What is stored.
    pub hash: TokenHash,
}

impl NewToken {
    /// Draws a token.
    ///
    /// # Errors
    /// [`Error::Random`] if the system has no random bits.
    pub fn draw() -> Result<Self> {
        let mut bytes = [0; ID_BYTES + SECRET_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| Error::Random)?;
        let (id, secret) = bytes.split_at(ID_BYTES);
        let text = format!("{PREFIX}{}-{}", hex(id), hex(secret));
        let (id, hash) = read(&text).expect("it was just written in that form");
        Ok(Self { id, secret: Secret::new(&text), hash })
    }
}

/// The number and the hash of a token; none if the text is no token.
pub fn read(text: &str) -> Option<(TokenId, TokenHash)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('-')?;
    let whole = secret.len() == 2 * SECRET_BYTES && secret.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = TokenId::parse(id).filter(|_| whole)?;
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(secret.as_bytes());
    Some((id, TokenHash(hasher.finalize())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_hash_alone() {
        let token = NewToken::draw().unwrap();
        let text = token.secret.expose();
        let (id, hash) = read(text).unwrap();
        assert_eq!((&id, hash), (&token.id, token.hash));
        assert_eq!(TokenHash::from_hex(&hash.to_hex()), Some(hash));
        assert!(!text.contains(&hash.to_hex()));
        let other = NewToken::draw().unwrap();
        assert_ne!(other.hash, hash);
    }

    #[test]
    fn what_is_no_token_is_none() {
        let token = NewToken::draw().unwrap();
        let text = token.secret.expose();
        for wrong in ["", "shanty-", "hf_abc", &text[1..], &text[..text.len() - 1], &format!("{text}0")] {
            assert!(read(wrong).is_none(), "{wrong}");
        }
        // One digit changed: it reads, and is another.
        let last = if text.ends_with('0') { "1" } else { "0" };
        let changed = format!("{}{last}", &text[..text.len() - 1]);
        assert_ne!(read(&changed).unwrap().1, token.hash);
    }
}
