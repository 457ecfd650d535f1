//! Adapter and optimizer as they stand, and how a step changes them. Parameters and moments lie where the engine computes;
//! who needs their numbers reads them through [`State`].

use std::ops::Range;

use shanty_checkpoint::Optimizer;
use shanty_config::job::{self, JobSpec};
use shanty_peft_core::optim::{AdamWOptions, Schedule, Shape};

use crate::{
    Error,
    engine::{FlatPart, StepEngine, StepHooks, StepUpdate, Total},
};

/// What the method carries from step to step, in a checkpoint: f32, little-endian.
pub(crate) const METHOD_STATE: &str = "method_state.f32";

/// Numbers that are read from the engine at once.
const PIECE: usize = 1 << 20;

/// The parts that lie in the engine, in the order in which they travel and are hashed. What the method carries follows.
const IN_ENGINE: [FlatPart; 3] = [FlatPart::Parameters, FlatPart::FirstMoment, FlatPart::SecondMoment];

/// What is said of adapter and optimizer after some number of updates, beside what lies in the engine.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    /// Updates applied.
    applied: u64,
    /// What the method carries from step to step.
    pub(crate) method: Vec<f32>,
}

impl State {
    /// Updates applied.
    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }

    /// Numbers of a part, in the order in which parts travel: parameters, moments, what the method carries.
    pub(crate) fn read(
        &self,
        engine: &dyn StepEngine,
        part: usize,
        start: usize,
        into: &mut [f32],
    ) -> Result<(), Error> {
        match (IN_ENGINE.get(part), self.method.get(start..start + into.len())) {
            (Some(part), _) => engine.read(*part, start, into)?,
            (None, Some(numbers)) => into.copy_from_slice(numbers),
            (None, None) => return Err(crate::engine::missing_state()),
        }
        Ok(())
    }

    /// The adapter's parameters.
    pub(crate) fn parameters(&self, engine: &dyn StepEngine) -> Result<Vec<f32>, Error> {
        whole(engine, FlatPart::Parameters)
    }

    /// A copy for a checkpoint, without what the method carries.
    pub(crate) fn to_checkpoint(&self, engine: &dyn StepEngine) -> Result<Optimizer, Error> {
        let [parameters, exp_avg, exp_avg_sq] = IN_ENGINE.map(|part| whole(engine, part));
        Ok(Optimizer { parameters: parameters?, exp_avg: exp_avg?, exp_avg_sq: exp_avg_sq? })
    }

    /// BLAKE3 over the applied step and the bits of all parts.
    pub(crate) fn digest(&self, engine: &dyn StepEngine) -> Result<blake3::Hash, Error> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.applied.to_le_bytes());
        for part in IN_ENGINE {
            hash_part(&mut hasher, engine, part)?;
        }
        hasher.update(bytemuck::cast_slice(&self.method));
        Ok(hasher.finalize())
    }

    /// A step was passed over: it counts as applied, and nothing of it is.
    pub(crate) fn pass_over(&mut self) {
        self.applied += 1;
    }

    /// BLAKE3 over the bits of the adapter's parameters alone.
    pub(crate) fn adapter_digest(&self, engine: &dyn StepEngine) -> Result<blake3::Hash, Error> {
        let mut hasher = blake3::Hasher::new();
        hash_part(&mut hasher, engine, FlatPart::Parameters)?;
        Ok(hasher.finalize())
    }

    /// [`Self::digest`] in hexadecimal, as members report it.
    pub(crate) fn hash(&self, engine: &dyn StepEngine) -> Result<String, Error> {
        Ok(self.digest(engine)?.to_hex().to_string())
    }
}

/// [`State::digest`] of parts in host memory.
pub(crate) fn digest_of(applied: u64, parts: [&[f32]; 4]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&applied.to_le_bytes());
    for part in parts {
        hasher.update(bytemuck::cast_slice(part));
    }
    hasher.finalize()
}

fn hash_part(hasher: &mut blake3::Hasher, engine: &dyn StepEngine, part: FlatPart) -> Result<(), Error> {
    let length = engine.facts().flat_length;
    let mut piece = vec![0.0f32; PIECE.min(length)];
    for start in (0..length).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(length - start)];
        engine.read(part, start, piece)?;
        hasher.update(bytemuck::cast_slice(piece));
    }
    Ok(())
}

