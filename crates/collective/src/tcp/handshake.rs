//! Both ends of a new connection prove that they hold the generation's token, without sending it.
//!
//! ```text
//! connecting rank                          accepting rank
//!   hello: generation, from, to, nonce  ->
//!                                       <-   answer: nonce, proof(accepting)   or   refusal: reason
//!   proof(connecting)                   ->
//!                                       <-   welcome
//! ```
//! `proof(side) = BLAKE3 keyed by the token (side, job, hello, answer's nonce)`. It binds job, generation,
//! both ranks, the world size and both nonces, so it is of no use on another connection or for the other
//! side. On a plain link the bytes are not protected after that: who can write into the connection, or reads it,
//! is outside of what the token guards against. On an encrypted one they are: `seal`, whose public keys the nonces are.

use blake3::Hash;
use uuid::Uuid;

use super::Token;

pub(super) const HELLO_BYTES: usize = 64;
pub(super) const ANSWER_BYTES: usize = 65;
pub(super) const PROOF_BYTES: usize = 32;
pub(super) const WELCOME: u8 = 1;

/// Names the protocol and its version.
const MAGIC: [u8; 8] = *b"shanty/2";
const REFUSED: u8 = 0;
const PROVED: u8 = 1;

pub(super) type Nonce = [u8; 32];

/// What a connection is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hello {
    pub generation: u64,
    /// The rank that connects.
    pub from: u32,
    /// The rank that it wants.
    pub to: u32,
    pub world_size: u32,
    /// How bytes travel on the link: [`JoinOptions::manner`](super::JoinOptions).
    pub manner: u32,
    pub nonce: Nonce,
}

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.from.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.to.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.world_size.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.manner.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.nonce);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&bytes[32..64]);
        (bytes[0..8] == MAGIC).then(|| Self {
            generation: u64::from(word(8)) | u64::from(word(12)) << 32,
            from: word(16),
            to: word(20),
            world_size: word(24),
            manner: word(28),
            nonce,
        })
    }
}

/// Who proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Connecting,
    Accepting,
}

/// The proof that `side` holds the token. Compare as [`struct@Hash`]: that takes the same time whatever differs.
pub(super) fn proof(token: &Token, side: Side, job: &str, hello: &[u8; HELLO_BYTES], nonce: &Nonce) -> Hash {
    let mut hasher = blake3::Hasher::new_keyed(&token.0);
    hasher.update(match side {
        Side::Connecting => b"shanty collective connecting",
        Side::Accepting => b"shanty collective accepting ",
    });
    hasher.update(blake3::hash(job.as_bytes()).as_bytes());
    hasher.update(hello);
    hasher.update(nonce);
    hasher.finalize()
}

/// 244 random bits of the system.
pub(super) fn nonce() -> Nonce {
    let mut nonce = [0; 32];
    nonce[..16].copy_from_slice(Uuid::new_v4().as_bytes());
    nonce[16..].copy_from_slice(Uuid::new_v4().as_bytes());
    nonce
}

/// The accepting side's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Proof {
        nonce: Nonce,
        proof: Hash,
    },
    /// Not a member of what goes on there; it is at this generation.
    Refusal {
        generation: u64,
    },
}

impl Answer {
    pub(super) fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        match self {
            Self::Proof { nonce, proof } => {
                bytes[0] = PROVED;
                bytes[1..33].copy_from_slice(nonce);
                bytes[33..65].copy_from_slice(proof.as_bytes());
            }
            Self::Refusal { generation } => {
                bytes[0] = REFUSED;
                bytes[1..9].copy_from_slice(&generation.to_le_bytes());
            }
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Option<Self> {
        let (mut nonce, mut proof, mut generation) = ([0; 32], [0; 32], [0; 8]);
        nonce.copy_from_slice(&bytes[1..33]);
        proof.copy_from_slice(&bytes[33..65]);
        generation.copy_from_slice(&bytes[1..9]);
        match bytes[0] {
            PROVED => Some(Self::Proof { nonce, proof: Hash::from_bytes(proof) }),
            REFUSED => Some(Self::Refusal { generation: u64::from_le_bytes(generation) }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello { generation: 1 << 40, from: 1, to: 2, world_size: 3, manner: 0, nonce: nonce() }
    }

    #[test]
    fn messages_survive_the_wire() {
        let hello = hello();
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        assert_eq!(Hello::decode(&[b'x'; HELLO_BYTES]), None);
        let proof = Answer::Proof { nonce: nonce(), proof: blake3::hash(b"x") };
        assert_eq!(Answer::decode(&proof.encode()), Some(proof));
        let refusal = Answer::Refusal { generation: 9 };
        assert_eq!(Answer::decode(&refusal.encode()), Some(refusal));
    }

    #[test]
    fn a_proof_is_of_use_nowhere_else() {
        let (token, hello, answer_nonce) = (Token([7; 32]), hello(), nonce());
        let made = proof(&token, Side::Connecting, "job", &hello.encode(), &answer_nonce);
        let others = [
            proof(&Token([8; 32]), Side::Connecting, "job", &hello.encode(), &answer_nonce),
            proof(&token, Side::Accepting, "job", &hello.encode(), &answer_nonce),
            proof(&token, Side::Connecting, "other", &hello.encode(), &answer_nonce),
            proof(&token, Side::Connecting, "job", &hello.encode(), &nonce()),
        ];
        let changed = [
            Hello { generation: 2, ..hello },
            Hello { from: 0, ..hello },
            Hello { to: 0, ..hello },
            Hello { world_size: 4, ..hello },
            Hello { manner: 1, ..hello },
            Hello { nonce: nonce(), ..hello },
        ];
        let changed =
            changed.map(|hello| proof(&token, Side::Connecting, "job", &hello.encode(), &answer_nonce));
        for other in others.into_iter().chain(changed) {
            assert_ne!(made, other);
        }
    }
}
