//! Training with parameters, gradient and moments where the engine computes: a step moves none of them.
//!
//! ```text
//! engine.begin(&parameters, &first_moment, &second_moment)?;
//! let tokens = engine.accumulate(&rows, StepKey { seed, step: 1 })?;      // once for each micro-batch
//! let outcome = engine.update(&FlatUpdate { mean: 1.0 / tokens as f64, max_norm: 1.0, groups })?;
//! let [parameters, first, second] = engine.trained_state()?;                // for a checkpoint
//! ```

use super::{
    Engine, StepKey,
    machine::{Parts, Pass},
};
use crate::{
    adapter::PassDropout,
    batch::Row,
    error::Result,
    optim::{FlatUpdate, Outcome},
};

impl Engine {
    /// Takes parameters and AdamW's moments to stay in the engine; the gradient is 0.
    ///
    /// # Errors
    /// They are of another length than the layout, the method makes its tensors by a network, which this way of training
    /// does not serve, or memory is short.
    pub fn begin(&mut self, parameters: &[f32], first: &[f32], second: &[f32]) -> Result<()> {
        for part in [parameters, first, second] {
            self.check_flat(part.len())?;
        }
        if self.fit.network().is_some() {
            return Err(super::StepError::NoState.into());
        }
        self.machine.begin([parameters, first, second])
    }

    /// Adds the gradient and the loss of one micro-batch; returns its trained tokens. On a card the work is only queued.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn accumulate(&mut self, rows: &[Row], key: StepKey) -> Result<u64> {
        let virtual_tokens = self.fit.layout().virtual_tokens();
        self.check_rows(rows, virtual_tokens)?;
        self.packed.fill_behind(virtual_tokens, rows)?;
        let p = self.fit.dropout();
        let dropout = (p > 0.0).then_some(PassDropout { p, seed: key.seed, step: key.step });
        let Self { machine, config, base, fit, packed, sizes, plan, .. } = self;
        let parts = Parts { config, base: &mut **base, layout: fit.layout() };
        let tokens = packed.predicting.len() as u64;
        let levels = plan.levels;
        machine.accumulate(
            parts,
            Pass { packed, sizes, levels, parameters: None, dropout, training: None, each: None },
        )?;
        Ok(tokens)
    }

    /// Clips and applies what was accumulated, waits for it, and says what it amounted to. Where the gradient's norm is not
    /// finite nothing was changed.
    ///
    /// # Errors
    /// What failed since the last update.
    pub fn update(&mut self, update: &FlatUpdate<'_>) -> Result<Outcome> {
        self.machine.update(update)
    }

    /// Parameters and moments as they stand.
    ///
    /// # Errors
    /// Before [`Engine::begin`], and what failed since the last update.
    pub fn trained_state(&self) -> Result<[Vec<f32>; 3]> {
        self.machine.read_state()
    }
}
