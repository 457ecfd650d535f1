//! The form of the rows, as the job file names it.

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
}

impl Format {
    /// All words, in the order of the variants.
    pub const NAMES: [&'static str; 4] = ["auto", "text", "prompt-completion", "messages"];
}
