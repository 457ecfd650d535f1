//! AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019) on flat f32 buffers.
//!
//! With g the gradient, t the number of the update from 1 and η its learning rate:
//!
//! ```text
//! p ← p · (1 − η · decay)
//! m ← m + (1 − β₁) · (g − m)
//! v ← β₂ · v + (1 − β₂) · g · g
//! p ← p − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! in the order in which `torch.optim.AdamW` computes it; its scalars are f64, rounded to f32 where they meet a buffer.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Numbers per task. Every number is computed alone, so the cut changes no bit.
const CHUNK: usize = 1 << 14;

/// Settings, under torch's names and defaults but for the decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of both moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay; all parameters decay.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The moments of all parameters, and how many updates they have seen.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    options: AdamWOptions,
    step: u64,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl AdamW {
    /// Moments of zero for `parameters` parameters.
    pub fn new(options: AdamWOptions, parameters: usize) -> Self {
        Self { options, step: 0, first: vec![0.0; parameters], second: vec![0.0; parameters] }
    }

    /// Moments from a checkpoint.
    ///
    /// # Errors
    /// They are of unequal lengths.
    pub fn restore(options: AdamWOptions, step: u64, first: Vec<f32>, second: Vec<f32>) -> Result<Self> {
        expect_length("the second moment", second.len(), first.len())?;
        Ok(Self { options, step, first, second })
    }

    /// Settings.
    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// Updates so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Running mean of gradients, torch's `exp_avg`.
    pub fn first_moment(&self) -> &[f32] {
        &self.first
    }

    /// Running mean of squared gradients, torch's `exp_avg_sq`.
    pub fn second_moment(&self) -> &[f32] {
        &self.second
    }

    /// One update. The gradient is `gradients * gradient_scale`: the scale holds both 1 / trained tokens and clipping,
    /// and `gradients` stays as it is.
    ///
    /// # Errors
    /// The buffers are not of one length; nothing was changed then.
    pub fn update(
        &mut self,
        parameters: &mut [f32],
        gradients: &[f32],
        gradient_scale: f64,
        learning_rate: f64,
    ) -> Result<()> {
        self.update_by(parameters, gradients, gradient_scale, learning_rate, &[])
    }

    /// As [`Self::update`], with factors of the learning rate for parts of the buffers, in ascending order. A part whose factor
    /// is 0 stays as it is, moments included.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub fn update_by(
        &mut self,
        parameters: &mut [f32],
        gradients: &[f32],
        gradient_scale: f64,
        learning_rate: f64,
        rates: &[(Range<usize>, f64)],
    ) -> Result<()> {
        let (options, step) = (self.options, self.step + 1);
        self.update_at(&options, step, parameters, gradients, gradient_scale, learning_rate, rates)
    }

    /// As [`Self::update_by`], with settings and the number of the update from outside.
    ///
    /// # Errors
    /// As [`Self::update`].
    #[expect(clippy::too_many_arguments, reason = "all that an update depends on")]
    pub fn update_at(
        &mut self,
        options: &AdamWOptions,
        step: u64,
        parameters: &mut [f32],
        gradients: &[f32],
        gradient_scale: f64,
        learning_rate: f64,
        rates: &[(Range<usize>, f64)],
    ) -> Result<()> {
        expect_length("the parameter buffer", parameters.len(), self.first.len())?;
        expect_length("the gradient buffer", gradients.len(), self.first.len())?;
        self.step = step;
        let groups = groups(options, step, learning_rate, rates, parameters.len());
        let mut start = 0;
        for (end, factors) in groups {
            if let Some(factors) = factors {
                let range = start..end;
                let (first, second) = (&mut self.first[range.clone()], &mut self.second[range.clone()]);
                let scale = gradient_scale as f32;
                apply(&factors, scale, &mut parameters[range.clone()], &gradients[range], first, second);
            }
            start = end;
        }
        Ok(())
    }
}

/// The scalars of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    keep: f32,
    first: f32,
    beta2: f32,
    second: f32,
    root: f32,
    epsilon: f32,
    step: f32,
}

/// Ranges that share factors, to the end of `length` numbers: the first number behind each, ascending, and no factors where
/// numbers stay as they are. `rates` are factors of the learning rate for parts, in ascending order; 1 elsewhere.
pub fn groups(
    options: &AdamWOptions,
    step: u64,
    learning_rate: f64,
    rates: &[(Range<usize>, f64)],
    length: usize,
) -> Vec<(usize, Option<Factors>)> {
    let factors = |rate: f64| (rate != 0.0).then(|| Factors::new(options, step, learning_rate * rate));
    let mut groups = Vec::with_capacity(2 * rates.len() + 1);
    let mut done = 0;
    for (range, rate) in rates {
        if range.start > done {
            groups.push((range.start, factors(1.0)));
        }
        if !range.is_empty() {
            groups.push((range.end, factors(*rate)));
        }
        done = range.end.max(done);
    }
    if done < length {
        groups.push((length, factors(1.0)));
    }
    groups
}

/// Updates parameters and moments of one length by `gradients * scale`.
pub(super) fn apply(
    factors: &Factors,
    scale: f32,
    parameters: &mut [f32],
    gradients: &[f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    parameters
        .par_chunks_mut(CHUNK)
        .zip(gradients.par_chunks(CHUNK))
        .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)))
        .for_each(|((parameters, gradients), (first, second))| {
            factors.apply(scale, parameters, gradients, first, second);
        });
}

impl Factors {
    /// The scalars of update `step`, from 1.
    pub fn new(options: &AdamWOptions, step: u64, learning_rate: f64) -> Self {
        let [beta1, beta2] = options.betas;
        let t = i32::try_from(step).unwrap_or(i32::MAX);
        let step_size = learning_rate / (1.0 - beta1.powi(t));
        Self {
            keep: (1.0 - learning_rate * options.weight_decay) as f32,
            first: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            second: (1.0 - beta2) as f32,
            root: (1.0 - beta2.powi(t)).sqrt() as f32,
            epsilon: options.epsilon as f32,
            step: -step_size as f32,
        }
    }

    /// In the order in which a kernel takes them.
    pub(crate) fn as_array(&self) -> [f32; 7] {
        [self.keep, self.first, self.beta2, self.second, self.root, self.epsilon, self.step]
    }

    fn apply(
        &self,
        scale: f32,
        parameters: &mut [f32],
        gradients: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        // Slices of one known length: the loop needs no bounds checks and becomes vector instructions.
        let length = parameters.len();
        let (gradients, first, second) = (&gradients[..length], &mut first[..length], &mut second[..length]);
        for i in 0..length {
            let gradient = gradients[i] * scale;
            first[i] += self.first * (gradient - first[i]);
            second[i] = second[i] * self.beta2 + self.second * gradient * gradient;
            let denominator = second[i].sqrt() / self.root + self.epsilon;
            parameters[i] = parameters[i] * self.keep + self.step * first[i] / denominator;
        }
    }
}

fn expect_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { what, found, expected }) }
}
