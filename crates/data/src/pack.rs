//! Puts samples into rows: best fit within a bounded window of open rows, in input order.
//!
//! A sample goes into the open row that it fills best. If it fits into none, a row is opened, and when the window is full the
//! fullest one is closed. What is built depends on the samples' lengths and order alone.

use std::ops::Range;

use crate::{Row, Segment, sample::Sample};

/// Open rows at a time. More fill rows better and hold more memory: `WINDOW × max_length` tokens at most.
const WINDOW: usize = 128;
/// A row with less room than this is closed: no sample is shorter.
const SHORTEST: usize = 2;

/// Puts samples into rows.
pub(crate) struct Packer {
    max_length: usize,
    /// What each sample takes up besides its tokens.
    virtual_tokens: usize,
    packing: bool,
    open: Vec<Row>,
    next_row: u64,
    next_sample: u64,
}

impl Packer {
    pub(crate) fn new(max_length: u32, packing: bool) -> Self {
        let (max_length, virtual_tokens) = (max_length as usize, 0);
        Self { max_length, virtual_tokens, packing, open: Vec::new(), next_row: 0, next_sample: 0 }
    }

    /// Leaves room for so many virtual tokens in front of every sample; samples are that much shorter than a row.
    pub(crate) fn with_virtual_tokens(self, count: u32) -> Self {
        Self { virtual_tokens: count as usize, ..self }
    }

    /// Takes the next sample; gives a row if one is full now.
    pub(crate) fn push(&mut self, sample: Sample) -> Option<Row> {
        let length = sample.ids.len() + self.virtual_tokens;
        debug_assert!(sample.ids.len() >= SHORTEST && length <= self.max_length);
        let best = (0..self.open.len())
            .filter(|index| self.room(*index) >= length)
            .min_by_key(|index| self.room(*index));
        let index = match best {
            Some(index) => index,
            None => {
                self.open.push(Row {
                    id: 0,
                    token_ids: Vec::new(),
                    segments: Vec::new(),
                    trained: Vec::new(),
                });
                self.open.len() - 1
            }
        };
        append(&mut self.open[index], self.next_sample, sample);
        self.next_sample += 1;
        if !self.packing || self.room(index) < SHORTEST + self.virtual_tokens {
            return Some(self.close(index));
        }
        if self.open.len() > WINDOW {
            let fullest = (0..self.open.len()).min_by_key(|index| self.room(*index)).unwrap_or(index);
            return Some(self.close(fullest));
        }
        None
    }

    /// Closes a row that is still open, the oldest first; nothing when all are closed.
    pub(crate) fn finish(&mut self) -> Option<Row> {
        (!self.open.is_empty()).then(|| self.close(0))
    }

    fn room(&self, index: usize) -> usize {
        let row = &self.open[index];
        self.max_length - row.token_ids.len() - row.segments.len() * self.virtual_tokens
    }

    fn close(&mut self, index: usize) -> Row {
        let mut row = self.open.remove(index);
        row.id = self.next_row;
        self.next_row += 1;
        row
    }
}

fn append(row: &mut Row, sample_id: u64, sample: Sample) {
    let start = row.token_ids.len() as u32;
    row.segments.push(Segment { sample_id, length: sample.ids.len() as u32 });
    row.token_ids.extend(sample.ids);
    let moved = |range: Range<u32>| range.start + start..range.end + start;
    row.trained.extend(sample.trained.into_iter().map(moved));
}

/// Share of `rows × max_length` that holds no token.
pub(crate) fn padding_fraction(rows: u64, tokens: u64, max_length: u32) -> f64 {
    match rows * u64::from(max_length) {
        0 => 0.0,
        room => 1.0 - tokens as f64 / room as f64,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pack(samples: &[Sample], max_length: u32, packing: bool) -> Vec<Row> {
        let mut packer = Packer::new(max_length, packing);
        let mut rows: Vec<Row> = samples.iter().filter_map(|sample| packer.push(sample.clone())).collect();
        rows.extend(std::iter::from_fn(|| packer.finish()));
        rows
    }

    fn sample(length: usize, first: u32) -> Sample {
        Sample { ids: (first..first + length as u32).collect(), trained: vec![1..length as u32] }
    }

    proptest! {
        #[test]
        fn packing_loses_no_token(
            lengths in prop::collection::vec(2usize..=32, 1..600), max_length in 32u32..100, packing: bool,
        ) {
            let mut first = 0;
            let samples: Vec<Sample> = lengths.iter().map(|length| {
                first += 100;
                sample(*length, first)
            }).collect();
            let rows = pack(&samples, max_length, packing);
            let mut seen = vec![false; samples.len()];
            for (index, row) in rows.iter().enumerate() {
                prop_assert_eq!(row.id, index as u64);
                prop_assert!(row.token_ids.len() <= max_length as usize);
                prop_assert!(packing || row.segments.len() == 1);
                let mut start = 0;
                let mut trained = Vec::new();
                for segment in &row.segments {
                    let sample = &samples[segment.sample_id as usize];
                    prop_assert!(!std::mem::replace(&mut seen[segment.sample_id as usize], true));
                    let end = start + segment.length as usize;
                    prop_assert_eq!(&row.token_ids[start..end], &*sample.ids);
                    trained.push(start as u32 + 1..end as u32);
                    start = end;
                }
                prop_assert_eq!(start, row.token_ids.len());
                prop_assert_eq!(&row.trained, &trained);
            }
            prop_assert!(seen.iter().all(|seen| *seen));
        }
    }

    #[test]
    fn virtual_tokens_of_every_sample_count_towards_the_row() {
        let mut packer = Packer::new(100, true).with_virtual_tokens(20);
        let mut rows: Vec<Row> = (0..50).filter_map(|_| packer.push(sample(25, 0))).collect();
        rows.extend(std::iter::from_fn(|| packer.finish()));
        // Two of 25 + 20, where four of 25 would fit.
        assert!(rows.iter().all(|row| row.segments.len() == 2), "{rows:?}");
        assert_eq!(rows.len(), 25);
        let mut packer = Packer::new(100, true).with_virtual_tokens(20);
        assert!(
            packer.push(sample(80, 0)).is_some(),
            "a row without room for a sample and its virtual tokens is full"
        );
    }

    #[test]
    fn window_stays_bounded() {
        let mut packer = Packer::new(100, true);
        for _ in 0..10_000 {
            packer.push(sample(60, 0));
            assert!(packer.open.len() <= WINDOW);
        }
    }

    #[test]
    fn short_samples_fill_the_room_that_long_ones_leave() {
        let lengths = (0..2000).map(|index| if index % 2 == 0 { 70 } else { 30 });
        let samples: Vec<Sample> = lengths.map(|length| sample(length, 0)).collect();
        assert_eq!(pack(&samples, 100, true).len(), 1000);
    }
}
