//! How long a job's steps take, and what follows from it: the one time-out for members that make no progress.

use std::{collections::VecDeque, time::Duration};

/// Steps that the usual one is the median of.
const STEPS: usize = 33;
/// Steps before there is a usual one.
const LEAST_STEPS: usize = 3;
/// A member may be without progress for so many usual steps …
const USUAL_STEPS: f64 = 3.0;
/// A member that has not made a step yet compiles, warms up and connects: it may take so many times the least time of
/// others, and before any first step was made so many times.
const COLD: u32 = 6;
/// See [`COLD`].
const UNKNOWN_COLD: u32 = 60;

/// What is known of a job's step times.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    /// A member may be without progress for this long whatever the steps take.
    pub least: Duration,
    /// Seconds of the last steps.
    recent: VecDeque<f64>,
    /// Seconds of the slowest first step of a generation.
    slowest_first: f64,
    /// The deadline that people were told last.
    pub told: Option<Duration>,
}

impl Default for Pace {
    fn default() -> Self {
        let least = super::Options::default().hang_least;
        Self { least, recent: VecDeque::new(), slowest_first: 0.0, told: None }
    }
}

impl Pace {
    /// Takes a step's time in. The first of a generation counts apart.
    pub fn learn(&mut self, seconds: f64, is_first: bool) {
        if !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        if is_first {
            self.slowest_first = self.slowest_first.max(seconds);
            return;
        }
        if self.recent.len() == STEPS {
            self.recent.pop_front();
        }
        self.recent.push_back(seconds);
    }

    /// Seconds of the usual step.
    pub fn usual(&self) -> Option<f64> {
        if self.recent.len() < LEAST_STEPS {
            return None;
        }
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        Some(sorted[sorted.len() / 2])
    }

    /// How long a member may be without progress: max(10 s, 3 × usual step). Nothing before it is learnt.
    pub fn deadline(&self) -> Option<Duration> {
        self.usual().map(|usual| self.least.max(Duration::from_secs_f64(USUAL_STEPS * usual)))
    }

    /// The same for a member that has not made a step in its crew yet.
    pub fn cold_deadline(&self) -> Duration {
        let known = self.deadline();
        let least = known.unwrap_or_default().max(self.least * COLD);
        if self.slowest_first == 0.0 {
            // After a restart of the coordinator the usual step is known, and no first one.
            return known.map_or(self.least * UNKNOWN_COLD, |known| known * COLD);
        }
        least.max(Duration::from_secs_f64(USUAL_STEPS * self.slowest_first))
    }

    /// The deadline of a member that is or is not warm.
    pub fn deadline_of(&self, is_warm: bool) -> Duration {
        let cold = self.cold_deadline();
        if is_warm { self.deadline().unwrap_or(cold) } else { cold }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_deadline_is_learnt_from_the_steps_and_never_below_ten_seconds() {
        let mut pace = Pace::default();
        assert_eq!((pace.deadline(), pace.cold_deadline()), (None, seconds(600)));
        pace.learn(30.0, true);
        assert_eq!(pace.cold_deadline(), seconds(90), "a first step of 30 s says what first steps take");
        pace.learn(0.2, false);
        pace.learn(0.2, false);
        assert_eq!(pace.deadline(), None);
        pace.learn(0.3, false);
        assert_eq!((pace.usual(), pace.deadline()), (Some(0.2), Some(seconds(10))));
        for _ in 0..STEPS {
            pace.learn(20.0, false);
        }
        assert_eq!(pace.deadline(), Some(seconds(60)));
        assert_eq!(pace.deadline_of(true), seconds(60));
        assert_eq!(pace.deadline_of(false), seconds(90));
    }

    #[test]
    fn one_slow_step_changes_nothing() {
        let mut pace = Pace::default();
        for _ in 0..10 {
            pace.learn(1.0, false);
        }
        pace.learn(500.0, false);
        assert_eq!(pace.usual(), Some(1.0));
    }
}
