//! What is said of the local gradient sum of a step, which lies where the engine computes: unscaled, over whole
//! micro-batches, tagged with what it is of.

use crate::{Error, engine::StepEngine};

/// The local sum of one step.
#[derive(Debug, Default)]
pub(crate) struct LocalSum {
    /// The step that it belongs to; 0 while it is of none.
    step: u64,
    /// The rows in it, in the order in which they were added.
    rows: Vec<u64>,
    /// Summed loss of the micro-batches that were heard of, nats.
    loss: f64,
    /// Trained tokens.
    tokens: u64,
    /// Rows of each micro-batch whose loss the engine has not told yet: they are the last ones.
    untold: Vec<usize>,
    /// Rows of micro-batches whose loss was not a finite number.
    not_finite: Vec<u64>,
    /// How many micro-batches those are.
    not_finite_batches: u64,
}

impl LocalSum {
    /// Begins the sum of a step, unless it is the one that is held.
    pub(crate) fn begin(&mut self, step: u64, engine: &mut dyn StepEngine) -> Result<(), Error> {
        if self.step != step {
            self.clear(engine)?;
            self.step = step;
        }
        Ok(())
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self, engine: &mut dyn StepEngine) -> Result<(), Error> {
        *self = Self { rows: std::mem::take(&mut self.rows), ..Self::default() };
        self.rows.clear();
        engine.clear_sum()
    }

    /// Adds one whole micro-batch, whose gradient `add` has the engine add: it returns trained tokens. If it fails, the sum
    /// is worth nothing and is dropped.
    pub(crate) fn add(
        &mut self,
        engine: &mut dyn StepEngine,
        rows: impl ExactSizeIterator<Item = u64>,
        add: impl FnOnce(&mut dyn StepEngine) -> Result<u64, Error>,
    ) -> Result<(), Error> {
        match add(engine) {
            Ok(tokens) => {
                self.untold.push(rows.len());
                self.rows.extend(rows);
                self.tokens += tokens;
                Ok(())
            }
            Err(error) => self.drop_for(engine, error),
        }
    }

    /// Waits until the engine has added everything, and takes in the losses. If a micro-batch failed, the sum is worth
    /// nothing and is dropped.
    pub(crate) fn complete(&mut self, engine: &mut dyn StepEngine) -> Result<(), Error> {
        let losses = match engine.losses() {
            Ok(losses) => losses,
            Err(error) => return self.drop_for(engine, error),
        };
        let untold = std::mem::take(&mut self.untold);
        let mut first = self.rows.len() - untold.iter().sum::<usize>();
        for (rows, loss) in untold.into_iter().zip(losses) {
            if loss.is_finite() {
                self.loss += loss;
            } else {
                self.not_finite.extend_from_slice(&self.rows[first..first + rows]);
                self.not_finite_batches += 1;
            }
            first += rows;
        }
        Ok(())
    }

    fn drop_for(&mut self, engine: &mut dyn StepEngine, error: Error) -> Result<(), Error> {
        // The first failure is the one to tell.
        let _ = self.clear(engine);
        Err(error)
    }

    /// Step and rows, if it holds any.
    pub(crate) fn kept(&self) -> Option<(u64, &[u64])> {
        (self.step > 0 && !self.rows.is_empty()).then_some((self.step, self.rows.as_slice()))
    }

    /// The rows in it.
    pub(crate) fn rows(&self) -> &[u64] {
        &self.rows
    }

    /// Summed loss of the micro-batches whose loss is finite, nats; whole after [`Self::complete`].
    pub(crate) fn loss(&self) -> f64 {
        self.loss
    }

    /// Trained tokens.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// How many micro-batches had a loss that is not finite, and their rows; whole after [`Self::complete`].
    pub(crate) fn not_finite(&self) -> (u64, &[u64]) {
        (self.not_finite_batches, &self.not_finite)
    }
}

#[cfg(test)]
mod tests {
    use shanty_peft_core::GradientSink;

    use super::*;
    use crate::engine::{Facts, FlatPart, HostEngine, OnHost, Row, StepHooks, Sum, SumSink};

    /// Adds 1 to the gradient, or fails half way.
    struct Counting {
        facts: Facts,
        loss: f64,
        fails: bool,
    }

