//! The job file: what to fine-tune, on what, how.
//!
//! Field names are those of Hugging Face PEFT and transformers where they have the thing.
//! The doc comments here are the text of `docs/reference/job.md`.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::shape::{Describe, Shape, described};

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
        /// A folder in Hugging Face layout: `config.json`, safetensors, tokenizer.
        pub model: PathBuf,
        /// How the frozen weights are kept.
        #[serde(default)]
        pub quantization: Quantization,
        /// Whether block scales are quantised too (8 bits, blocks of 256), as QLoRA does.
        #[serde(default = "yes")]
        pub double_quantization: bool,
        /// How many workers share one copy of the base.
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

    /// How many workers share one copy of the base.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Shard {
        /// Replicate where it fits.
        #[default]
        Auto,
        /// Every worker holds all of it.
        Replicate,
    }

    /// `[adapter]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(non_snake_case, reason = "`deltaT` is PEFT's name")]
    pub struct AdapterSpec {
        /// How the base is adapted.
        #[serde(default)]
        pub method: Method,
        /// Rank of the update.
        #[serde(default = "default_r")]
        pub r: usize,
        /// The update is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        #[serde(default = "default_lora_alpha")]
        pub lora_alpha: f64,
        /// Share of the adapter's inputs set to zero while training.
        #[serde(default)]
        pub lora_dropout: f32,
        /// Whether the scale is rank-stabilised (rsLoRA): `lora_alpha / sqrt(r)`.
        #[serde(default)]
        pub use_rslora: bool,
        /// `"all-linear"`, a list of name suffixes, or a regular expression that must match the whole name. IA3 takes PEFT's
        /// choice for the family where it is left out (keys or queries, values, and the feed-forward's second layer).
        #[serde(default)]
        pub target_modules: Option<TargetModules>,
        /// Modules that are not adapted although `target_modules` names them: a list or a regular expression.
        #[serde(default)]
        pub exclude_modules: Option<TargetModules>,
        /// Only modules of these layers, from 0. Goes with a list of names in `target_modules`.
        #[serde(default)]
        pub layers_to_transform: Option<Vec<u32>>,
        /// What the list of layers is called in the model, where it is not `layers`.
        #[serde(default)]
        pub layers_pattern: Option<TargetModules>,
        /// Other ranks for some modules: `{ "q_proj" = 32, "layers.0.mlp.up_proj" = 4 }`. The first name, in alphabetical order,
        /// that is the end of a module's name (or a regular expression for it) counts.
        #[serde(default)]
        pub rank_pattern: Option<BTreeMap<String, f64>>,
        /// Other `lora_alpha` for some modules; names as in `rank_pattern`.
        #[serde(default)]
        pub alpha_pattern: Option<BTreeMap<String, f64>>,
        /// Modules that are trained whole and saved with the adapter, by the end of their names: `["lm_head",
        /// "embed_tokens", "norm"]`. They make the adapter, and what workers send each other at every step, as large as they are.
        #[serde(default)]
        pub modules_to_save: Option<TargetModules>,
        /// Tokens whose rows of the embedding are trained, for example those that were added for a chat template.
        #[serde(default)]
        pub trainable_token_indices: Option<Vec<u32>>,
        /// Which biases of the base are trained. Such an adapter changes the base for everyone who loads it.
        #[serde(default)]
        pub bias: Bias,
        /// Whether the second factor of the update has a bias of its own.
        #[serde(default)]
        pub lora_bias: bool,
        /// Whether the lengths of the adapted rows are trained besides (DoRA); the same as `method = "dora"`. Costs some 20 to
        /// 60 % of the speed.
        #[serde(default)]
        pub use_dora: bool,
        /// How the update begins.
        #[serde(default)]
        pub init_lora_weights: LoraInit,
        /// LoRA+: the second factor learns at so many times the rate of the first. 16 is what its authors found to work
        /// (arXiv 2402.12354); lower the learning rate with it.
        #[serde(default)]
        pub loraplus_lr_ratio: Option<f64>,
        /// LoRA+: peak learning rate of an adapted token embedding.
        #[serde(default = "default_loraplus_lr_embedding")]
        pub loraplus_lr_embedding: f64,
        /// IA3: those of the adapted modules whose input is scaled instead of their output.
        #[serde(default)]
        pub feedforward_modules: Option<TargetModules>,
        /// AdaLoRA: rank of every update at first. The usual is 1.5 times `target_r`.
        #[serde(default = "default_init_r")]
        pub init_r: usize,
        /// AdaLoRA: rank that is left in the end, on average.
        #[serde(default = "default_target_r")]
        pub target_r: usize,
        /// AdaLoRA: steps before pruning begins; a tenth of all steps where it is left out, as its authors have it on MNLI.
        #[serde(default)]
        pub tinit: Option<u64>,
        /// AdaLoRA: steps after pruning has ended; half of all steps where it is left out, as its authors have it on MNLI.
        #[serde(default)]
        pub tfinal: Option<u64>,
        /// AdaLoRA: steps between two prunings.
        #[serde(default = "default_delta_t")]
        pub deltaT: u64,
        /// AdaLoRA: smoothing of the importance of a direction.
        #[serde(default = "default_adalora_beta")]
        pub beta1: f64,
        /// AdaLoRA: smoothing of how uncertain that is.
        #[serde(default = "default_adalora_beta")]
        pub beta2: f64,
        /// AdaLoRA: weight of the term that keeps directions apart; its authors use 0.1 to 0.5.
        #[serde(default = "default_orth_reg_weight")]
        pub orth_reg_weight: f64,
        /// Virtual tokens in front of every sample: `prefix_tuning`, `prompt_tuning`, `p_tuning`. They count towards
        /// `data.max_length`. TRL's guide names 8 to 20.
        #[serde(default = "default_num_virtual_tokens")]
        pub num_virtual_tokens: usize,
        /// Prefix tuning: whether the prefix is trained through a small network.
        #[serde(default)]
        pub prefix_projection: bool,
        /// Prefix tuning: how the prefix begins.
        #[serde(default)]
        pub prefix_init: PrefixInit,
        /// Prefix tuning from a text: the text, best one that tells of the task. Cut or repeated to the length of the
        /// prefix.
        #[serde(default = "default_prefix_init_text")]
        pub prefix_init_text: String,
        /// Prompt tuning: how the prompt begins. `TEXT` where `prompt_tuning_init_text` is given, else `SAMPLE_VOCAB`.
        #[serde(default)]
        pub prompt_tuning_init: Option<PromptTuningInit>,
        /// Prompt tuning from a text: the text, best one that tells of the task. Cut or repeated to the length of the prompt.
        #[serde(default)]
        pub prompt_tuning_init_text: Option<String>,
        /// P-tuning: the network that makes the prompt.
        #[serde(default)]
        pub encoder_reparameterization_type: PromptEncoder,
        /// P-tuning, and prefix tuning with `prefix_projection`: width of the network. The width of a token where it is
        /// left out, as in PEFT.
        #[serde(default)]
        pub encoder_hidden_size: Option<usize>,
        /// P-tuning by `LSTM`: its layers.
        #[serde(default = "default_encoder_num_layers")]
        pub encoder_num_layers: usize,
        /// P-tuning by `LSTM`: share of numbers set to zero between its layers while training.
        #[serde(default)]
        pub encoder_dropout: f32,
    }

    /// The method of fine-tuning.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Method {
        /// Low-rank adaptation (arXiv 2106.09685).
        #[default]
        Lora,
        /// LoRA that trains the lengths of the adapted rows besides (arXiv 2402.09353).
        Dora,
        /// Trained scales of keys, values and feed-forward activations: very few parameters (arXiv 2205.05638).
        Ia3,
        /// LoRA whose rank is pruned where it matters least while it is trained (arXiv 2303.10512).
        Adalora,
        /// Trained keys and values in every layer, ahead of those of the text.
        PrefixTuning,
        /// Trained rows ahead of the token embeddings.
        PromptTuning,
        /// Rows ahead of the token embeddings that a small network makes.
        PTuning,
    }

    /// Which biases of the base are trained.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Bias {
        /// None.
        #[default]
        None,
        /// All that the base has.
        All,
        /// Those of adapted modules.
        LoraOnly,
    }

    /// How the update of LoRA begins.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum LoraInit {
        /// At zero: the first factor uniform, the second 0. PEFT's `true`.
        #[default]
        Default,
        /// At zero: the first factor normal, the second 0.
        Gaussian,
        /// Both factors at random: for tests. PEFT's `false`.
        Random,
        /// As the largest singular directions of each weight; the base keeps the rest (PiSSA, arXiv 2404.02948). Computed once;
        /// the adapter is saved for the unchanged base, with twice the rank.
        Pissa,
        /// As an orthonormal part of each weight; the base keeps the rest (OLoRA, arXiv 2406.01775). Computed once; the adapter
        /// is saved for the unchanged base, with twice the rank.
        Olora,
        /// As what 4 bits lose of each weight (LoftQ, arXiv 2310.08659). Computed once; needs a base in 16 bits on disk and
        /// `quantization = "nf4"`.
        Loftq,
    }

    /// How a prefix begins.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum PrefixInit {
        /// As the keys and values that the base computes for a text: trains far better than the others (41.6 against
        /// 35.8 and 18.6 % in PEFT's comparison, Llama-3.2-3B on MetaMathQA).
        #[default]
        Text,
        /// All zero: PEFT's `init_weights = "zero"`.
        Zero,
        /// At random, as PEFT does unless told otherwise.
        Random,
    }

    /// How a prompt begins, in PEFT's words.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
    pub enum PromptTuningInit {
        /// As the embeddings of a text's tokens.
        Text,
        /// As the embeddings of tokens drawn from the vocabulary.
        SampleVocab,
        /// At random, far from all embeddings: trains badly (23.4 against 34.3 % in PEFT's comparison).
        Random,
    }

    /// The network of p-tuning.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "UPPERCASE")]
    pub enum PromptEncoder {
        /// Three linear layers.
        #[default]
        Mlp,
        /// A bidirectional LSTM and two linear layers.
        Lstm,
    }
}

