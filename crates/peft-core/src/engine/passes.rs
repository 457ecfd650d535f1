//! Passes over rows: training, evaluation, logits.

use super::{
    Engine, GradientSink, LossSum, NoSink, StepError, StepKey,
    machine::{Parts, Pass},
};
use crate::{
    adapter::PassDropout,
    batch::{Row, VirtualTokens},
    error::Result,
};

impl Engine {
    /// Runs one micro-batch forward and backward: returns the summed loss of its trained tokens and **adds** the
    /// gradient of that sum to `gradient`. Nothing is scaled.
    ///
    /// `sink` hears of each layer's part of `gradient` when it is final, front to back.
    ///
    /// # Errors
    /// Where the rows are malformed or do not fit a micro-batch, a token is outside the vocabulary, a flat buffer has
    /// another length than the layout, memory is short, or a layer's weights cannot be had.
    pub fn forward_backward(
        &mut self,
        parameters: &[f32],
        rows: &[Row],
        key: StepKey,
        gradient: &mut [f32],
        sink: &mut dyn GradientSink,
    ) -> Result<LossSum> {
        self.check_flat(gradient.len())?;
        let p = self.fit.dropout();
        let dropout = (p > 0.0).then_some(PassDropout { p, seed: key.seed, step: key.step });
        let Some(network) = self.fit.network().cloned() else {
            return self.pass(Some(parameters), rows, Some(key), dropout, Some((gradient, sink)), None);
        };
        // The gradient of what the network makes is whole before any of the trained tensors' is known.
        let mut made = std::mem::take(&mut self.made.gradient);
        made.fill(0.0);
        let sum = self.pass(Some(parameters), rows, Some(key), dropout, Some((&mut made, &mut NoSink)), None);
        let sum = sum.and_then(|sum| {
            network.network.backward(parameters, Some(key), &made, gradient)?;
            Ok(sum)
        });
        self.made.gradient = made;
        sink.ready(0..gradient.len(), gradient);
        sum
    }

    /// Summed loss of any number of rows, without dropout.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn evaluate(&mut self, parameters: &[f32], rows: &[Row]) -> Result<LossSum> {
        self.sum_losses(Some(parameters), rows)
    }

    /// Summed loss of any number of rows on the bare base.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn evaluate_base(&mut self, rows: &[Row]) -> Result<LossSum> {
        self.sum_losses(None, rows)
    }

    /// Summed loss of each of any number of rows, with the adapter or of the bare base, without dropout.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn row_losses(&mut self, parameters: Option<&[f32]>, rows: &[Row]) -> Result<Vec<LossSum>> {
        let mut sums = Vec::with_capacity(rows.len());
        let mut each = Vec::new();
        for rows in rows.chunks(self.plan.micro_batch_rows) {
            each.clear();
            self.pass(parameters, rows, None, None, None, Some(&mut each))?;
            let mut left = each.as_slice();
            for row in rows {
                let (own, rest) = left.split_at(left.len().min(row.trained_tokens() as usize));
                let loss = own.iter().map(|loss| f64::from(*loss)).sum();
                sums.push(LossSum { loss, tokens: own.len() as u64 });
                left = rest;
            }
        }
        Ok(sums)
    }

    fn sum_losses(&mut self, parameters: Option<&[f32]>, rows: &[Row]) -> Result<LossSum> {
        let mut sum = LossSum::default();
        for rows in rows.chunks(self.plan.micro_batch_rows) {
            sum.add(self.pass(parameters, rows, None, None, None, None)?);
        }
        Ok(sum)
    }

    fn pass<'a>(
        &'a mut self,
        parameters: Option<&'a [f32]>,
        rows: &[Row],
        key: Option<StepKey>,
        dropout: Option<PassDropout>,
        training: Option<(&'a mut [f32], &'a mut dyn GradientSink)>,
        each: Option<&'a mut Vec<f32>>,
    ) -> Result<LossSum> {
        self.check_parameters(parameters)?;
        self.pass_over(parameters, false, rows, key, dropout, training, each)
    }

    /// As [`Engine::pass`], with the parameters that stay in the engine where `resident` is set.
    #[expect(clippy::too_many_arguments, reason = "what a pass is of, and what is wanted of it")]
    pub(super) fn pass_over<'a>(
        &'a mut self,
        parameters: Option<&'a [f32]>,
        resident: bool,
        rows: &[Row],
        key: Option<StepKey>,
        dropout: Option<PassDropout>,
        training: Option<(&'a mut [f32], &'a mut dyn GradientSink)>,
        each: Option<&'a mut Vec<f32>>,
    ) -> Result<LossSum> {
        let virtual_tokens = match parameters.is_some() || resident {
            true => self.fit.layout().virtual_tokens(),
            false => VirtualTokens::None,
        };
        self.check_rows(rows, virtual_tokens)?;
        self.packed.fill_behind(virtual_tokens, rows)?;
        let Self { machine, config, base, fit, made, packed, sizes, plan, .. } = self;
        let parameters = made.parameters(fit, parameters, key)?;
        let parts = Parts { config, base: &mut **base, layout: fit.layout() };
        let tokens = packed.predicting.len() as u64;
        let levels = plan.levels;
        let loss = machine
            .pass(parts, Pass { packed, sizes, levels, parameters, dropout, training, each, resident })?;
        Ok(LossSum { loss, tokens })
    }

    pub(crate) fn check_parameters(&self, parameters: Option<&[f32]>) -> Result<()> {
        parameters.map_or(Ok(()), |parameters| self.check_flat(parameters.len()))
    }

    pub(super) fn check_flat(&self, found: usize) -> Result<()> {
        let expected = self.layout().len();
        if found == expected { Ok(()) } else { Err(StepError::FlatLength { found, expected }.into()) }
    }

    pub(super) fn check_rows(&self, rows: &[Row], virtual_tokens: VirtualTokens) -> Result<()> {
        let plan = &self.plan;
        let tokens: usize = rows.iter().map(|row| virtual_tokens.positions(row)).sum();
        if rows.len() > plan.micro_batch_rows || tokens > plan.micro_batch_tokens {
            return Err(StepError::MicroBatchTooLarge {
                rows: rows.len(),
                tokens,
                row_room: plan.micro_batch_rows,
                token_room: plan.micro_batch_tokens,
            }
            .into());
        }
        for row in rows {
            if virtual_tokens.positions(row) > self.sizes.max_length {
                let reason = "with its virtual tokens it is longer than max_length";
                return Err(StepError::MalformedRow { row: row.id, reason }.into());
            }
            self.check_tokens(row.id, &row.token_ids)?;
        }
        Ok(())
    }

    pub(crate) fn check_tokens(&self, row: u64, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocabulary_size;
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(&token) => Err(StepError::TokenOutOfRange { row, token, vocabulary }.into()),
        }
    }
}
