//! What a job would train and take, from headers alone: no weight is read.

use std::path::PathBuf;

use serde::Serialize;
use shanty_config::{
    JobSpec, Loaded,
    job::{Device, Shard},
};
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, Error,
    backend::cuda,
    engine::Estimate,
    model::{MemoryUse, ShardPart},
    plan::{ShareChoice, ShareOption},
};
use shanty_worker::engine::engine_options;

use crate::{base, failure::CommandResult, job_file::at_key};

/// Records of each source that are looked at ahead of a job.
const FIRST_RECORDS: u64 = 1000;

/// Checks the base's tokenizer and the first records of the data as preparing them will, so that what is wrong with them
/// is said before anybody waits: at once, at the key of the job file that names the data. The base must be here.
pub(crate) fn check_data(job: &Loaded<JobSpec>) -> CommandResult<()> {
    let options = shanty_coordinator::prepare::options(&base::with_folder(&job.value)?, PathBuf::new());
    match shanty_data::check_first(&options, FIRST_RECORDS) {
        // Preparing all of it says the warnings, with figures of all of it.
        Ok(_) => Ok(()),
        Err(error) => Err(at_key(job, "data", error.diagnostic())),
    }
}

/// What a job would train and take.
#[derive(Debug, Clone)]
pub(crate) struct Preflight {
    pub(crate) matched_modules: Vec<String>,
    /// Virtual tokens in front of every sample.
    pub(crate) virtual_tokens: usize,
    pub(crate) trainable_parameters: u64,
    /// Base and adapter together.
    pub(crate) total_parameters: u64,
    pub(crate) memory: Memory,
    pub(crate) micro_batch_rows: usize,
    /// Whether anything is computed again in the backward pass.
    pub(crate) recompute: bool,
    /// What becomes of each layer's activations, in words.
    pub(crate) layers: String,
    /// How many workers share a base, and why.
    pub(crate) shard: Share,
    /// Tokens of the longest row that memory has room for; none where the memory of the card is not known.
    pub(crate) largest_context: Option<usize>,
    /// Tokens of a row that the base was made for.
    pub(crate) positions: usize,
    /// What is allowed, and perhaps not meant.
    pub(crate) warnings: Vec<String>,
}

/// How many workers share a base, and why.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Share {
    /// 1 where each worker has its own.
    pub(crate) parts: usize,
    pub(crate) reason: String,
    /// What a worker may take; none where nothing was weighed.
    pub(crate) limit_bytes: Option<u64>,
    /// What a worker would take with the base in so many parts, in the order in which they were weighed.
    pub(crate) options: Vec<ShareOption>,
}

impl Share {
    /// As the job file says, or as memory has it.
    fn of(spec: &JobSpec, options: &EngineOptions) -> Result<Self, Error> {
        let given =
            |parts, reason: String| Ok(Self { parts, reason, limit_bytes: None, options: Vec::new() });
        match spec.base.shard {
            Shard::Replicate => given(1, "the job file says so".to_owned()),
            Shard::Parts(parts) => given(parts.max(1) as usize, "the job file says so".to_owned()),
            Shard::Auto => {
                let choice = Engine::choose_share(options, spec.cluster.workers.max as usize)?;
                let ShareChoice { parts, reason, limit_bytes, options } = choice;
                Ok(Self { parts, reason, limit_bytes: Some(limit_bytes), options })
            }
        }
    }

    /// What a job file says for it.
    pub(crate) fn word(&self) -> Shard {
        match u32::try_from(self.parts) {
            Ok(parts) if parts > 1 => Shard::Parts(parts),
            _ => Shard::Replicate,
        }
    }
}

/// The base's memory of one worker by part, bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct BaseMemory {
    /// The decoder's matrices, or this worker's part of them.
    pub(crate) layers: u64,
    /// Two places for whole layers, where workers share a base.
    pub(crate) slots: u64,
    pub(crate) embedding: u64,
    /// 0 where it is the embedding.
    pub(crate) head: u64,
    /// Norms and biases.
    pub(crate) other: u64,
}

impl From<MemoryUse> for BaseMemory {
    fn from(memory: MemoryUse) -> Self {
        Self {
            layers: memory.linear_bytes as u64,
            slots: memory.slot_bytes as u64,
            embedding: memory.embedding_bytes as u64,
            head: memory.head_bytes as u64,
            other: memory.other_bytes as u64,
        }
    }
}

