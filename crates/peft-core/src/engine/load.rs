//! From a base's folder to an engine, or to what an engine would take.

use super::{Engine, EngineDevice, EngineOptions, Machine, SharedBase, prepared::Prepared};
use crate::{
    adapter::{Fit, SharedMethod},
    backend::cuda::{self, Precision},
    error::{Error, Result},
    model::{LoadProgress, MemoryUse, ModelConfig, ResidentBase, ShardPart, ShardedBase},
    plan::{MemoryPlan, PlanRequest, Sizes},
};

/// What an engine would take and train, without loading it.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// What the model is made of.
    pub config: ModelConfig,
    /// The method, fitted to the model.
    pub fit: Fit,
    /// Memory by part.
    pub plan: MemoryPlan,
    /// The base's memory by part.
    pub base: MemoryUse,
    /// What the plan may take.
    pub limit_bytes: u64,
}

/// A base, what it takes, and its hash where it is known.
struct Loaded {
    base: SharedBase,
    memory: MemoryUse,
    hash: Option<blake3::Hash>,
}

impl Loaded {
    fn of(
        options: &EngineOptions,
        over: &[std::path::PathBuf],
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let (folder, nf4) = (&options.base, options.quantization);
        let Some(part) = options.shard else {
            let base = ResidentBase::load_over(folder, over, nf4, progress)?;
            let (memory, hash) = (base.memory(), Some(base.content_hash()));
            return Ok(Self { base: Box::new(base), memory, hash });
        };
        let base = ShardedBase::load(folder, over, nf4, part, progress)?;
        Ok(Self { memory: base.planned_memory(), base: Box::new(base), hash: None })
    }
}

impl Engine {
    /// Loads a base; `progress` is called every few megabytes.
    ///
    /// # Errors
    /// Where the folder is no model of a known family or does not hold together, the adapter's settings do not fit it, or
    /// threads cannot be started.
    pub fn load(options: EngineOptions, progress: &mut dyn FnMut(LoadProgress)) -> Result<Self> {
        // What can be wrong with the adapter is said before the base is read.
        let config = ModelConfig::load(&options.base)?;
        options.check_shard()?;
        let mut fit = fit(&config, options.adapter.as_ref())?;
        // So is what is wrong with the device.
        let machine = Machine::open(options.device, options.threads)?;
        let prepared = Prepared::open(&options, &fit, &config)?;
        let over = prepared.as_ref().map_or(&[][..], Prepared::files);
        let loaded = Loaded::of(&options, over, progress)?;
        if let Some(prepared) = &prepared {
            fit.set_start(prepared.parameters(fit.layout())?);
        }
        let Loaded { base, memory, hash } = loaded;
        let request = PlanRequest {
            base_bytes: memory.total_bytes() as u64,
            dequantised: options.quantization.is_some() || base.config().stored_nf4,
            head_widened: base.head().as_f32().is_none() && options.widens_head(),
            ..options.request()
        };
        let mut engine = Self::on(machine, base, fit, request)?;
        if let Some(hash) = hash {
            engine.set_base_hash(hash);
        }
        Ok(engine)
    }

    /// Says what [`Engine::load`] would take and train, from headers alone.
    ///
    /// # Errors
    /// As [`Engine::load`], but for damaged numbers.
    pub fn estimate(options: &EngineOptions) -> Result<Estimate> {
        let config = ModelConfig::load(&options.base)?;
        let fit = fit(&config, options.adapter.as_ref())?;
        let base = match options.shard {
            None => MemoryUse::plan(&options.base, options.quantization)?,
            Some(ShardPart { parts, .. }) => {
                MemoryUse::plan_sharded(&options.base, options.quantization, parts)?
            }
        };
        let head_bytes = if base.head_bytes > 0 { base.head_bytes } else { base.embedding_bytes };
        let mut request = PlanRequest {
            base_bytes: base.total_bytes() as u64,
            embedding_bytes: if base.head_bytes > 0 { base.embedding_bytes as u64 } else { 0 },
            dequantised: options.quantization.is_some() || config.stored_nf4,
            head_widened: head_bytes < 4 * config.vocabulary_size * config.hidden_size
                && options.widens_head(),
            ..options.request()
        };
        if let EngineDevice::Cuda { index, .. } = options.device {
            // Where the card is not here, nothing is known of its memory.
            let room = cuda::free_bytes(index).map_or(u64::MAX, |free| free / 100 * 96);
            request.memory_limit = Some(request.memory_limit.map_or(room, |limit| limit.min(room)));
        }
        if request.threads == 0 {
            request.threads = std::thread::available_parallelism().map_or(1, usize::from);
        }
        let sizes = |tokens| Sizes::of(&config, &fit, tokens, request.max_length, &request);
        let plan = MemoryPlan::choose(sizes, &request);
        let limit_bytes = request.limit();
        Ok(Estimate { config, fit, plan, base, limit_bytes })
    }
}

impl EngineOptions {
    /// Refuses what a shared base cannot be used for.
    pub(super) fn check_shard(&self) -> Result<()> {
        match self.device {
            EngineDevice::Cuda { .. } if self.shard.is_some() => Err(Error::ShardOnCard),
            _ => Ok(()),
        }
    }

    fn dropout(&self) -> f32 {
        self.adapter.as_ref().map_or(0.0, |method| method.dropout())
    }

    /// Whether products need a head of f32.
    fn widens_head(&self) -> bool {
        !matches!(self.device, EngineDevice::Cuda { precision: Precision::Bf16, .. })
    }

    fn request(&self) -> PlanRequest {
        PlanRequest {
            micro_batch_rows: self.micro_batch_rows,
            max_length: self.max_length,
            recompute: self.recompute,
            memory_limit: self.memory_limit,
            base_bytes: 0,
            embedding_bytes: 0,
            dequantised: false,
            head_widened: false,
            dropout: self.dropout() > 0.0,
            threads: self.threads,
            accelerated: self.device != EngineDevice::Cpu,
            half_activations: matches!(self.device, EngineDevice::Cuda { precision: Precision::Bf16, .. }),
        }
    }
}

fn fit(config: &ModelConfig, method: Option<&SharedMethod>) -> Result<Fit> {
    method.map_or_else(|| Ok(Fit::bare()), |method| Fit::new(method.clone(), config))
}
