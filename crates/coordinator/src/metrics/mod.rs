//! Prometheus' page at `/metrics`, on the coordinator's port.
//!
//! [`table`] declares every metric; `recorder` counts what happens, `collect` looks up the rest when somebody asks, `text`
//! writes. `Meter` times calls behind the door (`Guard`); `Scraped` answers the page, in front of
//! what speaks gRPC alone, and asks for the same rights.

mod collect;
mod layer;
mod recorder;
pub mod table;
mod text;

pub(crate) use self::{
    layer::{Meter, Scraped},
    recorder::Recorder,
};

/// Where the page is.
pub const PATH: &str = "/metrics";
