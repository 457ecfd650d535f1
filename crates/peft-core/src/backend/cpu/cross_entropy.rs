//! Softmax cross-entropy by row, its gradient in place of the logits.

use super::{Cpu, math};
use crate::backend::ViewMut;

/// `loss = ln(sum of e^logit) - logit[target]`; the gradient of a row is `softmax - one_hot(target)`. A soft cap bounds the
/// logits first; its slope `1 - (logit / cap)²` multiplies the gradient.
pub(super) fn rows(
    cpu: &Cpu,
    targets: &[u32],
    gradient: bool,
    soft_cap: Option<f32>,
    logits: ViewMut<'_, Cpu>,
    losses: ViewMut<'_, Cpu>,
) {
    cpu.row_pairs(logits, losses, |row, logits, loss| {
        let target = targets[row] as usize;
        if let Some(cap) = soft_cap {
            math::soft_cap(logits, cap);
        }
        let largest = math::maximum(logits);
        let wanted = logits[target];
        if let (true, Some(cap)) = (gradient, soft_cap) {
            let sum = math::sum_of_exp(logits, largest);
            math::capped_cross_entropy_gradient(logits, largest, 1.0 / sum, cap);
            logits[target] -= 1.0 - (wanted / cap) * (wanted / cap);
            loss[0] = sum.ln() + (largest - wanted);
            return;
        }
        if gradient {
            let sum = math::exp_and_sum(logits, largest);
            math::scale(logits, 1.0 / sum);
            logits[target] -= 1.0;
            loss[0] = sum.ln() + (largest - wanted);
        } else {
            loss[0] = math::sum_of_exp(logits, largest).ln() + (largest - wanted);
        }
    });
}
