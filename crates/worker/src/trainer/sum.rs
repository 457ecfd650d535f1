//! The local gradient sum of a step: unscaled, over whole micro-batches, tagged with what it is of.

use crate::engine::Sum;

/// The local sum of one step.
#[derive(Debug, Default)]
pub(crate) struct LocalSum {
    /// The step that it belongs to; 0 while it is of none.
    step: u64,
    /// The rows in it, in the order in which they were added.
    rows: Vec<u64>,
    /// The gradient.
    gradient: Vec<f32>,
    /// Summed loss, nats.
    loss: f64,
    /// Trained tokens.
    tokens: u64,
    /// Rows of micro-batches whose loss was not a finite number.
    not_finite: Vec<u64>,
    /// How many micro-batches those are.
    not_finite_batches: u64,
}

impl LocalSum {
    /// Begins the sum of a step, unless it is the one that is held.
    ///
    /// # Shapes
    /// The gradient gets `length` entries.
    pub(crate) fn begin(&mut self, step: u64, length: usize) {
        if self.step == step && self.gradient.len() == length {
            return;
        }
        self.clear();
        self.step = step;
        self.gradient.resize(length, 0.0);
    }

    /// Drops everything; the memory stays.
    pub(crate) fn clear(&mut self) {
        self.step = 0;
        self.rows.clear();
        self.gradient.fill(0.0);
        self.loss = 0.0;
        self.tokens = 0;
        self.not_finite.clear();
        self.not_finite_batches = 0;
    }

    /// Adds one whole micro-batch, whose gradient `add` adds. If it fails, the sum is worth nothing and is dropped.
    pub(crate) fn add<E>(
        &mut self,
        rows: impl Iterator<Item = u64>,
        add: impl FnOnce(&mut [f32]) -> Result<Sum, E>,
    ) -> Result<(), E> {
        match add(&mut self.gradient) {
            Ok(sum) => {
                let first = self.rows.len();
                self.rows.extend(rows);
                self.tokens += sum.tokens;
                if sum.loss.is_finite() {
                    self.loss += sum.loss;
                } else {
                    self.not_finite.extend_from_slice(&self.rows[first..]);
                    self.not_finite_batches += 1;
                }
                Ok(())
            }
            Err(error) => {
                self.clear();
                Err(error)
            }
        }
    }

    /// Step and rows, if it holds any.
    pub(crate) fn kept(&self) -> Option<(u64, &[u64])> {
        (self.step > 0 && !self.rows.is_empty()).then_some((self.step, self.rows.as_slice()))
    }

    /// The gradient. `[trainable parameters]`
    pub(crate) fn gradient(&self) -> &[f32] {
        &self.gradient
    }

    /// The rows in it.
    pub(crate) fn rows(&self) -> &[u64] {
        &self.rows
    }

    /// Summed loss of the micro-batches whose loss is finite, nats.
    pub(crate) fn loss(&self) -> f64 {
        self.loss
    }

    /// Trained tokens.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// How many micro-batches had a loss that is not finite, and their rows.
    pub(crate) fn not_finite(&self) -> (u64, &[u64]) {
        (self.not_finite_batches, &self.not_finite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(sum: &mut LocalSum, row: u64, loss: f64) {
        let added: Result<(), ()> = sum.add([row].into_iter(), |gradient| {
            gradient[0] += 1.0;
            Ok(Sum { loss, tokens: 2 })
        });
        added.unwrap();
    }

    #[test]
    fn a_sum_goes_on_within_its_step_and_begins_anew_with_the_next() {
        let mut sum = LocalSum::default();
        sum.begin(3, 2);
        assert_eq!(sum.kept(), None);
        add(&mut sum, 7, 0.5);
        sum.begin(3, 2);
        add(&mut sum, 8, 0.25);
        assert_eq!(sum.kept(), Some((3, [7, 8].as_slice())));
        assert_eq!((sum.loss(), sum.tokens(), sum.gradient()), (0.75, 4, [2.0, 0.0].as_slice()));
        sum.begin(4, 2);
        assert_eq!((sum.kept(), sum.gradient()), (None, [0.0, 0.0].as_slice()));
    }

    #[test]
    fn a_micro_batch_that_failed_takes_the_whole_sum_with_it() {
        let mut sum = LocalSum::default();
        sum.begin(1, 1);
        add(&mut sum, 7, 0.5);
        let failed = sum.add([8].into_iter(), |gradient| {
            gradient[0] += 0.1;
            Err("half of it")
        });
        assert_eq!(failed, Err("half of it"));
        assert_eq!((sum.kept(), sum.gradient()), (None, [0.0].as_slice()));
    }

    #[test]
    fn rows_with_a_loss_that_is_not_finite_are_remembered() {
        let mut sum = LocalSum::default();
        sum.begin(1, 1);
        add(&mut sum, 7, 0.5);
        add(&mut sum, 8, f64::NAN);
        assert_eq!(sum.not_finite(), (1, [8].as_slice()));
        assert!((sum.loss() - 0.5).abs() < f64::EPSILON);
    }
}
