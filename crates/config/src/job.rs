//! The job file: what to fine-tune, on what, how.
//!
//! Field names are those of Hugging Face PEFT and transformers where they have the thing.
//! The doc comments here are the text of `docs/reference/job.md`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::shape::described;

mod adapter;
mod shard;
mod train_data;
mod train_words;

pub use adapter::{
    AdapterSpec, Bias, LoraInit, Method, PrefixInit, PromptEncoder, PromptTuningInit, TargetModules,
};
pub use shard::Shard;
pub use train_data::TrainData;
pub(crate) use train_words::bytes_of;
pub use train_words::{BadStep, Recompute, Schedule};

described! {
    /// A fine-tuning job.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct JobSpec {
        /// Name of the job; its id is made from it. Letters, digits, `-` and `_`.
        pub name: String,
        /// The frozen base model.
        pub base: BaseSpec,
        /// What is trained.
        #[serde(default)]
        pub adapter: AdapterSpec,
        /// What it is trained on.
        pub data: DataSpec,
        /// How it is trained.
        #[serde(default)]
        pub train: TrainSpec,
        /// What is kept, and where.
        #[serde(default)]
        pub checkpoint: CheckpointSpec,
        /// Who trains.
        #[serde(default)]
        pub cluster: ClusterSpec,
        /// What is shown at the end.
        #[serde(default)]
        pub sample: SampleSpec,
    }

    /// `[base]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct BaseSpec {
        /// A folder in Hugging Face layout: `config.json`, safetensors, tokenizer. Or a model of the Hugging Face hub,
        /// `org/name` or `org/name@revision`, which is downloaded into the hub's usual cache (`HF_HOME`) and shared with
        /// Python; a folder of that name is taken first.
        pub model: PathBuf,
        /// How the frozen weights are kept.
        #[serde(default)]
        pub quantization: Quantization,
        /// Whether block scales are quantised too (8 bits, blocks of 256), as QLoRA does.
        #[serde(default = "yes")]
        pub double_quantization: bool,
        /// How many workers share one copy of the base. A number N: of each layer's 4-bit weights a worker holds one of N parts and gathers
        /// the others as they are due; workers then train in whole groups of N.
        #[serde(default)]
        pub shard: Shard,
    }

    /// How the frozen weights are kept in memory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Quantization {
        /// 4-bit NormalFloat in blocks of 64.
        #[default]
        Nf4,
        /// As stored, computed in f32.
        None,
    }
}

