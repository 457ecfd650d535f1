//! Rows as the data part delivers them, and a micro-batch as the layers want it.
//!
//! A [`Row`] is a packed sequence: several segments (samples) one after the other. A [`PackedBatch`] lays the
//! rows of a micro-batch end to end without any padding, so that every operation works on one matrix of
//! `tokens` rows. Positions restart with each segment and no attention crosses a segment's border.

use std::ops::Range;

use crate::{
    engine::StepError,
    error::{Error, Result},
};

/// A sample inside a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Names the sample in the prepared data; part of the key of dropout.
    pub sample_id: u64,
    /// Tokens of the sample.
    pub length: u32,
}

/// A packed sequence: the unit of order, lease and batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Number of the row in the prepared data.
    pub id: u64,
    /// All tokens of all segments.
    pub token_ids: Vec<u32>,
    /// What the row is made of; the lengths add up to `token_ids.len()`.
    pub segments: Vec<Segment>,
    /// Positions in the row whose token is a target. It is predicted from the position before it, which must
    /// lie in the same segment: a segment's first token is never a target. Ascending, not overlapping.
    pub trained: Vec<Range<u32>>,
}

impl Row {
    /// A row of one segment whose tokens are all trained but the first, which nothing predicts.
    pub fn whole(id: u64, token_ids: Vec<u32>) -> Self {
        let length = token_ids.len() as u32;
        let trained = if length > 1 { std::iter::once(1..length).collect() } else { Vec::new() };
        Self { id, token_ids, segments: vec![Segment { sample_id: id, length }], trained }
    }

    /// How many tokens are trained.
    pub fn trained_tokens(&self) -> u64 {
        self.trained.iter().map(|range| u64::from(range.end.saturating_sub(range.start))).sum()
    }
}

/// A stretch of queries that attends to a stretch of keys, causally.
///
/// The last query sees the last key: query `i` sees keys `0 ..= i + keys - queries`. In training both are the
/// same rows; with a cache there are more keys than queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row of the queries.
    pub query_start: usize,
    /// Number of queries.
    pub queries: usize,
    /// First row of keys and values.
    pub key_start: usize,
    /// Number of keys, at least `queries`.
    pub keys: usize,
}

/// The rows of a micro-batch laid end to end. Its vectors are reused from one micro-batch to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids, one a token.
    pub token_ids: Vec<u32>,
    /// Position in the segment, one a token.
    pub positions: Vec<u32>,
    /// Sample, one a token.
    pub sample_ids: Vec<u64>,
    /// Where attention may look.
    pub spans: Vec<Span>,
    /// Rows of the final hidden state that predict a trained token.
    pub predicting: Vec<u32>,
    /// The token each of `predicting` must predict.
    pub targets: Vec<u32>,
}

impl PackedBatch {
    /// A batch whose vectors hold `tokens` tokens without growing.
    pub fn with_capacity(tokens: usize) -> Self {
        Self {
            token_ids: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            sample_ids: Vec::with_capacity(tokens),
            spans: Vec::with_capacity(tokens),
            predicting: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Forgets all tokens, keeps the memory.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.sample_ids.clear();
        self.spans.clear();
        self.predicting.clear();
        self.targets.clear();
    }

    /// Replaces the content by that of `from`; grows only where that is larger than ever before.
    pub fn clone_from_batch(&mut self, from: &Self) {
        self.token_ids.clone_from(&from.token_ids);
        self.positions.clone_from(&from.positions);
        self.sample_ids.clone_from(&from.sample_ids);
        self.spans.clone_from(&from.spans);
        self.predicting.clone_from(&from.predicting);
        self.targets.clone_from(&from.targets);
    }

    /// Replaces the content by `rows`.
    ///
    /// # Errors
    /// [`StepError::MalformedRow`] where segments do not cover a row, a trained range leaves it, or a trained token
    /// has no token of its own segment before it.
    pub fn fill(&mut self, rows: &[Row]) -> Result<()> {
        self.clear();
        rows.iter().try_for_each(|row| self.push(row))
    }

    fn push(&mut self, row: &Row) -> Result<()> {
        let malformed = |reason: &'static str| Error::from(StepError::MalformedRow { row: row.id, reason });
        let start = self.tokens();
        self.token_ids.extend_from_slice(&row.token_ids);
        for segment in &row.segments {
            let (length, query_start) = (segment.length as usize, self.positions.len());
            self.positions.extend(0..segment.length);
            self.sample_ids.extend(std::iter::repeat_n(segment.sample_id, length));
            if length > 0 {
                self.spans.push(Span { query_start, queries: length, key_start: query_start, keys: length });
            }
        }
        if self.positions.len() != self.token_ids.len() {
            return Err(malformed("the lengths of its segments do not add up to its tokens"));
        }
        let mut last_end = 0;
        for range in &row.trained {
            if range.start < last_end || range.end as usize > row.token_ids.len() {
                return Err(malformed("its trained ranges overlap, descend or leave the row"));
            }
            last_end = range.end;
            for position in range.clone() {
                let token = start + position as usize;
                if self.positions[token] == 0 {
                    return Err(malformed("the first token of a segment is marked as trained"));
                }
                self.predicting.push(token as u32 - 1);
                self.targets.push(self.token_ids[token]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed_row() -> Row {
        Row {
            id: 7,
            token_ids: vec![10, 11, 12, 20, 21],
            segments: vec![Segment { sample_id: 1, length: 3 }, Segment { sample_id: 2, length: 2 }],
            trained: vec![2..3, 4..5],
        }
    }

    #[test]
    fn positions_restart_and_targets_are_predicted_from_the_token_before() {
        let mut batch = PackedBatch::with_capacity(8);
        batch.fill(&[packed_row(), Row::whole(8, vec![30, 31])]).unwrap();
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 1]);
        assert_eq!(batch.sample_ids, [1, 1, 1, 2, 2, 8, 8]);
        assert_eq!(batch.predicting, [1, 3, 5]);
        assert_eq!(batch.targets, [12, 21, 31]);
        assert_eq!(batch.spans.len(), 3);
    }

    #[test]
    fn a_first_token_of_a_segment_cannot_be_trained() {
        let row = Row { trained: std::iter::once(3..4).collect(), ..packed_row() };
        let error = PackedBatch::default().fill(&[row]).unwrap_err();
        assert!(matches!(error, Error::Step(StepError::MalformedRow { row: 7, .. })));
    }

    #[test]
    fn segments_must_cover_the_row() {
        let row = Row { segments: vec![Segment { sample_id: 1, length: 3 }], ..packed_row() };
        assert!(PackedBatch::default().fill(&[row]).is_err());
    }
}