/// Memory of one worker by part, bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Memory {
    pub(crate) base: u64,
    pub(crate) base_parts: BaseMemory,
    pub(crate) adapter: u64,
    pub(crate) optimizer: u64,
    pub(crate) activations: u64,
    pub(crate) scratch: u64,
    /// What lies in the host's memory beside a card.
    pub(crate) host: u64,
}

impl Memory {
    pub(crate) fn total(&self) -> u64 {
        self.base + self.adapter + self.optimizer + self.activations + self.scratch
    }
}

/// Where workers of this machine would compute. A job for cards is planned for cards, whatever this machine has.
fn device(spec: &JobSpec) -> EngineDevice {
    let card = EngineDevice::Cuda { index: 0, precision: cuda::Precision::default() };
    match spec.cluster.device {
        Device::Cpu => EngineDevice::Cpu,
        Device::Cuda => card,
        Device::Auto if cuda::is_available() => card,
        Device::Auto => EngineDevice::Cpu,
    }
}

fn warnings(estimate: &Estimate) -> Vec<String> {
    let unused = estimate.fit.matched().unused.iter();
    let unused = unused.map(|name| format!("`{name}` in adapter.target_modules matches no module"));
    unused.chain(estimate.fit.doubts(&estimate.config)).collect()
}

impl Preflight {
    /// Checks base and targets, and counts. What is wrong is shown at the key of the job file that names it.
    pub(crate) fn of(job: &Loaded<JobSpec>, threads: usize) -> CommandResult<Self> {
        let spec = &base::with_folder(&job.value)?;
        let options =
            engine_options(spec, threads).map_err(|error| at_key(job, "base.model", error.diagnostic()))?;
        let options = EngineOptions { device: device(spec), ..options };
        let estimated = Share::of(spec, &options).and_then(|shard| {
            let parts = shard.parts;
            let part = (parts > 1).then_some(ShardPart { part: 0, parts });
            Ok((shard, Engine::estimate(&EngineOptions { shard: part, ..options })?))
        });
        let (shard, estimate) = estimated.map_err(|error| {
            let diagnostic = error.diagnostic();
            let key = match &error {
                Error::AdapterSetting { key, .. } => format!("adapter.{key}"),
                Error::NoModuleToSave { .. } => "adapter.modules_to_save".to_owned(),
                Error::ShardNeedsNf4 { .. } | Error::ShardOfGguf { .. } | Error::ShardOnCard => {
                    "base.shard".to_owned()
                }
                _ if !diagnostic.code.starts_with("SH04") => "base.model".to_owned(),
                _ if spec.adapter.method.has_virtual_tokens() => "adapter.num_virtual_tokens".to_owned(),
                _ => "adapter.target_modules".to_owned(),
            };
            at_key(job, &key, diagnostic)
        })?;
        let (plan, trainable) = (estimate.plan, estimate.fit.trained().parameters() as u64);
        Ok(Self {
            matched_modules: estimate.fit.matched().modules(),
            virtual_tokens: estimate.fit.layout().virtual_tokens().count(),
            trainable_parameters: trainable,
            total_parameters: estimate.config.parameters() as u64 + trainable,
            memory: Memory {
                base: plan.base_bytes,
                base_parts: estimate.base.into(),
                adapter: plan.adapter_bytes,
                optimizer: plan.optimizer_bytes,
                activations: plan.activation_bytes,
                scratch: plan.scratch_bytes,
                host: plan.aside_bytes,
            },
            micro_batch_rows: plan.micro_batch_rows,
            recompute: plan.levels.everything < plan.levels.layers(),
            layers: plan.levels.describe(),
            shard,
            largest_context: estimate.largest_context,
            positions: estimate.config.max_positions,
            warnings: warnings(&estimate),
        })
    }

    /// What is trained, in words.
    pub(crate) fn what(&self) -> String {
        if self.virtual_tokens > 0 {
            return format!("{} virtual tokens in front of every sample", self.virtual_tokens);
        }
        format!("{} modules: {}", self.matched_modules.len(), self.modules_by_kind())
    }

    /// `q_proj, k_proj, …`: the last parts of the matched names, each once.
    fn modules_by_kind(&self) -> String {
        let mut kinds: Vec<&str> = Vec::new();
        for module in &self.matched_modules {
            let kind = module.rsplit('.').next().unwrap_or(module);
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds.join(", ")
    }
}
