//! A sequence in progress: the keys and values of what came before, and memory for what comes next.

use crate::{
    backend::{Backend, View, ViewMut, cpu::Cpu},
    batch::{PackedBatch, Span},
    engine::Engine,
    error::Result,
    model::decoder::{Attend, Branches, Decoder},
    nn::rope::RopeTable,
    plan::{Arena, Recompute},
};

/// Keys and values of one layer, `[positions, kv_heads * head_dim]` each.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// A sequence in progress.
pub(crate) struct Session {
    arena: Arena<Cpu>,
    rope: RopeTable<Cpu>,
    caches: Vec<Cache>,
    packed: PackedBatch,
    length: usize,
}

impl Session {
    /// Room for `positions` positions, of which at most `tokens` are new in one go. Without `cached`
    /// each [`Session::advance`] must follow a [`Session::restart`].
    pub(crate) fn new(engine: &Engine, tokens: usize, positions: usize, cached: bool) -> Result<Self> {
        let backend = &engine.backend;
        let sizes = engine.sizes_for(tokens, positions);
        let layers = if cached { sizes.layers } else { 0 };
        let room = positions * sizes.keys;
        let cache = || Ok(Cache { keys: backend.allocate(room)?, values: backend.allocate(room)? });
        Ok(Self {
            arena: Arena::new(backend, &sizes, Recompute::Layers)?,
            rope: RopeTable::new(backend, engine.config(), positions)?,
            caches: (0..layers).map(|_| cache()).collect::<Result<_>>()?,
            packed: PackedBatch::with_capacity(tokens),
            length: 0,
        })
    }

    /// Begins a new sequence.
    pub(crate) fn restart(&mut self) {
        self.length = 0;
    }

    /// Appends `ids`; writes the logits of the last `rows` of them to `out`.
    pub(crate) fn advance(
        &mut self,
        engine: &mut Engine,
        parameters: Option<&[f32]>,
        ids: &[u32],
        rows: usize,
        out: &mut [f32],
    ) -> Result<()> {
        engine.check_parameters(parameters)?;
        engine.check_tokens(0, ids)?;
        let Self { arena, rope, caches, packed, length } = self;
        let (past, tokens) = (*length, ids.len());
        packed.clear();
        packed.token_ids.extend_from_slice(ids);
        packed.positions.extend((past..past + tokens).map(|position| position as u32));
        packed.sample_ids.resize(tokens, 0);
        packed.spans.push(Span { query_start: 0, queries: tokens, key_start: 0, keys: past + tokens });
        engine.backend.load_batch(packed, &mut arena.batch);

        let Engine { backend, config, base, layout, .. } = engine;
        let backend = &*backend;
        let features = config.key_value_heads * config.head_dim;
        let branches = Branches { parameters, layout: &*layout, dropout: None };
        let mut decoder = Decoder {
            backend,
            config: &*config,
            base: &mut **base,
            branches,
            rope,
            arena,
            tokens,
            predicting: 0,
        };
        backend.run(|| {
            decoder.forward_with(|layer, attention, step| {
                let Attend { backend, batch, tokens, work, attended } = step;
                let Some(cache) = caches.get_mut(layer) else {
                    return attention.attend(backend, batch, tokens, work, attended);
                };
                let new = |x| View::<Cpu>::new(x, tokens, features);
                let start = past * features;
                backend.copy(new(&work.k), ViewMut::<Cpu>::at(&mut cache.keys, start, tokens, features));
                backend.copy(new(&work.v), ViewMut::<Cpu>::at(&mut cache.values, start, tokens, features));
                let keys = View::<Cpu>::new(&cache.keys, past + tokens, features);
                let values = View::<Cpu>::new(&cache.values, past + tokens, features);
                attention.attend_to(backend, batch, tokens, work, keys, values, attended);
            })?;
            decoder.logits(rows, out);
            Ok::<_, crate::Error>(())
        })?;
        *length += tokens;
        Ok(())
    }
}
