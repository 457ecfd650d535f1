//! Job, coordinator and worker files: layers, checks, and answers with file, line, caret and hint.
//!
//! - [`job`] declares what a job file may say, [`service`] what the services' files may say. The declarations know
//!   their own keys, types and texts ([`shape`]); checks, suggestions and reference pages come from there.
//! - [`load_job`], [`load_coordinator`] and [`load_worker`] lay default, file, environment and flags over each other and
//!   say of each wrong value where it came from. [`Loaded::locate`] says so for errors found elsewhere.
//! - [`render`] shows any [`Diagnostic`](shanty_diagnostic::Diagnostic), with its line and a caret.
//!
//! This crate knows nothing of tensors, tokens or networks.

pub mod env_vars;
pub mod job;
pub mod reference;
pub mod render;
pub mod service;
pub mod shape;
pub mod validate;
mod validate_adapter;

mod check;
mod document;
mod error;
mod files;
mod json;
mod layers;
mod load;
mod loaded;
mod methods;
mod paths;
mod place;
mod read;
mod suggest;
mod usual_loss;

pub use error::{Error, Errors};
pub use job::JobSpec;
pub use json::{from_json, to_json};
pub use layers::parse_override;
pub use load::{JOB_PREFIX, check_files, load_job, load_job_with};
pub use loaded::Loaded;
pub use paths::{HUB, model_reference};
pub use place::{Place, Position};
pub use service::{CoordinatorFile, WorkerFile, load_coordinator, load_worker};
pub use usual_loss::UsualLoss;
