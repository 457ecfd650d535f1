//! What the step loop needs of a numeric engine. peft-core has the real one; tests have a small one.

mod card;
mod host;
mod method;
mod peft;
mod virtual_tokens;

use std::{ops::Range, path::Path, sync::Arc};

use shanty_config::job::JobSpec;
use shanty_peft_core::{backend::cuda::CardFlat, optim::AdamWOptions};

use crate::Error;

use shanty_peft_core::model::{ShardPart, ShardedBase};

pub use shanty_peft_core::{
    GradientSink, NoSink,
    batch::{Row, Segment},
    engine::{FlatPart, Memory, SumSink},
};

pub(crate) use host::PIECE;
pub use host::{HostEngine, OnHost};
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

/// Which gradient an update takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Total {
    /// This member's own sum: it is alone.
    Own,
    /// What [`StepEngine::reduce`] made.
    Reduced,
}

/// An update of parameters and moments: depends on nothing but the bits that every member holds.
#[derive(Debug, Clone, Copy)]
pub struct StepUpdate<'a> {
    /// The step, from 1.
    pub step: u64,
    /// Steps of the job.
    pub total_steps: u64,
    /// Which gradient.
    pub total: Total,
    /// 1 / trained tokens of all members: gradients are sums.
    pub mean: f64,
    /// Longest mean gradient; 0 for no limit.
    pub max_norm: f64,
    /// AdamW's settings.
    pub adamw: &'a AdamWOptions,
    /// The learning rate.
    pub learning_rate: f64,
    /// Factors of it for parts of the parameters, in ascending order.
    pub rates: &'a [(Range<usize>, f64)],
}

/// What an update amounted to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Updated {
    /// Norm of the mean gradient before it was clipped.
    pub gradient_norm: f64,
}

/// Sums gradients over all members.
pub trait Reducer {
    /// Sums a piece of the gradient in host memory: `own` of every member into `sum`, the same bits everywhere.
    ///
    /// # Errors
    /// What broke the generation.
    fn reduce(&mut self, own: &[f32], sum: &mut [f32]) -> shanty_collective::Result<()>;

    /// Sums the whole gradient in the card's memory, after what is queued on its stream and before what will be; none
    /// where this reducer works in host memory.
    fn reduce_on_card(&mut self, _flat: &CardFlat) -> Option<shanty_collective::Result<()>> {
        None
    }
}

/// Why a reduction did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ReductionError {
    /// The members could not sum.
    #[error(transparent)]
    Collective(#[from] shanty_collective::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] Error),
}

/// Forward and backward over a frozen base, with a trained adapter whose parameters, moments and gradients live where the
/// engine computes: four flat vectors of one layout.
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

    /// The number of the card that it computes on.
    fn card(&self) -> Option<u32> {
        None
    }

    /// Takes parameters and AdamW's moments in place of those it has. The sum of gradients is 0.
    ///
    /// # Shapes
    /// All parts: `[flat_length]`.
    ///
    /// # Errors
    /// As the engine says.
    fn begin(&mut self, parts: [&[f32]; 3]) -> Result<(), Error>;

    /// Numbers of a part as they stand, from `start` on.
    ///
    /// # Errors
    /// Before [`Self::begin`], or as the engine says.
    fn read(&self, part: FlatPart, start: usize, into: &mut [f32]) -> Result<(), Error>;

    /// Sets this member's sum of gradients to 0 and forgets its losses.
    ///
    /// # Errors
    /// As the engine says.
    fn clear_sum(&mut self) -> Result<(), Error>;

    /// Adds the unscaled gradient of the summed loss of one micro-batch to this member's sum; returns its trained tokens.
    /// The work may only be queued. `sink` hears at least once of a part that is final for this micro-batch while
    /// another is not.
    ///
    /// # Shapes
    /// At most [`Self::micro_batch_rows`] rows.
    ///
    /// # Errors
    /// As the engine says; the sum is then unspecified.
    fn accumulate(
        &mut self,
        rows: &[Row],
        seed: u64,
        step: u64,
        sink: &mut dyn SumSink,
    ) -> Result<u64, Error>;

    /// The summed losses of the micro-batches accumulated since they were last asked for, in their order. Waits for them:
    /// then the sum is whole.
    ///
    /// # Errors
    /// What failed in them; the sum is then unspecified.
    fn losses(&mut self) -> Result<Vec<f64>, Error>;

    /// The summed loss of some rows, without dropout.
    ///
    /// # Errors
    /// As the engine says.
    fn evaluate(&mut self, rows: &[Row]) -> Result<Sum, Error>;

    /// Sums the gradient over all members, apart from this member's own sum, which stays whole.
    ///
    /// # Errors
    /// What broke the generation, or as the engine says. The sum over all members is then unspecified.
    fn reduce(&mut self, reducer: &mut dyn Reducer) -> Result<(), ReductionError>;

    /// Makes an optimizer's step. None, and nothing is changed, where the gradient is not finite. `method_state` is what
    /// [`StepHooks::after_step`] changes.
    ///
    /// # Errors
    /// As the engine says.
    fn update(&mut self, update: &StepUpdate<'_>, method_state: &mut [f32])
    -> Result<Option<Updated>, Error>;

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

    /// The same for a thread of its own, so that no step waits for it; none where only the engine's thread can.
    fn adapter_writer(&self) -> Option<AdapterWriter> {
        None
    }
}

/// The files of an adapter's folder, by name.
pub type AdapterFiles = Vec<(String, Vec<u8>)>;

/// [`StepEngine::adapter_files`] for another thread.
pub type AdapterWriter = Arc<dyn Fn(&[f32], &[f32]) -> Result<AdapterFiles, Error> + Send + Sync>;

/// A state was asked of an engine that holds none.
pub(crate) fn missing_state() -> Error {
    Error::Protocol { message: "Form", reason: "it gave this worker no state".to_owned() }
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
