//! The coordinator: a pure machine for jobs and membership, a small store, and gRPC services.
//!
//! [`machine`] decides, and does nothing; `engine` tells it what happens and carries out what it wants, durable
//! things first; [`store`] is what outlives a crash; `services` turns wire messages into events and back.
//! [`access`] says who may ask; `listen` lets connections in. [`Coordinator`] puts all of it on a port.

pub mod access;
mod at_work;
mod engine;
mod error;
mod find;
mod hub;
mod leases;
mod listen;
pub mod machine;
pub mod outside;
pub mod prepare;
mod server;
mod services;
pub mod simulation;
pub mod store;

pub use error::{Error, Result};
pub use listen::TlsFiles;
pub use server::{Coordinator, Handle, LONGEST_ANSWER, LONGEST_MESSAGE, Options};
