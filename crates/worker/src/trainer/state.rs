//! Adapter and optimizer as they stand, and how a step changes them.

use std::ops::Range;

use shanty_checkpoint::Optimizer;
use shanty_config::job::{self, JobSpec};
use shanty_peft_core::optim::{AdamW, AdamWOptions, Schedule, Shape, clip_factor, global_norm};

use crate::{
    Error,
    engine::{StepHooks, StepInfo},
};

/// What the method carries from step to step, in a checkpoint: f32, little-endian.
pub(crate) const METHOD_STATE: &str = "method_state.f32";

/// Adapter and optimizer after some number of updates.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    /// The adapter's parameters, flat.
    pub(crate) parameters: Vec<f32>,
    optimizer: AdamW,
    /// What the method carries from step to step.
    pub(crate) method: Vec<f32>,
}

impl State {
    /// Updates applied.
    pub(crate) fn applied(&self) -> u64 {
        self.optimizer.step()
    }

    /// All flat vectors, in the order in which they travel and are hashed.
    pub(crate) fn parts(&self) -> [&[f32]; 4] {
        [&self.parameters, self.optimizer.first_moment(), self.optimizer.second_moment(), &self.method]
    }

    /// A copy for a checkpoint, without what the method carries.
    pub(crate) fn to_checkpoint(&self) -> Optimizer {
        let [parameters, exp_avg, exp_avg_sq, _] = self.parts();
        let [parameters, exp_avg, exp_avg_sq] = [parameters, exp_avg, exp_avg_sq].map(<[f32]>::to_vec);
        Optimizer { parameters, exp_avg, exp_avg_sq }
    }

    /// BLAKE3 over the applied step and the bits of all parts.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.applied().to_le_bytes());
        for part in self.parts() {
            hasher.update(bytemuck::cast_slice(part));
        }
        hasher.finalize()
    }

    /// [`Self::digest`] in hexadecimal, as members report it.
    pub(crate) fn hash(&self) -> String {
        self.digest().to_hex().to_string()
    }
}

/// How a step changes a state.
#[derive(Debug, Clone)]
pub(crate) struct Update {
    adamw: AdamWOptions,
    schedule: Schedule,
    /// Longest gradient; 0 for no limit.
    max_norm: f64,
    /// Factors of the learning rate for parts of the parameters.
    rates: Vec<(Range<usize>, f64)>,
}

/// What an update amounted to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Applied {
    /// Norm of the mean gradient before it was clipped.
    pub(crate) gradient_norm: f64,
    pub(crate) learning_rate: f64,
}

impl Update {
    /// What a job says, for all its steps.
    pub(crate) fn new(spec: &JobSpec, total_steps: u64) -> Self {
        let train = &spec.train;
        let shape = match train.schedule {
            job::Schedule::Constant => Shape::Constant,
            job::Schedule::Linear => Shape::Linear,
            job::Schedule::Cosine => Shape::Cosine,
        };
        Self {
            adamw: AdamWOptions {
                betas: train.betas,
                epsilon: train.epsilon,
                weight_decay: train.weight_decay,
            },
            schedule: Schedule {
                peak: spec.learning_rate(),
                shape,
                warmup_steps: train.warmup_steps,
                total_steps,
            },
            max_norm: train.max_grad_norm,
            rates: Vec::new(),
        }
    }

    /// With factors of the learning rate, as the engine's method has them.
    #[must_use]
    pub(crate) fn with_rates(self, hooks: &dyn StepHooks) -> Self {
        Self { rates: hooks.rates(self.schedule.peak), ..self }
    }

    /// The state before the first update.
    pub(crate) fn fresh(&self, parameters: Vec<f32>, method: Vec<f32>) -> State {
        let optimizer = AdamW::new(self.adamw, parameters.len());
        State { parameters, optimizer, method }
    }

    /// The state that another member or a checkpoint gave.
    ///
    /// # Shapes
    /// All parts of `given`: `[parameters]`, else it is an error.
    pub(crate) fn restore(&self, applied: u64, given: Optimizer, method: Vec<f32>) -> Result<State, Error> {
        let Optimizer { parameters, exp_avg, exp_avg_sq } = given;
        let optimizer =
            AdamW::restore(self.adamw, applied, exp_avg, exp_avg_sq).map_err(|error| Error::part(&error))?;
        Ok(State { parameters, optimizer, method })
    }

