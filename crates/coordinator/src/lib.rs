//! The coordinator: a pure machine for jobs and membership, a small store, and gRPC services.
//!
//! [`machine`] decides, and does nothing; `engine` tells it what happens and carries out what it wants, durable
//! things first; [`store`] is what outlives a crash; `services` turns wire messages into events and back.
//! [`Coordinator`] puts them on a port.

mod engine;
mod error;
mod find;
mod hub;
mod leases;
pub mod machine;
mod pages;
pub mod prepare;
mod server;
mod services;
pub mod store;

pub use error::{Error, Result};
pub use server::{Coordinator, Handle, LONGEST_MESSAGE, Options};
