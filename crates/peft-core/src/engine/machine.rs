//! What an engine computes with: a backend and the memory of a step, on the processor or on a card.

use super::{EngineDevice, GradientSink, StepError};
use crate::{
    adapter::{AnyMethod, Branches, Fit, MethodOn, ParameterLayout, PassDropout},
    backend::{
        Backend, View,
        cpu::{Cpu, Spent},
        cuda::Cuda,
    },
    batch::PackedBatch,
    error::{Error, Result},
    model::{
        BaseSource, ModelConfig,
        decoder::{Decoder, accompany},
        trained::Trained,
    },
    nn::rope::RopeTable,
    optim::{FlatState, FlatUpdate, Outcome},
    plan::{Arena, Levels, Sizes},
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
        let Self { backend, branches, memory, parameters: place, gradient: gradient_place, staging, .. } =
            self;
        let Parts { config, base, layout } = parts;
        let Pass { packed, sizes, levels, parameters, dropout, training, each } = pass;
        let StepMemory { arena, rope } = StepMemory::of(memory, backend, config, sizes, levels)?;
        let backend = &*backend;
        backend.load_batch(packed, &mut arena.batch);
        let parameters = match parameters {
            Some(parameters) => Some(backend.lend(parameters, place)?),
            None => None,
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
    fn begin(&mut self, parts: [&[f32]; 3]) -> Result<()> {
        let [parameters, first, second] = parts;
        // What the other way of training reserved is given back first.
        (self.parameters, self.gradient, self.state) = (None, None, None);
        self.staging = Vec::new();
        let mut state = FlatState::new(&self.backend, parameters.len())?;
        self.backend.upload(parameters, &mut state.parameters);
        self.backend.upload(first, &mut state.first);
        self.backend.upload(second, &mut state.second);
        self.state = Some(state);
        self.backend.settle()
    }

    /// Adds a micro-batch's gradient and losses to the state. Only queues the work, where the backend has a queue.
    fn accumulate(&mut self, parts: Parts<'_>, pass: Pass<'_>) -> Result<()> {
        let Self { backend, branches, memory, state, .. } = self;
        let Parts { config, base, layout } = parts;
        let Pass { packed, sizes, levels, dropout, .. } = pass;
        let state = state.as_mut().ok_or(StepError::NoState)?;
        let StepMemory { arena, rope } = StepMemory::of(memory, backend, config, sizes, levels)?;
        let backend = &*backend;
        backend.load_batch(packed, &mut arena.batch);
        let (tokens, keys, predicting) = (packed.tokens(), packed.keys(), packed.predicting.len());
        if predicting == 0 {
            return accompany(base, config.layers, Some(layout));
        }
        let parameters = Some(&*state.parameters);
        let trained = Trained { parameters, layout, branches, dropout, begins: true };
        let gradient = &mut state.gradient;
        let mut decoder =
            Decoder { backend, config, base, trained, rope, arena, tokens, keys, predicting, training: true };
        backend.run(|| {
            decoder.forward()?;
            decoder.loss(Some(&mut *gradient));
            decoder.backward(gradient, &mut |_, _| {})
        })?;
        backend.add_losses(View::<B>::new(&arena.head.losses, predicting, 1), state);
        Ok(())
    }

    fn update(&mut self, update: &FlatUpdate<'_>) -> Result<Outcome> {
        let state = self.state.as_mut().ok_or(StepError::NoState)?;
        self.backend.update_flat(update, state);
        self.backend.outcome(state)
    }

    fn read_state(&self) -> Result<[Vec<f32>; 3]> {
        let state = self.state.as_ref().ok_or(StepError::NoState)?;
        let parts = [&state.parameters, &state.first, &state.second].map(|buffer| {
            let mut numbers = vec![0.0; state.length];
            self.backend.download(View::<B>::new(buffer, 1, state.length), &mut numbers);
            numbers
        });
        self.backend.settle()?;
        Ok(parts)
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

    pub(crate) fn begin(&mut self, parts: [&[f32]; 3]) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.begin(parts),
            Self::Cuda(worker) => worker.begin(parts),
        }
    }

    pub(crate) fn accumulate(&mut self, parts: Parts<'_>, pass: Pass<'_>) -> Result<()> {
        match self {
            Self::Cpu(worker) => worker.accumulate(parts, pass),
            Self::Cuda(worker) => worker.accumulate(parts, pass),
        }
    }

    pub(crate) fn update(&mut self, update: &FlatUpdate<'_>) -> Result<Outcome> {
        match self {
            Self::Cpu(worker) => worker.update(update),
            Self::Cuda(worker) => worker.update(update),
        }
    }

    pub(crate) fn read_state(&self) -> Result<[Vec<f32>; 3]> {
        match self {
            Self::Cpu(worker) => worker.read_state(),
            Self::Cuda(worker) => worker.read_state(),
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