fn whole(engine: &dyn StepEngine, part: FlatPart) -> Result<Vec<f32>, Error> {
    let mut numbers = vec![0.0; engine.facts().flat_length];
    engine.read(part, 0, &mut numbers)?;
    Ok(numbers)
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

impl Applied {
    /// Of a step that was passed over.
    pub(crate) fn nothing() -> Self {
        Self { gradient_norm: 0.0, learning_rate: 0.0 }
    }
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
    pub(crate) fn fresh(
        &self,
        engine: &mut dyn StepEngine,
        parameters: &[f32],
        method: Vec<f32>,
    ) -> Result<State, Error> {
        let zeros = vec![0.0; parameters.len()];
        engine.begin([parameters, &zeros, &zeros])?;
        Ok(State { applied: 0, method })
    }

    /// The state that another member or a checkpoint gave.
    ///
    /// # Shapes
    /// All parts of `given`: `[parameters]`, else it is an error.
    pub(crate) fn restore(
        &self,
        engine: &mut dyn StepEngine,
        applied: u64,
        given: &Optimizer,
        method: Vec<f32>,
    ) -> Result<State, Error> {
        engine.begin([&given.parameters, &given.exp_avg, &given.exp_avg_sq])?;
        Ok(State { applied, method })
    }

    /// Makes one step with the sum of all ranks, scaled once by all trained tokens and clipped. None, and nothing is
    /// changed, if the gradient is not finite. Depends on nothing but the bits of its arguments and of the engine's sum.
    pub(crate) fn apply(
        &self,
        state: &mut State,
        engine: &mut dyn StepEngine,
        total: Total,
        tokens: u64,
    ) -> Result<Option<Applied>, Error> {
        // The schedule counts updates from 0.
        let learning_rate = self.schedule.learning_rate(state.applied);
        let update = StepUpdate {
            step: state.applied + 1,
            total_steps: self.schedule.total_steps,
            total,
            mean: 1.0 / tokens.max(1) as f64,
            max_norm: self.max_norm,
            adamw: &self.adamw,
            learning_rate,
            rates: &self.rates,
        };
        let Some(updated) = engine.update(&update, &mut state.method)? else { return Ok(None) };
        state.applied += 1;
        Ok(Some(Applied { gradient_norm: updated.gradient_norm, learning_rate }))
    }
}

#[cfg(test)]
mod tests {
    use shanty_peft_core::GradientSink;

    use super::*;
    use crate::engine::{Facts, HostEngine, Memory, OnHost, Row, Sum, SumSink};

    /// Adds its own numbers to the gradient.
    struct Adding {
        facts: Facts,
        gradient: Vec<f32>,
        /// How often whole vectors were computed on.
        ran: std::cell::Cell<u32>,
    }

    impl StepHooks for Adding {}

    impl HostEngine for Adding {
        fn facts(&self) -> &Facts {
            &self.facts
        }

        fn initial_parameters(&mut self, _: u64) -> Result<Vec<f32>, Error> {
            Ok(vec![0.0; self.facts.flat_length])
        }

        fn micro_batch_rows(&self) -> usize {
            1
        }

        fn forward_backward(
            &mut self,
            _: &[f32],
            _: &[Row],
            _: u64,
            _: u64,
            gradient: &mut [f32],
            sink: &mut dyn GradientSink,
        ) -> Result<Sum, Error> {
            gradient.iter_mut().zip(&self.gradient).for_each(|(sum, own)| *sum += own);
            sink.ready(0..gradient.len(), gradient);
            Ok(Sum::default())
        }

        fn evaluate(&mut self, _: &[f32], _: &[Row]) -> Result<Sum, Error> {
            Ok(Sum::default())
        }

        fn adapter_files(&self, _: &[f32], _: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
            Ok(Vec::new())
        }

        fn run(&self, work: &mut (dyn FnMut() + Send)) {
            self.ran.set(self.ran.get() + 1);
            work();
        }
    }

    struct Deaf;

    impl SumSink for Deaf {
        fn ready(&mut self, _: Range<usize>, _: Memory<'_>) {}
    }

    fn engine(gradient: &[f32]) -> OnHost<Adding> {
        let facts = Facts { flat_length: gradient.len(), ..Facts::default() };
        OnHost::new(Adding { facts, gradient: gradient.to_vec(), ran: Default::default() })
    }

    /// A step with the sum of one micro-batch.
    fn step(update: &Update, state: &mut State, engine: &mut OnHost<Adding>, tokens: u64) -> Option<Applied> {
        engine.clear_sum().unwrap();
        engine.accumulate(&[], 1, 1, &mut Deaf).unwrap();
        update.apply(state, engine, Total::Own, tokens).unwrap()
    }

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
        let (mut one, mut other) = (engine(&[0.25, 0.5]), engine(&[2.0, 4.0]));
        let mut states =
            [&mut one, &mut other].map(|engine| update.fresh(engine, &[1.0, -1.0], Vec::new()).unwrap());
        let first = step(&update, &mut states[0], &mut one, 1).unwrap();
        let second = step(&update, &mut states[1], &mut other, 8).unwrap();
        // Powers of two scale exactly.
        assert_eq!(states[0].hash(&one).unwrap(), states[1].hash(&other).unwrap());
        assert_eq!(first, second);
        assert_eq!(states[0].applied(), 1);
    }

    #[test]
    fn the_norm_and_the_optimizer_run_on_the_engines_threads() {
        let update = update();
        let mut engine = engine(&[0.25, 0.5]);
        let mut state = update.fresh(&mut engine, &[1.0, -1.0], Vec::new()).unwrap();
        step(&update, &mut state, &mut engine, 1).unwrap();
        step(&update, &mut state, &mut engine, 1).unwrap();
        assert_eq!(engine.engine().ran.get(), 2, "once a step, all of it");
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let update = update();
        let mut engine = engine(&[f32::INFINITY, 0.0]);
        let mut state = update.fresh(&mut engine, &[1.0, -1.0], Vec::new()).unwrap();
        let before = state.hash(&engine).unwrap();
        assert_eq!(step(&update, &mut state, &mut engine, 1), None);
        assert_eq!(state.hash(&engine).unwrap(), before);
    }

    #[test]
    fn a_restored_state_goes_on_with_the_same_bits() {
        let update = update();
        let (mut one, mut other) = (engine(&[0.3, 0.1]), engine(&[0.2, 0.7]));
        let mut state = update.fresh(&mut one, &[1.0, -1.0], Vec::new()).unwrap();
        step(&update, &mut state, &mut one, 3).unwrap();
        let given = state.to_checkpoint(&one).unwrap();
        let mut restored = update.restore(&mut other, state.applied(), &given, Vec::new()).unwrap();
        assert_eq!(restored.hash(&other).unwrap(), state.hash(&one).unwrap());
        one = engine(&[0.2, 0.7]);
        let mut state = update.restore(&mut one, state.applied(), &given, Vec::new()).unwrap();
        step(&update, &mut state, &mut one, 3).unwrap();
        step(&update, &mut restored, &mut other, 3).unwrap();
        assert_eq!(restored.hash(&other).unwrap(), state.hash(&one).unwrap());
    }

    #[test]
    fn the_hash_covers_every_part_and_the_step() {
        let update = update();
        let given = || Optimizer { parameters: vec![1.0], exp_avg: vec![2.0], exp_avg_sq: vec![3.0] };
        let hash = |applied, given: Optimizer, method: Vec<f32>| {
            let mut engine = engine(&[0.0]);
            let state = update.restore(&mut engine, applied, &given, method.clone()).unwrap();
            let digest = state.digest(&engine).unwrap();
            let parts = [&given.parameters, &given.exp_avg, &given.exp_avg_sq, &method].map(Vec::as_slice);
            assert_eq!(digest, digest_of(applied, parts), "in the engine as in host memory");
            digest.to_hex().to_string()
        };
        let hashes = [
            hash(1, given(), vec![]),
            hash(2, given(), vec![]),
            hash(1, Optimizer { parameters: vec![1.5], ..given() }, vec![]),
            hash(1, Optimizer { exp_avg: vec![2.5], ..given() }, vec![]),
            hash(1, Optimizer { exp_avg_sq: vec![3.5], ..given() }, vec![]),
            hash(1, given(), vec![4.0]),
        ];
        let distinct: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }
}
