//! What an engine does whose base several members share.

use super::{Engine, EngineDevice, EngineOptions};
use crate::{
    adapter::Start,
    error::Result,
    model::{ShardPart, ShardedBase, decoder::accompany},
    plan::{Recompute, ShareChoice},
};

impl Engine {
    /// Its base, where it holds but a part of it.
    pub fn shared_base(&mut self) -> Option<&mut ShardedBase> {
        self.base.sharded()
    }

    /// Takes note of the hash of its base, which the members that share it found together.
    pub fn set_base_hash(&mut self, hash: blake3::Hash) {
        self.base_hash = Some(hash);
        self.fit.on_base(hash);
    }

    /// Gathers the layers of a pass, in step with members that have rows while this one has none.
    ///
    /// # Errors
    /// When a layer cannot be had.
    pub fn keep_company(&mut self, training: bool) -> Result<()> {
        let layout = training.then(|| self.fit.layout());
        accompany(&mut *self.base, self.config.layers, layout)
    }

    /// Whether [`Engine::initial_parameters`] asks for layers of the base.
    pub fn start_reads_layers(&self) -> bool {
        let of_base = |start: &Start| matches!(start, Start::Base | Start::Computed);
        self.computes_start() || self.fit.layout().entries().iter().any(|entry| of_base(&entry.start))
    }

    /// Whether each of at most `workers` should hold the whole base, or several share one: from headers alone. A plan fits if its smallest
    /// form does: micro-batches of a row, and everything computed again. On processors, where no limit is given, workers are taken to
    /// share what this machine has.
    ///
    /// # Errors
    /// As [`Engine::estimate`].
    pub fn choose_share(options: &EngineOptions, workers: usize) -> Result<ShareChoice> {
        let smallest = |parts: usize| EngineOptions {
            shard: (parts > 1).then_some(ShardPart { part: 0, parts }),
            micro_batch_rows: Some(options.micro_batch_rows.unwrap_or(1)),
            recompute: match options.recompute {
                Recompute::Auto => Recompute::Layers,
                wanted => wanted,
            },
            ..options.clone()
        };
        let mut limit = Self::estimate(&smallest(1))?.limit_bytes;
        if options.memory_limit.is_none() && options.device == EngineDevice::Cpu {
            limit /= workers.max(1) as u64;
        }
        ShareChoice::make(workers, limit, |parts| {
            let options = smallest(parts);
            options.check_shard()?;
            Ok::<_, crate::Error>(Self::estimate(&options)?.plan.peak_bytes())
        })
    }
}
