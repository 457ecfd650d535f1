//! Object stores and the Hugging Face hub: URLs to bytes, models to folders.
//!
//! [`open_store`] makes a store of a URL (`s3://`, `gs://`, `az://`, `http://`, `https://`), with credentials from the
//! usual environment variables; [`Object`] reads one object in ranges, from plain threads, in bounded memory. [`hub`]
//! downloads models into the cache that Python's `huggingface_hub` uses.
//!
//! All of it goes through one HTTP client and one TLS provider (rustls with ring). The crate knows nothing of tensors,
//! rows or jobs.

mod client;
mod error;
pub mod hub;
mod object;
mod reader;
mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use crate::{
    error::Error,
    object::{Object, expand, expand_in, is_url},
    reader::Reader,
    store::{Environment, Location, open_store, open_store_in},
};
