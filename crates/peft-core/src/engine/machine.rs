//! What an engine computes with: a backend and the memory of a step, on the processor or on a card.

use std::ops::Range;

use super::{EngineDevice, FlatPart, GradientSink, Memory, SharedBase, StepError, SumSink};
use crate::{
    adapter::{AnyMethod, Branches, Fit, MethodOn, ParameterLayout, PassDropout},
    backend::{
        Backend, View, ViewMut,
        cpu::{Cpu, Spent},
        cuda::{CardFlat, Cuda},
    },
    batch::PackedBatch,
    error::{Error, Result},
    model::{
        BaseSource, LoadProgress, ModelConfig, ResidentBase,
        decoder::{Decoder, accompany},
        resident::plan::BasePlan,
        trained::Trained,
    },
    nn::rope::RopeTable,
    optim::{FlatState, FlatUpdate, Outcome, Source, SumPiece},
    plan::{Arena, Levels, MemoryPlan, Sizes, WORKSPACE},
};

/// A backend, the method's branches, and the flat parameters where the backend can read them.
pub(crate) type Lent<'a, B> = (&'a B, &'a Branches<B>, Option<&'a <B as Backend>::Buffer>);

/// A backend and what passes over it work in.
pub(crate) struct Worker<B: Backend> {
    backend: B,
    /// What the method does beside each module.
    branches: Branches<B>,
    /// Reserved at the first step: generating alone does not need it.
    memory: Option<StepMemory<B>>,
    /// The flat parameters and their gradient where the backend can read them, where it cannot read the caller's.
    parameters: Option<B::Owned>,
    gradient: Option<B::Owned>,
    staging: Vec<f32>,
    /// What is trained, where it stays with the backend from step to step.
    state: Option<FlatState<B>>,
}

/// What a step works in.
struct StepMemory<B: Backend> {
    arena: Arena<B>,
    rope: RopeTable<B>,
}

/// What a pass runs on.
pub(crate) struct Parts<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) base: &'a mut (dyn BaseSource + Send + Sync),
    pub(crate) layout: &'a ParameterLayout,
}

/// A micro-batch, and what is wanted of it.
pub(crate) struct Pass<'a> {
    pub(crate) packed: &'a PackedBatch,
    pub(crate) sizes: &'a Sizes,
    pub(crate) levels: Levels,
    pub(crate) parameters: Option<&'a [f32]>,
    pub(crate) dropout: Option<PassDropout>,
    pub(crate) training: Option<(&'a mut [f32], &'a mut dyn GradientSink)>,
    /// Where the loss of each trained token goes, where that is wanted and no gradient is.
    pub(crate) each: Option<&'a mut Vec<f32>>,
    /// Whether the parameters are those that stay with the backend.
    pub(crate) resident: bool,
}

impl<B: Backend> Worker<B> {
    fn new(backend: B) -> Self {
        let branches = Branches::default();
        let (memory, parameters, gradient, state) = (None, None, None, None);
        Self { backend, branches, memory, parameters, gradient, staging: Vec::new(), state }
    }

    /// Takes on a method; what was reserved for another is given back.
    fn adapt(&mut self, fit: &Fit, layers: usize)
    where
        dyn AnyMethod: MethodOn<B>,
    {
        self.branches = fit.branches(layers);
        (self.memory, self.parameters, self.gradient, self.state) = (None, None, None, None);
    }

    /// The backend, the method's branches, and the flat parameters where the backend can read them.
    pub(crate) fn lend<'a>(&'a mut self, parameters: Option<&'a [f32]>) -> Result<Lent<'a, B>> {
        let Self { backend, branches, parameters: place, .. } = self;
        let parameters = match parameters {
            Some(parameters) => Some(backend.lend(parameters, place)?),
            None => None,
        };
        Ok((backend, branches, parameters))
    }

