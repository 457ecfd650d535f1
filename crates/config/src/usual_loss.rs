//! What a loss spike is measured by: `train.loss_spike` as arithmetic. Coordinator and workers share it.

/// Weight of the newest step in the mean: about the last 32 steps count.
const SMOOTHING: f64 = 1.0 / 16.0;
/// Before so many steps nothing is a spike: a job's first losses fall too fast to have a usual value.
const LEAST_STEPS: u64 = 16;

/// The usual loss of a job's steps. A pure function of the losses that it was told, in their order: ranks that were told
/// the same agree to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UsualLoss {
    /// Smoothed mean loss a trained token.
    pub mean: f64,
    /// Steps that it was learnt from.
    pub steps: u64,
}

impl UsualLoss {
    /// Takes a good step's loss in.
    pub fn learn(&mut self, loss: f64) {
        if !loss.is_finite() {
            return;
        }
        // A plain mean at first, so that the first step does not weigh for ever.
        let weight = (1.0 / (self.steps + 1) as f64).max(SMOOTHING);
        self.mean += weight * (loss - self.mean);
        self.steps += 1;
    }

    /// Whether a loss is above `factor` times the usual. Never with a factor of 0.
    pub fn is_spike(&self, loss: f64, factor: f64) -> bool {
        factor > 0.0 && self.steps >= LEAST_STEPS && self.mean > 0.0 && loss > factor * self.mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_told_from_the_usual_once_that_is_known() {
        let mut usual = UsualLoss::default();
        for step in 0..20 {
            assert_eq!(usual.is_spike(50.0, 3.0), step >= 16, "after {step} steps");
            usual.learn(2.0);
        }
        assert!((usual.mean - 2.0).abs() < 1e-12);
        assert!(!usual.is_spike(5.9, 3.0) && usual.is_spike(6.1, 3.0));
        assert!(!usual.is_spike(1e9, 0.0), "0 looks for none");
    }

    #[test]
    fn the_usual_follows_a_falling_loss() {
        let mut usual = UsualLoss::default();
        for step in 0..200 {
            usual.learn(10.0 / f64::from(1 + step));
        }
        assert!(usual.mean < 0.1, "{}", usual.mean);
        usual.learn(f64::NAN);
        assert!(usual.mean.is_finite());
    }
}
