//! What is trained: packed rows made of segments.

use std::{fmt, ops::Range, path::PathBuf};

use serde::{Deserialize, Serialize};

/// A part of a job's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    Eval,
}

impl Split {
    /// `train` or `eval`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Eval => "eval",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One sample's place in a row. Segments are laid end to end and fill the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Number of the sample in the split, in input order from 0; keys its dropout masks.
    pub sample_id: u64,
    /// Tokens of the segment, at least 2.
    pub length: u32,
}

/// A packed row: the unit of order, lease and batch. Holds no padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Number of the row in the split, from 0.
    pub id: u64,
    /// Tokens of all segments, at most `max_length`.
    pub token_ids: Vec<u32>,
    /// The samples that the tokens are of. Attention and positions begin anew with each.
    pub segments: Vec<Segment>,
    /// Positions in the row whose token is a target, ascending and disjoint. The target at position `i` is
    /// predicted from position `i - 1` of the same segment; a segment's first token never is one.
    pub trained: Vec<Range<u32>>,
}

impl Row {
    /// How many tokens are targets; at least 1.
    pub fn trained_tokens(&self) -> u32 {
        self.trained.iter().map(|range| range.end - range.start).sum()
    }
}

/// Where a sample comes from, for logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleSource {
    /// Number of the sample in the split.
    pub sample_id: u64,
    /// The data file.
    pub file: PathBuf,
    /// Line of the file (of a Parquet file: the row), from 1.
    pub line: u64,
    /// Which piece of a document that was cut, from 0.
    pub part: u32,
}

impl fmt::Display for SampleSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)?;
        match self.part {
            0 => Ok(()),
            part => write!(f, " (piece {})", part + 1),
        }
    }
}
