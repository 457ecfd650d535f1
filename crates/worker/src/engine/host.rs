//! Parameters, moments and sums in host memory, for engines that read and write there.

use std::ops::Range;

use shanty_peft_core::{
    GradientSink,
    engine::{FlatPart, Memory, SumSink},
    model::ShardedBase,
    optim::{AdamW, clip_factor, global_norm},
};

use crate::Error;

use super::{
    AdapterWriter, Facts, Reducer, ReductionError, Row, StepEngine, StepHooks, StepInfo, StepUpdate, Sum,
    Total, Updated,
};

/// Entries of the gradient in one all-reduce. Between two, a member that is to leave does.
pub(crate) const PIECE: usize = 1 << 20;

/// Forward and backward over a frozen base with a trained adapter, whose parameters are one flat vector that the caller
/// owns.
pub trait HostEngine: StepHooks {
    /// What was loaded.
    fn facts(&self) -> &Facts;

    /// The adapter's parameters before the first step: a pure function of job and seed.
    ///
    /// # Errors
    /// As the engine says.
    fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>, Error>;

    /// The most rows of one micro-batch.
    fn micro_batch_rows(&self) -> usize;

    /// Adds the unscaled gradient of the summed loss of one micro-batch to `gradient`. `sink` hears at least once of a part
    /// that is final while another is not.
    ///
    /// # Shapes
    /// `parameters`, `gradient`: `[flat_length]`; at most [`Self::micro_batch_rows`] rows.
    ///
    /// # Errors
    /// As the engine says; `gradient` is then unspecified.
    fn forward_backward(
        &mut self,
        parameters: &[f32],
        rows: &[Row],
        seed: u64,
        step: u64,
        gradient: &mut [f32],
        sink: &mut dyn GradientSink,
    ) -> Result<Sum, Error>;

    /// The summed loss of some rows, without dropout.
    ///
    /// # Errors
    /// As the engine says.
    fn evaluate(&mut self, parameters: &[f32], rows: &[Row]) -> Result<Sum, Error>;

    /// As [`StepEngine::adapter_files`].
    ///
    /// # Errors
    /// As the engine says.
    fn adapter_files(&self, parameters: &[f32], state: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error>;

    /// The base, where this worker holds but a part of it.
    fn shared_base(&mut self) -> Option<&mut ShardedBase> {
        None
    }

    /// Takes note of the hash of a base that its members agreed on.
    fn agree_on_base(&mut self, _hash: blake3::Hash) {}

    /// Whether [`Self::initial_parameters`] reads layers of the base: where that is shared, its members must make them together.
    fn start_reads_base(&self) -> bool {
        false
    }

    /// Gathers the layers of a micro-batch of which only others, who share the base, have rows.
    ///
    /// # Errors
    /// As the engine says.
    fn keep_company(&mut self, _training: bool) -> Result<(), Error> {
        Ok(())
    }

    /// The number of the card that it computes on.
    fn card(&self) -> Option<u32> {
        None
    }

    /// The same for a thread of its own; none where only the engine's thread can.
    fn adapter_writer(&self) -> Option<AdapterWriter> {
        None
    }

    /// Runs `work`, which computes on whole flat vectors, on the engine's threads.
    fn run(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }
}

/// An engine with parameters, moments and sums in host memory.
pub struct OnHost<E> {
    engine: E,
    parameters: Vec<f32>,
    optimizer: AdamW,
    gradient: Vec<f32>,
    /// The sum over all members, reserved at first.
    reduced: Vec<f32>,
    losses: Vec<f64>,
}

impl<E: HostEngine> OnHost<E> {
    /// With nothing in memory yet.
    pub fn new(engine: E) -> Self {
        Self {
            engine,
            parameters: Vec::new(),
            optimizer: AdamW::new(Default::default(), 0),
            gradient: Vec::new(),
            reduced: Vec::new(),
            losses: Vec::new(),
        }
    }

    /// The engine that computes.
    #[cfg(test)]
    pub(crate) fn engine(&self) -> &E {
        &self.engine
    }
}

/// Hands on what an engine in host memory says.
struct Told<'a>(&'a mut dyn SumSink);

impl GradientSink for Told<'_> {
    fn ready(&mut self, range: Range<usize>, gradient: &[f32]) {
        self.0.ready(range, Memory::Host(gradient));
    }
}

impl<E: HostEngine> StepHooks for OnHost<E> {
    fn method_state(&self) -> Vec<f32> {
        self.engine.method_state()
    }

    fn rates(&self, peak: f64) -> Vec<(Range<usize>, f64)> {
        self.engine.rates(peak)
    }

    fn regularise(&self, step: StepInfo, parameters: &[f32], gradient: &mut [f32]) {
        self.engine.regularise(step, parameters, gradient);
    }

