//! What the step loop needs of a numeric engine. peft-core has the real one; tests have a small one.

mod method;
mod peft;
mod virtual_tokens;

use std::{ops::Range, path::Path};

use shanty_config::job::JobSpec;

use crate::Error;

use shanty_peft_core::model::{ShardPart, ShardedBase};

pub use shanty_peft_core::batch::{Row, Segment};

pub use peft::{PeftEngines, engine_options, quantization};

/// Summed loss of some rows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sum {
    /// Summed loss over the trained tokens, nats.
    pub loss: f64,
    /// Trained tokens.
    pub tokens: u64,
}

/// What is said about a loaded engine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// Hash of the base as loaded and quantised.
    pub base_hash: String,
    /// Length of the flat parameter vector; there may be gaps between tensors.
    pub flat_length: usize,
    /// Parameters of the adapter.
    pub trainable_parameters: u64,
    /// Parameters of base and adapter together.
    pub total_parameters: u64,
    /// Modules that got an adapter.
    pub matched_modules: Vec<String>,
    /// Whether the start is computed with the base, so that its bits may depend on the device.
    pub computed_start: bool,
}

/// A step, as hooks see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepInfo {
    /// The step, from 1.
    pub step: u64,
    /// Steps of the job.
    pub total_steps: u64,
    /// The gradient of the mean loss is the reduced gradient times this.
    pub scale: f64,
}

/// What a method of adaptation does once a step, with what is the same on every rank. Must give the same bits on all.
pub trait StepHooks: Send {
    /// Numbers that the method carries from step to step besides the parameters, at their start.
    fn method_state(&self) -> Vec<f32> {
        Vec::new()
    }

    /// Factors of the learning rate for parts of the flat vector, in ascending order; `peak` is the job's.
    fn rates(&self, _peak: f64) -> Vec<(Range<usize>, f64)> {
        Vec::new()
    }

    /// Adds terms of the loss that depend on the parameters alone to the reduced gradient, ahead of clipping.
    fn regularise(&self, _step: StepInfo, _parameters: &[f32], _gradient: &mut [f32]) {}

    /// Follows the optimizer's update; `scale` of `step` includes clipping.
    fn after_step(&self, _step: StepInfo, _parameters: &mut [f32], _gradient: &[f32], _state: &mut [f32]) {}
}

impl StepHooks for () {}

/// Forward and backward over a frozen base with a trained adapter. The adapter's parameters are one flat vector
/// that the caller owns.
pub trait StepEngine: StepHooks {
    /// What was loaded.
    fn facts(&self) -> &Facts;

    /// The adapter's parameters before the first step: a pure function of job and seed.
    ///
    /// # Errors
    /// As the engine says.
    fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>, Error>;

    /// The most rows of one micro-batch.
    fn micro_batch_rows(&self) -> usize;

    /// Adds the unscaled gradient of the summed loss of one micro-batch to `gradient`. `during` is called at least
    /// once while part of the gradient is computed and part is not.
    ///
    /// # Shapes
    /// `parameters`, `gradient`: `[flat_length]`; at most [`Self::micro_batch_rows`] rows.
    ///
    /// # Errors
    /// As the engine says; `gradient` is then unspecified.
    fn forward_backward(
        &mut self,
        parameters: &[f32],
        rows: &[Row],
        seed: u64,
        step: u64,
        gradient: &mut [f32],
        during: &mut (dyn FnMut() + Send),
    ) -> Result<Sum, Error>;

    /// The summed loss of some rows, without dropout.
    ///
    /// # Errors
    /// As the engine says.
    fn evaluate(&mut self, parameters: &[f32], rows: &[Row]) -> Result<Sum, Error>;

    /// The base, where this worker holds but a part of it.
    fn shared_base(&mut self) -> Option<&mut ShardedBase> {
        None
    }

    /// Takes note of the hash of a base that its members agreed on.
    fn agree_on_base(&mut self, _hash: blake3::Hash) {}

    /// Whether [`Self::initial_parameters`] reads layers of the base: where that is shared, its members must make them together.
    fn start_reads_base(&self) -> bool {
        false
    }

    /// Gathers the layers of a micro-batch of which only others, who share the base, have rows.
    ///
    /// # Errors
    /// As the engine says.
    fn keep_company(&mut self, _training: bool) -> Result<(), Error> {
        Ok(())
    }

    /// The files of a finished adapter's folder, as PEFT lays them out: name and content. `state` is what
    /// [`StepHooks::after_step`] made of [`StepHooks::method_state`].
    ///
    /// # Errors
    /// As the engine says.
    fn adapter_files(&self, parameters: &[f32], state: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error>;
}

/// What an engine is to be loaded for.
#[derive(Debug)]
pub struct LoadRequest<'a> {
    /// The job.
    pub spec: &'a JobSpec,
    /// Threads that it may use.
    pub threads: usize,
    /// The worker's device: `cpu`, `cuda:0`, …
    pub device: &'a str,
    /// Bytes that a step may take; half of what is free when none.
    pub memory_limit_bytes: Option<u64>,
    /// Steps of the job.
    pub steps: u64,
    /// The folder of the run.
    pub store: &'a Path,
    /// The part of the base that this worker is to hold, where several share one.
    pub part: Option<ShardPart>,
}

/// Loads engines.
pub trait EngineLoader: Send {
    /// Loads base and adapter; `progress` gets the share that is done, 0 to 1.
    ///
    /// # Errors
    /// As the engine says.
    fn load(
        &self,
        request: LoadRequest<'_>,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Box<dyn StepEngine>, Error>;
}
