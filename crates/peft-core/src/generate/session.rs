//! Sequences in progress: the keys and values of what came before, and memory for what comes next.

use crate::{
    adapter::Branches,
    backend::{Backend, View, ViewMut},
    batch::{PackedBatch, Span},
    engine::Parts,
    error::Result,
    model::decoder::{Attend, Decoder, Trained},
    nn::rope::RopeTable,
    plan::{Arena, PlanRequest, Recompute, Sizes},
};

/// Keys and values of one layer, `[rows * positions, kv_heads * head_dim]` each: row after row.
struct Cache<B: Backend> {
    keys: B::Owned,
    values: B::Owned,
}

/// What a session has room for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Sequences.
    pub(crate) rows: usize,
    /// Positions of each.
    pub(crate) positions: usize,
    /// New tokens in one go, of all sequences together.
    pub(crate) tokens: usize,
    /// Whether keys and values are kept. Without, there is one row and each [`Session::advance`] begins it anew.
    pub(crate) cached: bool,
}

/// New tokens of one sequence.
pub(crate) type Piece<'a> = (usize, &'a [u32]);

/// Sequences in progress.
pub(crate) struct Session<B: Backend> {
    arena: Arena<B>,
    rope: RopeTable<B>,
    caches: Vec<Cache<B>>,
    packed: PackedBatch,
    room: Room,
    /// Tokens of each sequence so far.
    lengths: Vec<usize>,
}

impl<B: Backend> Session<B> {
    /// Reserves memory.
    pub(crate) fn new(backend: &B, parts: &Parts<'_>, request: &PlanRequest, room: Room) -> Result<Self> {
        let sizes = Sizes::new(parts.config, parts.layout, room.tokens, room.positions, request);
        let layers = if room.cached { sizes.layers } else { 0 };
        let length = room.rows * room.positions * sizes.keys;
        let cache = || Ok(Cache { keys: backend.allocate(length)?, values: backend.allocate(length)? });
        Ok(Self {
            arena: Arena::new(backend, &sizes, Recompute::Layers)?,
            rope: RopeTable::new(backend, parts.config, room.positions)?,
            caches: (0..layers).map(|_| cache()).collect::<Result<_>>()?,
            packed: PackedBatch::with_capacity(room.tokens),
            lengths: vec![0; room.rows],
            room,
        })
    }

    /// Appends tokens that the base knows to some sequences, each named once, with the branches and parameters of an adapter; writes the logits of the last `rows` of all of
    /// them, as they come one after the other, to `out`.
    pub(crate) fn advance(
        &mut self,
        backend: &B,
        parts: &mut Parts<'_>,
        adapter: (&Branches<B>, Option<&B::Buffer>),
        pieces: &[Piece<'_>],
        rows: usize,
        out: &mut [f32],
    ) -> Result<()> {
        self.pack(pieces);
        let Self { arena, rope, caches, packed, room, lengths } = self;
        let tokens = packed.tokens();
        backend.load_batch(packed, &mut arena.batch);

        let Parts { config, base, layout } = parts;
        let features = config.key_value_heads * config.head_dim;
        let (branches, parameters) = adapter;
        let trained = Trained { parameters, layout, branches, dropout: None };
        let mut decoder =
            Decoder { backend, config, base: &mut **base, trained, rope, arena, tokens, predicting: 0 };
        let (spans, lengths_before) = (&packed.spans, &*lengths);
        backend.run(|| {
            decoder.forward_with(|layer, attention, step| {
                let Attend { backend, batch, tokens, work, attended } = step;
                let Some(cache) = caches.get_mut(layer) else {
                    return attention.attend(backend, batch, tokens, work, attended);
                };
                for (span, (row, _)) in spans.iter().zip(pieces) {
                    let start = (row * room.positions + lengths_before[*row]) * features;
                    for (new, kept) in [(&work.k, &mut cache.keys), (&work.v, &mut cache.values)] {
                        let new =
                            View::<B>::new(new, tokens, features).row_range(span.query_start, span.queries);
                        backend.copy(new, ViewMut::<B>::at(kept, start, span.queries, features));
                    }
                }
                let kept = room.rows * room.positions;
                let keys = View::<B>::new(&cache.keys, kept, features);
                let values = View::<B>::new(&cache.values, kept, features);
                attention.attend_to(backend, batch, tokens, work, keys, values, attended);
            })?;
            decoder.logits(rows, out);
            Ok::<_, crate::Error>(())
        })?;
        backend.settle()?;
        if room.cached {
            pieces.iter().for_each(|(row, ids)| lengths[*row] += ids.len());
        }
        Ok(())
    }

    /// Lays new tokens end to end, each at its position, each seeing its own sequence alone.
    fn pack(&mut self, pieces: &[Piece<'_>]) {
        let Self { packed, room, lengths, .. } = self;
        packed.clear();
        for (row, ids) in pieces {
            let (past, query_start) = (lengths[*row], packed.tokens());
            packed.token_ids.extend_from_slice(ids);
            packed.positions.extend((past..past + ids.len()).map(|position| position as u32));
            packed.sample_ids.resize(packed.token_ids.len(), *row as u64);
            packed.spans.push(Span {
                query_start,
                queries: ids.len(),
                key_start: if room.cached { row * room.positions } else { query_start },
                keys: past + ids.len(),
            });
        }
    }
}
