//! Lists of tiles that blocks work through: one launch, whatever the lengths of a batch's spans.

use std::cmp::Reverse;

use crate::{
    backend::{
        BatchRoom,
        cuda::{Cuda, DeviceError, DeviceMemory, Numbers, compile::HopperTiles},
    },
    batch::Span,
};

/// Bytes of a tile as kernels read it: its span's number and its first row within it.
const TILE_BYTES: usize = 8;

/// The tiles of a batch's queries and of its keys, those with the most work first.
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

    /// Writes the tiles of a batch.
    pub(in crate::backend::cuda) fn load(&mut self, cuda: &Cuda, spans: &[Span]) {
        let (queries, keys) = (query_tiles(spans), key_tiles(spans));
        for (list, tiles) in [(&mut self.queries, queries), (&mut self.keys, keys)] {
            let bytes = TILE_BYTES * tiles.len();
            if bytes > list.memory.bytes {
                match cuda.take(bytes, Numbers::F32) {
                    Ok(memory) => list.memory = memory,
                    Err(error) => return cuda.device.note(Err(error)),
                }
            }
            cuda.device.upload(&tiles, list.memory.address);
            list.count = tiles.len();
        }
    }
}

/// Tiles of `length(span)` rows each, by `work` in falling order; of equal work, in the order of spans.
fn tiles(
    spans: &[Span],
    length: impl Fn(&Span) -> usize,
    work: impl Fn(&Span, usize) -> usize,
) -> Vec<[u32; 2]> {
    let rows = |span: &Span| (0..length(span)).step_by(HopperTiles::ROWS);
    let mut all: Vec<(usize, [u32; 2])> = spans
        .iter()
        .enumerate()
        .flat_map(|(number, span)| {
            rows(span).map(|first| (work(span, first), [number as u32, first as u32])).collect::<Vec<_>>()
        })
        .collect();
    all.sort_by_key(|(work, _)| Reverse(*work));
    all.into_iter().map(|(_, tile)| tile).collect()
}

/// Work of a tile of queries: the keys that its last query sees.
fn query_tiles(spans: &[Span]) -> Vec<[u32; 2]> {
    let seen = |span: &Span, first: usize| {
        let last = (first + HopperTiles::ROWS).min(span.queries);
        last + span.keys - span.queries
    };
    tiles(spans, |span| span.queries, seen)
}

/// Work of a tile of keys: the queries that see its first key.
fn key_tiles(spans: &[Span]) -> Vec<[u32; 2]> {
    let seeing = |span: &Span, first: usize| {
        let ahead = span.keys - span.queries;
        span.queries - first.saturating_sub(ahead)
    };
    tiles(spans, |span| span.keys, seeing)
}

#[cfg(test)]
mod tests {
    use super::{Span, key_tiles, query_tiles};

    /// 300 queries, and 70 behind 60 more keys.
    fn spans() -> [Span; 2] {
        [
            Span { query_start: 0, queries: 300, key_start: 0, keys: 300 },
            Span { query_start: 300, queries: 70, key_start: 300, keys: 130 },
        ]
    }

    #[test]
    fn every_row_lies_in_one_tile_and_the_longest_work_comes_first() {
        assert_eq!(query_tiles(&spans()), [[0, 256], [0, 128], [1, 0], [0, 0]]);
        assert_eq!(key_tiles(&spans()), [[0, 0], [0, 128], [1, 0], [0, 256], [1, 128]]);
    }
}