    /// Runs a micro-batch: the summed loss.
    fn pass(&mut self, parts: Parts<'_>, pass: Pass<'_>) -> Result<f64> {
        let Self { backend, branches, memory, parameters: place, gradient: gradient_place, staging, state } =
            self;
        let Parts { config, base, layout } = parts;
        let Pass { packed, sizes, levels, parameters, dropout, training, each, resident } = pass;
        let StepMemory { arena, rope } = StepMemory::of(memory, backend, config, sizes, levels)?;
        let backend = &*backend;
        backend.load_batch(packed, &mut arena.batch);
        let parameters = match (parameters, &*state) {
            (_, Some(state)) if resident => Some(&*state.parameters),
            (Some(parameters), _) => Some(backend.lend(parameters, place)?),
            (None, _) => None,
        };
        let (tokens, keys, predicting) = (packed.tokens(), packed.keys(), packed.predicting.len());
        let trained = Trained { parameters, layout, branches, dropout, begins: true };
        let learning = training.is_some();
        let mut decoder = Decoder {
            backend,
            config,
            base,
            trained,
            rope,
            arena,
            tokens,
            keys,
            predicting,
            training: learning,
        };
        let loss = backend.run(|| {
            if predicting == 0 {
                accompany(&mut *decoder.base, config.layers, learning.then_some(layout))?;
                if let Some((gradient, sink)) = training {
                    sink.ready(0..gradient.len(), gradient);
                }
                return Ok(0.0);
            }
            decoder.forward()?;
            if let Some(each) = each {
                each.resize(predicting, 0.0);
                decoder.losses(each);
                return Ok(each.iter().map(|loss| f64::from(*loss)).sum());
            }
            match training {
                None => decoder.loss(None),
                Some((gradient, sink)) => {
                    backend.with_gradient(gradient, gradient_place, staging, sink, |flat, ready| {
                        decoder.loss(Some(&mut *flat));
                        decoder.backward(flat, ready)
                    })?;
                }
            }
            Ok::<_, Error>(decoder.sum())
        })?;
        backend.settle()?;
        Ok(loss)
    }

    /// Takes parameters and moments to stay; the gradient is 0.
    fn begin(&mut self, parts: [&[f32]; 3], reduced_apart: bool) -> Result<()> {
        let [parameters, first, second] = parts;
        // What the other way of training reserved is given back first.
        (self.parameters, self.gradient) = (None, None);
        self.staging = Vec::new();
        if self.state.as_ref().is_none_or(|state| state.length != parameters.len()) {
            self.state = None;
            self.state = Some(FlatState::new(&self.backend, parameters.len())?);
        }
        self.clear_sum()?;
        let state = self.state.as_mut().ok_or(StepError::NoState)?;
        if reduced_apart {
            state.reserve_reduced(&self.backend)?;
        }
        self.backend.upload(parameters, &mut state.parameters);
        self.backend.upload(first, &mut state.first);
        self.backend.upload(second, &mut state.second);
        self.backend.settle()
    }

    /// Sets the sum of gradients to 0 and forgets its losses.
    fn clear_sum(&mut self) -> Result<()> {
        let Some(state) = &mut self.state else { return Ok(()) };
        if state.touched {
            state.touched = false;
            let length = state.length;
            self.backend.fill(0.0, ViewMut::<B>::new(&mut state.gradient, 1, length));
            self.backend.losses(state)?;
        }
        Ok(())
    }

    fn losses(&mut self) -> Result<Vec<f64>> {
        self.backend.losses(self.state.as_mut().ok_or(StepError::NoState)?)
    }

    /// Adds a micro-batch's gradient and losses to the state. Only queues the work, where the backend has a queue.
    /// `ready` hears of every range of the sum that this micro-batch changes no more.
    fn accumulate(
        &mut self,
        parts: Parts<'_>,
        pass: Pass<'_>,
        ready: &mut (dyn FnMut(Range<usize>, &B::Buffer) + Send),
    ) -> Result<()> {
        let Self { backend, branches, memory, state, .. } = self;
        let Parts { config, base, layout } = parts;
        let Pass { packed, sizes, levels, dropout, .. } = pass;
        let state = state.as_mut().ok_or(StepError::NoState)?;
        let StepMemory { arena, rope } = StepMemory::of(memory, backend, config, sizes, levels)?;
        let backend = &*backend;
        backend.load_batch(packed, &mut arena.batch);
        let (tokens, keys, predicting) = (packed.tokens(), packed.keys(), packed.predicting.len());
        state.touched = true;
        if predicting == 0 {
            accompany(base, config.layers, Some(layout))?;
            ready(0..state.length, &state.gradient);
            backend.add_losses(View::<B>::new(&arena.head.losses, 0, 1), state);
            return Ok(());
        }
        let parameters = Some(&*state.parameters);
        let trained = Trained { parameters, layout, branches, dropout, begins: true };
        let gradient = &mut state.gradient;
        let mut decoder =
            Decoder { backend, config, base, trained, rope, arena, tokens, keys, predicting, training: true };
        backend.run(|| {
            decoder.forward()?;
            decoder.loss(Some(&mut *gradient));
            decoder.backward(gradient, ready)
        })?;
        backend.add_losses(View::<B>::new(&arena.head.losses, predicting, 1), state);
        Ok(())
    }

