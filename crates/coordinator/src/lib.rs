//! The coordinator: a pure machine for jobs and membership, a small store, and gRPC services.
