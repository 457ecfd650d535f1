//! Checkpoints: manifest, writer, reader, retention, over an object store.
//!
//! A checkpoint is a folder below the job's store:
//! ```text
//! checkpoints/00000050-a1-g3/        step 50, attempt 1, generation 3
//!     adapter_config.json            as Hugging Face PEFT writes it
//!     adapter_model.safetensors
//!     optimizer.safetensors          parameters, exp_avg, exp_avg_sq: flat f32
//!     manifest.json                  sizes and hashes of the others, and the state; written last
//! ```
//! The store is a folder, or a prefix of a bucket. Only a manifest makes a checkpoint exist. Its name is unique to (step, attempt, generation) and it is
//! created only if absent, so of two writers one wins and a reader never sees half of each. A folder
//! without a manifest is the leftover of a writer that died; retention removes it once it is old.
//!
//! Readers trust nothing: sizes and hashes are checked on the way in, and a damaged checkpoint is
//! reported and passed over for the one before ([`Store::newest_good`]).
//!
//! [`Store`] is async; [`Blocking`] is the same for a thread without a runtime.

mod blocking;
mod error;
mod manifest;
mod read;
mod retention;
mod snapshot;
mod store;
mod transfer;
mod write;

pub use crate::{
    blocking::Blocking,
    error::{Error, Result, Skipped},
    manifest::{Expectations, FORMAT, FileEntry, Key, Loss, Manifest, State},
    read::{Found, Verified},
    retention::{Candidate, Health, Keep, Removed, best, retain},
    snapshot::{Optimizer, Snapshot},
    store::{Listing, Store},
    write::{WritePoint, Written},
};
