//! The coordinator: a pure machine for jobs and membership, a small store, and gRPC services.

mod error;
pub mod machine;
pub mod store;

pub use error::{Error, Result};
