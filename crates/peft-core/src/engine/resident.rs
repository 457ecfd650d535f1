//! Training with parameters, gradient and moments where the engine computes: a step moves none of them.
//!
//! ```text
//! engine.begin(&parameters, &first_moment, &second_moment)?;
//! let tokens = engine.accumulate(&rows, StepKey { seed, step: 1 }, &mut NoSink)?;   // once for each micro-batch
//! let losses = engine.losses()?;                            // one a micro-batch: from here on the sum is whole
//! engine.reduce(PIECE, &mut |own, sum| collective.all_reduce_f32(own, sum))?;       // where there are other members
//! let outcome = engine.update(&FlatUpdate { mean: 1.0 / tokens as f64, max_norm: 1.0, groups, source })?;
//! engine.read(FlatPart::Parameters, 0, &mut numbers)?;                                // for a checkpoint
//! ```

use std::ops::Range;

use super::{
    Engine, LossSum, NoSink, StepError, StepKey,
    machine::{Parts, Pass},
};
use crate::{
    adapter::PassDropout,
    backend::cuda::CardFlat,
    batch::Row,
    error::Result,
    optim::{FlatUpdate, Outcome, SumPiece},
};

/// What stays in an engine, all of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlatPart {
    /// What is trained.
    Parameters,
    /// AdamW's first moment.
    FirstMoment,
    /// AdamW's second moment.
    SecondMoment,
    /// The sum of gradients since it was last cleared or used.
    Gradient,
}

/// Where a sum of gradients lies.
#[derive(Clone, Copy)]
pub enum Memory<'a> {
    /// In host memory: the whole sum.
    Host(&'a [f32]),
    /// In a card's memory. The work that makes it is queued, not done.
    Card(&'a CardFlat),
}

/// Hears when a part of the sum of gradients is final for this micro-batch, so that its reduction may begin.
pub trait SumSink: Send {
    /// `range` of the sum will not change any more until the next micro-batch. Ranges come front to back.
    fn ready(&mut self, range: Range<usize>, memory: Memory<'_>);
}

impl SumSink for NoSink {
    fn ready(&mut self, _range: Range<usize>, _memory: Memory<'_>) {}
}

impl Engine {
    /// Whether [`Engine::begin`] can be served: what is trained is what passes read, and the method changes neither gradient
    /// nor parameters on the host in between.
    pub fn trains_resident(&self) -> bool {
        self.fit.network().is_none() && !self.fit.method().is_some_and(|method| method.has_step_hooks())
    }

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
            return Err(StepError::NoState.into());
        }
        self.machine.begin([parameters, first, second], self.request.reduced_apart)
    }

    /// Adds the gradient and the loss of one micro-batch; returns its trained tokens. On a card the work is only queued.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn accumulate(&mut self, rows: &[Row], key: StepKey, sink: &mut dyn SumSink) -> Result<u64> {
        let virtual_tokens = self.fit.layout().virtual_tokens();
        self.check_rows(rows, virtual_tokens)?;
        self.packed.fill_behind(virtual_tokens, rows)?;
        let p = self.fit.dropout();
        let dropout = (p > 0.0).then_some(PassDropout { p, seed: key.seed, step: key.step });
        let Self { machine, config, base, fit, packed, sizes, plan, .. } = self;
        let parts = Parts { config, base: &mut **base, layout: fit.layout() };
        let tokens = packed.predicting.len() as u64;
        let levels = plan.levels;
        let (parameters, training, each, resident) = (None, None, None, true);
        let pass = Pass { packed, sizes, levels, parameters, dropout, training, each, resident };
        machine.accumulate(parts, pass, sink)?;
        Ok(tokens)
    }

    /// The losses of the micro-batches accumulated since they were last asked for, in their order. Waits for them: what
    /// failed in them is told here.
    ///
    /// # Errors
    /// What failed since the last wait.
    pub fn losses(&mut self) -> Result<Vec<f64>> {
        self.machine.losses()
    }

    /// Sets the sum of gradients to 0 and forgets its losses.
    ///
    /// # Errors
    /// What failed since the last wait.
    pub fn clear_sum(&mut self) -> Result<()> {
        self.machine.clear_sum()
    }

    /// Summed loss of any number of rows with the parameters that stay in the engine, without dropout.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn evaluate_resident(&mut self, rows: &[Row]) -> Result<LossSum> {
        let mut sum = LossSum::default();
        for rows in rows.chunks(self.plan.micro_batch_rows) {
            sum.add(self.pass_over(None, true, rows, None, None, None, None)?);
        }
        Ok(sum)
    }

    /// Has `work` sum the gradient over members, in pieces of at most `piece` numbers, front to back: from its first slice
    /// into its second, both in host memory. The gradient stays as it is; the sum is what [`crate::optim::Source::Reduced`]
    /// names. From a card, pieces travel through pinned memory while the one before is summed.
    ///
    /// # Errors
    /// Outside: what failed since the last wait, or memory is short. Inside: what `work` returned.
    pub fn reduce<E>(
        &mut self,
        piece: usize,
        work: &mut SumPiece<'_, E>,
    ) -> Result<std::result::Result<(), E>> {
        self.machine.reduce(piece.max(1), work)
    }

    /// The gradient and the place of its sum over members in a card's memory, for a collective that reads and writes there;
    /// none on the processor.
    ///
    /// # Errors
    /// Before [`Engine::begin`], or memory is short.
    pub fn card_flat(&mut self) -> Result<Option<CardFlat>> {
        self.machine.flat()
    }

    /// Clips and applies what was accumulated, waits for it, and says what it amounted to. Where the gradient's norm is not
    /// finite nothing was changed.
    ///
    /// # Errors
    /// What failed since the last wait.
    pub fn update(&mut self, update: &FlatUpdate<'_>) -> Result<Outcome> {
        self.machine.update(update)
    }

    /// Numbers of a part from `start` on, as they stand.
    ///
    /// # Errors
    /// Before [`Engine::begin`], a range that is not there, and what failed since the last wait.
    pub fn read(&self, part: FlatPart, start: usize, into: &mut [f32]) -> Result<()> {
        self.machine.read(part, start, into)
    }

    /// Parameters and moments as they stand.
    ///
    /// # Errors
    /// As [`Engine::read`].
    pub fn trained_state(&self) -> Result<[Vec<f32>; 3]> {
        let whole = |part| {
            let mut numbers = vec![0.0; self.layout().len()];
            self.read(part, 0, &mut numbers)?;
            Ok::<_, crate::Error>(numbers)
        };
        Ok([whole(FlatPart::Parameters)?, whole(FlatPart::FirstMoment)?, whole(FlatPart::SecondMoment)?])
    }

    /// Runs `work` on the engine's threads, where it computes on the processor: vector work of the caller then takes no
    /// more threads than the engine may.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.machine.run(work)
    }
}
