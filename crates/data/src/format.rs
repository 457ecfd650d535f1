//! What the job file says of the rows: their form, what of them is trained, and whether the chat template is used.

use serde::{Deserialize, Serialize};

/// Form of the rows; the words of `data.format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Detected from the columns of the first record.
    #[default]
    Auto,
    /// `text`: every token is trained.
    Text,
    /// `prompt`, `completion`: the completion is trained.
    PromptCompletion,
    /// `messages`: what the assistant says is trained.
    Messages,
    /// `instruction`, `output`, perhaps `input`: the output is trained.
    Alpaca,
    /// `conversations` of `from` and `value`: what `gpt` says is trained.
    Sharegpt,
}

impl Format {
    /// All words, in the order of the variants.
    pub const NAMES: [&'static str; 6] =
        ["auto", "text", "prompt-completion", "messages", "alpaca", "sharegpt"];
}

/// What of a row is trained; the words of `data.train_on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainOn {
    /// What the model is to say: completions, outputs, the assistant's messages.
    #[default]
    Answers,
    /// Prompts and what others say, too: every token but the first.
    All,
}

/// Whether rows become conversations by the model's chat template; the words of `data.chat_template`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateUse {
    /// Where rows are conversations, and for `alpaca` where the model has a template.
    #[default]
    Auto,
    /// For all forms but `text`.
    Model,
    /// For none: `alpaca` gets Stanford's text.
    None,
}
