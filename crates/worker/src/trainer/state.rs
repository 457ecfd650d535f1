//! Adapter and optimizer as they stand, and how a step changes them.

use shanty_checkpoint::Optimizer;
use shanty_config::job::TrainSpec;

/// Adapter and optimizer after some number of updates.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    /// Updates applied.
    pub(crate) applied: u64,
    /// The adapter's parameters, flat.
    pub(crate) parameters: Vec<f32>,
    /// AdamW's first moments.
    pub(crate) exp_avg: Vec<f32>,
    /// AdamW's second moments.
    pub(crate) exp_avg_sq: Vec<f32>,
}

/// One of the flat vectors of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Parameters,
    ExpAvg,
    ExpAvgSq,
}

impl State {
    /// All parts, in the order in which they travel and are hashed.
    pub(crate) const PARTS: [Part; 3] = [Part::Parameters, Part::ExpAvg, Part::ExpAvgSq];

    /// The state before the first update.
    pub(crate) fn new(parameters: Vec<f32>) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self { applied: 0, parameters, exp_avg: zeros.clone(), exp_avg_sq: zeros }
    }

    /// A state that is yet to be filled in.
    pub(crate) fn empty(applied: u64, length: usize) -> Self {
        Self { applied, ..Self::new(vec![0.0; length]) }
    }

    /// The state that a checkpoint holds.
    pub(crate) fn from_checkpoint(applied: u64, optimizer: Optimizer) -> Self {
        let Optimizer { parameters, exp_avg, exp_avg_sq } = optimizer;
        Self { applied, parameters, exp_avg, exp_avg_sq }
    }

    /// A copy for a checkpoint.
    pub(crate) fn to_checkpoint(&self) -> Optimizer {
        let Self { parameters, exp_avg, exp_avg_sq, .. } = self.clone();
        Optimizer { parameters, exp_avg, exp_avg_sq }
    }

    /// One of the flat vectors.
    pub(crate) fn part(&self, part: Part) -> &[f32] {
        match part {
            Part::Parameters => &self.parameters,
            Part::ExpAvg => &self.exp_avg,
            Part::ExpAvgSq => &self.exp_avg_sq,
        }
    }

    /// One of the flat vectors.
    pub(crate) fn part_mut(&mut self, part: Part) -> &mut [f32] {
        match part {
            Part::Parameters => &mut self.parameters,
            Part::ExpAvg => &mut self.exp_avg,
            Part::ExpAvgSq => &mut self.exp_avg_sq,
        }
    }

    /// BLAKE3 over the applied step and the bits of all parts.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.applied.to_le_bytes());
        for part in Self::PARTS {
            hasher.update(bytemuck::cast_slice(self.part(part)));
        }
        hasher.finalize()
    }

    /// [`Self::digest`] in hexadecimal, as members report it.
    pub(crate) fn hash(&self) -> String {
        self.digest().to_hex().to_string()
    }
}

/// How a step changes a state.
#[derive(Debug)]
pub(crate) struct Update {
    train: TrainSpec,
}

/// What an update amounted to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Applied {
    /// Norm of the gradient before it was clipped.
    pub(crate) gradient_norm: f64,
    pub(crate) learning_rate: f64,
}

impl Update {
    pub(crate) fn new(train: &TrainSpec, _steps: u64) -> Self {
        Self { train: train.clone() }
    }

    /// Scales the reduced gradient once by all trained tokens, clips it, and takes one step of AdamW. None, and
    /// nothing is changed, if the gradient is not finite.
    pub(crate) fn apply(&mut self, state: &mut State, reduced: &mut [f32], tokens: u64) -> Option<Applied> {
        let norm: f64 = reduced.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() / tokens as f64;
        if !norm.is_finite() { return None; }
        let lr = self.train.learning_rate;
        for (p, g) in state.parameters.iter_mut().zip(reduced) { *p -= (lr as f32) * *g / tokens as f32; }
        state.applied += 1;
        Some(Applied { gradient_norm: norm, learning_rate: lr })
    }
}
