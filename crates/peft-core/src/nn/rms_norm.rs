//! Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467).
//!
//! `y = x r w` with `r = 1 / sqrt(mean(x²) + ε)`, one r a row. The backward pass needs x and r:
//! `dx += r w dy - x r³ mean(x w dy)`; where the weight is trained, `dw += sum over rows of dy x r`.

use crate::{
    backend::{Backend, View, ViewMut},
    plan::Output,
};

/// A norm.
pub struct RmsNorm<'a, B: Backend> {
    /// w, `[1, features]`.
    pub weight: View<'a, B>,
    /// ε.
    pub epsilon: f32,
    /// Where the gradient of w lies in the flat gradient, where w is trained.
    pub trained: Option<usize>,
}

impl<B: Backend> RmsNorm<'_, B> {
    /// Whether w is trained.
    pub fn is_trained(&self) -> bool {
        self.trained.is_some()
    }

    /// Writes y `[T, features]` and r `[T, 1]`.
    pub fn forward(&self, backend: &B, x: View<'_, B>, y: ViewMut<'_, B>, reciprocal: ViewMut<'_, B>) {
        backend.rms_norm(x, self.weight, self.epsilon, y, reciprocal);
    }

    /// `sum += y` with `x` of `output`, whose factors are kept there; y is made in `normed`. `sum` `[T, features]`.
    pub fn add(&self, backend: &B, output: &mut Output<B>, normed: &mut B::Buffer, sum: ViewMut<'_, B>) {
        let (tokens, features) = (sum.rows, sum.columns);
        let y = ViewMut::<B>::new(&mut *normed, tokens, features);
        let x = View::<B>::new(&output.x, tokens, features);
        self.forward(backend, x, y, ViewMut::<B>::new(&mut output.norm, tokens, 1));
        backend.add(View::<B>::new(normed, tokens, features), sum);
    }

    /// Writes the gradient of `output.x` to `dx`, given that of the sum of [`RmsNorm::add`].
    pub fn add_backward(
        &self,
        backend: &B,
        dsum: View<'_, B>,
        output: &Output<B>,
        dx: &mut B::Buffer,
        flat: &mut B::Buffer,
    ) {
        let mut dx = ViewMut::<B>::new(dx, dsum.rows, dsum.columns);
        backend.fill(0.0, dx.reborrow());
        let x = View::<B>::new(&output.x, dsum.rows, dsum.columns);
        self.backward(backend, dsum, x, View::<B>::new(&output.norm, dsum.rows, 1), dx, flat);
    }

    /// Adds to `dx` `[T, features]`, and to `flat` where w is trained.
    pub fn backward(
        &self,
        backend: &B,
        dy: View<'_, B>,
        x: View<'_, B>,
        reciprocal: View<'_, B>,
        dx: ViewMut<'_, B>,
        flat: &mut B::Buffer,
    ) {
        if let Some(at) = self.trained {
            let dweight = ViewMut::<B>::at(flat, at, 1, self.weight.columns);
            backend.rms_norm_weight_backward(dy, x, reciprocal, dweight);
        }
        backend.rms_norm_backward(dy, x, self.weight, reciprocal, dx);
    }
}
