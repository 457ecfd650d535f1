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
        expect_length("the parameter buffer", parameters.len(), self.first.len())?;
        expect_length("the gradient buffer", gradients.len(), self.first.len())?;
        self.step += 1;
        let [beta1, beta2] = self.options.betas;
        let t = i32::try_from(self.step).unwrap_or(i32::MAX);
        let root = (1.0 - beta2.powi(t)).sqrt() as f32;
        let factors = |learning_rate: f64| Factors {
            gradient: gradient_scale as f32,
            keep: (1.0 - learning_rate * self.options.weight_decay) as f32,
            first: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            second: (1.0 - beta2) as f32,
            root,
            epsilon: self.options.epsilon as f32,
            step: -(learning_rate / (1.0 - beta1.powi(t))) as f32,
        };
        let mut update = |range: Range<usize>, factor: f64| {
            if factor == 0.0 || range.is_empty() {
                return;
            }
            let factors = factors(learning_rate * factor);
            let (first, second) = (&mut self.first[range.clone()], &mut self.second[range.clone()]);
            parameters[range.clone()]
                .par_chunks_mut(CHUNK)
                .zip(gradients[range].par_chunks(CHUNK))
                .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)))
                .for_each(|((parameters, gradients), (first, second))| {
                    factors.apply(parameters, gradients, first, second);
                });
        };
        let mut done = 0;
        for (range, factor) in rates {
            update(done..range.start.max(done), 1.0);
            update(range.clone(), *factor);
            done = range.end;
        }
        update(done..gradients.len(), 1.0);
        Ok(())
    }
}

/// The scalars of one update.
struct Factors {
    gradient: f32,
    keep: f32,
    first: f32,
    beta2: f32,
    second: f32,
    root: f32,
    epsilon: f32,
    step: f32,
}

impl Factors {
    fn apply(&self, parameters: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32]) {
        // Slices of one known length: the loop needs no bounds checks and becomes vector instructions.
        let length = parameters.len();
        let (gradients, first, second) = (&gradients[..length], &mut first[..length], &mut second[..length]);
        for i in 0..length {
            let gradient = gradients[i] * self.gradient;
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