described! {
    /// `[data]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct DataSpec {
        /// Training data: JSONL (also `.gz` and `.zst`) or Parquet; a path, a glob, or a URL (`s3://bucket/key`, `gs://…`,
        /// `az://container/key`, `https://…`; globs in the first three). Several sources are a list of tables:
        /// `train = [{ path = "a.jsonl", weight = 7 }, { path = "b.jsonl", weight = 3 }]`.
        pub train: TrainData,
        /// Held-out data, evaluated before, after, and every `train.eval_every_steps`.
        #[serde(default)]
        pub eval: Option<String>,
        /// Form of the rows; `auto` detects it from the columns.
        #[serde(default)]
        pub format: Format,
        /// What of a row is trained. A message of the assistant may say for itself: `"weight": 0` (or `"train": false`)
        /// leaves it out.
        #[serde(default)]
        pub train_on: TrainOn,
        /// Whether rows become conversations by the model's chat template.
        #[serde(default)]
        pub chat_template: ChatTemplate,
        /// Whether training data in which no end token is ever trained is refused (SH0222): a model trained on it never stops.
        #[serde(default = "yes")]
        pub require_end_token: bool,
        /// Longest row, tokens, an adapter's virtual tokens included. Longer samples are truncated and counted; `text` is
        /// cut into samples.
        #[serde(default = "default_max_length")]
        pub max_length: usize,
        /// Whether several samples share a row (no attention between them).
        #[serde(default = "yes")]
        pub packing: bool,
    }

    /// A source of training data. With weights, an epoch has as many rows as all sources together, and of these each
    /// source gives the share `weight / sum of weights`, in exact counts. Which rows those are follows from `train.seed`
    /// and the epoch: a source is a deck that is shuffled, dealt from, and shuffled anew when it is used up, so no row
    /// comes again before all others of its source have come, and a source that gives less than it has goes
    /// on in the next epoch where it stopped. Without weights every row of every source comes once an epoch.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct TrainSource {
        /// A path, a glob, or a URL.
        pub path: String,
        /// Form of its rows, where it is not `data.format`.
        #[serde(default)]
        pub format: Option<Format>,
        /// Its share beside the weights of the others; all sources have one, or none has.
        #[serde(default)]
        pub weight: Option<f64>,
    }

    /// Form of the rows.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Format {
        /// Detected from the columns.
        #[default]
        Auto,
        /// A column `text`: every token is trained.
        Text,
        /// Columns `prompt` and `completion`: the completion is trained.
        PromptCompletion,
        /// A column `messages` (`role`, `content`), perhaps `tools`: what the assistant says is trained.
        Messages,
        /// Columns `instruction`, `output`, perhaps `input` and `system`: the output is trained. Without a chat template the
        /// text is Stanford's: `Below is an instruction …`.
        Alpaca,
        /// A column `conversations` (`from`, `value`), perhaps `system` and `tools`: what `gpt` says is trained.
        Sharegpt,
    }

    /// What of a row is trained.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum TrainOn {
        /// What the model is to say: completions, outputs, the assistant's messages.
        #[default]
        Answers,
        /// Prompts and what others say, too: every token but the first.
        All,
    }

    /// Whether rows become conversations by the model's chat template.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum ChatTemplate {
        /// `messages` and `sharegpt` do, `alpaca` where the model has a template, `prompt-completion` does not.
        #[default]
        Auto,
        /// All forms but `text` do: a prompt is a message of the user, a completion one of the assistant.
        Model,
        /// None does.
        None,
    }

    /// `[train]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct TrainSpec {
        /// Passes over the data. Ignored where `steps` is given.
        pub epochs: u32,
        /// Optimizer steps; instead of `epochs`.
        pub steps: Option<u64>,
        /// Rows per optimizer step, whatever the number of workers.
        pub global_batch_size: usize,
        /// Rows per forward pass; chosen from memory when absent.
        pub micro_batch_size: Option<usize>,
        /// Peak learning rate. Where it is left out it depends on the method: 2e-4 for `lora` and `dora` (QLoRA's
        /// authors, TRL, Unsloth), 5e-3 for `ia3` (PEFT's comparison: 45.5 % of MetaMathQA, 31.1 % at a lower rate), 5e-4 for
        /// `adalora` (its authors on MNLI), 5e-3 for `prefix_tuning` and 1e-4 for `p_tuning` (PEFT's comparison on MetaMathQA), 1e-2 for
        /// `prompt_tuning` (TRL's guide: 1e-2 to 3e-2). Models of some million parameters bear ten times that.
        pub learning_rate: Option<f64>,
        /// How the learning rate falls.
        pub schedule: Schedule,
        /// Steps over which the learning rate rises from 0.
        pub warmup_steps: u64,
        /// AdamW's betas.
        pub betas: [f64; 2],
        /// AdamW's epsilon.
        pub epsilon: f64,
        /// Decoupled weight decay.
        pub weight_decay: f64,
        /// Gradients are scaled down to at most this global norm; 0 turns it off.
        pub max_grad_norm: f64,
        /// Seeds order, initialisation and dropout.
        pub seed: u64,
        /// Evaluate every so many steps; 0: before and after only.
        pub eval_every_steps: u64,
        /// Activation memory: keep everything, or recompute a layer in its backward pass.
        pub recompute: Recompute,
        /// What a worker's step may take, on a card of its memory: `auto` for all that is there (half of it without a card),
        /// or a size such as `8GiB` (`GiB`, `MiB`, `GB`, `MB`). Base, adapter, optimizer, activations and scratch count; what
        /// does not fit is computed again, then moved to the host's memory. `shanty plan` shows what comes of it.
        pub memory: String,
        /// What becomes of a step whose loss or gradient is no number, or whose loss is a spike: `stop` fails the job,
        /// `skip` passes over its rows, which the ledger counts as `skipped`. The samples are named either way.
        pub on_bad_step: BadStep,
        /// A loss above so many times the usual one (the mean of the last steps, smoothed) is a spike; 0: none is.
        pub loss_spike: f64,
        /// With `skip`, go back to the newest checkpoint at least so many steps before the bad step, and pass over it on
        /// the way; 0: stay where the step before it left the adapter.
        pub rollback_steps: u64,
    }
}

impl TrainSpec {
    /// What a step may take, bytes; none for `auto`, and where [`Self::memory`] is no size, which validation refuses.
    pub fn memory_limit(&self) -> Option<u64> {
        bytes_of(&self.memory)
    }
}

impl Default for TrainSpec {
    fn default() -> Self {
        Self {
            epochs: 1,
            steps: None,
            global_batch_size: 32,
            micro_batch_size: None,
            learning_rate: None,
            schedule: Schedule::Cosine,
            warmup_steps: 0,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            seed: 17,
            eval_every_steps: 0,
            recompute: Recompute::Auto,
            memory: "auto".to_owned(),
            on_bad_step: BadStep::Stop,
            loss_spike: 0.0,
            rollback_steps: 0,
        }
    }
}

described! {
    /// `[checkpoint]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct CheckpointSpec {
        /// A folder, or a URL of an object store (`s3://bucket/prefix`, `gs://…`, `az://…`); `runs/NAME` when absent.
        /// Checkpoints and the finished adapter lie below it.
        pub store: Option<PathBuf>,
        /// The folder on each machine for the rest: prepared data, logs, the coordinator's state. `store` when absent, or
        /// `runs/NAME` where the store is a URL.
        pub run_folder: Option<PathBuf>,
        /// Write a checkpoint every so many steps; the last step always has one. 0: the last alone.
        pub every_steps: u64,
        /// How many checkpoints are kept: the newest ones.
        pub keep: usize,
        /// How many more are kept: those with the lowest loss on the held-out rows. Only checkpoints of steps that were
        /// evaluated can be among them, so `train.eval_every_steps` should divide `every_steps`, or the other way round.
        pub keep_best: usize,
    }
}

