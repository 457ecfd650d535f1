//! Data preparation from the outside: files in, rows out.

mod bad_input;
mod chat;
mod forms;
mod helpers;
mod parquet_files;
mod reuse;
mod tasks;
