//! What a job would train and take, from headers alone: no weight is read.

use serde::Serialize;
use shanty_config::{JobSpec, Loaded, job};
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    adapter::{LoraConfig, TargetModules},
    model::{MemoryUse, ModelConfig},
    plan::{MemoryPlan, PlanRequest, Recompute, Sizes},
    quant::Nf4Options,
};

use crate::{
    failure::{CommandResult, Failure},
    job_file::at_key,
};

/// What a job would train and take.
#[derive(Debug, Clone)]
pub(crate) struct Preflight {
    pub(crate) matched_modules: Vec<String>,
    pub(crate) trainable_parameters: u64,
    /// Base and adapter together.
    pub(crate) total_parameters: u64,
    pub(crate) memory: Memory,
    pub(crate) micro_batch_rows: usize,
    pub(crate) recompute: bool,
}

/// Memory of one worker by part, bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Memory {
    pub(crate) base: u64,
    pub(crate) adapter: u64,
    pub(crate) optimizer: u64,
    pub(crate) activations: u64,
    pub(crate) scratch: u64,
}

impl Memory {
    pub(crate) fn total(&self) -> u64 {
        self.base + self.adapter + self.optimizer + self.activations + self.scratch
    }
}

impl Preflight {
    /// Checks base and targets, and counts. What is wrong is shown at the key of the job file that names it.
    pub(crate) fn of(job: &Loaded<JobSpec>, threads: usize) -> CommandResult<Self> {
        let spec = &job.value;
        let at = |key: &'static str| {
            move |error: shanty_peft_core::Error| -> Failure { at_key(job, key, error.diagnostic()) }
        };
        let config = ModelConfig::load(&spec.base.model).map_err(at("base.model"))?;
        let nf4 = nf4_of(spec);
        let base = MemoryUse::plan(&spec.base.model, nf4).map_err(at("base.model"))?;
        let (layout, matched) = lora_of(spec).layout(&config).map_err(at("adapter.target_modules"))?;

        let trainable = layout.parameters() as u64;
        let request = PlanRequest {
            micro_batch_rows: spec.train.micro_batch_size,
            max_length: spec.data.max_length,
            recompute: match spec.train.recompute {
                job::Recompute::Auto => Recompute::Auto,
                job::Recompute::Never => Recompute::Never,
                job::Recompute::Layers => Recompute::Layers,
            },
            memory_limit: None,
            base_bytes: base.total_bytes() as u64,
            dequantised: nf4.is_some(),
            head_widened: true,
            dropout: spec.adapter.lora_dropout > 0.0,
            threads,
        };
        let sizes = |tokens| Sizes::new(&config, &layout, tokens, spec.data.max_length, &request);
        let plan = MemoryPlan::choose(sizes, &request);
        Ok(Self {
            matched_modules: matched.modules(),
            trainable_parameters: trainable,
            total_parameters: config.parameters() as u64 + trainable,
            memory: Memory {
                base: plan.base_bytes,
                adapter: plan.adapter_bytes,
                optimizer: plan.optimizer_bytes,
                activations: plan.activation_bytes,
                scratch: plan.scratch_bytes,
            },
            micro_batch_rows: plan.micro_batch_rows,
            recompute: plan.recompute == Recompute::Layers,
        })
    }

    /// `q_proj, k_proj, …`: the last parts of the matched names, each once.
    pub(crate) fn modules_by_kind(&self) -> String {
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

/// How the job keeps its base.
pub(crate) fn nf4_of(spec: &JobSpec) -> Option<Nf4Options> {
    match spec.base.quantization {
        job::Quantization::Nf4 => Some(Nf4Options { double: spec.base.double_quantization, ..Nf4Options::default() }),
        job::Quantization::None => None,
    }
}

/// The job's adapter in the words of the numeric crate.
fn lora_of(spec: &JobSpec) -> LoraConfig {
    let adapter = &spec.adapter;
    LoraConfig {
        base_model_name_or_path: Some(spec.base.model.display().to_string()),
        r: adapter.r,
        lora_alpha: adapter.lora_alpha,
        lora_dropout: adapter.lora_dropout,
        use_rslora: adapter.use_rslora,
        target_modules: match &adapter.target_modules {
            job::TargetModules::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
            job::TargetModules::Names(names) => TargetModules::Names(names.clone()),
        },
    }
}
