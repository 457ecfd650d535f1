//! Data preparation from the outside: files in, rows out.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::single_range_in_vec_init, reason = "a list of trained ranges often holds one range")]

mod bad_input;
mod borrowed_forms;
mod chat;
mod forms;
mod helpers;
mod mixed;
mod parquet_files;
mod remote;
mod reuse;
mod tasks;
