//! The wire contract: generated types, typed ids, and errors that survive the wire.

pub mod error;
mod ids;

pub use error::{from_detail, from_status, to_detail, to_status};
pub use ids::{Attempt, Generation, InvalidId, JobId, Rank, Step, WorkerId};

/// Types and services of `proto/shanty/v1`, as generated.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod v1 {
    tonic::include_proto!("shanty.v1");

    /// The encoded descriptor set, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
