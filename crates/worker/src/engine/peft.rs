//! The real engine, of peft-core.

use std::{ops::Range, path::Path, sync::Arc};

use shanty_config::job::{self, Device, JobSpec};
use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, GradientSink, StepKey,
    adapter::{StepHook, files},
    backend::cuda::Precision,
    model::ShardedBase,
    plan::Recompute,
    quant::Nf4Options,
};

use crate::Error;

use super::{
    AdapterWriter, EngineLoader, Facts, HostEngine, LoadRequest, OnHost, Row, StepEngine, StepHooks,
    StepInfo, Sum, card::OnCard, method::method,
};

/// Where below the run's folder a start lies that is computed from the base.
const START: &str = "start";

/// Loads peft-core's engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeftEngines;

impl EngineLoader for PeftEngines {
    fn load(
        &self,
        request: LoadRequest<'_>,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Box<dyn StepEngine>, Error> {
        let spec = request.spec;
        let on = device(request.device, spec.cluster.device)?;
        let options = EngineOptions {
            device: on,
            memory_limit: [request.memory_limit_bytes, spec.train.memory_limit()].into_iter().flatten().min(),
            start: local(request.store).map(|store| store.join(START)),
            shard: request.part,
            member: true,
            ..engine_options_for(spec, request.threads, Some(request.steps))?
        };
        let quantised = format!("{:?}", options.quantization);
        let mut engine = Engine::load(options, &mut |loaded| {
            progress(loaded.done_bytes as f64 / loaded.total_bytes.max(1) as f64);
        })
        .map_err(|error| Error::part(&error))?;
        let plan = engine.plan();
        tracing::info!(
            engine_device = match engine.card() {
                Some(_) => request.device,
                None => "cpu",
            },
            card = engine.card().map(|(name, _)| name),
            memory_bytes = plan.peak_bytes(),
            host_bytes = plan.aside_bytes,
            micro_batch_rows = plan.micro_batch_rows,
            layers = plan.levels.describe(),
            "planned the memory of a step"
        );
        // Of a part, what all parts have in common, until its group has agreed.
        let identity = engine.shared_base().map(|base| base.identity());
        let stored = engine.base_hash().or(identity);
        let trainable = engine.layout().parameters() as u64;
        let facts = Facts {
            base_hash: base_hash(stored, &quantised),
            flat_length: engine.layout().len(),
            trainable_parameters: trainable,
            total_parameters: engine.config().parameters() as u64 + trainable,
            matched_modules: engine.matched().modules(),
            computed_start: engine.computes_start(),
        };
        let on_card = engine.card().is_some();
        let card = match on {
            EngineDevice::Cuda { index, .. } => u32::try_from(index).ok(),
            EngineDevice::Cpu => None,
        };
        let loaded = PeftEngine { engine, facts, card, quantised };
        if on_card && loaded.engine.trains_resident() {
            return Ok(Box::new(OnCard(loaded)));
        }
        if on_card {
            tracing::info!(
                "this method changes what is trained on the host: it comes from the card each step"
            );
        }
        Ok(Box::new(OnHost::new(loaded)))
    }
}

