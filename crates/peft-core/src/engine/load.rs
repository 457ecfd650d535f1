//! From a base's folder to an engine, or to what an engine would take.

use super::{Engine, EngineDevice, EngineOptions, Machine, Planned, prepared::Prepared};
use crate::{
    adapter::{Fit, SharedMethod},
    backend::cuda::{self, Precision},
    error::{Error, Result},
    model::{
        LoadProgress, MemoryUse, ModelConfig, ShardPart, ShardedBase, resident::plan::BasePlan,
        weights::ModelFiles,
    },
    plan::{self, MemoryPlan, PlanRequest, Sizes},
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
    /// Tokens of the longest row that a step of one row has room for; none where the memory of the card is not known.
    pub largest_context: Option<usize>,
}

/// The longest row that is looked for: positions are numbers of 32 bits, and so are a micro-batch's rows.
const LONGEST: usize = 1 << 24;

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
        if let Some(prepared) = &prepared {
            fit.set_start(prepared.parameters(fit.layout())?);
        }
        if let Some(part) = options.shard {
            let (folder, nf4) = (&options.base, options.quantization);
            let base = ShardedBase::load(folder, over, nf4, part, progress)?;
            let memory = base.planned_memory();
            let request = options.request_for(&memory, &config);
            let start = Planned::new(machine, &config, fit, request, memory.embedding_apart())?;
            // Its hash is known once its members have met.
            return Ok(start.over(Box::new(base)));
        }
        // What does not fit is told before anything is read.
        let files = ModelFiles::open_over(&options.base, over)?;
        let tensors = BasePlan::new(&files, &config, options.quantization)?;
        let memory = tensors.memory(&config, options.halves());
        let request = options.request_for(&memory, &config);
        let mut start = Planned::new(machine, &config, fit, request, memory.embedding_apart())?;
        let Planned { machine, plan, .. } = &mut start;
        let (base, hash) = machine.load(&config, &tensors, plan, options.threads, progress)?;
        let mut engine = start.over(base);
        engine.set_base_hash(hash);
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
            None => MemoryUse::plan_for(&options.base, options.quantization, options.halves())?,
            Some(ShardPart { parts, .. }) => {
                MemoryUse::plan_shared(&options.base, options.quantization, parts)?
            }
        };
        let mut request =
            PlanRequest { embedding_bytes: base.embedding_apart(), ..options.request_for(&base, &config) };
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
        let known = request.memory_limit != Some(u64::MAX);
        let largest_context = known.then(|| {
            let sizes = |length| Sizes::of(&config, &fit, length, length, &request);
            MemoryPlan::largest_context(sizes, &request, LONGEST)
        });
        let limit_bytes = request.limit();
        Ok(Estimate { config, fit, plan, base, limit_bytes, largest_context })
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

    /// Whether products read bf16.
    fn halves(&self) -> bool {
        matches!(self.device, EngineDevice::Cuda { precision: Precision::Bf16, .. })
    }

    /// What a plan over a base is made for.
    fn request_for(&self, base: &MemoryUse, config: &ModelConfig) -> PlanRequest {
        let head_bytes = if base.head_bytes > 0 { base.head_bytes } else { base.embedding_bytes };
        PlanRequest {
            base_bytes: base.total_bytes() as u64,
            dequantised: self.quantization.is_some() || config.stored_nf4,
            // Products of f32 need a head of f32.
            head_widened: head_bytes < 4 * config.vocabulary_size * config.hidden_size && !self.halves(),
            ..self.request()
        }
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
            half_activations: self.halves(),
            reduced_apart: self.member && self.device != EngineDevice::Cpu,
            host_limit: plan::host_limit(),
        }
    }
}

fn fit(config: &ModelConfig, method: Option<&SharedMethod>) -> Result<Fit> {
    method.map_or_else(|| Ok(Fit::bare()), |method| Fit::new(method.clone(), config))
}