    /// What the last pass left where layers' inputs lie.
    pub(super) fn boundary(&self, place: usize, tokens: usize, hidden: usize) -> Result<Vec<f32>> {
        let memory = self.memory.as_ref().ok_or(StepError::NoState)?;
        let mut numbers = vec![0.0; tokens * hidden];
        self.backend.download(View::<B>::new(&memory.arena.inputs[place], tokens, hidden), &mut numbers);
        self.backend.settle()?;
        Ok(numbers)
    }

    fn update(&mut self, update: &FlatUpdate<'_>) -> Result<Outcome> {
        let state = self.state.as_mut().ok_or(StepError::NoState)?;
        self.backend.update_flat(update, state);
        let outcome = self.backend.outcome(state)?;
        if outcome.norm.is_finite() && update.source == Source::Own {
            state.touched = false;
        }
        Ok(outcome)
    }

    /// Numbers of a part from `start` on.
    fn read(&self, part: FlatPart, start: usize, into: &mut [f32]) -> Result<()> {
        let state = self.state.as_ref().ok_or(StepError::NoState)?;
        let buffer = match part {
            FlatPart::Parameters => &state.parameters,
            FlatPart::FirstMoment => &state.first,
            FlatPart::SecondMoment => &state.second,
            FlatPart::Gradient => &state.gradient,
        };
        if start + into.len() > state.length {
            let (found, expected) = (start + into.len(), state.length);
            return Err(StepError::FlatLength { found, expected }.into());
        }
        self.backend.download(View::<B>::at(buffer, start, 1, into.len()), into);
        self.backend.settle()
    }
}

impl Worker<Cuda> {
    /// The gradient and the place of its sum over members, as addresses. The place is reserved if `reserve` is set.
    fn flat(&mut self, reserve: bool) -> Result<CardFlat> {
        let state = self.state.as_mut().ok_or(StepError::NoState)?;
        if reserve {
            state.reserve_reduced(&self.backend)?;
        }
        Ok(self.backend.flat(state))
    }
}

impl<B: Backend> StepMemory<B> {
    /// Reserved at first.
    fn of<'a>(
        place: &'a mut Option<Self>,
        backend: &B,
        config: &ModelConfig,
        sizes: &Sizes,
        levels: Levels,
    ) -> Result<&'a mut Self> {
        Ok(match place {
            Some(memory) => memory,
            None => place.insert(Self {
                arena: Arena::new(backend, sizes, levels)?,
                rope: RopeTable::new(backend, config, sizes.max_length)?,
            }),
        })
    }
}

/// The processor or a card.
pub(crate) enum Machine {
    Cpu(Box<Worker<Cpu>>),
    Cuda(Box<Worker<Cuda>>),
}

impl Machine {
    /// A machine with nothing on it.
    pub(crate) fn open(device: EngineDevice, threads: usize) -> Result<Self> {
        Ok(match device {
            EngineDevice::Cpu => Self::Cpu(Box::new(Worker::new(Cpu::new(threads)?))),
            EngineDevice::Cuda { index, precision } => {
                Self::Cuda(Box::new(Worker::new(Cuda::new(index, precision)?)))
            }
        })
    }

