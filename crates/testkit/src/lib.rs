//! What tests share: real processes of the built program, fixtures, and readers of what runs leave behind.
//!
//! Nothing here sleeps for a fixed time: [`wait::until`] waits for conditions, and says what it waited for.

pub mod adapter;
pub mod chaos;
pub mod cluster;
pub mod fixtures;
pub mod job;
pub mod process;
pub mod pty;
pub mod rows;
pub mod s3;
pub mod slurm;
pub mod ssh;
pub mod wait;

pub use cluster::LocalCluster;
pub use job::TinyJob;
pub use process::{Finished, Running, Shanty};
pub use slurm::Slurm;
pub use ssh::Sshd;
