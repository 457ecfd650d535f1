//! Where this process was launched, and how engines name its place: one reading of the environment for all of them.
//!
//! Ranks come from the coordinator, so the environment has to say three things alone: where the coordinator is, who this
//! process is among those of its launch, and which of the host's devices are its own. [`Surroundings::read`] takes the
//! first convention that is there, in the order of [`Engine::ALL`]:
//!
//! ```
//! use shanty_launch::{Engine, Surroundings};
//!
//! let slurm = [("SLURM_JOB_ID", "91"), ("SLURM_JOB_NODELIST", "gpu[07-09]"), ("SLURM_NODEID", "2"),
//!     ("SLURM_JOB_NUM_NODES", "3"), ("SLURM_PROCID", "2"), ("SLURM_NTASKS", "3"), ("SLURM_LOCALID", "0")];
//! let found = Surroundings::read(|name| slurm.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))?;
//! assert_eq!(found.engine, Some(Engine::Slurm));
//! assert_eq!(found.coordinator_host.as_deref(), Some("gpu07"));
//! assert_eq!((found.node, found.nodes), (Some(2), Some(3)));
//! # Ok::<(), shanty_launch::Error>(())
//! ```

mod cluster_file;
mod error;
mod host_list;
pub mod render;
mod surroundings;

pub use crate::{
    cluster_file::{ClusterFile, Host, Ssh, Worker},
    error::{Error, Result},
    host_list::hosts,
    surroundings::{Devices, Engine, Surroundings},
};
