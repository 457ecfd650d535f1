//! Losses.

pub mod head;
