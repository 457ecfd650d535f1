//! What each operation sends around the ring and where it puts what comes.
//!
//! An operation is a number of *hops*. At hop `h` a member sends a run of *parts* to the next rank and
//! receives one from the rank before; what it sends at hop `h` is what it received at hop `h - 1`, part by
//! part, so a part travels on as soon as it is in. Every hop has at least one part, if an empty one:
//! members that disagree on the length notice it here.

use std::ops::Range;

use crate::{Operation, sum};

/// Bytes in a part of what is only copied.
const PART_BYTES: usize = 64 * 1024;

/// A part of a hop. Ordered as they travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub hop: u32,
    pub part: u32,
}

/// One operation, as the ring sees it.
pub(super) trait Pass {
    fn operation(&self) -> Operation;

    /// Bytes that each member brings.
    fn total_bytes(&self) -> usize;

    /// What else members must agree on.
    fn argument(&self) -> u32 {
        0
    }

    /// The hops at which this member sends.
    fn sends(&self) -> Range<u32>;

    /// The hops at which it receives.
    fn receives(&self) -> Range<u32>;

    /// How many parts it sends at a hop; at least 1.
    fn parts_out(&self, hop: u32) -> u32;

    /// How many parts it receives at a hop; at least 1.
    fn parts_in(&self, hop: u32) -> u32;

    /// A part is about to be sent.
    fn prepare(&mut self, _place: Place) {}

    /// What to send.
    fn outgoing(&self, place: Place) -> &[u8];

    /// Where to put what comes.
    fn incoming(&mut self, place: Place) -> &mut [u8];

    /// A part is in.
    fn received(&mut self, _place: Place) {}

    /// Whether a part can be sent when everything before `received` is in.
    fn is_ready(&self, place: Place, received: Place) -> bool {
        place.hop == 0 || Place { hop: place.hop - 1, ..place } < received
    }
}

/// Which block of a buffer is where at which hop of a ring all-reduce.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    pub rank: usize,
    pub world_size: usize,
    /// Elements of the buffer.
    pub length: usize,
}

impl Schedule {
    /// All hops, of which every member sends and receives at each.
    pub(super) fn hops(self) -> Range<u32> {
        0..2 * (self.world_size as u32 - 1)
    }

    /// The segment that this member sends at a hop. It receives that of the hop after.
    fn segment(self, hop: u32) -> usize {
        (self.rank + 2 * self.world_size - hop as usize) % self.world_size
    }

    /// How many parts the segment of a hop has; at least 1.
    pub(super) fn parts(self, hop: u32) -> u32 {
        sum::blocks_of(self.segment(hop), self.length, self.world_size).max(1) as u32
    }

    /// The number of a part's block, and its elements; none for a part of an empty segment.
    pub(super) fn block(self, hop: u32, part: u32) -> (usize, Range<usize>) {
        let block = self.segment(hop) + part as usize * self.world_size;
        (block, sum::block_range(block, self.length))
    }

    /// Whether what comes at a hop is a partial sum, to be added to; later ones are finished.
    pub(super) fn adds_at(self, hop: u32) -> bool {
        (hop as usize) < self.world_size - 1
    }
}

/// Ring all-reduce: `n - 1` hops in which partial sums go around and grow, then `n - 1` in which the
/// finished sums do. Each link carries `2 (n - 1) / n` of the buffer.
/// Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
pub(super) struct ReducePass<'a> {
    pub schedule: Schedule,
    pub input: &'a [f32],
    pub output: &'a mut [f32],
    /// Room for a block.
    pub scratch: &'a mut [f32],
}

impl Pass for ReducePass<'_> {
    fn operation(&self) -> Operation {
        Operation::AllReduceF32
    }

    fn total_bytes(&self) -> usize {
        size_of_val(self.input)
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

    fn outgoing(&self, place: Place) -> &[u8] {
        let (_, range) = self.schedule.block(place.hop, place.part);
        let source = if place.hop == 0 { self.input } else { &*self.output };
        bytemuck::cast_slice(&source[range])
    }

    fn incoming(&mut self, place: Place) -> &mut [u8] {
        let (_, range) = self.schedule.block(place.hop + 1, place.part);
        if self.schedule.adds_at(place.hop) {
            bytemuck::cast_slice_mut(&mut self.scratch[..range.len()])
        } else {
            bytemuck::cast_slice_mut(&mut self.output[range])
        }
    }

    fn received(&mut self, place: Place) {
        if self.schedule.adds_at(place.hop) {
            let (_, range) = self.schedule.block(place.hop + 1, place.part);
            sum::add(&mut self.output[range.clone()], &self.scratch[..range.len()], &self.input[range]);
        }
    }
}

