//! `[adapter]`: what is trained.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::shape::{Describe, Shape, described};

described! {
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
        /// "embed_tokens"]`; `"norm"` is every norm. They make the adapter, and what workers send each other at every step, as large as they are.
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

fn default_adalora_beta() -> f64 {
    0.85
}

fn default_delta_t() -> u64 {
    1
}

fn default_encoder_num_layers() -> usize {
    2
}

fn default_init_r() -> usize {
    12
}

fn default_lora_alpha() -> f64 {
    32.0
}

fn default_loraplus_lr_embedding() -> f64 {
    1e-6
}

fn default_num_virtual_tokens() -> usize {
    20
}

fn default_orth_reg_weight() -> f64 {
    0.5
}

fn default_prefix_init_text() -> String {
    "Read what follows with care. Answer in the same style, to the point, and without mistakes.".to_owned()
}

fn default_r() -> usize {
    16
}

fn default_target_r() -> usize {
    8
}
