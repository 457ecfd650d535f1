//! What a prepared folder amounts to.

use serde::{Deserialize, Serialize};

use crate::{Split, pack};

/// Figures of a prepared folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// BLAKE3 over rows, sample sources, options and tokenizer; hexadecimal. Equal hashes train the same rows.
    pub hash: String,
    /// BLAKE3 over the tokenizer's files and chat template; hexadecimal.
    pub tokenizer_hash: String,
    /// Longest row, tokens.
    pub max_length: u32,
    /// Whether several samples share a row.
    pub packing: bool,
    /// What is trained on.
    pub train: SplitSummary,
    /// What is held out.
    #[serde(default)]
    pub eval: Option<SplitSummary>,
    /// What a user should know before training on it, a sentence each.
    pub warnings: Vec<String>,
}

impl Summary {
    /// The figures of a split, if there is such data.
    pub fn split(&self, split: Split) -> Option<&SplitSummary> {
        match split {
            Split::Train => Some(&self.train),
            Split::Eval => self.eval.as_ref(),
        }
    }
}

/// Figures of one split.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitSummary {
    /// The form that the rows have: `text`, `prompt-completion` or `messages`.
    pub form: String,
    /// Data files.
    pub files: u64,
    /// Records of those files.
    pub records: u64,
    /// Packed rows.
    pub rows: u64,
    /// Samples in those rows; a record may become several (a cut document) or none (dropped).
    pub samples: u64,
    /// Tokens in those rows.
    pub tokens: u64,
    /// Tokens that are targets.
    pub trained_tokens: u64,
    /// Share of `rows × max_length` that holds no token, to six decimals (so that it is the same after a way through JSON).
    pub padding_fraction: f64,
    /// Records that were longer than `max_length` and lost their end.
    pub truncated: u64,
    /// Tokens that were lost that way.
    pub truncated_tokens: u64,
    /// Of those, tokens that would have been targets.
    pub truncated_trained_tokens: u64,
    /// Documents that were cut into several samples.
    pub cut: u64,
    /// Records whose prompt and completion meet inside a token (it is trained).
    pub merged_boundaries: u64,
    /// Records that became no sample, by reason.
    pub dropped: Dropped,
    /// Columns of the first record that are not read.
    #[serde(default)]
    pub ignored_columns: Vec<String>,
}

impl SplitSummary {
    /// Virtual tokens fill a row as others do.
    pub(crate) fn set_padding(&mut self, max_length: u32, virtual_tokens: u32) {
        let tokens = self.tokens + self.samples * u64::from(virtual_tokens);
        let exact = pack::padding_fraction(self.rows, tokens, max_length);
        self.padding_fraction = (exact * 1e6).round() / 1e6;
    }
}

/// Records that became no sample, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// No text, or a single token.
    pub empty: u64,
    /// A conversation in which the assistant says nothing.
    pub no_answer: u64,
    /// Nothing of what would be trained lies within `max_length`.
    pub truncated_away: u64,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.empty + self.no_answer + self.truncated_away
    }
}
