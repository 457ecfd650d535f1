//! What a prepared folder amounts to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{MixPart, Split, pack};

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
    /// The form that the rows have, a word of `data.format`; of several sources each form once, with ` + ` between.
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
    /// Samples that train an end token.
    #[serde(default)]
    pub samples_with_end: u64,
    /// How long records are, before anything is cut or left out; the shortest first, without empty buckets.
    #[serde(default)]
    pub lengths: Vec<LengthBucket>,
    /// Tokens of the longest record.
    #[serde(default)]
    pub longest: u64,
    /// Some of the records that were cut or left out, the first of each kind.
    #[serde(default)]
    pub examples: Vec<Example>,
    /// The sources, where there are several.
    #[serde(default)]
    pub sources: Vec<SourceSummary>,
}

/// Records of like length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthBucket {
    /// They have at most so many tokens, and more than the bucket before.
    pub up_to: u64,
    /// How many records.
    pub records: u64,
}

/// A record that was cut or left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// `empty`, `no_answer`, `unweighted`, `truncated_away` or `truncated`.
    pub what: String,
    /// The data file.
    pub file: PathBuf,
    /// Line of the file, from 1.
    pub line: u64,
    /// Tokens of the record.
    pub tokens: u64,
}

/// Figures of one source of several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceSummary {
    /// Path, glob or URL, as it was given.
    pub path: String,
    /// The form of its rows.
    pub form: String,
    /// Its weight, if sources are mixed by weight.
    pub weight: Option<f64>,
    /// Packed rows, which follow those of the sources before it.
    pub rows: u64,
    /// Rows of it that each epoch trains.
    pub rows_per_epoch: u64,
    /// Tokens in its rows.
    pub tokens: u64,
    /// Tokens that are targets.
    pub trained_tokens: u64,
}

/// Examples that are kept of each kind.
const EXAMPLES: usize = 3;

impl SplitSummary {
    /// How an epoch is dealt from the sources; empty where they are not weighted, and each row comes once an epoch.
    pub fn mix(&self) -> Vec<MixPart> {
        if self.sources.iter().all(|source| source.weight.is_none()) {
            return Vec::new();
        }
        let part =
            |source: &SourceSummary| MixPart { rows: source.rows, rows_per_epoch: source.rows_per_epoch };
        self.sources.iter().map(part).collect()
    }

    /// Counts a record by its length: four buckets an octave, from 8 tokens on.
    pub(crate) fn count_length(&mut self, tokens: u64) {
        let mut up_to = 8;
        while up_to < tokens {
            let octave = 1u64 << (63 - up_to.leading_zeros());
            up_to += (octave / 4).max(1);
        }
        self.longest = self.longest.max(tokens);
        match self.lengths.binary_search_by_key(&up_to, |bucket| bucket.up_to) {
            Ok(index) => self.lengths[index].records += 1,
            Err(index) => self.lengths.insert(index, LengthBucket { up_to, records: 1 }),
        }
    }

    /// Keeps a record as an example, if there are not enough of its kind.
    pub(crate) fn keep_example(&mut self, what: &str, file: &Path, line: u64, tokens: u64) {
        if self.examples.iter().filter(|example| example.what == what).count() < EXAMPLES {
            self.examples.push(Example { what: what.to_owned(), file: file.to_owned(), line, tokens });
        }
    }

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
    /// A conversation whose answers all have weight 0.
    #[serde(default)]
    pub unweighted: u64,
    /// Nothing of what would be trained lies within `max_length`.
    pub truncated_away: u64,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.empty + self.no_answer + self.unweighted + self.truncated_away
    }
}