/// Everybody's bytes go around once: `n - 1` hops. Small all-reduces use it too, and add locally.
pub(super) struct GatherPass<'a> {
    pub operation: Operation,
    pub rank: usize,
    pub world_size: usize,
    /// `[world_size * bytes]`; this member's own are in place.
    pub output: &'a mut [u8],
}

impl GatherPass<'_> {
    fn range(&self, sender: usize, part: u32) -> Range<usize> {
        let bytes = self.total_bytes();
        let start = (part as usize * PART_BYTES).min(bytes);
        let end = (start + PART_BYTES).min(bytes);
        sender * bytes + start..sender * bytes + end
    }

    /// Whose bytes this member sends at a hop. It receives those of the hop after.
    fn origin(&self, hop: u32) -> usize {
        (self.rank + self.world_size - hop as usize) % self.world_size
    }
}

impl Pass for GatherPass<'_> {
    fn operation(&self) -> Operation {
        self.operation
    }

    fn total_bytes(&self) -> usize {
        self.output.len() / self.world_size
    }

    fn sends(&self) -> Range<u32> {
        0..self.world_size as u32 - 1
    }

    fn receives(&self) -> Range<u32> {
        self.sends()
    }

    fn parts_out(&self, _hop: u32) -> u32 {
        parts_of(self.total_bytes())
    }

    fn parts_in(&self, hop: u32) -> u32 {
        self.parts_out(hop)
    }

    fn outgoing(&self, place: Place) -> &[u8] {
        &self.output[self.range(self.origin(place.hop), place.part)]
    }

    fn incoming(&mut self, place: Place) -> &mut [u8] {
        let range = self.range(self.origin(place.hop + 1), place.part);
        &mut self.output[range]
    }
}

/// The root's bytes go from rank to rank, and an empty part from the last back to the root: when it is
/// there, all have them. The member at distance `d` receives at hop `d - 1` and sends at hop `d`.
pub(super) struct BroadcastPass<'a> {
    pub root: u32,
    pub rank: u32,
    pub world_size: u32,
    pub buffer: &'a mut [u8],
}

impl BroadcastPass<'_> {
    fn distance(&self) -> u32 {
        (self.rank + self.world_size - self.root) % self.world_size
    }

    /// The hop back to the root.
    fn last_hop(&self) -> u32 {
        self.world_size - 1
    }

    fn parts(&self, hop: u32) -> u32 {
        if hop == self.last_hop() { 1 } else { parts_of(self.buffer.len()) }
    }

    fn range(&self, place: Place) -> Range<usize> {
        if place.hop == self.last_hop() {
            return 0..0;
        }
        let start = (place.part as usize * PART_BYTES).min(self.buffer.len());
        start..(start + PART_BYTES).min(self.buffer.len())
    }
}

impl Pass for BroadcastPass<'_> {
    fn operation(&self) -> Operation {
        Operation::Broadcast
    }

    fn total_bytes(&self) -> usize {
        self.buffer.len()
    }

    fn argument(&self) -> u32 {
        self.root
    }

    fn sends(&self) -> Range<u32> {
        self.distance()..self.distance() + 1
    }

    fn receives(&self) -> Range<u32> {
        let hop = (self.distance() + self.world_size - 1) % self.world_size;
        hop..hop + 1
    }

    fn parts_out(&self, hop: u32) -> u32 {
        self.parts(hop)
    }

    fn parts_in(&self, hop: u32) -> u32 {
        self.parts(hop)
    }

    fn outgoing(&self, place: Place) -> &[u8] {
        &self.buffer[self.range(place)]
    }

    fn incoming(&mut self, place: Place) -> &mut [u8] {
        let range = self.range(place);
        &mut self.buffer[range]
    }

    fn is_ready(&self, place: Place, received: Place) -> bool {
        if place.hop == 0 {
            return true;
        }
        let needed = if place.hop == self.last_hop() { parts_of(self.buffer.len()) - 1 } else { place.part };
        Place { hop: place.hop - 1, part: needed } < received
    }
}

fn parts_of(bytes: usize) -> u32 {
    bytes.div_ceil(PART_BYTES).max(1) as u32
}