/// Hash of a base as it is stored and quantised.
fn base_hash(stored: Option<blake3::Hash>, quantised: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    if let Some(stored) = stored {
        hasher.update(stored.as_bytes());
    }
    hasher.update(quantised.as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// A run's folder, where it is one on this machine.
fn local(store: &Path) -> Option<&Path> {
    let url = store.to_str().is_some_and(|store| store.contains("://"));
    (!url).then_some(store)
}

/// Where to compute: the worker's device, but for what the job insists on. `cuda` never becomes the processor.
fn device(name: &str, wanted: Device) -> Result<EngineDevice, Error> {
    let unknown = || Error::UnknownDevice { device: name.to_owned() };
    let index = match name.split_once(':') {
        None if matches!(name, "cpu" | "cuda") => 0,
        Some(("cuda", index)) => index.parse().map_err(|_| unknown())?,
        _ => return Err(unknown()),
    };
    let on_card = match wanted {
        Device::Cpu => false,
        Device::Cuda => true,
        Device::Auto => name != "cpu",
    };
    Ok(if on_card {
        EngineDevice::Cuda { index, precision: Precision::default() }
    } else {
        EngineDevice::Cpu
    })
}

/// The engine that a job asks for, on the CPU and without a limit of memory.
///
/// # Errors
/// Where the adapter begins as a text and the base's tokenizer cannot be used.
pub fn engine_options(spec: &JobSpec, threads: usize) -> Result<EngineOptions, Error> {
    engine_options_for(spec, threads, None)
}

/// [`engine_options`] of a job whose number of steps is known.
fn engine_options_for(spec: &JobSpec, threads: usize, steps: Option<u64>) -> Result<EngineOptions, Error> {
    Ok(EngineOptions {
        quantization: quantization(spec),
        adapter: Some(method(spec, steps)?),
        threads,
        recompute: match spec.train.recompute {
            job::Recompute::Auto => Recompute::Auto,
            job::Recompute::Never => Recompute::Never,
            job::Recompute::Layers => Recompute::Layers,
        },
        micro_batch_rows: spec.train.micro_batch_size,
        memory_limit: spec.train.memory_limit(),
        ..EngineOptions::new(&spec.base.model, spec.data.max_length)
    })
}

/// How a job keeps its base.
pub fn quantization(spec: &JobSpec) -> Option<Nf4Options> {
    match spec.base.quantization {
        job::Quantization::Nf4 => {
            Some(Nf4Options { double: spec.base.double_quantization, ..Nf4Options::default() })
        }
        job::Quantization::None => None,
    }
}

/// A loaded engine with what its files need.
pub(super) struct PeftEngine {
    pub(super) engine: Engine,
    facts: Facts,
    /// How the base is quantised, in words.
    quantised: String,
    card: Option<u32>,
}

impl PeftEngine {
    fn hook<'a>(&'a self, step: StepInfo) -> StepHook<'a> {
        let StepInfo { step, total_steps, scale } = step;
        StepHook { layout: self.engine.layout(), step, total_steps, scale }
    }
}

impl StepHooks for PeftEngine {
    fn method_state(&self) -> Vec<f32> {
        self.engine.fit().method().map_or(Vec::new(), |method| method.state(self.engine.layout()))
    }

    fn rates(&self, peak: f64) -> Vec<(Range<usize>, f64)> {
        self.engine.layout().rates(peak)
    }

    fn regularise(&self, step: StepInfo, parameters: &[f32], gradient: &mut [f32]) {
        if let Some(method) = self.engine.fit().method() {
            method.regularise(&self.hook(step), parameters, gradient);
        }
    }

    fn after_step(&self, step: StepInfo, parameters: &mut [f32], gradient: &[f32], state: &mut [f32]) {
        if let Some(method) = self.engine.fit().method() {
            method.after_step(&self.hook(step), parameters, gradient, state);
        }
    }
}

impl HostEngine for PeftEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>, Error> {
        self.engine.initial_parameters(seed).map_err(|error| Error::part(&error))
    }

    fn micro_batch_rows(&self) -> usize {
        self.engine.micro_batch_rows()
    }

    fn card(&self) -> Option<u32> {
        self.card
    }

    fn forward_backward(
        &mut self,
        parameters: &[f32],
        rows: &[Row],
        seed: u64,
        step: u64,
        gradient: &mut [f32],
        sink: &mut dyn GradientSink,
    ) -> Result<Sum, Error> {
        let key = StepKey { seed, step };
        let sum = self
            .engine
            .forward_backward(parameters, rows, key, gradient, sink)
            .map_err(|error| Error::part(&error))?;
        Ok(Sum { loss: sum.loss, tokens: sum.tokens })
    }

    fn evaluate(&mut self, parameters: &[f32], rows: &[Row]) -> Result<Sum, Error> {
        let sum = self.engine.evaluate(parameters, rows).map_err(|error| Error::part(&error))?;
        Ok(Sum { loss: sum.loss, tokens: sum.tokens })
    }

    fn shared_base(&mut self) -> Option<&mut ShardedBase> {
        self.engine.shared_base()
    }

    fn agree_on_base(&mut self, hash: blake3::Hash) {
        self.engine.set_base_hash(hash);
        self.facts.base_hash = base_hash(Some(hash), &self.quantised);
    }

    fn start_reads_base(&self) -> bool {
        self.engine.start_reads_layers()
    }

    fn keep_company(&mut self, training: bool) -> Result<(), Error> {
        self.engine.keep_company(training).map_err(|error| Error::part(&error))
    }

    fn adapter_files(&self, parameters: &[f32], state: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        files::contents(self.engine.fit(), parameters, state).map_err(|error| Error::part(&error))
    }

    fn adapter_writer(&self) -> Option<AdapterWriter> {
        // A description of the adapter, without its numbers.
        let fit = self.engine.fit().clone();
        Some(Arc::new(move |parameters, state| {
            files::contents(&fit, parameters, state).map_err(|error| Error::part(&error))
        }))
    }

    fn run(&self, work: &mut (dyn FnMut() + Send)) {
        self.engine.run(work);
    }
}
