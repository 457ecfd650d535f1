//! Who may do what: roles, tokens, certificates, and connections that carry them.
//!
//! [`role`] says what there is to be allowed; [`token`] and [`local_key`] are secrets that stand for a role;
//! [`authority`] issues certificates and takes them back, [`certificate`] reads who a certificate is of; [`client`] opens
//! connections that show one or the other. The coordinator decides (`shanty_coordinator`'s `access`); nothing here does.

pub mod authority;
pub mod certificate;
pub mod client;
mod error;
pub mod files;
pub mod local_key;
pub mod role;
pub mod secret;
pub mod token;

pub use client::{Bearer, Channel, Credentials};
pub use error::{Error, Result};
pub use role::{Least, Role};
pub use secret::Secret;
pub use token::{NewToken, TokenId};