/// Which modules get an adapter. Rules as in PEFT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `"all-linear"` (every linear layer but the output head) or a regular expression.
    Pattern(String),
    /// Names, or the last parts of names.
    Names(Vec<String>),
}

impl Describe for TargetModules {
    fn shape() -> Shape {
        Shape::TextOrList
    }
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Pattern("all-linear".to_owned())
    }
}

impl Default for AdapterSpec {
    fn default() -> Self {
        Self {
            method: Method::Lora,
            r: default_r(),
            lora_alpha: default_lora_alpha(),
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: None,
            alpha_pattern: None,
            modules_to_save: None,
            trainable_token_indices: None,
            bias: Bias::None,
            lora_bias: false,
            use_dora: false,
            init_lora_weights: LoraInit::Default,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: default_loraplus_lr_embedding(),
            feedforward_modules: None,
            init_r: default_init_r(),
            target_r: default_target_r(),
            tinit: None,
            tfinal: None,
            deltaT: default_delta_t(),
            beta1: default_adalora_beta(),
            beta2: default_adalora_beta(),
            orth_reg_weight: default_orth_reg_weight(),
            num_virtual_tokens: default_num_virtual_tokens(),
            prefix_projection: false,
            prefix_init: PrefixInit::Text,
            prefix_init_text: default_prefix_init_text(),
            prompt_tuning_init: None,
            prompt_tuning_init_text: None,
            encoder_reparameterization_type: PromptEncoder::Mlp,
            encoder_hidden_size: None,
            encoder_num_layers: default_encoder_num_layers(),
            encoder_dropout: 0.0,
        }
    }
}

