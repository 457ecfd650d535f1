//! Ring all-reduce of numbers that travel rounded.
//!
//! The order is that of [`ReducePass`](super::pass::ReducePass). Each rank rounds each block once, where it has added
//! its own part (or begins the sum, or ends it), and keeps what it rounded away: so every loss has an owner, and all
//! ranks take the finished block from the same bytes, the one that finished it included.

use std::ops::Range;

use super::pass::{Pass, Place, Schedule};
use crate::{Compression, Operation, sum};

pub(super) struct RoundedPass<'a> {
    schedule: Schedule,
    compression: Compression,
    input: &'a [f32],
    output: &'a mut [f32],
    owed: &'a [f32],
    owes: &'a mut [f32],
    /// Per block: what this rank sends of it, later the finished block. One place will do: it comes back finished only
    /// after it was sent.
    wire: &'a mut [u8],
    /// The block that is coming in.
    coming: Vec<u8>,
    /// It, and its sum.
    values: Vec<f32>,
}

impl<'a> RoundedPass<'a> {
    pub(super) fn new(
        schedule: Schedule,
        compression: Compression,
        (input, output): (&'a [f32], &'a mut [f32]),
        (owed, owes): (&'a [f32], &'a mut [f32]),
        wire: &'a mut Vec<u8>,
    ) -> Self {
        let block_bytes = compression.bytes(sum::BLOCK);
        wire.resize(input.len().div_ceil(sum::BLOCK) * block_bytes, 0);
        let (coming, values) = (vec![0; block_bytes], vec![0.0; sum::BLOCK]);
        Self { schedule, compression, input, output, owed, owes, wire, coming, values }
    }

    /// The elements of a part and their place on the wire; both empty for a part of an empty segment.
    fn ranges(&self, hop: u32, part: u32) -> (Range<usize>, Range<usize>) {
        let (block, elements) = self.schedule.block(hop, part);
        let start = (block * self.compression.bytes(sum::BLOCK)).min(self.wire.len());
        let wire = start..start + self.compression.bytes(elements.len());
        (elements, wire)
    }

    /// Rounds `values` and what is owed for this block into the wire; keeps what is lost.
    fn round(&mut self, elements: Range<usize>, wire: Range<usize>) {
        let values = &mut self.values[..elements.len()];
        for (value, owed) in values.iter_mut().zip(&self.owed[elements.clone()]) {
            *value += owed;
        }
        self.compression.encode(values, &mut self.wire[wire.clone()]);
        let owes = &mut self.owes[elements];
        self.compression.decode(&self.wire[wire], owes);
        for (owes, value) in owes.iter_mut().zip(values) {
            *owes = *value - *owes;
        }
    }
}

impl Pass for RoundedPass<'_> {
    fn operation(&self) -> Operation {
        Operation::AllReduceF32
    }

    fn total_bytes(&self) -> usize {
        size_of_val(self.input)
    }

    fn argument(&self) -> u32 {
        self.compression.number()
    }

    fn sends(&self) -> Range<u32> {
        self.schedule.hops()
    }

    fn receives(&self) -> Range<u32> {
        self.sends()
    }

    fn parts_out(&self, hop: u32) -> u32 {
        self.schedule.parts(hop)
    }

    fn parts_in(&self, hop: u32) -> u32 {
        self.schedule.parts(hop + 1)
    }

    fn prepare(&mut self, place: Place) {
        if place.hop == 0 {
            let (elements, wire) = self.ranges(0, place.part);
            self.values[..elements.len()].copy_from_slice(&self.input[elements.clone()]);
            self.round(elements, wire);
        }
    }

    fn outgoing(&self, place: Place) -> &[u8] {
        &self.wire[self.ranges(place.hop, place.part).1]
    }

    fn incoming(&mut self, place: Place) -> &mut [u8] {
        let (_, wire) = self.ranges(place.hop + 1, place.part);
        if self.schedule.adds_at(place.hop) { &mut self.coming[..wire.len()] } else { &mut self.wire[wire] }
    }

    fn received(&mut self, place: Place) {
        let (elements, wire) = self.ranges(place.hop + 1, place.part);
        if self.schedule.adds_at(place.hop) {
            let values = &mut self.values[..elements.len()];
            self.compression.decode(&self.coming[..wire.len()], values);
            for (value, input) in values.iter_mut().zip(&self.input[elements.clone()]) {
                *value += input;
            }
            self.round(elements.clone(), wire.clone());
            let is_finished = !self.schedule.adds_at(place.hop + 1);
            if !is_finished {
                return;
            }
        }
        self.compression.decode(&self.wire[wire], &mut self.output[elements]);
    }
}
