//! The wire contract: generated types, typed ids, and errors that survive the wire.

/// Types and services of `proto/shanty/v1`, as generated.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("shanty.v1");

    /// The encoded descriptor set, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
