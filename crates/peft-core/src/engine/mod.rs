//! The engine: a frozen base, a flat adapter, and the passes over them.
//!
//! An [`Engine`] holds the base and the memory of a step. Parameters, gradients and optimizer state belong to
//! the caller, as flat buffers of one [`ParameterLayout`]:
//! ```text
//! let mut engine = Engine::load(options, &mut |_| {})?;
//! let mut parameters = engine.initial_parameters(seed)?;
//! let sum = engine.forward_backward(&parameters, &rows, StepKey { seed, step: 1 }, &mut gradient, &mut NoSink)?;
//! // … reduce, scale by 1 / tokens, clip, AdamW …
//! ```

mod base_start;
mod error;
mod inspect;
mod load;
mod machine;
mod options;
mod passes;
mod prepared;
mod resident;
mod sharded;
mod start;

use std::ops::Range;

pub use error::StepError;
pub use load::Estimate;
pub(crate) use machine::{Machine, Parts};
pub use options::{EngineDevice, EngineOptions};
pub use resident::{FlatPart, Memory, SumSink};

use crate::{
    adapter::{Fit, Matched, ParameterLayout, SharedMethod},
    backend::{
        cpu::Spent,
        cuda::{Clock, Precision},
    },
    batch::PackedBatch,
    error::Result,
    model::{BaseSource, ModelConfig},
    plan::{MemoryPlan, PlanRequest, Sizes},
};

/// What random masks of a step are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepKey {
    /// The job's seed.
    pub seed: u64,
    /// The optimizer step, from 1.
    pub step: u64,
}

/// A summed loss and the number of tokens it is summed over.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSum {
    /// Sum of the cross-entropy of all trained tokens, nats.
    pub loss: f64,
    /// Trained tokens.
    pub tokens: u64,
}

impl LossSum {
    /// Loss per trained token; NaN where there is none.
    pub fn mean(&self) -> f64 {
        self.loss / self.tokens as f64
    }

    /// Adds another sum.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
    }
}

/// Hears when a part of the flat gradient is final for this micro-batch, so that its reduction may begin.
pub trait GradientSink: Send {
    /// `gradient` is the whole buffer; `range` of it will not change any more. Ranges come front to back.
    fn ready(&mut self, range: Range<usize>, gradient: &[f32]);
}

/// Does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSink;

impl GradientSink for NoSink {
    fn ready(&mut self, _range: Range<usize>, _gradient: &[f32]) {}
}

/// A base that any thread may use.
pub type SharedBase = Box<dyn BaseSource + Send + Sync>;

/// A frozen base, and passes over it with an adapter that the caller owns.
pub struct Engine {
    pub(crate) machine: Machine,
    pub(crate) config: ModelConfig,
    pub(crate) base: SharedBase,
    pub(crate) fit: Fit,
    /// What a network in front of the adapter's tensors makes, and the gradient of that.
    made: Made,
    request: PlanRequest,
    sizes: Sizes,
    plan: MemoryPlan,
    packed: PackedBatch,
    base_hash: Option<blake3::Hash>,
}

/// What a [`crate::adapter::Reparameterisation`] makes; empty where there is none.
#[derive(Debug, Default)]
struct Made {
    parameters: Vec<f32>,
    gradient: Vec<f32>,
}

/// What [`Engine::with_base`] is made of besides the base.
#[derive(Debug, Clone)]
pub struct EngineParts {
    /// What is trained; none runs the bare base.
    pub adapter: Option<SharedMethod>,
    /// What the memory plan is made for.
    pub request: PlanRequest,
}

impl Engine {
    /// An engine on the processor over a base that is already there.
    ///
    /// # Errors
    /// When its threads cannot be started.
    pub fn with_base(base: SharedBase, parts: EngineParts) -> Result<Self> {
        Self::with_base_on(EngineDevice::Cpu, base, parts)
    }

    /// As [`Engine::with_base`], on a device. The base must keep its numbers where they are in host memory.
    ///
    /// # Errors
    /// When threads cannot be started, the device cannot be used, the base does not fit it, or the adapter the base.
    pub fn with_base_on(device: EngineDevice, base: SharedBase, parts: EngineParts) -> Result<Self> {
        let machine = Machine::open(device, parts.request.threads)?;
        let fit = match parts.adapter {
            Some(method) => Fit::new(method, base.config())?,
            None => Fit::bare(),
        };
        Self::on(machine, base, fit, parts.request)
    }

    /// An engine over a base that is already there. The base must keep its numbers where they are.
    ///
    /// # Errors
    /// When the base does not fit the card's memory.
    fn on(machine: Machine, mut base: SharedBase, fit: Fit, request: PlanRequest) -> Result<Self> {
        let (embedding, head) = (base.embedding().place(), base.head().place());
        let embedding_bytes = if embedding.0 == head.0 { 0 } else { embedding.1 };
        let mut start = Planned::new(machine, base.config(), fit, request, embedding_bytes)?;
        start.machine.hold(&mut *base, start.plan.embedding_aside)?;
        Ok(start.over(base))
    }

    /// Takes on another method, or none ([`Fit::bare`]): the base stays where it is. The memory of a step is planned anew,
    /// and reserved by the next pass.
    ///
    /// `fit` must have been fitted to this engine's model.
    pub fn adapt(&mut self, fit: Fit) {
        self.machine.adapt(&fit, self.config.layers);
        self.request.dropout = fit.dropout() > 0.0;
        (self.plan, self.sizes) = plan_for(&self.config, &fit, &self.request);
        self.made = Made::room_for(&fit);
        self.fit = fit;
    }

    /// What the model is made of.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where each trained tensor lies in the flat buffers.
    pub fn layout(&self) -> &ParameterLayout {
        self.fit.trained()
    }

