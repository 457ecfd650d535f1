//! The gRPC services, on one port.

mod access;
mod job;
mod status;
pub(crate) mod wire;
mod wire_crew;
mod wire_view;
mod worker;

pub(crate) use self::{access::Tokens, job::Jobs, status::Statuses, worker::Workers};

use crate::error::Error;

/// An error as a status.
pub(crate) fn refuse(error: Error) -> tonic::Status {
    shanty_proto::to_status(&error)
}