    impl StepHooks for Counting {}

    impl HostEngine for Counting {
        fn facts(&self) -> &Facts {
            &self.facts
        }

        fn initial_parameters(&mut self, _: u64) -> Result<Vec<f32>, Error> {
            Ok(vec![0.0; 2])
        }

        fn micro_batch_rows(&self) -> usize {
            1
        }

        fn forward_backward(
            &mut self,
            _: &[f32],
            _: &[Row],
            _: u64,
            step: u64,
            gradient: &mut [f32],
            _: &mut dyn GradientSink,
        ) -> Result<Sum, Error> {
            gradient[0] += 1.0;
            if self.fails {
                return Err(Error::NotFinite { what: "half of it", step, rows: Vec::new() });
            }
            Ok(Sum { loss: self.loss, tokens: 2 })
        }

        fn evaluate(&mut self, _: &[f32], _: &[Row]) -> Result<Sum, Error> {
            Ok(Sum::default())
        }

        fn adapter_files(&self, _: &[f32], _: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
            Ok(Vec::new())
        }
    }

    struct Deaf;

    impl SumSink for Deaf {
        fn ready(&mut self, _: std::ops::Range<usize>, _: crate::engine::Memory<'_>) {}
    }

    fn engine(loss: f64, fails: bool) -> OnHost<Counting> {
        let facts = Facts { flat_length: 2, ..Facts::default() };
        let mut engine = OnHost::new(Counting { facts, loss, fails });
        engine.begin([&[0.0; 2]; 3]).unwrap();
        engine
    }

    fn add(sum: &mut LocalSum, engine: &mut OnHost<Counting>, row: u64) -> Result<(), Error> {
        sum.add(engine, [row].into_iter(), |engine| engine.accumulate(&[], 1, 3, &mut Deaf))
    }

    fn gradient(engine: &OnHost<Counting>) -> [f32; 2] {
        let mut numbers = [f32::NAN; 2];
        engine.read(FlatPart::Gradient, 0, &mut numbers).unwrap();
        numbers
    }

    #[test]
    fn a_sum_goes_on_within_its_step_and_begins_anew_with_the_next() {
        let (mut sum, mut engine) = (LocalSum::default(), engine(0.375, false));
        sum.begin(3, &mut engine).unwrap();
        assert_eq!(sum.kept(), None);
        add(&mut sum, &mut engine, 7).unwrap();
        sum.begin(3, &mut engine).unwrap();
        add(&mut sum, &mut engine, 8).unwrap();
        assert_eq!(sum.kept(), Some((3, [7, 8].as_slice())));
        sum.complete(&mut engine).unwrap();
        assert_eq!((sum.loss(), sum.tokens(), gradient(&engine)), (0.75, 4, [2.0, 0.0]));
        sum.begin(4, &mut engine).unwrap();
        assert_eq!((sum.kept(), gradient(&engine)), (None, [0.0, 0.0]));
    }

    #[test]
    fn a_micro_batch_that_failed_takes_the_whole_sum_with_it() {
        let (mut sum, mut engine) = (LocalSum::default(), engine(0.5, true));
        sum.begin(3, &mut engine).unwrap();
        let failed = add(&mut sum, &mut engine, 8).unwrap_err();
        assert!(failed.to_string().contains("half of it"), "{failed}");
        assert_eq!((sum.kept(), gradient(&engine)), (None, [0.0, 0.0]));
    }

    #[test]
    fn rows_with_a_loss_that_is_not_finite_are_remembered() {
        let (mut sum, mut engine) = (LocalSum::default(), engine(f64::NAN, false));
        sum.begin(3, &mut engine).unwrap();
        add(&mut sum, &mut engine, 7).unwrap();
        add(&mut sum, &mut engine, 8).unwrap();
        sum.complete(&mut engine).unwrap();
        add(&mut sum, &mut engine, 9).unwrap();
        assert_eq!(sum.not_finite(), (2, [7, 8].as_slice()), "of the third nothing is known yet");
        sum.complete(&mut engine).unwrap();
        assert_eq!(sum.not_finite(), (3, [7, 8, 9].as_slice()));
        assert_eq!(sum.loss().to_bits(), 0.0_f64.to_bits());
    }
}
