//! The worker: its session with the coordinator, the supervisor of device processes, and the step loop.
//!
//! A host runs one process a device. The parent ([`supervisor`]) only spawns and kills. In each child
//! ([`run_worker`]) an async session talks to the coordinator while one thread trains:
//!
//! ```text
//! coordinator ── stream ── session ── commands ──> trainer ── collective ── the other workers
//!                             ^  └─── Control ───────┘ │
//!                             └────── reports ─────────┘
//! ```
//!
//! docs/concepts/step-protocol.md says what a step is and how none is lost; the trainer is the worker's half of it.

mod adapter_folder;
mod control;
mod device;
pub mod engine;
mod error;
mod facts;
pub mod failpoint;
pub mod logs;
mod plan;
pub mod row_log;
mod rows;
mod session;
#[cfg(all(test, feature = "simulation"))]
mod simulation;
pub mod supervisor;
mod trainer;

pub use device::{WorkerOptions, new_worker_id, run_worker, worker_id_of};
pub use error::Error;
