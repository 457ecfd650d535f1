//! Sequences in progress: the keys and values of what came before, and memory for what comes next.

use crate::{
    adapter::Branches,
    backend::{Backend, SpanStart, Use, View, ViewMut},
    batch::{PackedBatch, Span, VirtualTokens},
    engine::Parts,
    error::Result,
    model::{
        decoder::{Attend, Decoder},
        trained::Trained,
    },
    nn::rope::RopeTable,
    plan::{Arena, Levels, PlanRequest, Sizes},
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
        // Every sequence begins with its virtual tokens.
        let virtual_tokens = parts.layout.virtual_tokens();
        let positions = room.positions + virtual_tokens.count();
        let tokens = room.tokens + virtual_tokens.rows();
        // What lies behind virtual keys is attended to where they lie: in the cache.
        let cached = room.cached || virtual_tokens.keys() > 0;
        let room = Room { positions, tokens, cached, ..room };
        let sizes = Sizes::new(parts.config, parts.layout, tokens, positions, request);
        let layers = if room.cached { sizes.layers } else { 0 };
        let length = room.rows * room.positions * sizes.keys;
        let part = || backend.allocate(length, Use::Activation);
        let cache = || Ok(Cache { keys: part()?, values: part()? });
        Ok(Self {
            arena: Arena::new(backend, &sizes, Levels::boundaries(sizes.layers))?,
            rope: RopeTable::new(backend, parts.config, room.positions)?,
            caches: (0..layers).map(|_| cache()).collect::<Result<_>>()?,
            packed: PackedBatch::with_capacity(room.tokens),
            lengths: vec![0; room.rows],
            room,
        })
    }

    /// Begins all sequences anew.
    pub(crate) fn restart(&mut self) {
        self.lengths.fill(0);
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
        let (branches, parameters) = adapter;
        let Parts { config, base, layout } = parts;
        let begins = pieces.iter().all(|(row, _)| self.lengths[*row] == 0);
        debug_assert!(
            begins || pieces.iter().all(|(row, _)| self.lengths[*row] > 0),
            "sequences that begin and sequences that go on do not go together"
        );
        let trained = Trained { parameters, layout, branches, dropout: None, begins };
        let virtual_tokens = if begins { trained.virtual_tokens() } else { VirtualTokens::None };
        self.pack(pieces, virtual_tokens);
        let Self { arena, rope, caches, packed, room, lengths } = self;
        let tokens = packed.tokens();
        backend.load_batch(packed, &mut arena.batch);

        let features = config.key_value_heads * config.head_dim;
        let kept = room.rows * room.positions;
        for (layer, cache) in caches.iter_mut().enumerate().filter(|_| virtual_tokens.keys() > 0) {
            let Some(parts) = trained.virtual_keys(layer, features) else { continue };
            for (part, place) in parts.into_iter().zip([&mut cache.keys, &mut cache.values]) {
                let to = ViewMut::<B>::new(place, kept, features);
                backend.put_virtual(&arena.batch, SpanStart::Keys, part, to);
            }
        }
        let (base, keys) = (&mut **base, packed.keys());
        let mut decoder = Decoder {
            backend,
            config,
            base,
            trained,
            rope,
            arena,
            tokens,
            keys,
            predicting: 0,
            training: false,
        };
        let spans = &packed.spans;
        backend.run(|| {
            decoder.forward_with(|layer, attention, step| {
                let Attend { backend, batch, tokens, work, joined, attended } = step;
                let Some(cache) = caches.get_mut(layer) else {
                    return attention.attend(backend, batch, tokens, work, joined, attended);
                };
                for span in spans {
                    let start = (span.key_start + span.keys - span.queries) * features;
                    for (new, kept) in [(&work.k, &mut cache.keys), (&work.v, &mut cache.values)] {
                        let new =
                            View::<B>::new(new, tokens, features).row_range(span.query_start, span.queries);
                        backend.copy(new, ViewMut::<B>::at(kept, start, span.queries, features));
                    }
                }
                let keys = View::<B>::new(&cache.keys, kept, features);
                let values = View::<B>::new(&cache.values, kept, features);
                attention.attend_to(backend, batch, tokens, work, keys, values, attended);
            })?;
            decoder.logits(rows, out);
            Ok::<_, crate::Error>(())
        })?;
        backend.settle()?;
        if room.cached {
            pieces.iter().for_each(|(row, ids)| lengths[*row] += virtual_tokens.count() + ids.len());
        }
        Ok(())
    }

    /// The keys, then the values of the first sequence, layer by layer: `[tokens, kv_heads * head_dim]` each.
    pub(crate) fn download(&self, backend: &B, tokens: usize, features: usize, out: &mut [f32]) {
        let parts = self.caches.iter().flat_map(|cache| [&cache.keys, &cache.values]);
        for (part, out) in parts.zip(out.chunks_exact_mut(tokens * features)) {
            backend.download(View::<B>::new(part, tokens, features), out);
        }
    }

    /// Lays new tokens end to end, each at its position, each seeing its own sequence alone; `ahead` of them come virtual
    /// tokens.
    fn pack(&mut self, pieces: &[Piece<'_>], ahead: VirtualTokens) {
        let Self { packed, room, lengths, .. } = self;
        packed.clear();
        for (row, ids) in pieces {
            let (past, query_start) = (lengths[*row] + ahead.keys(), packed.tokens());
            let queries = ahead.rows() + ids.len();
            packed.token_ids.extend(std::iter::repeat_n(0, ahead.rows()));
            packed.token_ids.extend_from_slice(ids);
            packed.positions.extend((past..past + queries).map(|position| position as u32));
            packed.sample_ids.resize(packed.token_ids.len(), *row as u64);
            packed.spans.push(Span {
                query_start,
                queries,
                key_start: if room.cached { row * room.positions } else { query_start },
                keys: past + queries,
            });
        }
    }
}
