//! Everything numeric: quantisation, layers, models, adapters, losses, optimizers.

pub mod adapter;
pub mod error;
pub mod model;
pub mod optim;
pub mod quant;
pub mod random;

pub use error::{Error, Result};