    /// Puts a base where passes read it. It must not move as long as this machine works on it.
    /// `embedding_stays` keeps the embedding in host memory beside a card.
    pub(crate) fn hold(
        &mut self,
        base: &mut (dyn BaseSource + Send + Sync),
        embedding_stays: bool,
    ) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(worker) => worker.backend.hold(base, embedding_stays),
        }
    }

    /// Loads a base to where passes read it, and what it is hashed to. Until a step's memory is reserved, loading may work in
    /// what `plan` has for it.
    pub(crate) fn load(
        &mut self,
        config: &ModelConfig,
        tensors: &BasePlan<'_>,
        plan: &MemoryPlan,
        threads: usize,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(SharedBase, blake3::Hash)> {
        Ok(match self {
            Self::Cpu(_) => {
                let base = ResidentBase::read(config, tensors, progress)?;
                let hash = base.content_hash();
                (Box::new(base), hash)
            }
            Self::Cuda(worker) => {
                let cuda = &mut worker.backend;
                // What products work in is reserved already.
                let room = (plan.peak_bytes() - plan.base_bytes).saturating_sub(WORKSPACE as u64);
                let stays = plan.embedding_aside;
                let (base, hash) = cuda.load_base(config, tensors, stays, threads, room, progress)?;
                (Box::new(base), hash)
            }
        })
    }

    /// Waits for what was queued, and says what failed.
    pub(crate) fn settle(&self) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.backend.settle(),
            Self::Cuda(worker) => worker.backend.settle(),
        }
    }

    /// Takes on a method.
    pub(crate) fn adapt(&mut self, fit: &Fit, layers: usize) {
        match self {
            Self::Cpu(worker) => worker.adapt(fit, layers),
            Self::Cuda(worker) => worker.adapt(fit, layers),
        }
    }

    pub(crate) fn pass(&mut self, parts: Parts<'_>, pass: Pass<'_>) -> Result<f64> {
        match self {
            Self::Cpu(worker) => worker.pass(parts, pass),
            Self::Cuda(worker) => worker.pass(parts, pass),
        }
    }

    pub(crate) fn begin(&mut self, parts: [&[f32]; 3], reduced_apart: bool) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.begin(parts, reduced_apart),
            Self::Cuda(worker) => worker.begin(parts, reduced_apart),
        }
    }

    pub(crate) fn accumulate(
        &mut self,
        parts: Parts<'_>,
        pass: Pass<'_>,
        sink: &mut dyn SumSink,
    ) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.accumulate(parts, pass, &mut |range, gradient| {
                sink.ready(range, Memory::Host(gradient));
            }),
            Self::Cuda(worker) => {
                let flat = worker.flat(false)?;
                worker.accumulate(parts, pass, &mut |range, _| sink.ready(range, Memory::Card(&flat)))
            }
        }
    }

    pub(crate) fn clear_sum(&mut self) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.clear_sum(),
            Self::Cuda(worker) => worker.clear_sum(),
        }
    }

    pub(crate) fn losses(&mut self) -> Result<Vec<f64>> {
        match self {
            Self::Cpu(worker) => worker.losses(),
            Self::Cuda(worker) => worker.losses(),
        }
    }

    /// Has `work` sum the gradient over members, piece by piece of at most `length` numbers: from the first slice into the
    /// second, in host memory.
    pub(crate) fn reduce<E>(
        &mut self,
        length: usize,
        work: &mut SumPiece<'_, E>,
    ) -> Result<std::result::Result<(), E>> {
        match self {
            Self::Cpu(worker) => {
                let Worker { backend, state, .. } = &mut **worker;
                let state = state.as_mut().ok_or(StepError::NoState)?;
                state.reserve_reduced(backend)?;
                let FlatState { gradient, reduced: Some(reduced), .. } = state else {
                    return Err(StepError::NoState.into());
                };
                for (own, sum) in gradient.chunks(length).zip(reduced.chunks_mut(length)) {
                    if let Err(error) = work(own, sum) {
                        return Ok(Err(error));
                    }
                }
                Ok(Ok(()))
            }
            Self::Cuda(worker) => {
                let flat = worker.flat(true)?;
                worker.backend.reduce_through_host(&flat, length, work)
            }
        }
    }

    /// The gradient and the place of its sum over members in a card's memory; none on the processor.
    pub(crate) fn flat(&mut self) -> Result<Option<CardFlat>> {
        match self {
            Self::Cpu(_) => Ok(None),
            Self::Cuda(worker) => worker.flat(true).map(Some),
        }
    }

    /// Runs `work` where operations on the processor run.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Self::Cpu(worker) => worker.backend.run(work),
            Self::Cuda(_) => work(),
        }
    }

    pub(crate) fn update(&mut self, update: &FlatUpdate<'_>) -> Result<Outcome> {
        match self {
            Self::Cpu(worker) => worker.update(update),
            Self::Cuda(worker) => worker.update(update),
        }
    }

    pub(crate) fn read(&self, part: FlatPart, start: usize, into: &mut [f32]) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.read(part, start, into),
            Self::Cuda(worker) => worker.read(part, start, into),
        }
    }

    pub(crate) fn threads(&self) -> usize {
        match self {
            Self::Cpu(worker) => worker.backend.threads(),
            Self::Cuda(_) => 1,
        }
    }

    pub(crate) fn take_profile(&self) -> Vec<Spent> {
        match self {
            Self::Cpu(worker) => worker.backend.take_profile(),
            Self::Cuda(_) => Vec::new(),
        }
    }

    /// The card, where there is one.
    pub(crate) fn card(&self) -> Option<&Cuda> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(worker) => Some(&worker.backend),
        }
    }
}
