//! Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467).
//!
//! `y = x r w` with `r = 1 / sqrt(mean(x²) + ε)`, one r a row. The backward pass needs x and r:
//! `dx += r w dy - x r³ mean(x w dy)`. The weight is frozen; it gets no gradient.

use crate::backend::{Backend, View, ViewMut};

/// A frozen norm.
pub struct RmsNorm<'a, B: Backend> {
    /// w, `[1, features]`.
    pub weight: View<'a, B>,
    /// ε.
    pub epsilon: f32,
}

impl<B: Backend> RmsNorm<'_, B> {
    /// Writes y `[T, features]` and r `[T, 1]`.
    pub fn forward(&self, backend: &B, x: View<'_, B>, y: ViewMut<'_, B>, reciprocal: ViewMut<'_, B>) {
        backend.rms_norm(x, self.weight, self.epsilon, y, reciprocal);
    }

    /// Adds to `dx` `[T, features]`.
    pub fn backward(
        &self,
        backend: &B,
        dy: View<'_, B>,
        x: View<'_, B>,
        reciprocal: View<'_, B>,
        dx: ViewMut<'_, B>,
    ) {
        backend.rms_norm_backward(dy, x, self.weight, reciprocal, dx);
    }
}
