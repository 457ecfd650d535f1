//! What is read of a base's files: hashed, counted, and the small parts of it made ready.

use crate::{
    error::Result,
    model::{
        LoadProgress, ModelConfig, Norm,
        resident::{
            Hashes,
            plan::{BasePlan, LayerPlan},
        },
        weights::Tensor,
    },
};

/// Hashes and counts what is read.
pub(super) struct Meter<'a> {
    pub hashes: Hashes,
    progress: &'a mut dyn FnMut(LoadProgress),
    done_bytes: u64,
    total_bytes: u64,
}

impl<'a> Meter<'a> {
    pub fn new(plan: &BasePlan<'_>, progress: &'a mut dyn FnMut(LoadProgress)) -> Self {
        let total_bytes = plan.tensors().iter().map(|tensor| tensor.bytes() as u64).sum();
        Self { hashes: Hashes::default(), progress, done_bytes: 0, total_bytes }
    }

    pub fn count(&mut self, bytes: usize) {
        self.done_bytes += bytes as u64;
        (self.progress)(LoadProgress { done_bytes: self.done_bytes, total_bytes: self.total_bytes });
    }

    pub fn numbers(&mut self, tensor: &Tensor<'_>) -> Result<Vec<f32>> {
        let mut numbers = vec![0.0; tensor.elements()];
        tensor.read_f32(&mut numbers, &mut |bytes| {
            self.hashes.see(tensor, bytes);
            self.count(bytes.len());
        })?;
        Ok(numbers)
    }

    pub fn norm(&mut self, tensor: &Tensor<'_>, less_one: bool) -> Result<Vec<f32>> {
        let mut numbers = self.numbers(tensor)?;
        if less_one {
            numbers.iter_mut().for_each(|number| *number += 1.0);
        }
        Ok(numbers)
    }
}

/// A layer's norms and biases.
pub(super) struct Vectors {
    pub norms: [Vec<f32>; Norm::ALL.len()],
    pub biases: Vec<Option<Vec<f32>>>,
}

impl Vectors {
    pub fn read(plan: &LayerPlan<'_>, config: &ModelConfig, meter: &mut Meter<'_>) -> Result<Self> {
        let mut norms = <[Vec<f32>; Norm::ALL.len()]>::default();
        for (norm, tensor) in &plan.norms {
            norms[norm.index()] = meter.norm(tensor, config.norms_less_one)?;
        }
        let biases = plan.biases.iter().map(|bias| bias.as_ref().map(|bias| meter.numbers(bias)).transpose());
        Ok(Self { norms, biases: biases.collect::<Result<_>>()? })
    }

    pub fn all(&self) -> impl Iterator<Item = &[f32]> {
        let norms = self.norms.iter().filter(|norm| !norm.is_empty());
        norms.chain(self.biases.iter().flatten()).map(Vec::as_slice)
    }
}
