//! What an engine computes with: a backend and the memory of a step, on the processor or on a card.

use super::{EngineDevice, GradientSink};
use crate::{
    adapter::{AnyMethod, Branches, Fit, MethodOn, ParameterLayout, PassDropout},
    backend::{
        Backend,
        cpu::{Cpu, Spent},
        cuda::Cuda,
    },
    batch::PackedBatch,
    error::{Error, Result},
    model::{
        BaseSource, ModelConfig,
        decoder::{Decoder, Trained},
    },
    nn::rope::RopeTable,
    plan::{Arena, Recompute, Sizes},
};

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
    pub(crate) recompute: Recompute,
    pub(crate) parameters: Option<&'a [f32]>,
    pub(crate) dropout: Option<PassDropout>,
    pub(crate) training: Option<(&'a mut [f32], &'a mut dyn GradientSink)>,
}

impl<B: Backend> Worker<B> {
    fn new(backend: B) -> Self {
        let branches = Branches::default();
        Self { backend, branches, memory: None, parameters: None, gradient: None, staging: Vec::new() }
    }

    /// Takes on a method; what was reserved for another is given back.
    fn adapt(&mut self, fit: &Fit, layers: usize)
    where
        dyn AnyMethod: MethodOn<B>,
    {
        self.branches = fit.branches(layers);
        (self.memory, self.parameters, self.gradient) = (None, None, None);
    }

    /// The backend, the method's branches, and the flat parameters where the backend can read them.
    pub(crate) fn lend<'a>(
        &'a mut self,
        parameters: Option<&'a [f32]>,
    ) -> Result<(&'a B, &'a Branches<B>, Option<&'a B::Buffer>)> {
        let Self { backend, branches, parameters: place, .. } = self;
        let parameters = match parameters {
            Some(parameters) => Some(backend.lend(parameters, place)?),
            None => None,
        };
        Ok((backend, branches, parameters))
    }

    /// Runs a micro-batch: the summed loss.
    fn pass(&mut self, parts: Parts<'_>, pass: Pass<'_>) -> Result<f64> {
        let Self { backend, branches, memory, parameters: place, gradient: gradient_place, staging } = self;
        let Parts { config, base, layout } = parts;
        let Pass { packed, sizes, recompute, parameters, dropout, training } = pass;
        let StepMemory { arena, rope } = match memory {
            Some(memory) => memory,
            None => memory.insert(StepMemory {
                arena: Arena::new(backend, sizes, recompute)?,
                rope: RopeTable::new(backend, config, sizes.max_length)?,
            }),
        };
        let backend = &*backend;
        backend.load_batch(packed, &mut arena.batch);
        let parameters = match parameters {
            Some(parameters) => Some(backend.lend(parameters, place)?),
            None => None,
        };
        let (tokens, predicting) = (packed.tokens(), packed.predicting.len());
        let trained = Trained { parameters, layout, branches, dropout };
        let mut decoder = Decoder { backend, config, base, trained, rope, arena, tokens, predicting };
        let loss = backend.run(|| {
            if predicting == 0 {
                if let Some((gradient, sink)) = training {
                    sink.ready(0..gradient.len(), gradient);
                }
                return Ok(0.0);
            }
            decoder.forward()?;
            decoder.loss(training.is_some());
            if let Some((gradient, sink)) = training {
                backend.with_gradient(gradient, gradient_place, staging, sink, |flat, ready| {
                    decoder.backward(flat, ready)
                })?;
            }
            Ok::<_, Error>(decoder.sum())
        })?;
        backend.settle()?;
        Ok(loss)
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
    pub(crate) fn hold(&mut self, base: &mut (dyn BaseSource + Send + Sync)) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(worker) => worker.backend.hold(base),
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
