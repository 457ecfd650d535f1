//! Parameters before the first step.

use super::{Engine, Machine, Parts, base_start};
use crate::{
    adapter::Branches,
    backend::Backend,
    batch::VirtualTokens,
    error::Result,
    generate::{Room, Session},
    model::BaseSource,
    plan::PlanRequest,
};

impl Engine {
    /// Whether [`Engine::initial_parameters`] computes with the base: the bits may then depend on the device.
    pub fn computes_start(&self) -> bool {
        let from_keys = self.fit.layout().virtual_tokens().keys() > 0;
        from_keys && self.fit.method().is_some_and(|method| method.start_tokens(&self.config, 0).is_some())
    }

    /// Flat parameters at their start, as the method says: a function of `seed`, method and base alone.
    ///
    /// # Errors
    /// Where the method begins from what the base makes of some tokens: an unknown token, memory is short, or a layer's weights
    /// cannot be had.
    pub fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>> {
        let mut parameters = vec![0.0; self.layout().len()];
        self.layout().initialise(seed, &mut parameters);
        if self.fit.network().is_none() {
            base_start::fill(&self.fit, &self.config, &mut *self.base, &mut parameters)?;
            // What was fetched from a card may have failed on its way.
            self.machine.settle()?;
        }
        let tokens = self.fit.method().and_then(|method| method.start_tokens(&self.config, seed));
        let Some(tokens) = tokens else { return Ok(parameters) };
        self.check_tokens(0, &tokens)?;
        let mut effective = vec![0.0; self.fit.layout().len()];
        match self.fit.layout().virtual_tokens() {
            VirtualTokens::None => return Ok(parameters),
            VirtualTokens::Rows(_) => embed(&*self.base, &tokens, &mut effective),
            VirtualTokens::Keys(_) => self.keys_and_values(&tokens, &mut effective)?,
        }
        match self.fit.network() {
            Some(network) => {
                network.network.reach(&effective, &mut parameters)?;
            }
            None => parameters = effective,
        }
        Ok(parameters)
    }

    /// What the bare base computes for `tokens` as a text, in PEFT's layout: a token is a row
    /// `[layer 0 K | layer 0 V | layer 1 K | …]`, K as it lies in a cache.
    fn keys_and_values(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        let (layers, features) = (self.config.layers, self.config.key_value_heads * self.config.head_dim);
        let (machine, mut parts, request, _) = self.take_apart(None)?;
        let mut caches = vec![0.0; 2 * layers * tokens.len() * features];
        match machine {
            Machine::Cpu(worker) => {
                let (backend, branches, _) = worker.lend(None)?;
                read(backend, &mut parts, request, branches, tokens, &mut caches)?;
            }
            Machine::Cuda(worker) => {
                let (backend, branches, _) = worker.lend(None)?;
                read(backend, &mut parts, request, branches, tokens, &mut caches)?;
            }
        }
        for (part, numbers) in caches.chunks_exact(tokens.len() * features).enumerate() {
            for (token, numbers) in numbers.chunks_exact(features).enumerate() {
                let start = (token * 2 * layers + part) * features;
                out[start..start + features].copy_from_slice(numbers);
            }
        }
        Ok(())
    }
}

/// Runs the bare base over `tokens`, and takes the keys and values of every layer.
fn read<B: Backend>(
    backend: &B,
    parts: &mut Parts<'_>,
    request: &PlanRequest,
    branches: &Branches<B>,
    tokens: &[u32],
    caches: &mut [f32],
) -> Result<()> {
    let count = tokens.len();
    let features = parts.config.key_value_heads * parts.config.head_dim;
    let room = Room { rows: 1, positions: count, tokens: count, cached: true };
    let mut session = Session::new(backend, parts, request, room)?;
    let mut logits = vec![0.0; parts.config.vocabulary_size];
    session.advance(backend, parts, (branches, None), &[(0, tokens)], 1, &mut logits)?;
    session.download(backend, count, features, caches);
    backend.settle()
}

/// The base's embeddings of `tokens`, a row each, scaled where the family scales them.
fn embed(base: &(dyn BaseSource + Send + Sync), tokens: &[u32], out: &mut [f32]) {
    let table = base.embedding();
    for (token, row) in tokens.iter().zip(out.chunks_exact_mut(table.columns())) {
        table.gather_row(*token as usize, row);
    }
    if let Some(scale) = base.config().embedding_scale {
        out.iter_mut().for_each(|number| *number *= scale);
    }
}