    fn after_step(&self, step: StepInfo, parameters: &mut [f32], gradient: &[f32], state: &mut [f32]) {
        self.engine.after_step(step, parameters, gradient, state);
    }
}

impl<E: HostEngine> StepEngine for OnHost<E> {
    fn facts(&self) -> &Facts {
        self.engine.facts()
    }

    fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>, Error> {
        self.engine.initial_parameters(seed)
    }

    fn micro_batch_rows(&self) -> usize {
        self.engine.micro_batch_rows()
    }

    fn card(&self) -> Option<u32> {
        self.engine.card()
    }

    fn shared_base(&mut self) -> Option<&mut ShardedBase> {
        self.engine.shared_base()
    }

    fn agree_on_base(&mut self, hash: blake3::Hash) {
        self.engine.agree_on_base(hash);
    }

    fn start_reads_base(&self) -> bool {
        self.engine.start_reads_base()
    }

    fn keep_company(&mut self, training: bool) -> Result<(), Error> {
        self.engine.keep_company(training)
    }

    fn begin(&mut self, [parameters, first, second]: [&[f32]; 3]) -> Result<(), Error> {
        let moments = AdamW::restore(Default::default(), 0, first.to_vec(), second.to_vec());
        self.optimizer = moments.map_err(|error| Error::part(&error))?;
        self.parameters = parameters.to_vec();
        self.gradient.resize(parameters.len(), 0.0);
        self.clear_sum()
    }

    fn read(&self, part: FlatPart, start: usize, into: &mut [f32]) -> Result<(), Error> {
        let whole = match part {
            FlatPart::Parameters => &self.parameters,
            FlatPart::FirstMoment => self.optimizer.first_moment(),
            FlatPart::SecondMoment => self.optimizer.second_moment(),
            FlatPart::Gradient => &self.gradient,
        };
        match whole.get(start..start + into.len()) {
            Some(numbers) => into.copy_from_slice(numbers),
            None => return Err(super::missing_state()),
        }
        Ok(())
    }

    fn clear_sum(&mut self) -> Result<(), Error> {
        self.gradient.fill(0.0);
        self.losses.clear();
        Ok(())
    }

    fn accumulate(
        &mut self,
        rows: &[Row],
        seed: u64,
        step: u64,
        sink: &mut dyn SumSink,
    ) -> Result<u64, Error> {
        let Self { engine, parameters, gradient, losses, .. } = self;
        let sum = engine.forward_backward(parameters, rows, seed, step, gradient, &mut Told(sink))?;
        losses.push(sum.loss);
        Ok(sum.tokens)
    }

    fn losses(&mut self) -> Result<Vec<f64>, Error> {
        Ok(std::mem::take(&mut self.losses))
    }

    fn evaluate(&mut self, rows: &[Row]) -> Result<Sum, Error> {
        self.engine.evaluate(&self.parameters, rows)
    }

    fn reduce(&mut self, reducer: &mut dyn Reducer) -> Result<(), ReductionError> {
        self.reduced.resize(self.gradient.len(), 0.0);
        for (own, sum) in self.gradient.chunks(PIECE).zip(self.reduced.chunks_mut(PIECE)) {
            reducer.reduce(own, sum)?;
        }
        Ok(())
    }

    fn update(
        &mut self,
        update: &StepUpdate<'_>,
        method_state: &mut [f32],
    ) -> Result<Option<Updated>, Error> {
        let Self { engine, parameters, optimizer, gradient, reduced, .. } = self;
        let gradient = match update.total {
            Total::Own => gradient,
            Total::Reduced => reduced,
        };
        let StepUpdate { step, total_steps, mean, max_norm, adamw, learning_rate, rates, .. } = *update;
        engine.regularise(StepInfo { step, total_steps, scale: mean }, parameters, gradient);
        // What runs on the engine's threads takes no more of them than the engine may.
        let mut outcome = Ok(None);
        engine.run(&mut || {
            let gradient_norm = global_norm(gradient) * mean;
            let Some(clip) = clip_factor(gradient_norm, max_norm) else { return };
            let scale = mean * clip;
            outcome = optimizer
                .update_at(adamw, step, parameters, gradient, scale, learning_rate, rates)
                .map(|()| Some((gradient_norm, scale)));
        });
        let Some((gradient_norm, scale)) = outcome.map_err(|error| Error::part(&error))? else {
            return Ok(None);
        };
        engine.after_step(StepInfo { step, total_steps, scale }, parameters, gradient, method_state);
        Ok(Some(Updated { gradient_norm }))
    }

    fn adapter_files(&self, parameters: &[f32], state: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        self.engine.adapter_files(parameters, state)
    }

    fn adapter_writer(&self) -> Option<AdapterWriter> {
        self.engine.adapter_writer()
    }
}
