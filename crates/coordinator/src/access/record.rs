//! What is kept of a token.

use serde::{Deserialize, Serialize};
use shanty_access::{Role, TokenId};
use shanty_proto::JobId;

/// A token as it is stored: of its secret, the hash alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Its public number.
    pub id: TokenId,
    /// BLAKE3 hash of its secret, as hexadecimal digits.
    pub hash: String,
    /// What it stands for.
    pub role: Role,
    /// For people.
    pub name: String,
    /// The one job that it is for.
    pub job: Option<JobId>,
    /// When it was made, by the coordinator's clock.
    pub created_unix_ms: u64,
    /// When it ends, by the coordinator's clock.
    pub expires_unix_ms: Option<u64>,
}

impl TokenRecord {
    /// Whether it is over at that time.
    pub fn is_expired(&self, unix_ms: u64) -> bool {
        self.expires_unix_ms.is_some_and(|expires| expires <= unix_ms)
    }
}
