//! Prometheus' page at `/metrics`, on the coordinator's port.
//!
//! [`table`] declares every metric; `recorder` counts what happens, `collect` looks up the rest when somebody asks, `text`
//! writes. [`Metered`] stands behind the door ([`Guard`](crate::access::guard::Guard)): it times calls, and answers the page.

mod collect;
mod layer;
mod recorder;
pub mod table;
mod text;

pub(crate) use self::{
    layer::{Meter, refused},
    recorder::Recorder,
};

/// Where the page is.
pub const PATH: &str = "/metrics";