described! {
    /// `[data]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct DataSpec {
        /// Training data: JSONL or Parquet; a path or a glob.
        pub train: String,
        /// Held-out data, evaluated before, after, and every `train.eval_every_steps`.
        #[serde(default)]
        pub eval: Option<String>,
        /// Form of the rows; `auto` detects it from the columns.
        #[serde(default)]
        pub format: Format,
        /// Longest row, tokens, an adapter's virtual tokens included. Longer samples are truncated and counted; `text` is
        /// cut into samples.
        #[serde(default = "default_max_length")]
        pub max_length: usize,
        /// Whether several samples share a row (no attention between them).
        #[serde(default = "yes")]
        pub packing: bool,
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
        /// A column `messages`: what the assistant says is trained.
        Messages,
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
    }
}

impl TrainSpec {
    /// What a step may take, bytes; none for `auto`, and where [`Self::memory`] is no size, which validation refuses.
    pub fn memory_limit(&self) -> Option<u64> {
        bytes_of(&self.memory)
    }
}

/// The bytes of `8GiB`, `512 MiB`, `7.5GB`.
pub(crate) fn bytes_of(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "GiB" => 1_u64 << 30,
        "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "MB" => 1_000_000,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    let bytes = number * factor as f64;
    (bytes.is_finite() && bytes >= 1.0).then_some(bytes as u64)
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
        }
    }
}

described! {
    /// How the learning rate falls after the warm-up, as transformers defines them.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Schedule {
        /// It stays where it is.
        Constant,
        /// It falls to 0 in a straight line.
        Linear,
        /// It falls to 0 along half a cosine.
        #[default]
        Cosine,
    }

    /// What becomes of activations between forward and backward.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Recompute {
        /// Decided by the memory that is there.
        #[default]
        Auto,
        /// Everything is kept: fastest.
        Never,
        /// Layer inputs are kept, the rest is computed again: least memory.
        Layers,
    }

    /// `[checkpoint]`
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct CheckpointSpec {
        /// A folder; `runs/NAME` when absent. Everything of the run lies below it.
        pub store: Option<PathBuf>,
        /// Write a checkpoint every so many steps; the last step always has one. 0: the last alone.
        pub every_steps: u64,
        /// How many checkpoints are kept.
        pub keep: usize,
    }
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { store: None, every_steps: 50, keep: 3 }
    }
}

described! {
    /// `[cluster]`
    #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct ClusterSpec {
        /// How many workers train.
        pub workers: WorkerCount,
        /// Where workers compute.
        pub device: Device,
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

fn default_loraplus_lr_embedding() -> f64 {
    1e-6
}

fn default_init_r() -> usize {
    12
}

fn default_target_r() -> usize {
    8
}

fn default_delta_t() -> u64 {
    1
}

fn default_adalora_beta() -> f64 {
    0.85
}

fn default_orth_reg_weight() -> f64 {
    0.5
}

fn default_r() -> usize {
    16
}

fn default_lora_alpha() -> f64 {
    32.0
}

fn default_num_virtual_tokens() -> usize {
    20
}

fn default_prefix_init_text() -> String {
    "Read what follows with care. Answer in the same style, to the point, and without mistakes.".to_owned()
}

fn default_encoder_num_layers() -> usize {
    2
}

fn default_max_length() -> usize {
    2048
}
