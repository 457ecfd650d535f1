//! Everything numeric: quantisation, layers, models, adapters, losses, optimizers.
//!
//! [`Engine`] is where to start: it holds a frozen base and runs passes over rows with an adapter that the
//! caller owns as one flat buffer. Layers ([`nn`]) are written by hand, forward and backward, over a
//! [`backend::Backend`]; no pass allocates once the engine has run one.

pub mod adapter;
pub mod adapter_files;
pub mod backend;
pub mod batch;
pub mod bench;
pub mod engine;
pub mod error;
pub mod generate;
pub mod loss;
pub mod model;
pub mod nn;
pub mod optim;
pub mod plan;
pub mod quant;
pub mod random;
pub mod use_error;

pub use engine::{Engine, EngineDevice, EngineOptions, GradientSink, LossSum, NoSink, StepKey};
pub use error::{Error, Result};
pub use use_error::UseError;
