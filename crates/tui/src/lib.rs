//! The terminal view of jobs: `shanty top`.
//!
//! [`state`] is what is shown and what keys and news do to it, [`view`] draws it; both are pure. [`feed`] asks the
//! coordinator, [`terminal`] owns the terminal, and `run` brings the four together.

mod error;
pub mod feed;
pub mod format;
mod run;
pub mod state;
pub mod terminal;
pub mod view;
pub mod words;

pub use self::{
    error::Error,
    run::{Options, once, run},
};