impl CheckpointSpec {
    /// The store, as a folder's path or a URL; `runs/NAME` where the job `name` names none.
    pub fn location(&self, name: &str) -> String {
        match &self.store {
            Some(store) => store.to_string_lossy().into_owned(),
            None => Path::new("runs").join(name).to_string_lossy().into_owned(),
        }
    }

    /// Whether the store is an object store, and no folder.
    pub fn is_remote(&self) -> bool {
        self.store.as_deref().is_some_and(is_url)
    }

    /// The folder on this machine of what does not go to the store.
    pub fn folder(&self, name: &str) -> PathBuf {
        let store = self.store.as_ref().filter(|store| !is_url(store));
        match self.run_folder.as_ref().or(store) {
            Some(folder) => folder.clone(),
            None => Path::new("runs").join(name),
        }
    }
}

/// Whether a path is a URL of something else than a folder of this machine.
pub(crate) fn is_url(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.contains("://") && !text.starts_with("file://"))
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { store: None, run_folder: None, every_steps: 50, keep: 3, keep_best: 0 }
    }
}

described! {
    /// `[cluster]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct ClusterSpec {
        /// How many workers train.
        pub workers: WorkerCount,
        /// Where workers compute.
        pub device: Device,
        /// How workers sum their gradients.
        pub collective: Collective,
        /// Whether what workers say to each other is encrypted. NCCL does not encrypt.
        pub encryption: Encryption,
        /// How gradients travel over TCP. Rounded ones are for slow links: what is rounded away is added to the next
        /// step, but steps are not equal to those of whole gradients.
        pub compression: Compression,
        /// Workers beyond `workers.max` that load the base and wait to take the place of one that is lost; all that have
        /// nothing else to do when absent.
        pub spares: Option<u32>,
        /// Let a waiting spare take the place of a member that the others wait for step after step.
        pub replace_stragglers: bool,
        /// Compare the adapters of all workers every so many steps, and before each checkpoint; 0: before checkpoints
        /// alone.
        pub compare_every_steps: u64,
        /// From 0 to 100. A job of a higher priority is next, and jobs of a lower one make room for it: they write a
        /// checkpoint, and go on from there when their turn comes again.
        pub priority: u32,
        /// For whom the job runs. Jobs of one priority are dealt out fairly among owners: next is that of the owner who
        /// has the fewest workers. `shanty submit` fills in the user's name.
        pub owner: Option<String>,
        /// How often all of its workers may be lost in a row, without a new step in between, and the job is tried again;
        /// 2 when absent. The pauses between tries grow.
        pub retries: Option<u32>,
    }

    /// How gradients are summed.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Collective {
        /// NCCL where every worker has a GPU of its own and the same NCCL, else TCP.
        #[default]
        Auto,
        /// NCCL, or an error.
        Nccl,
        /// TCP, also between GPUs.
        Tcp,
    }

    /// Whether TCP links between workers are encrypted.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Encryption {
        /// Unless all workers are on one machine and meet at its loopback address.
        #[default]
        Auto,
        /// Always.
        On,
        /// Never, but where the coordinator speaks TLS: there links that leave a machine are encrypted all the same.
        Off,
    }

    /// How gradients travel.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Compression {
        /// Whole: 4 bytes a number.
        #[default]
        Off,
        /// As bf16: 2 bytes.
        Bf16,
        /// As integers with a scale for each 256: 1 byte.
        Int8,
    }

    /// Bounds on the number of workers.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct WorkerCount {
        /// Fewer than this and the job waits.
        pub min: u32,
        /// More than this are not used.
        pub max: u32,
    }
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            workers: WorkerCount::default(),
            device: Device::default(),
            collective: Collective::default(),
            encryption: Encryption::default(),
            compression: Compression::default(),
            spares: None,
            replace_stragglers: false,
            compare_every_steps: 100,
            priority: 50,
            owner: None,
            retries: None,
        }
    }
}

impl Default for WorkerCount {
    fn default() -> Self {
        Self { min: 1, max: 1 }
    }
}

described! {
    /// Where a worker computes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Device {
        /// A GPU where there is one, else the CPU.
        #[default]
        Auto,
        /// The CPU.
        Cpu,
        /// A GPU, or an error.
        Cuda,
    }

    /// `[sample]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct SampleSpec {
        /// Continued by base and adapter at the end of `shanty run`; nothing is shown when absent.
        pub prompt: Option<String>,
        /// Length of the continuation.
        pub max_tokens: usize,
    }
}

impl Default for SampleSpec {
    fn default() -> Self {
        Self { prompt: None, max_tokens: 60 }
    }
}

fn yes() -> bool {
    true
}

fn default_max_length() -> usize {
    2048
}
