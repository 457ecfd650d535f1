//! Rotary position embedding (Su et al., arXiv 2104.09864), in the form of Hugging Face's Llama.
//!
//! Feature i of the first half of a head and feature i of the second half form a pair, which is turned by
//! `position * frequency[i]`. The backward pass turns back. Frequencies come from the model's configuration.

use crate::{
    backend::{Backend, Use, View, ViewMut},
    error::Result,
    model::ModelConfig,
};

/// Cosines and sines of every position.
pub struct RopeTable<B: Backend> {
    data: B::Owned,
    positions: usize,
    head_dim: usize,
}

impl<B: Backend> RopeTable<B> {
    /// A table for positions below `positions`.
    ///
    /// # Errors
    /// When its memory cannot be had.
    pub fn new(backend: &B, config: &ModelConfig, positions: usize) -> Result<Self> {
        let head_dim = config.head_dim;
        let frequencies = config.rope.inverse_frequencies(head_dim, positions);
        let factor = config.rope.attention_factor();
        let mut table = Vec::with_capacity(positions * head_dim);
        for position in 0..positions {
            // Angles are f32 products, as in the reference; their cosines are rounded from f64.
            let angle = |frequency: &f32| f64::from(position as f32 * frequency);
            table.extend(frequencies.iter().map(|frequency| (angle(frequency).cos() * factor) as f32));
            table.extend(frequencies.iter().map(|frequency| (angle(frequency).sin() * factor) as f32));
        }
        let mut data = backend.allocate(table.len(), Use::Exact)?;
        backend.upload(&table, &mut data);
        Ok(Self { data, positions, head_dim })
    }

    /// Numbers in a table for `positions` positions.
    pub fn length(config: &ModelConfig, positions: usize) -> usize {
        positions * config.head_dim
    }

    /// Positions it serves.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Turns every head of x `[T, heads * head_dim]` in place.
    pub fn forward(&self, backend: &B, batch: &B::Batch, x: ViewMut<'_, B>) {
        backend.rope(batch, self.head_dim, self.view(), false, x);
    }

    /// Turns the gradient back in place.
    pub fn backward(&self, backend: &B, batch: &B::Batch, dx: ViewMut<'_, B>) {
        backend.rope(batch, self.head_dim, self.view(), true, dx);
    }

    fn view(&self) -> View<'_, B> {
        View::<B>::new(&self.data, self.positions, self.head_dim)
    }
}
