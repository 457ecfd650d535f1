//! Rows as the data part delivers them, and a micro-batch as the layers want it.
//!
//! A [`Row`] is a packed sequence: several segments (samples) one after the other. A [`PackedBatch`] lays the
//! rows of a micro-batch end to end without any padding, so that every operation works on one matrix of
//! `tokens` rows. Positions restart with each segment and no attention crosses a segment's border.
//!
//! Where an adapter puts [`VirtualTokens`] in front of the text, every segment gets its own: they take the positions
//! `0 .. count`, the segment's tokens those from `count` on.

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
    /// lie in the same segment: a segment's first token is a target only where an adapter puts rows before it.
    /// Ascending, not overlapping.
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

/// Virtual tokens that an adapter puts in front of every segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VirtualTokens {
    /// None.
    #[default]
    None,
    /// So many rows before the token embeddings, which pass through the model as tokens do. The last of them
    /// predicts the segment's first token.
    Rows(usize),
    /// So many keys and values in every layer, for which the batch has no rows.
    Keys(usize),
}

impl VirtualTokens {
    /// How many there are in front of a segment: positions that its tokens move up.
    pub fn count(self) -> usize {
        match self {
            Self::None => 0,
            Self::Rows(count) | Self::Keys(count) => count,
        }
    }

    /// Rows that the batch has in front of a segment.
    pub fn rows(self) -> usize {
        match self {
            Self::Rows(count) => count,
            Self::None | Self::Keys(_) => 0,
        }
    }

    /// Keys in front of a segment without a row of their own.
    pub fn keys(self) -> usize {
        match self {
            Self::Keys(count) => count,
            Self::None | Self::Rows(_) => 0,
        }
    }

    /// Positions that a row takes, those of its segments' virtual tokens included.
    pub fn positions(self, row: &Row) -> usize {
        let segments = row.segments.iter().filter(|segment| segment.length > 0).count();
        row.token_ids.len() + segments * self.count()
    }
}

/// A stretch of queries that attends to a stretch of keys, causally.
///
/// The last query sees the last key: query `i` sees keys `0 ..= i + keys - queries`. In training both are the
/// same rows, or there are virtual keys ahead of them; with a cache there are more keys than queries.
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
    /// Token ids, one a row; 0 where a row is a virtual token's.
    pub token_ids: Vec<u32>,
    /// Position in the segment, behind its virtual tokens; one a row.
    pub positions: Vec<u32>,
    /// Sample, one a row.
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

    /// Number of rows: tokens, and virtual tokens that have one.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Number of keys: rows, and virtual keys ahead of them.
    pub fn keys(&self) -> usize {
        self.spans.last().map_or(0, |span| span.key_start + span.keys)
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
    /// As [`PackedBatch::fill_behind`].
    pub fn fill(&mut self, rows: &[Row]) -> Result<()> {
        self.fill_behind(VirtualTokens::None, rows)
    }

    /// Replaces the content by `rows`, with `virtual_tokens` in front of every segment.
    ///
    /// # Errors
    /// [`StepError::MalformedRow`] where segments do not cover a row, a trained range leaves it, or a trained token
    /// has nothing of its own segment before it.
    pub fn fill_behind(&mut self, virtual_tokens: VirtualTokens, rows: &[Row]) -> Result<()> {
        self.clear();
        rows.iter().try_for_each(|row| self.push(row, virtual_tokens))
    }

    fn push(&mut self, row: &Row, virtual_tokens: VirtualTokens) -> Result<()> {
        let malformed = |reason: &'static str| Error::from(StepError::MalformedRow { row: row.id, reason });
        let covered: u64 = row.segments.iter().map(|segment| u64::from(segment.length)).sum();
        if covered != row.token_ids.len() as u64 {
            return Err(malformed("the lengths of its segments do not add up to its tokens"));
        }
        let (ahead, start) = (virtual_tokens.rows(), self.tokens());
        let segments = || row.segments.iter().filter(|segment| segment.length > 0);
        let mut from = 0;
        for segment in segments() {
            let (length, query_start, key_start) = (segment.length as usize, self.tokens(), self.keys());
            let queries = ahead + length;
            self.token_ids.extend(std::iter::repeat_n(0, ahead));
            self.token_ids.extend_from_slice(&row.token_ids[from..from + length]);
            from += length;
            let first = virtual_tokens.keys() as u32;
            self.positions.extend(first..first + queries as u32);
            self.sample_ids.extend(std::iter::repeat_n(segment.sample_id, queries));
            self.spans.push(Span { query_start, queries, key_start, keys: virtual_tokens.count() + length });
        }
        let mut segments = segments();
        // The segment at hand: its first token and the one behind its last, and what the row's rows moved up by.
        let (mut first, mut end, mut shift) = (0, 0, start);
        let mut last_end = 0;
        for range in &row.trained {
            if range.start < last_end || range.end as usize > row.token_ids.len() {
                return Err(malformed("its trained ranges overlap, descend or leave the row"));
            }
            last_end = range.end;
            for position in range.clone() {
                while position >= end {
                    let Some(segment) = segments.next() else { break };
                    (first, end, shift) = (end, end + segment.length, shift + ahead);
                }
                if position == first && ahead == 0 {
                    return Err(malformed("the first token of a segment is marked as trained"));
                }
                let token = shift + position as usize;
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

    #[test]
    fn every_segment_gets_virtual_rows_and_the_last_of_them_predicts_its_first_token() {
        let mut batch = PackedBatch::with_capacity(16);
        let row = Row { trained: vec![0..1, 2..5], ..packed_row() };
        batch.fill_behind(VirtualTokens::Rows(2), &[row, Row::whole(8, vec![30, 31])]).unwrap();
        assert_eq!(batch.token_ids, [0, 0, 10, 11, 12, 0, 0, 20, 21, 0, 0, 30, 31]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]);
        assert_eq!(batch.sample_ids, [1, 1, 1, 1, 1, 2, 2, 2, 2, 8, 8, 8, 8]);
        assert_eq!(batch.predicting, [1, 3, 6, 7, 11]);
        assert_eq!(batch.targets, [10, 12, 20, 21, 31]);
        let span =
            |start, length| Span { query_start: start, queries: length, key_start: start, keys: length };
        assert_eq!(batch.spans, [span(0, 5), span(5, 4), span(9, 4)]);
        assert_eq!(batch.keys(), 13);
    }

    #[test]
    fn virtual_keys_have_no_rows_but_move_the_positions_up() {
        let mut batch = PackedBatch::with_capacity(16);
        batch.fill_behind(VirtualTokens::Keys(2), &[packed_row(), Row::whole(8, vec![30, 31])]).unwrap();
        assert_eq!(batch.token_ids, [10, 11, 12, 20, 21, 30, 31]);
        assert_eq!(batch.positions, [2, 3, 4, 2, 3, 2, 3]);
        assert_eq!(batch.predicting, [1, 3, 5]);
        let span =
            |query_start, queries, key_start| Span { query_start, queries, key_start, keys: queries + 2 };
        assert_eq!(batch.spans, [span(0, 3, 0), span(3, 2, 5), span(5, 2, 9)]);
        assert_eq!(batch.keys(), 13);
        assert_eq!(VirtualTokens::Keys(2).positions(&packed_row()), 9);
    }

    #[test]
    fn a_first_token_behind_virtual_keys_has_nothing_that_predicts_it() {
        let row = Row { trained: std::iter::once(3..4).collect(), ..packed_row() };
        assert!(PackedBatch::default().fill_behind(VirtualTokens::Keys(4), &[row]).is_err());
    }
}