    /// The method, fitted to the model.
    pub fn fit(&self) -> &Fit {
        &self.fit
    }

    /// Rows that one [`Engine::forward_backward`] has room for.
    pub fn micro_batch_rows(&self) -> usize {
        self.plan.micro_batch_rows
    }

    /// Memory by part.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The modules that are adapted.
    pub fn matched(&self) -> &Matched {
        self.fit.matched()
    }

    /// Hash of the base as it was stored; none where the base was handed in by [`Engine::with_base`].
    pub fn base_hash(&self) -> Option<blake3::Hash> {
        self.base_hash
    }

    /// Where the time went since the last call, by kind of operation.
    pub fn take_profile(&self) -> Vec<Spent> {
        self.machine.take_profile()
    }

    /// Times every operation on the card from now on, or no longer; nothing on the processor, which always does.
    pub fn set_profiling(&self, on: bool) {
        if let Some(card) = self.machine.card() {
            card.set_profiling(on);
        }
    }

    /// Has the card do nothing for some time, so that the host gets ahead of it; nothing on the processor.
    pub fn hold_card(&self, seconds: f64) {
        if let Some(card) = self.machine.card() {
            card.hold_for(seconds);
        }
    }

    /// A place in what is queued on the card, whose time is taken when it is reached; none on the processor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn card_clock(&self) -> Result<Option<Clock>> {
        self.machine.card().map(crate::backend::cuda::Cuda::clock).transpose()
    }

    /// What took how long on the card since [`Engine::set_profiling`]: operation, seconds, calls, the longest first.
    ///
    /// # Errors
    /// What failed on the card before.
    pub fn card_profile(&self) -> Result<Vec<(String, f64, u64)>> {
        self.machine.card().map_or(Ok(Vec::new()), crate::backend::cuda::Cuda::take_profile)
    }

    /// Threads that work.
    pub fn threads(&self) -> usize {
        self.machine.threads()
    }

    /// The card that computes, and the most memory of it that was ever reserved; none on the processor.
    pub fn card(&self) -> Option<(&str, u64)> {
        self.machine.card().map(|card| (card.card(), card.peak_bytes()))
    }

    /// What passes run on, taken apart: the machine, its parts, what plans are made for, and the parameters as passes read
    /// them.
    pub(crate) fn take_apart<'a>(
        &'a mut self,
        parameters: Option<&'a [f32]>,
    ) -> Result<(&'a mut Machine, Parts<'a>, &'a PlanRequest, Option<&'a [f32]>)> {
        let Self { machine, config, base, fit, made, request, .. } = self;
        let parameters = made.parameters(fit, parameters, None)?;
        Ok((machine, Parts { config, base: &mut **base, layout: fit.layout() }, request, parameters))
    }
}

/// An engine but for its base: whatever can be decided, and found wanting, before anything is loaded.
struct Planned {
    machine: Machine,
    fit: Fit,
    request: PlanRequest,
    plan: MemoryPlan,
    sizes: Sizes,
}

impl Planned {
    /// Plans the memory of a step. `embedding_bytes` is what a card saves where the embedding stays with the host.
    ///
    /// # Errors
    /// When the card's memory is too small.
    fn new(
        mut machine: Machine,
        config: &ModelConfig,
        fit: Fit,
        mut request: PlanRequest,
        embedding_bytes: u64,
    ) -> Result<Self> {
        machine.adapt(&fit, config.layers);
        request.threads = machine.threads();
        request.dropout = fit.dropout() > 0.0;
        if let Some(card) = machine.card() {
            // All that is free, but for what the driver takes as it goes.
            let room = card.free_bytes() / 100 * 96;
            request.memory_limit = Some(request.memory_limit.map_or(room, |limit| limit.min(room)));
            request.accelerated = true;
            request.embedding_bytes = embedding_bytes;
            request.half_activations = card.precision() == Precision::Bf16;
        }
        let (plan, sizes) = plan_for(config, &fit, &request);
        if machine.card().is_some() {
            plan.check(request.memory_limit)?;
        }
        Ok(Self { machine, fit, request, plan, sizes })
    }

    /// The engine over its base.
    fn over(self, base: SharedBase) -> Engine {
        let Self { machine, fit, request, plan, sizes } = self;
        let config = base.config().clone();
        let packed = PackedBatch::with_capacity(plan.micro_batch_tokens);
        let made = Made::room_for(&fit);
        Engine { machine, config, base, fit, made, request, sizes, plan, packed, base_hash: None }
    }
}

/// The memory plan of a method on a model.
fn plan_for(config: &ModelConfig, fit: &Fit, request: &PlanRequest) -> (MemoryPlan, Sizes) {
    let sizes = |tokens| Sizes::of(config, fit, tokens, request.max_length, request);
    let plan = MemoryPlan::choose(sizes, request);
    (plan, sizes(plan.micro_batch_tokens))
}

impl Made {
    fn room_for(fit: &Fit) -> Self {
        match fit.network() {
            Some(_) => {
                let length = fit.layout().len();
                Self { parameters: vec![0.0; length], gradient: vec![0.0; length] }
            }
            None => Self::default(),
        }
    }

    /// The parameters as passes read them: what the network makes of the trained ones, where there is one.
    fn parameters<'a>(
        &'a mut self,
        fit: &Fit,
        trained: Option<&'a [f32]>,
        key: Option<StepKey>,
    ) -> Result<Option<&'a [f32]>> {
        match (fit.network(), trained) {
            (Some(network), Some(trained)) => {
                network.network.forward(trained, key, &mut self.parameters)?;
                Ok(Some(&self.parameters))
            }
            (_, trained) => Ok(trained),
        }
    }
}
