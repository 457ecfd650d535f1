//! Encryption of a link: what goes over it is sealed part by part.
//!
//! The nonces of the handshake are public keys of X25519 then, drawn for this connection alone; the proofs, keyed by
//! the generation's token, cover them. So the link's key follows from a secret that was never sent and from the token:
//! who learns the token later cannot read what was recorded, and who holds no token cannot take part. Bytes go one
//! way on a link, so it has one key; AES-256-GCM counts its parts, covers the header in front of each, and notices
//! what is changed, left out, repeated or from another link.

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey},
    agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral},
    rand::SystemRandom,
};

use super::{
    Token,
    frame::HEADER_BYTES,
    handshake::{HELLO_BYTES, Nonce as PublicKey},
};

/// Bytes that a sealed part has more.
pub(super) const TAG_BYTES: usize = 16;

/// Our half of a link's secret.
pub(super) struct Secret {
    private: EphemeralPrivateKey,
    pub(super) public: PublicKey,
}

impl Secret {
    pub(super) fn new() -> Result<Self, String> {
        let failed = |_| "the system gives no random numbers".to_owned();
        let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(failed)?;
        let computed = private.compute_public_key().map_err(failed)?;
        let mut public = [0; 32];
        public.copy_from_slice(computed.as_ref());
        Ok(Self { private, public })
    }

    /// The link's key, once the handshake has proved both halves.
    pub(super) fn key(
        self,
        theirs: &PublicKey,
        token: &Token,
        hello: &[u8; HELLO_BYTES],
        answer: &PublicKey,
    ) -> Result<LinkKey, String> {
        agree_ephemeral(self.private, &UnparsedPublicKey::new(&X25519, theirs), |secret| {
            let mut hasher = blake3::Hasher::new_derive_key("shanty collective 2 link");
            for part in [&token.0[..], secret, hello, answer] {
                hasher.update(part);
            }
            LinkKey(*hasher.finalize().as_bytes())
        })
        .map_err(|_| "its public key is none".to_owned())
    }
}

/// The key of one link.
pub(super) struct LinkKey([u8; 32]);

/// One end of an encrypted link.
pub(super) struct Seal {
    key: LessSafeKey,
    parts: u64,
}

impl Seal {
    pub(super) fn new(key: &LinkKey) -> Option<Self> {
        let key = UnboundKey::new(&AES_256_GCM, &key.0).ok()?;
        Some(Self { key: LessSafeKey::new(key), parts: 0 })
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&self.parts.to_le_bytes());
        // At a billion parts a second it would wrap after 500 years.
        self.parts += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals the next part: `sealed` becomes the bytes that follow the header.
    pub(super) fn close(
        &mut self,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        sealed: &mut Vec<u8>,
    ) -> bool {
        sealed.clear();
        sealed.extend_from_slice(payload);
        let nonce = self.nonce();
        let Ok(tag) = self.key.seal_in_place_separate_tag(nonce, Aad::from(header), sealed) else {
            return false;
        };
        sealed.extend_from_slice(tag.as_ref());
        true
    }

    /// Opens the next part in place, if it is what the other end sealed.
    pub(super) fn open(
        &mut self,
        header: &[u8; HEADER_BYTES],
        payload: &mut [u8],
        tag: [u8; TAG_BYTES],
    ) -> bool {
        let nonce = self.nonce();
        self.key.open_in_place_separate_tag(nonce, Aad::from(header), Tag::from(tag), payload, 0..).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: [u8; HEADER_BYTES] = [3; HEADER_BYTES];

    fn ends() -> (Seal, Seal) {
        let (ours, theirs) = (Secret::new().unwrap(), Secret::new().unwrap());
        let (a, b) = (ours.public, theirs.public);
        let (token, hello) = (Token([1; 32]), [2; HELLO_BYTES]);
        let one = ours.key(&b, &token, &hello, &b).unwrap();
        let other = theirs.key(&a, &token, &hello, &b).unwrap();
        (Seal::new(&one).unwrap(), Seal::new(&other).unwrap())
    }

    fn part(seal: &mut Seal, payload: &[u8]) -> (Vec<u8>, [u8; TAG_BYTES]) {
        let mut sealed = Vec::new();
        assert!(seal.close(&HEADER, payload, &mut sealed));
        let tag = sealed.split_off(payload.len());
        (sealed, tag.try_into().unwrap())
    }

    #[test]
    fn parts_arrive_as_they_were_sent() {
        let (mut from, mut to) = ends();
        for payload in [&b"gold"[..], b"", b"more gold"] {
            let (mut sealed, tag) = part(&mut from, payload);
            assert!(payload.is_empty() || sealed != payload);
            assert!(to.open(&HEADER, &mut sealed, tag));
            assert_eq!(sealed, payload);
        }
    }

    #[test]
    fn what_is_changed_repeated_or_left_out_is_noticed() {
        let (mut from, mut to) = ends();
        let (mut sealed, tag) = part(&mut from, b"gold");
        sealed[1] ^= 1;
        assert!(!to.open(&HEADER, &mut sealed, tag), "changed");

        let (mut from, mut to) = ends();
        let (mut sealed, tag) = part(&mut from, b"gold");
        assert!(!to.open(&[4; HEADER_BYTES], &mut sealed, tag), "another header");

        let (mut from, mut to) = ends();
        let (mut sealed, tag) = part(&mut from, b"gold");
        let mut again = sealed.clone();
        assert!(to.open(&HEADER, &mut sealed, tag));
        assert!(!to.open(&HEADER, &mut again, tag), "repeated");

        let (mut from, mut to) = ends();
        part(&mut from, b"gold");
        let (mut sealed, tag) = part(&mut from, b"more");
        assert!(!to.open(&HEADER, &mut sealed, tag), "one left out");
    }

    #[test]
    fn another_token_makes_another_key() {
        let (ours, theirs) = (Secret::new().unwrap(), Secret::new().unwrap());
        let (a, b) = (ours.public, theirs.public);
        let hello = [2; HELLO_BYTES];
        let one = ours.key(&b, &Token([1; 32]), &hello, &b).unwrap();
        let other = theirs.key(&a, &Token([9; 32]), &hello, &b).unwrap();
        assert_ne!(one.0, other.0);
    }
}
