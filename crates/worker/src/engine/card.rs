//! Parameters, moments and sums on a card: a step moves none of them, but for what other members are to sum.

use std::ops::Range;

use shanty_peft_core::{
    StepKey,
    engine::{FlatPart, SumSink},
    optim::{FlatUpdate, Source, groups},
};

use crate::Error;

use super::{
    AdapterWriter, Facts, Reducer, ReductionError, Row, StepEngine, StepHooks, StepUpdate, Sum, Total,
    Updated, host::HostEngine, host::PIECE, peft::PeftEngine,
};

/// The real engine with everything that is trained on the card that computes.
pub(super) struct OnCard(pub(super) PeftEngine);

fn part(error: shanty_peft_core::Error) -> Error {
    Error::part(&error)
}

impl StepHooks for OnCard {
    fn method_state(&self) -> Vec<f32> {
        self.0.method_state()
    }

    fn rates(&self, peak: f64) -> Vec<(Range<usize>, f64)> {
        self.0.rates(peak)
    }
}

impl StepEngine for OnCard {
    fn facts(&self) -> &Facts {
        self.0.facts()
    }

    fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>, Error> {
        self.0.initial_parameters(seed)
    }

    fn micro_batch_rows(&self) -> usize {
        self.0.micro_batch_rows()
    }

    fn card(&self) -> Option<u32> {
        self.0.card()
    }

    fn begin(&mut self, [parameters, first, second]: [&[f32]; 3]) -> Result<(), Error> {
        self.0.engine.begin(parameters, first, second).map_err(part)
    }

    fn read(&self, which: FlatPart, start: usize, into: &mut [f32]) -> Result<(), Error> {
        self.0.engine.read(which, start, into).map_err(part)
    }

    fn clear_sum(&mut self) -> Result<(), Error> {
        self.0.engine.clear_sum().map_err(part)
    }

    fn accumulate(
        &mut self,
        rows: &[Row],
        seed: u64,
        step: u64,
        sink: &mut dyn SumSink,
    ) -> Result<u64, Error> {
        self.0.engine.accumulate(rows, StepKey { seed, step }, sink).map_err(part)
    }

    fn losses(&mut self) -> Result<Vec<f64>, Error> {
        self.0.engine.losses().map_err(part)
    }

    fn evaluate(&mut self, rows: &[Row]) -> Result<Sum, Error> {
        let sum = self.0.engine.evaluate_resident(rows).map_err(part)?;
        Ok(Sum { loss: sum.loss, tokens: sum.tokens })
    }

    fn reduce(&mut self, reducer: &mut dyn Reducer) -> Result<(), ReductionError> {
        let engine = &mut self.0.engine;
        if let Some(flat) = engine.card_flat().map_err(part)?
            && let Some(reduced) = reducer.reduce_on_card(&flat)
        {
            return Ok(reduced?);
        }
        Ok(engine.reduce(PIECE, &mut |own, sum| reducer.reduce(own, sum)).map_err(part)??)
    }

    fn update(&mut self, update: &StepUpdate<'_>, _: &mut [f32]) -> Result<Option<Updated>, Error> {
        let StepUpdate { step, mean, max_norm, adamw, learning_rate, rates, total, .. } = *update;
        let groups = groups(adamw, step, learning_rate, rates, self.0.facts().flat_length);
        let source = match total {
            Total::Own => Source::Own,
            Total::Reduced => Source::Reduced,
        };
        let update = FlatUpdate { mean, max_norm, groups: &groups, source };
        let outcome = self.0.engine.update(&update).map_err(part)?;
        Ok(outcome.norm.is_finite().then_some(Updated { gradient_norm: outcome.norm }))
    }

    fn adapter_files(&self, parameters: &[f32], state: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        self.0.adapter_files(parameters, state)
    }

    fn adapter_writer(&self) -> Option<AdapterWriter> {
        self.0.adapter_writer()
    }
}
