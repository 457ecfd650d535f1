//! Faults on purpose: processes killed and stopped, links cut, disks filled, and the way back.
//!
//! `shanty chaos` strikes a running job with these, `cargo xtask chaos` a thousand times. Nothing here knows what a job
//! is: a target is a process id or a folder. A fault that lasts is a [`Blow`]: it is undone when it is healed or dropped.

mod chance;
mod disk;
mod error;
mod fault;
mod launch;
mod link;
pub mod process;

pub use chance::Chance;
pub use disk::fill;
pub use error::{Error, Result};
pub use fault::{Blow, Fault, kill, slow, stop};
pub use launch::Launch;
pub use link::{has_own_network, partition};