    /// Makes one step with the sum of all ranks, scaled once by all trained tokens and clipped. None, and nothing is
    /// changed, if the gradient is not finite. Depends on nothing but the bits of its arguments.
    ///
    /// # Shapes
    /// `reduced`: `[parameters]`
    pub(crate) fn apply(
        &self,
        state: &mut State,
        reduced: &mut [f32],
        tokens: u64,
        hooks: &dyn StepHooks,
    ) -> Result<Option<Applied>, Error> {
        let mean = 1.0 / tokens.max(1) as f64;
        let (step, total_steps) = (state.applied() + 1, self.schedule.total_steps);
        hooks.regularise(StepInfo { step, total_steps, scale: mean }, &state.parameters, reduced);
        let gradient_norm = global_norm(reduced) * mean;
        let Some(clip) = clip_factor(gradient_norm, self.max_norm) else { return Ok(None) };
        // The schedule counts updates from 0.
        let learning_rate = self.schedule.learning_rate(state.applied());
        state
            .optimizer
            .update_by(&mut state.parameters, reduced, mean * clip, learning_rate, &self.rates)
            .map_err(|error| Error::part(&error))?;
        let info = StepInfo { step, total_steps, scale: mean * clip };
        hooks.after_step(info, &mut state.parameters, reduced, &mut state.method);
        Ok(Some(Applied { gradient_norm, learning_rate }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update() -> Update {
        let spec = serde_json::json!({
            "name": "j", "base": {"model": "m"}, "adapter": {}, "data": {"train": "t"},
            "train": {"learning_rate": 0.1, "max_grad_norm": 1.0},
        });
        Update::new(&serde_json::from_value(spec).unwrap(), 10)
    }

    #[test]
    fn the_sum_is_scaled_once_by_all_tokens() {
        let update = update();
        let (mut one, mut other) =
            (update.fresh(vec![1.0, -1.0], Vec::new()), update.fresh(vec![1.0, -1.0], Vec::new()));
        let first = update.apply(&mut one, &mut [0.25, 0.5], 1, &()).unwrap().unwrap();
        let second = update.apply(&mut other, &mut [2.0, 4.0], 8, &()).unwrap().unwrap();
        // Powers of two scale exactly.
        assert_eq!(one, other);
        assert_eq!(first, second);
        assert_eq!(one.applied(), 1);
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let update = update();
        let mut state = update.fresh(vec![1.0, -1.0], Vec::new());
        let before = state.clone();
        assert_eq!(update.apply(&mut state, &mut [f32::INFINITY, 0.0], 1, &()).unwrap(), None);
        assert_eq!(state, before);
    }

    #[test]
    fn a_restored_state_goes_on_with_the_same_bits() {
        let update = update();
        let mut state = update.fresh(vec![1.0, -1.0], Vec::new());
        update.apply(&mut state, &mut [0.3, 0.1], 3, &()).unwrap();
        let mut restored = update.restore(state.applied(), state.to_checkpoint(), Vec::new()).unwrap();
        assert_eq!(restored.hash(), state.hash());
        update.apply(&mut state, &mut [0.2, 0.7], 3, &()).unwrap();
        update.apply(&mut restored, &mut [0.2, 0.7], 3, &()).unwrap();
        assert_eq!(restored.hash(), state.hash());
    }

    #[test]
    fn the_hash_covers_every_part_and_the_step() {
        let update = update();
        let given = || Optimizer { parameters: vec![1.0], exp_avg: vec![2.0], exp_avg_sq: vec![3.0] };
        let hash = |applied, given| update.restore(applied, given, Vec::new()).unwrap().hash();
        let hashes = [
            hash(1, given()),
            hash(2, given()),
            hash(1, Optimizer { parameters: vec![1.5], ..given() }),
            hash(1, Optimizer { exp_avg: vec![2.5], ..given() }),
            hash(1, Optimizer { exp_avg_sq: vec![3.5], ..given() }),
        ];
        let distinct: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }
}
