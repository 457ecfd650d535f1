//! A sequence in progress: the keys and values of what came before, and memory for what comes next.

use crate::{
    adapter::Branches,
    backend::{Backend, Use, View, ViewMut},
    batch::{PackedBatch, Span},
    engine::Parts,
    error::Result,
    model::decoder::{Attend, Decoder, Trained},
    nn::rope::RopeTable,
    plan::{Arena, Levels, PlanRequest, Sizes},
};

/// Keys and values of one layer, `[positions, kv_heads * head_dim]` each.
struct Cache<B: Backend> {
    keys: B::Owned,
    values: B::Owned,
}

/// A sequence in progress.
pub(crate) struct Session<B: Backend> {
    arena: Arena<B>,
    rope: RopeTable<B>,
    caches: Vec<Cache<B>>,
    packed: PackedBatch,
    length: usize,
}

impl<B: Backend> Session<B> {
    /// Room for `positions` positions, of which at most `tokens` are new in one go. Without `cached`
    /// each [`Session::advance`] must follow a [`Session::restart`].
    pub(crate) fn new(
        backend: &B,
        parts: &Parts<'_>,
        request: &PlanRequest,
        tokens: usize,
        positions: usize,
        cached: bool,
    ) -> Result<Self> {
        let sizes = Sizes::new(parts.config, parts.layout, tokens, positions, request);
        let layers = if cached { sizes.layers } else { 0 };
        let room = positions * sizes.keys;
        let room = || backend.allocate(room, Use::Activation);
        let cache = || Ok(Cache { keys: room()?, values: room()? });
        Ok(Self {
            arena: Arena::new(backend, &sizes, Levels::boundaries(sizes.layers))?,
            rope: RopeTable::new(backend, parts.config, positions)?,
            caches: (0..layers).map(|_| cache()).collect::<Result<_>>()?,
            packed: PackedBatch::with_capacity(tokens),
            length: 0,
        })
    }

    /// Begins a new sequence.
    pub(crate) fn restart(&mut self) {
        self.length = 0;
    }

    /// Appends `ids`, which the base knows, with the branches and parameters of an adapter; writes the logits of the last `rows` of them to `out`.
    pub(crate) fn advance(
        &mut self,
        backend: &B,
        parts: &mut Parts<'_>,
        adapter: (&Branches<B>, Option<&B::Buffer>),
        ids: &[u32],
        rows: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let Self { arena, rope, caches, packed, length } = self;
        let (past, tokens) = (*length, ids.len());
        packed.clear();
        packed.token_ids.extend_from_slice(ids);
        packed.positions.extend((past..past + tokens).map(|position| position as u32));
        packed.sample_ids.resize(tokens, 0);
        packed.spans.push(Span { query_start: 0, queries: tokens, key_start: 0, keys: past + tokens });
        backend.load_batch(packed, &mut arena.batch);

        let Parts { config, base, layout } = parts;
        let features = config.key_value_heads * config.head_dim;
        let (branches, parameters) = adapter;
        let trained = Trained { parameters, layout, branches, dropout: None };
        let mut decoder = Decoder {
            backend,
            config,
            base: &mut **base,
            trained,
            rope,
            arena,
            tokens,
            predicting: 0,
            training: false,
        };
        backend.run(|| {
            decoder.forward_with(|layer, attention, step| {
                let Attend { backend, batch, tokens, work, attended } = step;
                let Some(cache) = caches.get_mut(layer) else {
                    return attention.attend(backend, batch, tokens, work, attended);
                };
                let start = past * features;
                let new = View::<B>::new(&work.k, tokens, features);
                backend.copy(new, ViewMut::<B>::at(&mut cache.keys, start, tokens, features));
                let new = View::<B>::new(&work.v, tokens, features);
                backend.copy(new, ViewMut::<B>::at(&mut cache.values, start, tokens, features));
                let keys = View::<B>::new(&cache.keys, past + tokens, features);
                let values = View::<B>::new(&cache.values, past + tokens, features);
                attention.attend_to(backend, batch, tokens, work, keys, values, attended);
            })?;
            decoder.logits(rows, out);
            Ok::<_, crate::Error>(())
        })?;
        backend.settle()?;
        *length += tokens;
        Ok(())
    }
}
