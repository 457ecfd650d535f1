//! Softmax cross-entropy by row, its gradient in place of the logits.

use super::{Cpu, math};
use crate::backend::ViewMut;

/// `loss = ln(sum of e^logit) - logit[target]`; the gradient of a row is `softmax - one_hot(target)`.
pub(super) fn rows(
    cpu: &Cpu,
    targets: &[u32],
    gradient: bool,
    logits: ViewMut<'_, Cpu>,
    losses: ViewMut<'_, Cpu>,
) {
    cpu.row_pairs(logits, losses, |row, logits, loss| {
        let target = targets[row] as usize;
        let largest = math::maximum(logits);
        let wanted = logits[target];
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
