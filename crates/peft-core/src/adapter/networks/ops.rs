//! Operations of which candle knows the gradient.

use candle_core::{Result, Tensor};

/// `x Wᵀ + b`; x `[T, in]`, W `[out, in]`, b `[out]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// `1 / (1 + e^-x)` in a form that neither overflows nor gives NaN in its gradient.
pub(super) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (((x * 0.5)?.tanh()? + 1.0)? * 0.5)?.contiguous()
}
