//! Virtual tokens before the first step: what the base makes of some of its tokens.

use super::{Engine, Machine, Parts};
use crate::{
    adapter::Branches,
    backend::Backend,
    batch::VirtualTokens,
    error::Result,
    generate::{Room, Session},
    plan::PlanRequest,
};

impl Engine {
    /// Whether [`Engine::initial_parameters`] computes with the base: the bits may then depend on the device.
    pub fn computes_start(&self) -> bool {
        let from_keys = self.fit.layout().virtual_tokens().keys() > 0;
        from_keys && self.fit.method().is_some_and(|method| method.start_tokens(&self.config, 0).is_some())
    }

    /// Writes virtual tokens that begin as tokens of the base over their start in `parameters`.
    pub(super) fn start_virtual_tokens(&mut self, seed: u64, parameters: &mut [f32]) -> Result<()> {
        let tokens = self.fit.method().and_then(|method| method.start_tokens(&self.config, seed));
        let Some(tokens) = tokens else { return Ok(()) };
        self.check_tokens(0, &tokens)?;
        let mut effective = vec![0.0; self.fit.layout().len()];
        match self.fit.layout().virtual_tokens() {
            VirtualTokens::None => return Ok(()),
            VirtualTokens::Rows(_) => self.embed(&tokens, &mut effective),
            VirtualTokens::Keys(_) => self.keys_and_values(&tokens, &mut effective)?,
        }
        match self.fit.network() {
            Some(network) => {
                network.network.reach(&effective, parameters)?;
            }
            None => parameters.copy_from_slice(&effective),
        }
        Ok(())
    }

    /// The base's embeddings of `tokens`, a row each, scaled where the family scales them.
    fn embed(&self, tokens: &[u32], out: &mut [f32]) {
        let table = self.base.embedding();
        for (token, row) in tokens.iter().zip(out.chunks_exact_mut(table.columns())) {
            table.gather_row(*token as usize, row);
        }
        if let Some(scale) = self.config.embedding_scale {
            out.iter_mut().for_each(|number| *number *= scale);
        }
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
