//! The real engine, of peft-core.

use std::ops::Range;

use shanty_config::job::{self, Device, JobSpec};
use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, GradientSink, StepKey,
    adapter::{LoraConfig, SharedMethod, TargetModules, files},
    backend::cuda::Precision,
    plan::Recompute,
    quant::Nf4Options,
};

use crate::Error;

use super::{EngineLoader, Facts, LoadRequest, Row, StepEngine, Sum};

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
        let options = EngineOptions {
            device: device(request.device, spec.cluster.device)?,
            memory_limit: request.memory_limit_bytes,
            ..engine_options(spec, request.threads)
        };
        let quantised = format!("{:?}", options.quantization);
        let engine = Engine::load(options, &mut |loaded| {
            progress(loaded.done_bytes as f64 / loaded.total_bytes.max(1) as f64);
        })
        .map_err(|error| Error::part(&error))?;
        let mut hasher = blake3::Hasher::new();
        if let Some(stored) = engine.base_hash() {
            hasher.update(stored.as_bytes());
        }
        hasher.update(quantised.as_bytes());
        let trainable = engine.layout().parameters() as u64;
        let facts = Facts {
            base_hash: hasher.finalize().to_hex().to_string(),
            flat_length: engine.layout().len(),
            trainable_parameters: trainable,
            total_parameters: engine.config().parameters() as u64 + trainable,
            matched_modules: engine.matched().modules(),
        };
        Ok(Box::new(PeftEngine { engine, facts }))
    }
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
pub fn engine_options(spec: &JobSpec, threads: usize) -> EngineOptions {
    EngineOptions {
        quantization: quantization(spec),
        adapter: Some(method(spec)),
        threads,
        recompute: match spec.train.recompute {
            job::Recompute::Auto => Recompute::Auto,
            job::Recompute::Never => Recompute::Never,
            job::Recompute::Layers => Recompute::Layers,
        },
        micro_batch_rows: spec.train.micro_batch_size,
        ..EngineOptions::new(&spec.base.model, spec.data.max_length)
    }
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

/// A job's adapter in the words of the numeric crate.
fn method(spec: &JobSpec) -> SharedMethod {
    let adapter = &spec.adapter;
    let lora = LoraConfig {
        base_model_name_or_path: Some(spec.base.model.display().to_string()),
        r: adapter.r,
        lora_alpha: adapter.lora_alpha,
        lora_dropout: adapter.lora_dropout,
        use_rslora: adapter.use_rslora,
        target_modules: match &adapter.target_modules {
            job::TargetModules::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
            job::TargetModules::Names(names) => TargetModules::Names(names.clone()),
        },
    };
    lora.shared()
}

/// A loaded engine with what its files need.
struct PeftEngine {
    engine: Engine,
    facts: Facts,
}

/// Tells that a part of the gradient is ready.
struct During<'a>(&'a mut (dyn FnMut() + Send));

impl GradientSink for During<'_> {
    fn ready(&mut self, _: Range<usize>, _: &[f32]) {
        (self.0)();
    }
}

impl StepEngine for PeftEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn initial_parameters(&self, seed: u64) -> Result<Vec<f32>, Error> {
        Ok(self.engine.initial_parameters(seed))
    }

    fn micro_batch_rows(&self) -> usize {
        self.engine.micro_batch_rows()
    }

    fn forward_backward(
        &mut self,
        parameters: &[f32],
        rows: &[Row],
        seed: u64,
        step: u64,
        gradient: &mut [f32],
        during: &mut (dyn FnMut() + Send),
    ) -> Result<Sum, Error> {
        let key = StepKey { seed, step };
        let sum = self
            .engine
            .forward_backward(parameters, rows, key, gradient, &mut During(during))
            .map_err(|error| Error::part(&error))?;
        Ok(Sum { loss: sum.loss, tokens: sum.tokens })
    }

    fn evaluate(&mut self, parameters: &[f32], rows: &[Row]) -> Result<Sum, Error> {
        let sum = self.engine.evaluate(parameters, rows).map_err(|error| Error::part(&error))?;
        Ok(Sum { loss: sum.loss, tokens: sum.tokens })
    }

    fn adapter_files(&self, parameters: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        files::contents(self.engine.fit(), parameters, &[]).map_err(|error| Error::part(&error))
    }
}
