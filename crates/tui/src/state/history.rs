//! Steps for the charts: all of a short run, fewer of a long one, never more than a bound.

use std::collections::VecDeque;

use shanty_proto::v1::StepRecord;

/// Points that are kept.
const MOST: usize = 4096;

/// Steps in order.
#[derive(Debug, Clone, Default)]
pub struct History {
    steps: VecDeque<StepRecord>,
}

impl History {
    /// Steps in order.
    pub fn steps(&self) -> impl DoubleEndedIterator<Item = &StepRecord> + ExactSizeIterator {
        self.steps.iter()
    }

    /// The newest.
    pub fn last(&self) -> Option<&StepRecord> {
        self.steps.back()
    }

    /// Takes what was before; steps that came since stay.
    pub fn restore(&mut self, mut before: Vec<StepRecord>) {
        let since = std::mem::take(&mut self.steps);
        before.sort_by_key(|step| step.step);
        self.steps = before.into();
        for step in since {
            if self.last().is_none_or(|last| (step.attempt, step.generation, step.step) > key(last)) {
                self.push(step);
            }
        }
        self.thin_out();
    }

    /// Takes a step. One that is not after the newest replaces it and what came after: the job went back.
    pub fn push(&mut self, step: StepRecord) {
        while self.last().is_some_and(|last| last.step >= step.step) {
            // The very same step again, or an older generation's late word, changes nothing.
            if self.last().is_some_and(|last| key(last) >= key(&step)) {
                return;
            }
            self.steps.pop_back();
        }
        self.steps.push_back(step);
        self.thin_out();
    }

    /// Of all but the newest quarter only every so many-th step stays, evenly over the whole run.
    fn thin_out(&mut self) {
        if self.steps.len() <= MOST {
            return;
        }
        let old = self.steps.len() - MOST / 4;
        let mut stride = 2;
        while self.steps.iter().take(old).filter(|step| step.step.is_multiple_of(stride)).count() > MOST / 2 {
            stride *= 2;
        }
        let mut place = 0;
        self.steps.retain(|step| {
            place += 1;
            place > old || step.step.is_multiple_of(stride)
        });
    }
}

fn key(step: &StepRecord) -> (u32, u64, u64) {
    (step.attempt, step.generation, step.step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(generation: u64, step: u64) -> StepRecord {
        StepRecord { step, generation, attempt: 1, ..StepRecord::default() }
    }

    fn numbers(history: &History) -> Vec<u64> {
        history.steps().map(|step| step.step).collect()
    }

    #[test]
    fn a_job_that_goes_back_takes_its_curve_along() {
        let mut history = History::default();
        for number in 1..=5 {
            history.push(step(1, number));
        }
        history.push(step(1, 3));
        assert_eq!(numbers(&history), [1, 2, 3, 4, 5], "a step that is told twice is one step");
        history.push(step(2, 4));
        assert_eq!(numbers(&history), [1, 2, 3, 4]);
        assert_eq!(history.last().map(|step| step.generation), Some(2));
    }

    #[test]
    fn steps_that_came_while_the_past_was_fetched_stay() {
        let mut history = History::default();
        history.push(step(1, 6));
        history.restore((1..=5).map(|number| step(1, number)).collect());
        assert_eq!(numbers(&history), [1, 2, 3, 4, 5, 6]);
        history.restore((1..=6).map(|number| step(1, number)).collect());
        assert_eq!(numbers(&history), [1, 2, 3, 4, 5, 6], "nothing is doubled");
    }

    #[test]
    fn a_long_run_is_thinned_out_where_it_is_old() {
        let mut history = History::default();
        for number in 1..=100_000 {
            history.push(step(1, number));
        }
        let kept = numbers(&history);
        assert!(kept.len() <= MOST && kept.len() > MOST / 2, "{} kept", kept.len());
        assert!(kept.is_sorted());
        assert_eq!(&kept[kept.len() - 3..], [99_998, 99_999, 100_000]);
        assert!(kept[0] < 10_000, "the beginning is still there: {}", kept[0]);
    }
}
