//! Lists of tiles that blocks work through: one launch, whatever the lengths of a batch's spans.

use std::cmp::Reverse;

use crate::{
    backend::{
        BatchRoom,
        cuda::{Cuda, DeviceError, DeviceMemory, Numbers, compile::HopperTiles, outgoing::Outgoing},
    },
    batch::Span,
};

/// Bytes of a tile as kernels read it: its span's number and its first row within it.
const TILE_BYTES: usize = 8;

/// The tiles of a batch's queries and of its keys, span by span, those with the most work first.
pub(in crate::backend::cuda) struct TileLists {
    pub(super) queries: TileList,
    pub(super) keys: TileList,
    /// Where each kernel counts the items that blocks have taken; 0 between launches.
    counters: DeviceMemory,
}

/// Kernels whose blocks take items.
#[derive(Debug, Clone, Copy)]
pub(super) enum Counter {
    Forward,
    Keys,
    Queries,
}

/// Tiles on the card.
pub(super) struct TileList {
    pub(super) memory: DeviceMemory,
    pub(super) count: usize,
}

impl TileLists {
    /// Room for the tiles of any batch that `room` lets in, as long as virtual keys do not outnumber its tokens.
    pub(in crate::backend::cuda) fn allocate(cuda: &Cuda, room: BatchRoom) -> Result<Self, DeviceError> {
        let tiles = |tokens: usize| TILE_BYTES * (tokens + room.longest_span / HopperTiles::ROWS + 1);
        let list = |tokens| {
            Ok::<_, DeviceError>(TileList { memory: cuda.take(tiles(tokens), Numbers::F32)?, count: 0 })
        };
        let counters = cuda.take(4 * (Counter::Queries as usize + 1), Numbers::F32)?;
        Ok(Self { queries: list(room.tokens)?, keys: list(2 * room.tokens)?, counters })
    }

    /// The address of a kernel's counter.
    pub(super) fn counter(&self, of: Counter) -> u64 {
        self.counters.address + 4 * of as u64
    }

    /// Bytes of both lists.
    pub(in crate::backend::cuda) fn bytes(&self) -> usize {
        self.queries.memory.bytes + self.keys.memory.bytes
    }

    /// Writes the tiles of a batch.
    pub(in crate::backend::cuda) fn load(&mut self, cuda: &Cuda, outgoing: &mut Outgoing, spans: &[Span]) {
        let (queries, keys) = (query_tiles(spans), key_tiles(spans));
        for (list, tiles) in [(&mut self.queries, queries), (&mut self.keys, keys)] {
            let bytes = TILE_BYTES * tiles.len();
            if bytes > list.memory.bytes {
                match cuda.take(bytes, Numbers::F32) {
                    Ok(memory) => list.memory = memory,
                    Err(error) => return cuda.device.note(Err(error)),
                }
            }
            outgoing.send(&cuda.device, &tiles, list.memory.address);
            list.count = tiles.len();
        }
    }
}

/// The numbers of spans, those with the most keys first: blocks that work at the same time share keys and values, which
/// the card's cache holds for one or two spans but not for all.
fn by_length(spans: &[Span]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..spans.len()).collect();
    order.sort_by_key(|&number| Reverse(spans[number].keys));
    order
}

fn rows(length: usize) -> impl DoubleEndedIterator<Item = usize> {
    (0..length.div_ceil(HopperTiles::ROWS)).map(|tile| tile * HopperTiles::ROWS)
}

/// Late queries see the most keys: they come first within their span.
fn query_tiles(spans: &[Span]) -> Vec<[u32; 2]> {
    let tiles =
        |number: usize| rows(spans[number].queries).rev().map(move |first| [number as u32, first as u32]);
    by_length(spans).into_iter().flat_map(tiles).collect()
}

/// Early keys are seen by the most queries: they come first within their span.
fn key_tiles(spans: &[Span]) -> Vec<[u32; 2]> {
    let tiles = |number: usize| rows(spans[number].keys).map(move |first| [number as u32, first as u32]);
    by_length(spans).into_iter().flat_map(tiles).collect()
}

#[cfg(test)]
mod tests {
    use super::{Span, key_tiles, query_tiles};

    /// 70 queries behind 60 more keys, and 300.
    fn spans() -> [Span; 2] {
        [
            Span { query_start: 0, queries: 70, key_start: 0, keys: 130 },
            Span { query_start: 70, queries: 300, key_start: 130, keys: 300 },
        ]
    }

    #[test]
    fn every_row_lies_in_one_tile_and_the_most_work_comes_first() {
        assert_eq!(query_tiles(&spans()), [[1, 256], [1, 128], [1, 0], [0, 0]]);
        assert_eq!(key_tiles(&spans()), [[1, 0], [1, 128], [1, 256], [0, 0], [0, 128]]);
    }
}
