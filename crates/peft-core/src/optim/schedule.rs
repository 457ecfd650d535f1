//! Learning-rate schedules, as transformers defines them.

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// It stays.
    Constant,
    /// To 0 in a line.
    Linear,
    /// To 0 along half a cosine.
    Cosine,
}

/// A schedule over all updates of a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The learning rate behind the warm-up.
    pub peak: f64,
    /// How it falls.
    pub shape: Shape,
    /// Updates over which it rises from 0.
    pub warmup_steps: u64,
    /// All updates, warm-up included.
    pub total_steps: u64,
}

impl Schedule {
    /// The learning rate of an update, counted from 0. With a warm-up, update 0 has rate 0, as in transformers.
    pub fn learning_rate(&self, update: u64) -> f64 {
        self.peak * self.factor(update)
    }

    fn factor(&self, update: u64) -> f64 {
        if update < self.warmup_steps {
            return update as f64 / self.warmup_steps.max(1) as f64;
        }
        let falling = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => self.total_steps.saturating_sub(update) as f64 / falling,
            Shape::Cosine => {
                // Behind the last update it stays at 0, where the formula alone would rise again.
                let progress = ((update - self.warmup_steps) as f64 / falling).min(1.0);
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(shape: Shape, warmup_steps: u64, total_steps: u64) -> Vec<f64> {
        let schedule = Schedule { peak: 2.0, shape, warmup_steps, total_steps };
        (0..=total_steps).map(|update| schedule.learning_rate(update)).collect()
    }

    /// By the formulas of `transformers/optimization.py`, worked out by hand.
    #[test]
    fn shapes_are_those_of_transformers() {
        assert_eq!(rates(Shape::Constant, 2, 4), [0.0, 1.0, 2.0, 2.0, 2.0]);
        assert_eq!(rates(Shape::Linear, 2, 6), [0.0, 1.0, 2.0, 1.5, 1.0, 0.5, 0.0]);
        assert_eq!(rates(Shape::Linear, 0, 2), [2.0, 1.0, 0.0]);
        let cosine = rates(Shape::Cosine, 1, 5);
        for (found, expected) in
            cosine.iter().zip([0.0, 2.0, 1.0 + 0.5_f64.sqrt(), 1.0, 1.0 - 0.5_f64.sqrt(), 0.0])
        {
            assert!((found - expected).abs() < 1e-15, "{cosine:?}");
        }
    }

    #[test]
    fn edges_divide_by_nothing() {
        for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
            for (warmup, total) in [(0, 0), (0, 1), (5, 5), (9, 5), (1, 1)] {
                let schedule = Schedule { peak: 1.0, shape, warmup_steps: warmup, total_steps: total };
                for update in [0, 1, total, total + 3, warmup, warmup + 1] {
                    let rate = schedule.learning_rate(update);
                    assert!((0.0..=1.0).contains(&rate), "{schedule:?} at {update}: {rate}");
                }
            }
        }
    }
}
